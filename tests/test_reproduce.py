"""protoquant reproduce: what is run, in which order, what a failure, an interruption or a second command does; on experiments that cost nothing."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from collections import namedtuple
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("papermill")
nbformat = pytest.importorskip("nbformat")

from protoquant import cli, core, reproduce as rp
from protoquant.core import ConfigError, StoreError
from protoquant.manifest import Row, found_runs, rows_for

ROOT = Path(__file__).resolve().parent.parent
TINY = '''
import datetime, hashlib, json, os, time
from pathlib import Path

def finish(experiment, params, files=(), made=None, **metrics):
    what = {k: v for k, v in params.items() if k not in ("output_dir", "weights")}
    folder = Path(params["output_dir"])/experiment/hashlib.sha256(repr(what).encode()).hexdigest()[:10]
    folder.mkdir(parents=True, exist_ok=True)
    for f in files: (folder/f).write_text(made)
    took = Path(str(params.get("weights")))
    about = dict(schema=1, experiment=experiment, key=folder.name, parameters=params, metrics=metrics, n_images=dict(test=3), scale="smoke", hardware="none", seconds=1,
                 date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds"), git=dict(commit=None),
                 weights=took.read_text() if took.is_file() else "random", **(dict(made=made) if made else {}))
    (folder/"run.json").write_text(json.dumps(about))
    Path(os.environ["PROTOQUANT_RUN_POINTER"]).write_text(json.dumps(dict(folder=str(folder.absolute()), done=False)))
'''
MANIFEST = """
smoke:
  files: {box: "@box/model.safetensors"}
  rows:
  - {id: box, experiment: blackbox, serves: [table3], minutes: 2, gb: 0.1}
  - id: sweep
    experiment: cub
    params: {weights: "@box"}
    grid: {codebook_size: [20, 40]}
    serves: [table7, figure6]
    gb: 0.5
  - {id: other, experiment: cub, params: {codebook_size: 7}, serves: [table8]}
