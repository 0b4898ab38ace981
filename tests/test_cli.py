"""protoquant on the command line, on a clone of one tiny experiment."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from protoquant import cli
from protoquant.core import ConfigError

pm = pytest.importorskip("papermill")
nbformat = pytest.importorskip("nbformat")

CELLS = ["from protoquant.results import Run, take_parameters\nparams = take_parameters(globals())",
         "run = Run.start('tiny', params, data='d', weights='w', output_dir=output_dir)",
         "import sys; print('halfway there', file=sys.stderr)",
         "if codebook_size < 1: raise ValueError('codebook_size must be at least 1')",
         "if not run.done: run.finish(dict(top1=codebook_size / 10, codes=codebook_size), dict(train=3, test=3))",
         "run.record['metrics']"]


@pytest.fixture
def clone(tmp_path, monkeypatch):
    (tmp_path/"nbs").mkdir()
    (tmp_path/"protoquant").mkdir()
    (tmp_path/"settings.ini").touch()
    first = nbformat.v4.new_code_cell("dataset = 'toybirds'  # name in the registry\ncodebook_size = 500  # M\nseed = 40\noutput_dir = 'results'",
                                      metadata=dict(tags=["parameters"]))
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, CELLS)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, tmp_path/"nbs"/"run_tiny.ipynb")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runs(clone):
    return sorted((clone/"results"/"tiny").glob("*/run.json"))


def test_run_leaves_notebook_record_and_table(clone, capsys):
    assert cli.main(["run", "tiny", "-p", "codebook_size", "120", "--output", "copy/x.ipynb"]) == 0
    said = capsys.readouterr()
    record, = runs(clone)
    assert json.loads(record.read_text())["metrics"] == dict(top1=12.0, codes=120)
    assert (record.parent/"executed.ipynb").exists() and (clone/"copy"/"x.ipynb").exists()
    assert sorted(p.name for p in (clone/"results"/"tiny").iterdir()) == [record.parent.name]   # nothing temporary is left
    assert "| ProtoQuant" in said.out and "12.0" in said.out and "executed notebook:" in said.out and str(clone) not in said.out
    assert "Executing" in said.err and "halfway there" in said.err   # papermill's bar, and what the notebook says
    before = (record.read_text(), (record.parent/"executed.ipynb").stat().st_mtime_ns)
    assert cli.main(["run", "tiny", "-p", "codebook_size", "120", "--quiet"]) == 0
    assert "--force runs it again" in capsys.readouterr().out
    assert before == (record.read_text(), (record.parent/"executed.ipynb").stat().st_mtime_ns)
    assert cli.main(["run", "tiny", "-p", "codebook_size", "120", "--quiet", "--force"]) == 0
    assert len(runs(clone)) == 1 and "done in" in capsys.readouterr().out


def test_a_failing_cell_is_told_in_short(clone, capsys):
    assert cli.main(["run", "tiny", "-p", "codebook_size", "0", "--quiet"]) == 1
    err = capsys.readouterr().err
    assert "ValueError: codebook_size must be at least 1" in err and "Traceback" not in err
    kept, = (clone/"results"/"tiny").glob("failed-*.ipynb")
    assert kept.name in err and not runs(clone)
    assert "codebook_size must be at least 1" in kept.read_text()


@pytest.mark.parametrize("args,says", [
    (["run", "tinny"], "Did you mean tiny"), (["run", "tiny", "-p", "codebok_size", "9"], "Did you mean codebook_size"),
    (["run", "tiny", "-p", "codebook_size", "many"], "int is needed"), (["run", "tiny", "-p", "codebook_size", "1.5"], "int is needed")])
def test_mistakes_are_told_before_anything_runs(clone, capsys, args, says):
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (clone/"results").exists()


def test_experiments_are_found_from_below_and_by_file_name(clone, monkeypatch):
    monkeypatch.chdir(clone/"nbs")
    for name in ("tiny", "run_tiny", "nbs/run_tiny.ipynb"): assert cli.find_experiment(name).name == "run_tiny.ipynb"


def test_outside_a_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(cli, "__file__", str(tmp_path/"site-packages"/"protoquant"/"cli.py"))
    with pytest.raises(ConfigError, match="need a clone"): cli.find_nbs(tmp_path)


def test_parameters_are_listed(clone, capsys):
    assert cli.main(["run", "tiny", "--list-parameters"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].split("#")[0].split() == ["dataset", "'toybirds'"] and "name in the registry" in out[0] and len(out) == 4


def test_a_notebook_without_the_tag(clone, capsys):
    nb = nbformat.read(clone/"nbs"/"run_tiny.ipynb", 4)
    nb.cells[0].metadata = {}
    nbformat.write(nb, clone/"nbs"/"run_tiny.ipynb")
    assert cli.main(["run", "tiny"]) == 2 and "no cell tagged 'parameters'" in capsys.readouterr().err


def test_a_notebook_that_records_nothing(clone, capsys):
    nb = nbformat.read(clone/"nbs"/"run_tiny.ipynb", 4)
    nb.cells = nb.cells[:1]
    nbformat.write(nb, clone/"nbs"/"run_tiny.ipynb")
    assert cli.main(["run", "tiny", "--quiet"]) == 1 and "without a complete record" in capsys.readouterr().err


@pytest.mark.parametrize("text,default,value", [("18", "resnet50", "18"), ("4000", 500, 4000), ("1", .05, 1.), ("1e-3", .05, 1e-3), ("no", True, False),
                                                ("None", "cub", None), ("x", None, "x"), ("[1, 2]", [0], [1, 2]), ("-1", 5, -1)])
def test_values_are_read_as_their_default(text, default, value):
    got = cli.read_value(text, default)
    assert got == value and type(got) is type(value)


def record(folder, key, **kw):
    from protoquant.results import SCHEMA
    r = dict(schema=SCHEMA, experiment="cub", key=key, parameters=dict(recipe="paper", codebook_size=500, seed=40), seed=40, metrics=dict(top1=70.),
             n_images=dict(train=1), crop="", scale="smoke", hardware="h", seconds=1., date="d", git=dict(commit=None, dirty=None), figures=[])
    (folder/"cub"/key).mkdir(parents=True)
    (folder/"cub"/key/"run.json").write_text(json.dumps({**r, **kw}))


def test_results(tmp_path, capsys):
    record(tmp_path, "a")
    record(tmp_path, "b", parameters=dict(recipe="paper", codebook_size=500, seed=41), metrics=dict(top1=72.))
    for fmt, line in (("markdown", "| cub "), ("csv", "cub,paper,500,smoke,2,"), ("plain", "cub")):
        assert cli.main(["results", "--folder", str(tmp_path), "--format", fmt]) == 0
        out = capsys.readouterr().out
        assert line in out and "71.0 ± 1.4" in out
    assert cli.main(["results", "--folder", str(tmp_path), "--by", "recipe,seed", "--metrics", "top1"]) == 0
    assert capsys.readouterr().out.count("\n") == 4
    assert cli.main(["results", "--folder", str(tmp_path), "--by", "recip"]) == 2
    assert "Did you mean recipe" in capsys.readouterr().err
    assert cli.main(["results", "--folder", str(tmp_path/"none")]) == 1
    assert "no complete run" in capsys.readouterr().err


def command(*args):
    return subprocess.run([sys.executable, "-c", "import sys; from protoquant.cli import main; sys.exit(main())", *args], capture_output=True, text=True)


def test_help_and_version(capsys):
    r = command("--help")
    assert r.returncode == 0 and "protoquant run cub" in r.stdout and "PROTOQUANT_DATA" in r.stdout
    assert command().stdout == r.stdout
    for sub in ("run", "results"): assert "examples:" in command(sub, "--help").stdout
    assert command("--version").stdout.startswith("protoquant 0.")
    assert command("no-such-command").returncode == 2


def test_help_imports_nothing_heavy():
    code = "import sys; from protoquant import cli; cli.parser().format_help(); assert not {'torch', 'pandas', 'papermill'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_datasets(capsys):
    d = pytest.importorskip("protoquant.datasets")
    assert cli.main(["datasets"]) == 0
    assert "toybirds" in capsys.readouterr().out


def test_a_needed_run_is_found_or_run(clone, monkeypatch):
    folder = cli.require("tiny", dict(codebook_size=30), artefacts=())
    made = (folder/"run.json").stat().st_mtime_ns
    monkeypatch.setattr(cli, "execute", lambda *a, **kw: pytest.fail("a complete run was run again"))
    assert cli.require("tiny", dict(codebook_size=30), artefacts=()) == folder and (folder/"run.json").stat().st_mtime_ns == made
    every = dict(dataset="toybirds", codebook_size=30, seed=40, output_dir="results")
    assert cli.find_run("tiny", every, weights="w") == folder
    assert cli.find_run("tiny", every, weights="another hash") is None           # same parameters, other weights
    assert cli.find_run("tiny", {**every, "seed": 41}) is None
    assert cli.find_run("tiny", every, artefacts=["model.safetensors"]) is None  # a record alone is not a model
    (folder/"run.json").write_text("{ damaged")
    assert cli.find_run("tiny", every) is None


def test_force_of_the_outer_run_does_not_reach_the_inner_one(clone, monkeypatch):
    folder = cli.require("tiny", dict(codebook_size=31), artefacts=())
    date = json.loads((folder/"run.json").read_text())["date"]
    monkeypatch.setenv("PROTOQUANT_FORCE", "1")
    notebook = clone/"nbs"/"run_tiny.ipynb"
    assert cli.execute(notebook, dict(codebook_size=31), clone/"x.ipynb", quiet=True)["done"]
    assert json.loads((folder/"run.json").read_text())["date"] == date and os.environ["PROTOQUANT_FORCE"] == "1"


@pytest.mark.parametrize("params,says", [(dict(codebook_size=0), "codebook_size must be at least 1"), (dict(codebok_size=3), "Did you mean codebook_size")])
def test_a_needed_run_that_fails_says_why(clone, params, says):
    with pytest.raises(ConfigError, match=says): cli.require("tiny", params, artefacts=())
    assert not runs(clone)
