"""protoquant.results: parameters through real papermill, records that are whole or absent, tables."""
import json
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest

from protoquant import results as R
from protoquant.core import ConfigError, read_json, write_json

PARAMS = dict(dataset="cub", recipe="paper", codebook_size=500, seed=40, data_root=None, device="cpu")
N = dict(train=1498, test=1389)


def start(tmp_path, **kw):
    return R.Run.start("cub", {**PARAMS, **kw}, data=dict(train="a", test="b"), weights="w", output_dir=tmp_path)


def history(*cells):
    return {"In": ["", *cells, "params = take_parameters(globals())"]}


# -- parameters

def test_parameters_without_injection():
    ns = dict(history("seed = 40\nlr = 0.05"), seed=40, lr=.05, other=3)
    assert R.take_parameters(ns) == dict(seed=40, lr=.05)


def test_the_cell_of_defaults_is_not_confused_with_other_cells():
    ns = dict(history("import os\nx = 1", "seed = 40\ntopk = 10", "# Parameters\ntopk = 5", "y = 2"), seed=40, topk=5)
    assert R.take_parameters(ns) == dict(seed=40, topk=5)


def test_a_person_who_edits_and_reruns():
    ns = dict(history("seed = 40\ntopk = 10", "# Parameters\ntopk = 5", "seed = 41\ntopk = 7"), seed=41, topk=7)
    assert R.take_parameters(ns) == dict(seed=41, topk=7)


@pytest.mark.parametrize("default,value,ok", [
    (500, 4000, True), (500, "4000", False), (500, None, False), (500, True, False), (.05, 1, True), (.05, "x", False), (True, 1, False),
    (True, False, True), ("cub", None, True), ("cub", 3, False), (None, "folder", True), (None, [1], False), ([1], (2,), True)])
def test_kinds(default, value, ok):
    if ok: R.check_parameters({"p": value}, {"p": default})
    else:
        with pytest.raises(ConfigError, match="parameter p="): R.check_parameters({"p": value}, {"p": default})


def tiny(path, last="params"):
    nbformat = pytest.importorskip("nbformat")
    first = nbformat.v4.new_code_cell("codebook_size = 500  # M\nrecipe = 'grounded'\ndata_root = None", metadata=dict(tags=["parameters"]))
    rest = ["from protoquant.results import take_parameters\nparams = take_parameters(globals())", last]
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, rest)])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbformat.write(nb, path)
    return str(path)


def shown(nb):
    return eval(nb.cells[-1].outputs[0]["data"]["text/plain"])


def test_papermill_passes_known_parameters(tmp_path):
    pm = pytest.importorskip("papermill")
    nb = pm.execute_notebook(tiny(tmp_path/"a.ipynb"), str(tmp_path/"out.ipynb"), dict(codebook_size=4000, data_root="d"), progress_bar=False)
    assert shown(nb) == dict(codebook_size=4000, recipe="grounded", data_root="d")


@pytest.mark.parametrize("given,says", [(dict(codebok_size=4000), "Did you mean codebook_size"), (dict(codebook_size="many"), "int is needed")])
def test_papermill_stops_at_what_the_notebook_does_not_know(tmp_path, given, says):
    pm = pytest.importorskip("papermill")
    with pytest.raises(pm.PapermillExecutionError) as e:
        pm.execute_notebook(tiny(tmp_path/"a.ipynb"), str(tmp_path/"out.ipynb"), given, progress_bar=False)
    assert e.value.ename == "ConfigError" and says in e.value.evalue