"""


def experiment(root, name, parameters, *cells):
    code = nbformat.v4.new_code_cell
    names = ", ".join(f"{k}={k}" for k in [*parameters, "output_dir"])
    first = code("\n".join(f"{k} = {v!r}" for k, v in {**parameters, "output_dir": "results"}.items()), metadata=dict(tags=["parameters"]))
    nb = nbformat.v4.new_notebook(cells=[first, code(f"import os, tiny, time\nparams = dict({names})"), *map(code, cells)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, root/"nbs"/f"run_{name}.ipynb")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    for d in ("nbs", "protoquant"): (tmp_path/d).mkdir()
    (tmp_path/"settings.ini").touch()
    (tmp_path/"tiny.py").write_text(TINY)
    (tmp_path/"m.yaml").write_text(MANIFEST)
    experiment(tmp_path, "blackbox", dict(dataset="toybirds", backbone="none", seed=40), "tiny.finish('blackbox', params, ['model.safetensors'], f'weights of seed {seed}', top1=50)")
    experiment(tmp_path, "cub", dict(dataset="toybirds", backbone="none", weights="random", recipe="grounded", codebook_size=500, seed=40),
               "if codebook_size == 66: os._exit(9)", "if codebook_size == 99: print('asleep', flush=True); time.sleep(600)",
               "if codebook_size < 1: raise ValueError('codebook_size must be at least 1')", "tiny.finish('cub', params, top1=codebook_size / 10)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path/"cache"))
    return tmp_path


def record(clone, name, **params):
    "A complete record, as an experiment would have left it."
    defaults = {k: d for k, (d, _) in cli.parameters(clone/"nbs"/f"run_{name}.ipynb").items()}
    key = str(params.get("codebook_size", "plain"))
    folder = clone/"results"/name/key
    folder.mkdir(parents=True, exist_ok=True)
    r = dict(schema=1, experiment=name, key=key, parameters={**defaults, **params}, metrics=dict(top1=1.), n_images=dict(test=3), scale="smoke", hardware="h", seconds=1.,
             date="2026-01-01T00:00:00+00:00", git=dict(commit=None))
    (folder/"run.json").write_text(json.dumps(r))
    return folder


def all_run(clone):
    box = record(clone, "blackbox")
    (box/"model.safetensors").write_text("weights")
    return box, record(clone, "cub", weights=".../model.safetensors", codebook_size=20), record(clone, "cub", weights=".../model.safetensors", codebook_size=40), record(clone, "cub", codebook_size=7)


class NotRun(ConfigError): pass


@pytest.fixture
def rooms(monkeypatch):
    "Tables and figures that cost nothing; returns the names that were drawn."
    drawn = []
    def render(name, scale, output_dir, rows):
        drawn.append(name)
        if name == "table1": raise ValueError("this one is broken")
        rows = rows_for(rows, [name], needs=False)
        runs = found_runs(rows, output_dir)
        return types.SimpleNamespace(frame=pd.DataFrame(dict(a=["1.0 ± 0.1"])), data=pd.DataFrame(dict(a=[1.])), runs=[r.id for r in rows if runs[r.id]], missing=[r.id for r in rows if not runs[r.id]],
                                     to_markdown=lambda: f"| {name} |", to_latex=lambda: "\\hline", to_html=lambda: "<table></table>")
    def draw(name, scale, output_dir, rows, data_root):
        t = render(name, scale, output_dir, rows)
        if not t.runs: raise NotRun(f"{name} has not been run; protoquant reproduce --only {name}")
        def save(folder):
            (folder/f"{rp.stem(name)}.png").write_bytes(b"a picture")
            return [folder/f"{rp.stem(name)}.png"]
        return types.SimpleNamespace(save=save, runs=t.runs, missing=t.missing)
    monkeypatch.setitem(sys.modules, "protoquant.tables", types.SimpleNamespace(render=render))
    monkeypatch.setitem(sys.modules, "protoquant.figures", types.SimpleNamespace(draw=draw, NotRun=NotRun))
    return drawn


def call(*args, only="table3,table7,table8,figure6", manifest="m.yaml"):
    return cli.main(["reproduce", "--manifest", manifest, *(["--only", only] if only else []), *args])


def todo(*only, **kw):
    return [r.id for r in rp.Plan("smoke", only, manifest="m.yaml", **kw).todo]


# ---- the plan

def test_what_has_to_run(clone):
    assert todo() == ["box", "other", "sweep/codebook_size=20", "sweep/codebook_size=40"] and todo("table8") == ["other"]
    box, small, big, other = all_run(clone)
    assert todo() == []
    (small/"run.json").unlink()
    assert todo() == ["sweep/codebook_size=20"] == todo("table7") and todo("table8", "table3") == []
    (box/"model.safetensors").unlink()
    assert todo("table7") == ["box", "sweep/codebook_size=20"]   # its file is needed again
    record(clone, "cub", weights=".../model.safetensors", codebook_size=20)
    assert todo("table7") == []                                  # complete rows need no black box
    assert todo("table8", force=True) == ["other"]


def test_files_become_relative_paths_and_places_are_given_where_they_fit(clone):
    all_run(clone)
    p = rp.Plan("smoke", manifest="m.yaml")
    sweep = p.by["sweep/codebook_size=20"]
    assert p.parameters(sweep, device="cpu", data_root="/data") == dict(weights="results/blackbox/plain/model.safetensors", codebook_size=20, output_dir="results")
    own = rp.Plan("smoke", manifest="m.yaml", files=dict(box="mine.safetensors"))
    assert own.parameters(own.by[sweep.id])["weights"] == "mine.safetensors" and own.lacking(own.by[sweep.id]) == []


def row(id, minutes=1., after=(), alone=False, **params):
    return Row(id, "smoke", "cub", params, ("table3",), after=tuple(after), minutes=minutes, alone=alone)


def test_estimates_play_the_schedule():
    rows = [row("a", 3), row("b", 1), row("c", 1, ["b"]), row("d", 1, ["c"]), row("t", 5, alone=True)]
    assert rp.estimate(rows, 1) == 11 and rp.estimate(rows, 2) == 8 and rp.estimate([], 3) == 0
    assert rp.estimate(rows[2:], 2, [(rows[1], .5)]) == 7.5
    assert rp.urgency(rows)["b"] == 3


def test_what_may_run_beside_what():
    a, b, t = row("a"), row("b"), row("t", alone=True)
    assert rp.may_start(a, [], 1) and not rp.may_start(b, [a], 1) and rp.may_start(b, [a], 2)
    assert not rp.may_start(t, [a], 2) and not rp.may_start(a, [t], 2) and rp.may_start(t, [], 2)
    reads, trains = ({"m"}, False), ({"m"}, True)
    assert rp.may_start(b, [a], 2, dict(a=reads, b=reads)) and not rp.may_start(b, [a], 2, dict(a=reads, b=trains)) and not rp.may_start(b, [a], 2, dict(a=trains, b=reads))
    assert rp.may_start(b, [a], 2, dict(a=trains, b=({"n"}, True)))


def test_rows_that_mean_the_same_model_are_known(clone):
    same = dict(dataset="toybirds", backbone="none", weights="random", recipe="grounded", codebook_size=500, seed=40)
    experiment(clone, "purity", {**same, "n_patches": 10})
    experiment(clone, "seeds", {k: v for k, v in same.items() if k not in ("recipe", "seed")} | dict(recipes="grounded,paper", seeds="40,41"))
    p = rp.Plan("smoke", manifest="m.yaml")
    make = lambda e, **params: Row(e, "smoke", e, params, ("table5",))
    claim = lambda e, **params: p.claim(make(e, **params))
    cub, purity = claim("cub", codebook_size=30), claim("purity", codebook_size=30, n_patches=5)
    assert cub == purity and cub[1] is True and len(cub[0]) == 1
    assert not cub[0] & claim("purity", codebook_size=31)[0] and claim("blackbox") == (set(), False)
    seeds = claim("seeds", codebook_size=30)
    assert len(seeds[0]) == 4 and cub[0] < seeds[0]
    folder = record(clone, "cub", codebook_size=30)
    for f in rp.MODEL: (folder/f).touch()
    p.look()
    assert claim("purity", codebook_size=30) == (cub[0], False) and claim("cub", codebook_size=30)[1] is True   # it only reads; a cub row always writes


# ---- disk

Usage = namedtuple("Usage", "total used free")


def test_too_little_disk_is_said_before_anything_starts(clone, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Usage(2**40, 2**40, 2**28))
    monkeypatch.setattr(rp, "spawn", lambda *a, **kw: pytest.fail("a row was started"))
    assert call(only="table7") == 2
    said = capsys.readouterr()
    assert "needs 0.62 GiB but only 0.25 GiB are free" in said.err and "0.50 GiB in cache/features" in said.err and "(0.25 GiB free)" in said.out
    assert call("--dry-run", only="table7") == 0 and "would not start" in capsys.readouterr().out
    assert call("--dry-run", only="table8") == 0 and "would not start" not in capsys.readouterr().out


def test_features_that_are_stored_need_no_room(clone):
    p = rp.Plan("smoke", ["table7"], manifest="m.yaml")
    cache = core.cache_dir("features")
    assert p.space()[cache] == .5      # once for both rows
    (cache/"a").mkdir()
    (cache/"a"/"tokens.npy").write_bytes(os.urandom(2**20))
    (cache/"a"/"meta.json").write_text(json.dumps(dict(key="a", backbone_name="none.tag")))
    assert abs(p.space()[cache] - (.5 - 2**-10)) < 1e-4
    (cache/"a"/"meta.json").write_text(json.dumps(dict(key="a", backbone_name="another")))
    assert p.space()[cache] == .5
    (cache/"a"/"meta.json").unlink()   # not finished: whose it is cannot be told
    assert abs(p.space()[cache] - (.5 - 2**-10)) < 1e-4


# ---- the command

def test_a_dry_run_shows_and_runs_nothing(clone, capsys):
    assert call("--dry-run", "--jobs", "2", only=None) == 0
    out = capsys.readouterr().out
    assert "4 to do" in out and "table7" in out and "time: about 3 min, 2 at a time" in out and "GiB free" in out and not (clone/"results").exists()


def test_everything_runs_then_nothing_then_only_what_was_deleted(clone, rooms, capsys):
    assert call("--jobs", "2") == 0
    out = capsys.readouterr().out
    assert all(f"[{i}/4]" in out for i in (1, 2, 3, 4)) and "left" in out and "2 of 2" in out and "paper_figures/smoke/figure_06.png" in out
    assert sorted(p.name for p in (clone/"paper_figures"/"smoke").iterdir()) == ["figure_06.png", "index.json", *(f"table_{n}.{e}" for n in (3, 7, 8) for e in ("csv", "html", "md", "tex"))]
    made = found_runs(rp.Plan("smoke", manifest="m.yaml").every)
    weights = made["sweep/codebook_size=20"]["parameters"]["weights"]
    assert Path(weights).exists() and not Path(weights).is_absolute()
    assert all((r["folder"]/"executed.ipynb").exists() for r in made.values())
    assert (clone/"results"/".reproduce"/"sweep"/"codebook_size=20.log").read_text().startswith("# sweep/codebook_size=20") and not list((clone/"results").rglob("*.ended.*"))
    rooms.clear()
    before = {p: p.stat().st_mtime_ns for p in clone.rglob("*.*") if ".reproduce" not in str(p) and p.is_file()}
    assert call("--jobs", "2") == 0 and rooms == []
    assert before == {p: p.stat().st_mtime_ns for p in before}
    (made["sweep/codebook_size=40"]["folder"]/"run.json").unlink()
    assert call() == 0 and sorted(rooms) == ["figure6", "table7"]                  # exactly the artefacts that it serves
    dates = {i: r["date"] for i, r in found_runs(rp.Plan("smoke", manifest="m.yaml").every).items()}
    assert {i for i, r in made.items() if r["date"] != dates[i]} == {"sweep/codebook_size=40"}   # exactly that row


def test_another_black_box_makes_what_rests_on_it_run_again(clone, rooms, capsys):
    assert call("--jobs", "2") == 0
    first = found_runs(rp.Plan("smoke", manifest="m.yaml").every)
    (clone/"m.yaml").write_text(MANIFEST.replace("experiment: blackbox,", "experiment: blackbox, params: {seed: 41},"))
    assert todo() == ["box"]                                                       # what it will make is not known yet
    rooms.clear(); capsys.readouterr()
    assert call() == 0
    out, now = capsys.readouterr().out, found_runs(rp.Plan("smoke", manifest="m.yaml").every)
    assert "2 rows rest on weights that have been made anew: sweep/codebook_size=20, sweep/codebook_size=40" in out and "[3/3]" in out
    assert {i for i in now if now[i]["date"] != first[i]["date"]} == {"box", "sweep/codebook_size=20", "sweep/codebook_size=40"}
    assert now["sweep/codebook_size=20"]["weights"] == now["box"]["made"] == "weights of seed 41" and sorted(rooms) == ["figure6", "table3", "table7"]
    assert todo() == [] and call() == 0
    (now["box"]["folder"]/"model.safetensors").unlink(); (now["box"]["folder"]/"run.json").unlink(); (now["sweep/codebook_size=40"]["folder"]/"run.json").unlink()
    assert call() == 0                                                             # the same black box again: only what is missing
    again = found_runs(rp.Plan("smoke", manifest="m.yaml").every)
    assert {i for i in now if now[i]["date"] != again[i]["date"]} == {"box", "sweep/codebook_size=40"}


def test_force_runs_again_what_was_asked_for(clone, rooms):
    all_run(clone)
    assert call("--force", only="table8") == 0
    dates = {i: r["date"] for i, r in found_runs(rp.Plan("smoke", manifest="m.yaml").every).items()}
    assert {i for i, d in dates.items() if not d.startswith("2026-01-01")} == {"other"}


def test_a_failed_row_is_told_and_the_rest_goes_on(clone, rooms, capsys):
    (clone/"m.yaml").write_text("""
