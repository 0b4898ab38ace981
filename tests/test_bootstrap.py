"""tools/bootstrap.py: one line where something is missing, instant when ready, safe when interrupted or run twice at once."""
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent/"tools"
sys.path.insert(0, str(TOOLS))
import bootstrap as b


@pytest.fixture
def root(tmp_path):
    (tmp_path/"pyproject.toml").write_text("[project]\n")
    (tmp_path/"constraints.txt").write_text("numpy==2.4.6\n")
    return str(tmp_path)


def ready(root, extras=b.EXTRAS):
    "An environment that looks installed."
    py = Path(root)/".venv"/"bin"/"python"
    py.parent.mkdir(parents=True, exist_ok=True)
    if not py.exists():
        py.symlink_to(sys.executable)
    b.write_stamp(str(Path(root)/".venv"), dict(hash=b.fingerprint(root, b.OLDEST), extras=list(extras)))


@pytest.mark.parametrize("version,ok", [((3, 9, 18), False), ((3, 10, 0), True), ((3, 12, 1), True), ((3, 13, 0), False), ((2, 7), False)])
def test_python_versions(version, ok):
    assert b.python_ok(version) is ok


def test_running_python_is_preferred():
    assert b.find_python("here", {"here": (3, 11)}.get) == "here"


def test_another_python_is_found():
    assert b.find_python("here", {"here": (3, 13), "python3.10": (3, 10), "python3.11": (3, 11)}.get) == "python3.11"


@pytest.mark.parametrize("here,says", [((3, 9), "3.9 is here"), (None, "python3-venv")])
def test_no_python_is_one_line(here, says):
    with pytest.raises(b.SetupError, match="3.10, 3.11 or 3.12") as e:
        b.find_python("here", {"here": here}.get)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_python_that_does_not_run():
    assert b.python_version("no-such-python") is None
    assert b.python_version(sys.executable) == sys.version_info[:2]


def test_full_disk_is_one_line(root):
    with pytest.raises(b.SetupError, match="3.0 GB of disk space are needed and 0.5 GB are free") as e:
        b.need_space(root, 3., lambda p: 5e8)
    assert "\n" not in str(e.value)
    b.need_space(root, 3., lambda p: 4e9)


def test_full_disk_stops_before_anything_is_made(root, capsys):
    with pytest.raises(b.SetupError, match="disk space"):
        b.setup(root, need_gb=1e9)
    assert not (Path(root)/".venv").exists()


def test_disk_that_fills_while_installing_is_named():
    assert b.why("Collecting x\nERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", 1).startswith("the disk is full")
    assert b.why("x\nERROR: No matching distribution found for torch==9\n", 1) == "No matching distribution found for torch==9"
    assert "status 7" in b.why("", 7)


def test_second_run_is_instant(root, monkeypatch):
    ready(root)
    monkeypatch.setattr(b, "find_python", lambda *a: pytest.fail("looked for a Python"))
    monkeypatch.setattr(b, "pip_install", lambda *a: pytest.fail("installed again"))
    began = time.time()
    assert b.setup(root) is False and time.time() - began < 1


@pytest.mark.parametrize("change", ["pyproject.toml", "constraints.txt"])
def test_a_changed_file_installs_again(root, monkeypatch, change):
    ready(root)
    (Path(root)/change).write_text("changed")
    calls = []
    monkeypatch.setattr(b, "pip_install", lambda *a: calls.append(a))
    monkeypatch.setattr(b, "need_space", lambda *a: None)
    assert b.setup(root) is True and len(calls) == 1
    assert b.setup(root) is False and len(calls) == 1


def test_more_extras_install_and_are_remembered(root, monkeypatch):
    ready(root)
    seen = []
    monkeypatch.setattr(b, "pip_install", lambda py, r, extras, log: seen.append(list(extras)))
    monkeypatch.setattr(b, "need_space", lambda *a: None)
    assert b.setup(root, ("dev", "demo", "bench")) is True
    assert seen == [["bench", "demo", "dev"]] and b.setup(root) is False


