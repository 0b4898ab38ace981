"""The project as a whole: notebooks clean and exported, tags, README, pins, and a wheel that imports without the development extras."""
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import check
from readme import readme, relink

needs_nbdev = pytest.mark.skipif(not (check.BIN/"nbdev_clean").exists(), reason="nbdev is not installed beside this Python")
DEV = ["nbdev", "execnb", "jupyterlab", "papermill", "pytest", "hypothesis", "jaxtyping", "beartype", "sklearn", "nbconvert", "nbclient",
       "nbformat", "ipywidgets", "ipykernel", "IPython", "faiss"]


@pytest.mark.parametrize("name", list(check.CHECKS))
@needs_nbdev
def test_checks_of_the_project(name):
    assert check.CHECKS[name](ROOT) == []


def code(source, **meta):
    return dict(cell_type="code", execution_count=None, id="c" + str(abs(hash(source)))[:7], metadata=meta, outputs=[], source=source)


def notebook(path, *cells, **meta):
    meta = meta or dict(kernelspec=dict(display_name="python3", language="python", name="python3"))
    path.write_text(json.dumps(dict(cells=list(cells), metadata=meta, nbformat=4, nbformat_minor=5), indent=1) + "\n")


@pytest.fixture
def small(tmp_path):
    "A project of one module and one experiment that passes every check."
    shutil.copy(ROOT/"settings.ini", tmp_path)
    (tmp_path/"nbs").mkdir()
    (tmp_path/"protoquant").mkdir()
    notebook(tmp_path/"nbs"/"00_core.ipynb", code("#| default_exp core"), code("#| export\nx = 1"))
    notebook(tmp_path/"nbs"/"run_cub.ipynb", code("seed = 40", tags=["parameters"]))
    notebook(tmp_path/"nbs"/"index.ipynb", dict(cell_type="markdown", id="m0", metadata={}, source="# title"))
    for command in ("nbdev_clean", "nbdev_export"):
        subprocess.run([str(check.BIN/command)], cwd=tmp_path, check=True, capture_output=True)
    (tmp_path/"README.md").write_text(readme(tmp_path))
    return tmp_path


@needs_nbdev
def test_a_proper_project_passes_and_cleaning_keeps_the_tag(small):
    assert check.run_checks(small) == 0
    assert json.loads((small/"nbs"/"run_cub.ipynb").read_text())["cells"][0]["metadata"] == {"tags": ["parameters"]}


@needs_nbdev
def test_an_unclean_notebook_is_found(small):
    nb = json.loads((small/"nbs"/"00_core.ipynb").read_text())
    nb["cells"][1]["execution_count"] = 7
    (small/"nbs"/"00_core.ipynb").write_text(json.dumps(nb, indent=1))
    assert "00_core.ipynb is not clean" in check.check_clean(small)[0]


@needs_nbdev
def test_a_module_edited_by_hand_is_found(small):
    (small/"protoquant"/"core.py").write_text("x = 2\n")
    assert "core.py is not what its notebook exports" in check.check_export(small)[0]


@needs_nbdev
def test_a_notebook_that_was_not_exported_is_found(small):
    notebook(small/"nbs"/"01_new.ipynb", code("#| default_exp new"), code("#| export\ny = 1"))
    assert any("new.py" in f for f in check.check_export(small))


def test_a_lost_tag_is_found(small):
    notebook(small/"nbs"/"run_cub.ipynb", code("seed = 40"))
    assert "has 0 cells tagged" in check.check_tags(small)[0]


def test_settings_that_would_lose_the_tag_are_found(small):
    p = small/"settings.ini"
    p.write_text(re.sub(r"(?m)^allowed_cell_metadata_keys.*$", "allowed_cell_metadata_keys =", p.read_text()))
    assert "allowed_cell_metadata_keys" in check.check_tags(small)[0]


def test_a_readme_out_of_step_and_a_dead_link_are_found(small):
    (small/"README.md").write_text("edited by hand")
    assert "make readme" in check.check_readme(small)[0]
    notebook(small/"nbs"/"index.ipynb", dict(cell_type="markdown", id="m0", metadata={}, source="![a](../paper_figures/none.png)"))
    (small/"README.md").write_text(readme(small))
    assert check.check_readme(small) == ["README.md links to paper_figures/none.png, which is not there"]


def test_a_path_of_this_machine_is_found(small):
    notebook(small/"nbs"/"01_data.ipynb", code(f"open('{small}/x')"))
    assert "01_data.ipynb names a folder of this machine" in check.check_paths(small)[0]


def test_readme_drops_hidden_cells_and_directives(small):
    out = dict(output_type="stream", name="stderr", text="a warning")
    res = dict(output_type="execute_result", execution_count=None, metadata={}, data={"text/plain": "3", "text/html": "<b>3</b>"})
    shown = code("#| eval: false\n1 + 2")
    shown["outputs"] = [out, res]
    notebook(small/"nbs"/"index.ipynb", code("#| hide\nsecret = 1"), shown)
    text = readme(small)
    assert "secret" not in text and "#|" not in text and "a warning" not in text and "<b>" not in text
    assert "```python\n1 + 2\n```" in text and "    3" in text