smoke:
  rows:
  - {id: bad, experiment: cub, params: {codebook_size: 0}, serves: [table5]}
  - {id: crash, experiment: cub, params: {codebook_size: 66}, serves: [table5]}
  - {id: waits, experiment: cub, params: {codebook_size: 3, weights: "@bad/model.safetensors"}, serves: [table5]}
  - {id: waits-too, experiment: cub, params: {codebook_size: 4}, after: [waits], serves: [table5]}
  - {id: good, experiment: cub, params: {codebook_size: 7}, serves: [table5]}
""")
    assert call("--jobs", "2", only="table5") == 1
    out = capsys.readouterr().out
    assert "ValueError: codebook_size must be at least 1" in out and "waits: waits for a failed row, bad" in out and "waits-too: waits for a failed row, bad" in out and "good: done in" in out
    assert "2 of 5 rows failed" in out and "need a failed row" in out and "crash" in out and "Kernel died" in out and "Traceback" not in out
    log = clone/"results"/".reproduce"/"bad.log"
    assert log.exists() and "results/.reproduce/bad.log" in out and "codebook_size must be at least 1" in (clone/"results"/".reproduce"/"bad.ipynb").read_text()
    assert "1 of 5" in out and "protoquant reproduce --scale smoke --only table5" in out and rooms == ["table5"]   # what is there is drawn


def test_a_row_without_the_file_that_others_take(clone, capsys):
    experiment(clone, "blackbox", dict(dataset="toybirds", backbone="none", seed=40), "tiny.finish('blackbox', params, top1=50)")
    assert call("--no-draw", only="table7") == 1
    out = capsys.readouterr().out
    assert "not the file that other rows take: model.safetensors" in out and "waits for a failed row, box" in out


@pytest.mark.parametrize("args,says", [
    (["--only", "tabel3"], "Did you mean table3"), (["--jobs", "0"], "at least one row"), (["--file", "bix=m.yaml"], "Did you mean box"),
    (["--file", "box=none.safetensors"], "no such file"), (["--file", "box"], "NAME=PATH"), (["--manifest", "none.yaml"], "cannot be read"), (["--scale", "small", "--only", "x"], "no table or figure")])
def test_mistakes_are_told_before_anything_starts(clone, capsys, args, says):
    assert call(*args, only=None) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not (clone/"results").exists()


def test_damaged_and_old_records_are_left_out_and_run_again(clone, rooms, capsys):
    box, small, big, other = all_run(clone)
    (other/"run.json").write_text("{ damaged")
    (small/"run.json").write_text(json.dumps(json.loads((small/"run.json").read_text()) | dict(schema=0)))
    assert call("--dry-run", only=None) == 0
    out = capsys.readouterr().out
    assert "2 to do" in out and out.count("warning: ") == 2 and "run.json was left out" in out and "its schema is 0" in out and "results/cub/7/run.json" in out and "counts as not run" in out
    assert call(only="table8") == 0 and "other: done in" in capsys.readouterr().out


# ---- two commands, interruptions

def background(*args):
    return subprocess.Popen([sys.executable, "-c", "import sys; from protoquant.cli import main; sys.exit(main())", "reproduce", "--manifest", "m.yaml", *args],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(condition, seconds=90):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until, "it did not happen"
        time.sleep(.1)


def kernels(clone):
    "Processes that work in this clone, this one left out."
    found = []
    for p in Path("/proc").glob("[0-9]*"):
        try:
            if (p/"cwd").resolve() == clone.resolve() and int(p.name) != os.getpid() and "zombie" not in (p/"status").read_text(): found.append(int(p.name))
        except (OSError, PermissionError): continue
    return found


SLEEPY = """
smoke:
  rows:
  - {id: quick, experiment: cub, params: {codebook_size: 7}, serves: [table8], minutes: 9}
  - {id: slow, experiment: cub, params: {codebook_size: 99}, serves: [table8]}