def test_interrupted_installation_leaves_no_stamp(root, monkeypatch):
    ready(root)
    (Path(root)/"constraints.txt").write_text("newer")

    def interrupted(*a):
        raise KeyboardInterrupt
    monkeypatch.setattr(b, "pip_install", interrupted)
    monkeypatch.setattr(b, "need_space", lambda *a: None)
    with pytest.raises(KeyboardInterrupt):
        b.setup(root)
    assert b.read_stamp(str(Path(root)/".venv")) == {}


def test_broken_environment_is_made_anew(root):
    broken = Path(root)/".venv"/"bin"/"python"
    broken.parent.mkdir(parents=True)
    broken.write_text("half")
    assert b.python_version(b.make_venv(sys.executable, str(Path(root)/".venv"))) == sys.version_info[:2]


def fake_pip(root, *lines):
    fake = Path(root)/"python"
    fake.write_text("#!/bin/sh\n" + "\n".join(lines) + "\n")
    fake.chmod(0o755)
    return str(fake)


def test_environment_interrupted_while_files_were_put_in_place_is_made_anew(root):
    venv = Path(root)/".venv"
    b.make_venv(sys.executable, str(venv))
    (venv/"kept").touch()
    with pytest.raises(b.SetupError):   # before that moment nothing is lost
        b.pip_install(fake_pip(root, "echo Collecting x", "exit 1"), root, ["dev"], str(Path(root)/"log"))
    b.make_venv(sys.executable, str(venv))
    assert (venv/"kept").exists()
    with pytest.raises(b.SetupError):
        b.pip_install(fake_pip(root, "echo Installing collected packages: x", "exit 1"), root, ["dev"], str(Path(root)/"log"))
    b.make_venv(sys.executable, str(venv))
    assert not (venv/"kept").exists() and not (venv/b.HALF).exists()
    b.pip_install(fake_pip(root, "echo Installing collected packages: x"), root, ["dev"], str(Path(root)/"log"))
    assert not (venv/b.HALF).exists()


def test_environment_of_another_python_is_not_deleted(root, monkeypatch):
    ready(root)
    monkeypatch.setattr(b, "python_version", lambda exe: (3, 13))
    with pytest.raises(b.SetupError, match="made with Python 3.13; delete it"):
        b.make_venv("python3.12", str(Path(root)/".venv"))
    assert (Path(root)/".venv").exists()


def test_damaged_stamp_counts_as_none(root):
    ready(root)
    (Path(root)/".venv"/".protoquant-stamp").write_text("{half")
    assert b.read_stamp(str(Path(root)/".venv")) == {}


TWO = """
import sys, time; sys.path.insert(0, {tools!r}); import bootstrap as b
b.need_space = lambda *a: None
b.make_venv = lambda py, venv: (__import__('os').makedirs(venv + '/bin', exist_ok=True), open(venv + '/bin/python', 'w').close(), 'py')[2]
def pip(py, root, extras, log):
    print('installing', flush=True); time.sleep(1.5)
b.pip_install = pip
b.setup({root!r})
"""


def test_two_at_once_install_once(root):
    code = TWO.format(tools=str(TOOLS), root=root)
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=50)[0] for p in both]
    assert [p.returncode for p in both] == [0, 0]
    assert sum("installing\n" in s for s in said) == 1


def test_failing_pip_is_one_line_and_status_1(root, monkeypatch, capsys):
    fake = fake_pip(root, "echo Collecting x", "echo 'ERROR: No matching distribution found for x'", "exit 1")
    monkeypatch.setattr(b, "setup", lambda **kw: b.pip_install(fake, root, ["dev"], str(Path(root)/"log")))
    assert b.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith("set-up: installing failed: No matching distribution found for x") and err.count("\n") == 1


def test_the_script_is_readable_by_an_old_python():
    import ast
    tree = ast.parse((TOOLS/"bootstrap.py").read_text(), feature_version=(3, 6))
    assert not any(isinstance(n, (ast.JoinedStr, ast.NamedExpr)) for n in ast.walk(tree))
