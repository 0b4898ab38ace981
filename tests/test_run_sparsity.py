"""nbs/run_sparsity.ipynb through the command line, on a tiny ToyBirds: every K from one model."""
import pandas as pd
import pytest

from pieces import records, run_experiment

pytest.importorskip("papermill")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_each_class_keeps_at_most_k_codes(tmp):
    r = run_experiment("sparsity", tmp, limits="30,6,2,1")
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp, "sparsity").items()
    (model, trained), = records(tmp, "cub").items()                 # it was trained on the way
    m, t = rec["metrics"], pd.read_csv(folder/"limits.csv")
    assert rec["data"]["model"] == model.name and t.k.tolist() == [0, 6, 2, 1]      # 30 of 24 codes: left out
    assert m["top1_frozen_Kfull"] == pytest.approx(trained["metrics"]["top1"]) and "top1_tuned_Kfull" not in m
    for k in (6, 2, 1):
        for kind in ("frozen", "tuned"): assert 0 < m[f"codes_{kind}_K{k}"] <= min(24, 4 * k) and 0 <= m[f"top1_{kind}_K{k}"] <= 100
    assert m["codes_frozen_K6"] >= m["codes_frozen_K2"] >= m["codes_frozen_K1"] and rec["scale"] == "smoke"
    assert (folder/"figures/limits.png").exists() and str(tmp) not in (folder/"run.json").read_text()


def test_ten_codes_are_those_of_the_main_experiment(tmp):
    assert run_experiment("sparsity", tmp, limits="10").returncode == 0
    m = next(r["metrics"] for r in records(tmp, "sparsity").values() if r["parameters"]["limits"] == "10")
    (_, trained), = records(tmp, "cub").items()
    assert m["top1_tuned_K10"] == pytest.approx(trained["metrics"]["top1_topk"]) and m["codes_tuned_K10"] == trained["metrics"]["codes_topk"]


@pytest.mark.parametrize("limits, said", [("10,x", "whole numbers"), ("5,0", "at least one code")])
def test_impossible_limits_stop_before_anything_is_trained(tmp_path, limits, said):
    r = run_experiment("sparsity", tmp_path, limits=limits)
    assert r.returncode and said in r.stderr and not records(tmp_path, "cub")