def test_links_are_turned_to_the_root():
    assert relink("![x](../paper_figures/a.png) [b](run_cub.ipynb) [c](https://x.org/a.ipynb)") == \
        "![x](paper_figures/a.png) [b](nbs/run_cub.ipynb) [c](https://x.org/a.ipynb)"


def test_settings():
    text = (ROOT/"settings.ini").read_text()
    assert re.search(r"(?m)^allowed_cell_metadata_keys\s*=\s*tags\s*$", text)
    assert re.search(r"(?m)^update_pyproject\s*=\s*False\s*$", text)


def test_pins_are_exact_and_name_no_place():
    for line in (ROOT/"constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ; [^#@]+)?", line), line
    for name in ("constraints.txt", "pyproject.toml"):
        text = (ROOT/name).read_text()
        assert "+cpu" not in text and "index-url" not in text and "file:" not in text


@pytest.mark.parametrize("minor", [10, 11, 12])
def test_one_pin_for_every_requirement(minor):
    from packaging.requirements import Requirement
    tomllib = pytest.importorskip("tomllib")
    env = dict(python_version=f"3.{minor}", python_full_version=f"3.{minor}.7", sys_platform="linux", platform_machine="x86_64",
               os_name="posix", implementation_name="cpython", platform_system="Linux", platform_python_implementation="CPython", extra="")
    pins = {}
    for line in (ROOT/"constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            r = Requirement(line)
            if r.marker is None or r.marker.evaluate(env):
                pins.setdefault(r.name.lower().replace("_", "-"), []).append(r)
    assert {k: v for k, v in pins.items() if len(v) > 1} == {}
    project = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]
    for req in [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]:
        r = Requirement(req)
        if r.name != "protoquant":
            pin = pins[r.name.lower().replace("_", "-")][0]
            assert next(iter(pin.specifier)).version in r.specifier, (req, str(pin))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "The wheel, built from a copy of the tree and unpacked by pip into an empty folder."
    tmp = tmp_path_factory.mktemp("wheel")
    (tmp/"src").mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT/name, tmp/"src")
    shutil.copytree(ROOT/"protoquant", tmp/"src"/"protoquant", ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(tmp/"dist"), str(tmp/"src")], check=True)
    wheel, = (tmp/"dist").glob("protoquant-*-py3-none-any.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", str(tmp/"site"), str(wheel)], check=True)
    return tmp/"site"


def test_the_wheel_holds_the_package_and_nothing_else(installed):
    names = {p.name for p in installed.iterdir() if p.name not in ("bin", "__pycache__")}
    assert {n for n in names if not n.endswith(".dist-info")} == {"protoquant"}
    assert (installed/"protoquant"/"paper_values.csv").exists()
    assert {p.name for p in (ROOT/"protoquant").glob("*.mplstyle")} == {p.name for p in (installed/"protoquant").glob("*.mplstyle")}
    assert list(installed.glob("protoquant-*.dist-info/licenses/LICENSE"))
    assert "License-Expression: Apache-2.0" in next(installed.glob("protoquant-*.dist-info/METADATA")).read_text()


BLOCKED = """
import importlib, pkgutil, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {dev!r}: raise ImportError(name + ' belongs to the development extras')
sys.meta_path.insert(0, Block())
import protoquant
assert protoquant.__file__.startswith({site!r}), protoquant.__file__
for m in pkgutil.iter_modules(protoquant.__path__):
    if not m.name.startswith('_'): importlib.import_module('protoquant.' + m.name)
from protoquant.results import paper_values
assert len(paper_values()) > 200
from protoquant.cli import main
assert main(['results', '--folder', 'none']) == 1
print('imported')
"""


def test_the_wheel_imports_without_the_development_extras(installed, tmp_path):
    script = BLOCKED.format(dev=DEV, site=str(installed))
    r = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=dict(PYTHONPATH=str(installed), PATH="", HOME=str(tmp_path)),
                       capture_output=True, text=True)
    assert r.returncode == 0 and "imported" in r.stdout, r.stderr[-2000:]


def test_running_an_experiment_without_papermill_names_the_extra(tmp_path, monkeypatch, capsys):
    from protoquant import cli
    (tmp_path/"nbs").mkdir()
    (tmp_path/"settings.ini").touch()
    notebook(tmp_path/"nbs"/"run_cub.ipynb", code("seed = 40", tags=["parameters"]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "papermill", None)
    assert cli.main(["run", "cub"]) == 2
    assert "protoquant[run]" in capsys.readouterr().err


def test_make_help_names_every_target():
    if not shutil.which("make"): pytest.skip("make is not installed")
    r = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True)
    for target in ("demo", "test", "bench", "lab", "readme", "clean-notebooks"):
        assert re.search(rf"(?m)^  {target} ", r.stdout), target


def test_make_without_python_is_one_line():
    if not shutil.which("make"): pytest.skip("make is not installed")
    r = subprocess.run(["make", "-s", "setup", "PYTHON=no-such-python"], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode != 0 and r.stderr.startswith("set-up: Python 3.10, 3.11 or 3.12 is needed")