"""


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes through /proc")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_ends_the_children_and_keeps_what_is_complete(clone, capsys, how):
    (clone/"m.yaml").write_text(SLEEPY)
    if how == signal.SIGTERM: record(clone, "cub", codebook_size=7)
    p = background("--only", "table8", "--jobs", "1", "--no-draw")
    try:
        log = clone/"results"/".reproduce"/"slow.log"
        wait_for(lambda: log.exists() and len(kernels(clone)) >= 3)   # the command, the child, its kernel
        assert call("--no-draw", only="table8") == 2                  # a second command meanwhile
        err = capsys.readouterr().err
        assert f"process {p.pid} on" in err and "has been at work on results since 20" in err and "--only table8" in err
        assert call("--dry-run", only="table8") == 0
        p.send_signal(how)
        out, _ = p.communicate(timeout=60)
    finally: p.kill()
    assert p.returncode == 130 and "1 of 2 runs are complete and kept; go on with  protoquant reproduce --scale smoke --only table8" in out and "Traceback" not in out
    wait_for(lambda: not kernels(clone), 20)
    assert found_runs(rp.Plan("smoke", manifest="m.yaml").every)["quick"] is not None and todo("table8") == ["slow"]
    if how == signal.SIGTERM: return
    (clone/"m.yaml").write_text(SLEEPY.replace("99", "98"))           # now it does not sleep
    assert call("--no-draw", only="table8") == 0                      # no stale lock, no stale marker
    out = capsys.readouterr().out
    assert "slow: done in" in out and "quick: done" not in out


@pytest.mark.skipif(not Path("/proc/self/cwd").exists(), reason="looks at processes through /proc")
def test_children_end_with_a_parent_that_was_killed(clone):
    (clone/"m.yaml").write_text(SLEEPY)
    record(clone, "cub", codebook_size=7)
    p = background("--only", "table8", "--jobs", "1", "--no-draw")
    log = clone/"results"/".reproduce"/"slow.log"
    wait_for(lambda: log.exists() and len(kernels(clone)) >= 3)
    p.kill(); p.communicate()
    wait_for(lambda: not kernels(clone), 30)
    with rp.only_one(clone/"results"/".reproduce", "next"): pass      # the lock went with the process


def test_who_holds_the_lock_is_said_and_stale_books_do_not_block(tmp_path):
    (tmp_path/".reproduce").mkdir()
    (tmp_path/".reproduce"/"holder.json").write_text("{ damaged")
    (tmp_path/".reproduce"/"lock").touch()
    with rp.only_one(tmp_path/".reproduce", "one"):
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on .* since 20.* \(one\)"):
            with rp.only_one(tmp_path/".reproduce", "two"): pass
    with rp.only_one(tmp_path/".reproduce", "three"): pass
    assert not (tmp_path/".reproduce"/"holder.json").exists()


# ---- drawing

def test_only_what_changed_is_drawn(clone, rooms, monkeypatch):
    all_run(clone)
    out = clone/"paper_figures"/"smoke"
    assert call() == 0 and sorted(rooms) == ["figure6", "table3", "table7", "table8"]
    again = lambda: (rooms.clear(), call(), sorted(rooms))[1:]
    assert again() == (0, [])
    (out/"table_3.tex").unlink()
    assert again() == (0, ["table3"]) and (out/"table_3.tex").exists()
    (out/"figure_06.png").write_bytes(b"by hand")
    assert again() == (0, ["figure6"]) and (out/"figure_06.png").read_bytes() == b"a picture"
    record(clone, "cub", codebook_size=7)
    f = clone/"results"/"cub"/"7"/"run.json"
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(date="2026-02-02T00:00:00+00:00")))
    assert again() == (0, ["table8"])
    (out/"index.json").write_text("{ damaged")
    assert again()[1] == ["figure6", "table3", "table7", "table8"] and again() == (0, [])
    monkeypatch.setattr(rp, "_sources", lambda kind: f"new {kind}" if kind == "table" else old(kind)); old = lambda kind: rp.hash_bytes(kind.encode())
    assert "table3" in again()[1]


def test_the_code_and_the_papers_numbers_are_part_of_the_stamp(tmp_path, monkeypatch):
    import protoquant
    monkeypatch.setattr(protoquant, "__path__", [str(tmp_path)])
    seen = set()
    for f in ("tables.py", "paper_values.csv", "figures.py", "plots.py"):
        (tmp_path/f).write_text(f)
        seen.add((rp.stamp("table3", [], {}), rp.stamp("figure6", [], {})))
    tables, figures = zip(*sorted(seen))
    assert len(set(tables)) == 2 and len(set(figures)) == 4      # after each file that it is drawn with


def test_an_artefact_that_cannot_be_drawn_is_told_and_the_rest_goes_on(clone, rooms, capsys):
    all_run(clone)
    assert call(only="table1,table3,figure8") == 1
    out = capsys.readouterr().out
    assert "table1: failed, ValueError: this one is broken" in out and "could not be drawn:" in out and (clone/"paper_figures"/"smoke"/"table_3.md").read_text() == "| table3 |\n"
    assert "not drawn" in out and "figure8 has not been run; protoquant reproduce --only figure8" in out
    rooms.clear()
    assert call(only="table3,figure8") == 0 and rooms == []      # the figure's reason is remembered; no error of the whole
    assert "figure8 has not been run" in capsys.readouterr().out
    index = json.loads((clone/"paper_figures"/"smoke"/"index.json").read_text())
    assert index["table3"]["runs"] == ["box"] and index["table3"]["keys"] == ["plain"] and index["table3"]["missing"] == [] and "table1" not in index


def test_a_table_with_no_runs_is_drawn(clone, rooms):
    assert cli.main(["reproduce", "--manifest", "m.yaml", "--only", "table2"]) == 0
    assert (clone/"paper_figures"/"smoke"/"table_2.md").exists()


def test_where_everything_stands(clone):
    all_run(clone)[1].joinpath("run.json").unlink()
    s = rp.status(manifest="m.yaml").set_index("artefact")
    assert s.loc["table7", "status_smoke"] == "1 of 2 runs" and s.loc["table3", "status_smoke"] == "complete" and s.loc["table3", "status_paper"] == "no runs"
    assert s.loc["table7", "minutes_smoke"] == 4 and s.loc["table7", "notebooks"] == "run_cub.ipynb" and s.loc["table8", "command"].endswith("--only table8") and len(s) == 30


# ---- speed, and real experiments

def test_a_second_call_imports_nothing_that_draws_or_runs(clone, rooms):
    all_run(clone)
    assert call() == 0
    code = ("import sys; from protoquant.cli import main; status = main(['reproduce', '--manifest', 'm.yaml', '--only', 'table3,table7,table8,figure6'])\n"
            "assert status == 0; print(sorted({'papermill', 'matplotlib', 'protoquant.tables', 'protoquant.figures', 'timm', 'torchvision'} & set(sys.modules)))")
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0 and r.stdout.strip().splitlines()[-1] == "[]", r.stdout + r.stderr


def test_real_experiments(tmp_path, monkeypatch, capsys):
    "A black box on twelve drawn birds, a codebook on its features, a measurement of that model."
    common = "backbone: test_resnet, classes: 3, n_train_per_class: 4, n_test_per_class: 2, img_size: 96, dataset: toybirds"
    (tmp_path/"m.yaml").write_text(f"""
smoke:
  defaults: {{{common}}}
  rows:
  - {{id: box, experiment: blackbox, params: {{weights: random, epochs: 1, warmup: 0, mixup: 0, cutmix: 0}}, serves: [table3]}}
  - {{id: model, experiment: cub, params: {{weights: "@box/model.safetensors", codebook_size: 12, epochs_stage1: 1, epochs_stage2: 1}}, serves: [table3]}}
  - {{id: purity, experiment: purity, params: {{weights: "@box/model.safetensors", codebook_size: 12, epochs_stage1: 1, epochs_stage2: 1}}, after: [model], serves: [table5]}}
""")
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path/"cache"))
    args = ["reproduce", "--manifest", str(tmp_path/"m.yaml"), "--output-dir", str(tmp_path/"results"), "--only", "table3,table5", "--no-draw"]
    assert cli.main(args) == 0, capsys.readouterr().out
    capsys.readouterr()
    assert cli.main(args) == 0 and "0 to do" in capsys.readouterr().out
