"""nbs/run_misalignment.ipynb through the command line, on a tiny ToyBirds with a tiny random backbone."""
from functools import partial

import numpy as np
import pandas as pd
import pytest

import pieces
from pieces import run_experiment

pytest.importorskip("papermill")
TINY = dict(dataset="toybirds", classes=4, n_train_per_class=8, n_test_per_class=3, backbone="test_resnet", weights="random", codebook_size=24, topk=3, epochs_stage1=3,
            epochs_stage2=6, steps=3, step=.25, n_images_pgd=5)


run = partial(run_experiment, "misalignment", tiny=TINY)
records = lambda tmp, experiment="misalignment": pieces.records(tmp, experiment)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_the_whole_way_from_images_to_a_record(tmp):
    r = run(tmp)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp).items()
    m, images = rec["metrics"], pd.read_csv(folder/"images.csv")
    assert rec["scale"] == "smoke" and rec["n_images"] == dict(test=12, pgd=5)
    for model in ("full", "topk"):
        for reading in ("softmax", "cosine"):
            for attack, n in (("noise", 12), ("pgd", 5)):
                at = f"{attack}_{reading}_top_proto_{model}"
                rows = images[(images.model == model) & (images.reading == reading) & (images.attack == attack)]
                assert len(rows) == n == m[f"n_{at}"] and m[f"plc_{at}"] == pytest.approx(rows.plc.mean()) and m[f"prc_{at}"] == pytest.approx(rows.prc.mean())
                assert m[f"pac_{at}"] == pytest.approx(rows.pac.mean()) and m[f"undefined_{at}"] == rows.pac.isna().sum()
                assert m[f"ac_{at}"] == pytest.approx(100 * (rows.right.mean() - rows.right_after.mean()))
            same = images[(images.model == model) & (images.reading == reading)].pivot(index="image", columns="attack", values=["target_after", "pac"]).dropna(subset=[("target_after", "pgd")])
            assert len(same) == 5 and (same.target_after.pgd <= same.target_after.noise + 1e-4).all()
            assert m[f"pac_noise_same_images_{reading}_top_proto_{model}"] == pytest.approx(same.pac.noise.mean())
    assert {"seconds_noise", "seconds_pgd"} <= set(m) and np.isfinite([v for v in m.values() if v is not None]).all()
    for name in ("executed.ipynb", "figures/attacked.png", "figures/change_noise.png", "figures/change_pgd.png"): assert (folder/name).exists()
    assert str(tmp) not in (folder/"run.json").read_text()
    text = (folder/"executed.ipynb").read_text()
    assert "ProtoTree" in text and "paper, whole CUB" in text and "ours, noise, softmax, toybirds" in text and "not in the paper" in text


def test_the_same_run_is_not_repeated_and_the_model_is_not_trained_again(tmp):
    before = records(tmp)
    trained = [p.stat().st_mtime_ns for p in (tmp/"results"/"cub").glob("*/model.safetensors")]
    assert len(trained) == 1 and "--force runs it again" in run(tmp).stdout and records(tmp) == before
    r = run(tmp, attacks="noise", models="topk", readings="cosine", choices="top_proto,gt_protos", units="pixel", eps=.03)
    assert r.returncode == 0, r.stderr[-3000:]
    assert [p.stat().st_mtime_ns for p in (tmp/"results"/"cub").glob("*/model.safetensors")] == trained
    (new,) = [r for f, r in records(tmp).items() if f not in before]
    assert {k for k in new["metrics"] if k.startswith("pac_")} == {f"pac_noise_cosine_{c}_topk" for c in ("top_proto", "gt_protos")}


@pytest.mark.parametrize("params,says", [(dict(eps=0), "nothing would be attacked"), (dict(readings="raw"), "softmax, cosine, separated by commas")])
def test_mistakes_stop_the_run_with_what_to_do(tmp, params, says):
    n = len(records(tmp))
    r = run(tmp, **params)
    assert r.returncode and says in r.stderr, r.stderr[-1500:]
    assert len(records(tmp)) == n