def test_nbclient_and_execnb_need_no_injection(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    nb = nbformat.read(tiny(tmp_path/"a.ipynb"), 4)
    nbclient.NotebookClient(nb, timeout=60).execute()
    assert shown(nb) == dict(codebook_size=500, recipe="grounded", data_root=None)
    execnb = pytest.importorskip("execnb.shell")
    tiny(tmp_path/"b.ipynb", "assert params['codebook_size'] == 500 and params['data_root'] is None, params")
    code = f"from execnb.shell import CaptureShell; CaptureShell().execute({str(tmp_path/'b.ipynb')!r}, exc_stop=True)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


# -- keys and scale

def test_key_counts_what_matters_and_not_where_it_lies():
    key = lambda d="cpu", data="d", **kw: R.run_key("cub", {**PARAMS, **kw}, data, "w", d)
    assert key() == key(data_root="x", output_dir="y", weights="z.safetensors", device="auto")
    assert len({key(), key(seed=41), key(codebook_size=501), key("cuda"), key(data="e")}) == 5
    assert key().startswith("cub-paper-M500-s40-")
    assert "/" not in key(dataset="../../odd name")


def test_scale():
    assert R.run_scale("toybirds", dict(train=5994, test=5794)) == "smoke"
    every, b = dict(train=5994, test=5794), "convnext_tiny.fb_in1k"
    assert R.run_scale("cub", every, b) == "paper" == R.run_scale("cub", dict(train=5394, val=600, test=5794), b, 224)
    assert R.run_scale("cub", N, b) == "small" == R.run_scale("imagefolder", N, b)
    for other in ((None,), ("tf_efficientnet_lite0",), (b, 64)): assert R.run_scale("cub", every, *other) == "small"   # all images, but not as in the paper


# -- records

def test_record_is_complete(tmp_path):
    run = start(tmp_path, weights=str(tmp_path/"w.safetensors"))
    (run.file("figures/a.png")).touch()
    run.finish(dict(top1=np.float32(71.5), codes=np.int64(500), top1_blackbox=None, loss=float("nan")), N, "bbox", [run.folder/"figures"/"a.png"])
    r = read_json(run.folder/"run.json")
    assert set(r) >= {"schema", "experiment", "key", "parameters", "seed", "metrics", "n_images", "crop", "scale", "versions", "device",
                      "hardware", "git", "data", "weights", "seconds", "date", "figures"}
    assert r["metrics"] == dict(top1=71.5, codes=500, top1_blackbox=None, loss=None) and r["scale"] == "small" and r["seed"] == 40
    assert set(r["versions"]) >= {"python", "torch", "timm", "protoquant", "numpy"} and set(r["git"]) == {"commit", "dirty"}
    assert r["figures"] == ["figures/a.png"] and r["device"] == "cpu" and r["hardware"]
    assert str(tmp_path) not in (run.folder/"run.json").read_text()
    assert not (run.folder/"running.json").exists() and not list(run.folder.glob(".*"))


def test_a_complete_run_is_found_again_and_force_forgets_it(tmp_path):
    start(tmp_path).finish(dict(top1=1), N)
    assert start(tmp_path).done and not start(tmp_path, seed=41).done
    again = R.Run.start("cub", PARAMS, data=dict(train="a", test="b"), weights="w", output_dir=tmp_path, force=True)
    assert not again.done and not start(tmp_path).done   # an interrupted repetition is not complete either


def test_force_by_environment_and_pointer(tmp_path, monkeypatch):
    start(tmp_path).finish(dict(top1=1), N)
    monkeypatch.setenv("PROTOQUANT_RUN_POINTER", str(tmp_path/"p.json"))
    run = start(tmp_path)
    assert read_json(tmp_path/"p.json") == dict(folder=str(run.folder), done=True)
    monkeypatch.setenv("PROTOQUANT_FORCE", "1")
    assert not start(tmp_path).done


def test_metrics_and_counts_must_be_numbers(tmp_path):
    run = start(tmp_path)
    with pytest.raises(ConfigError, match="top1='high'"): run.finish(dict(top1="high"), N)
    with pytest.raises(ConfigError, match="n_images"): run.finish(dict(top1=1), 5)
    assert not run.done


WORK = """
import sys, time
from protoquant.results import Run
run = Run.start('cub', {params!r}, data=dict(train='a', test='b'), weights='w', output_dir={folder!r})
(run.folder/'model.safetensors').write_text('half'); print('working', flush=True); time.sleep(60)
"""


def worker(tmp_path):
    p = subprocess.Popen([sys.executable, "-c", WORK.format(params=PARAMS, folder=str(tmp_path))], stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == "working\n"
    return p


def test_a_killed_run_looks_unfinished_and_runs_again(tmp_path):
    p = worker(tmp_path)
    with pytest.raises(ConfigError, match=f"process {p.pid} is working"): start(tmp_path)
    p.send_signal(signal.SIGKILL); p.wait()
    assert len(R.load_runs(tmp_path)) == 0
    run = start(tmp_path)
    assert not run.done
    run.finish(dict(top1=1), N)
    assert start(tmp_path).done


@pytest.mark.parametrize("content", ["", "{half", "[]", '{"schema": 0}', "\x00\xff"])
def test_damaged_record_is_not_done_and_is_named(tmp_path, content):
    start(tmp_path, seed=41).finish(dict(top1=1), N)
    run = start(tmp_path)
    (run.folder/"run.json").write_bytes(content.encode("latin1"))
    assert not run.done
    with pytest.warns(UserWarning, match=run.key): df = R.load_runs(tmp_path)
    assert list(df.seed) == [41]


def test_damaged_marker_does_not_block(tmp_path):
    run = start(tmp_path)
    (run.folder/"running.json").write_text("{half")
    assert not start(tmp_path).done


def test_commit_only_of_this_package(tmp_path):
    assert R.git_state(tmp_path) == dict(commit=None, dirty=None)


# -- tables

def three(tmp_path):
    for seed, top1 in ((40, 80.), (41, 81.), (42, 82.5)): start(tmp_path, seed=seed).finish(dict(top1=top1, codes=500), N, "bbox")
    start(tmp_path, dataset="toybirds").finish(dict(top1=99.), N)
    return R.load_runs(tmp_path, "cub")


def test_summary_against_numpy(tmp_path):
    s = R.summarise(three(tmp_path), by=["recipe"]).set_index("scale")
    assert s.n["small"] == 3 and s.n["smoke"] == 1 and s.seeds["small"] == "40, 41, 42"
    assert np.isclose(s.top1["small"], np.mean([80, 81, 82.5])) and np.isclose(s.top1_sd["small"], np.std([80, 81, 82.5], ddof=1))
    assert np.isnan(s.top1_sd["smoke"]) and np.isnan(s.codes["smoke"])
    text = R.show_summary(R.summarise(R.load_runs(tmp_path), by=["recipe"])).set_index("scale")
    assert text.top1["small"] == "81.2 ± 1.3" and text.top1["smoke"] == "99.0" and text.codes["smoke"] == "–"


def test_unknown_columns_offer_names(tmp_path):
    with pytest.raises(ConfigError, match="Did you mean recipe"): R.summarise(three(tmp_path), by=["recipes"])


def test_no_runs(tmp_path):
    assert len(R.load_runs(tmp_path)) == 0 == len(R.load_runs(tmp_path/"none"))


def test_run_table_with_and_without_metrics():
    t = R.run_table(dict(metrics={}, parameters={}))
    assert len(t) == 4 and (t.drop(columns="model") == "–").all().all()
    m = dict(top1_linear_probe=71.4, top1_blackbox=82.1, top1=73.41, codes=500, local_size=12.3, seconds_stage1=2., seconds_stage2=3.5,
             top1_topk=70., codes_topk=310, local_size_topk=10.)
    t = R.run_table(dict(metrics=m, parameters=dict(topk=10))).set_index("model")
    assert len(t) == 5 and t.loc["ProtoQuant"].tolist() == ["73.4", "500", "12.3", "5.5"]
    assert t.loc["ProtoQuant, 10 codes per class"].tolist() == ["70.0", "310", "10.0", "–"]


def test_paper_values():
    p = R.paper_values()
    assert list(p) == ["table", "row_method", "backbone", "dataset", "metric", "value", "std"] and set(p.table) > {"3", "7", "8"}
    row = R.paper_values(3).query("row_method == 'ProtoQuant' and backbone == 'ConvNeXt-Tiny' and dataset == 'CUB-200-2011'")
    assert row.value.tolist() == [87.6] and row["std"].tolist() == [.1]


def test_comparison_marks_what_was_run():
    paper = R.paper_values(3).query("dataset == 'CUB-200-2011' and row_method == 'ProtoQuant'")
    base = dict(row_method="ProtoQuant", backbone="ResNet-50", sd=.2, n=3)
    for scale, diff in (("paper", -.5), ("small", None), ("smoke", None)):
        t = R.compare(paper, [dict(base, ours=82., scale=scale)]).set_index("backbone")
        assert t.status["DeiT-Small"] == "not run" and len(t) == 3
        assert (np.isclose(t.difference["ResNet-50"], diff) if diff else np.isnan(t.difference["ResNet-50"]))
    assert "not comparable" in t.status["ResNet-50"]
    md = R.markdown_table(R.show_comparison(t.reset_index()))
    assert "82.0 ± 0.2 (3)" in md and "not run" in md and md.count("\n") == 4


def test_comparison_of_something_the_paper_does_not_have():
    t = R.compare(R.paper_values(3), [dict(row_method="grounded", ours=80., scale="small")])
    assert t[t.row_method == "grounded"].status.tolist() == ["not in the paper"]


def test_comparison_refuses_what_is_ambiguous():
    with pytest.raises(ConfigError, match="several rows"): R.compare(R.paper_values(3), [dict(row_method="ProtoQuant", ours=80., scale="paper")])
    with pytest.raises(ConfigError, match="at least one of"): R.compare(R.paper_values(3), [dict(ours=80., scale="paper")])
