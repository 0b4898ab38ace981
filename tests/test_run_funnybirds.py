"""nbs/run_funnybirds.ipynb through the command line, on a tiny ToyBirds with a tiny random backbone, drawn and from disk."""
from functools import partial

import pytest

import pieces
from pieces import run_experiment

pytest.importorskip("papermill")
TINY = dict(dataset="toybirds", classes=4, n_train_per_class=8, n_test_per_class=3, backbone="test_resnet", weights="random", codebook_size=24, topk=3, epochs_stage1=3,
            epochs_stage2=6, val_fraction=.25)


run = partial(run_experiment, "funnybirds", tiny=TINY)
records = lambda tmp, experiment="funnybirds": pieces.records(tmp, experiment)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def done(tmp):
    r = run(tmp)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp).items()
    return folder, rec, r


def test_a_run_leaves_everything(tmp, done):
    folder, rec, r = done
    m = rec["metrics"]
    scores = ("bi", "csdc", "pc", "dc", "d", "completeness", "correctness", "csdc_published")
    for k in scores:
        for end in ("_full", "_topk", "_boxes_full", "_boxes_topk", "_blackbox"): assert m[k + end] is None or 0 <= m[k + end] <= 1, k + end
    assert rec["n_images"] == dict(train=32, test=12, interventions=4) and rec["scale"] == "smoke"
    assert m["passes_full"] == m["passes_topk"] == m["passes_blackbox"] < m["pictures_full"] and m["attributions_full"] == 0 < m["attributions_blackbox"]
    assert m["mean_full"] is None and m["ts_full"] is None          # four classes have no pair of classes for TS: not measured, and so said
    (_, model), = records(tmp, "cub").items()
    assert m["top1_full"] == pytest.approx(model["metrics"]["top1"]) and m["top1_topk"] == pytest.approx(model["metrics"]["top1_topk"])
    for f in ("executed.ipynb", "figures/funnybirds.png", "figures/parts.png", "figures/thresholds.png", "topk_sum/parts.csv", "full_boxes/images.csv", "blackbox_map/scores.json"): assert (folder/f).exists(), f
    assert str(tmp) not in (folder/"run.json").read_text()


def test_tables_on_disk_give_the_record(done):
    from protoquant.funnybirds import Result
    folder, rec, _ = done
    r = Result.load(folder/"topk_sum")
    assert r.scores["d"] == pytest.approx(rec["metrics"]["d_topk"]) == pytest.approx(r.images.d.mean())
    assert len(r.parts) == 5*4 + r.images[r.images.measured].objects.sum()


def test_the_same_run_is_not_repeated(tmp, done):
    assert "--force runs it again" in run(tmp).stdout
    assert len(records(tmp, "cub")) == 1


def test_from_disk(tmp):
    "FunnyBirds' layout: the same test images and interventions as drawn ones, other training images (parts are missing)."
    from protoquant import toybirds
    toybirds.write_funnybirds(tmp/"data"/"FunnyBirds", 8, 3, classes=4, interventions_per_class=1)
    r = run(tmp, dataset="funnybirds", data_root=tmp/"data", classes=None, n_train_per_class=None, n_test_per_class=None)
    assert r.returncode == 0, r.stderr[-3000:]
    (_, rec), = [(f, x) for f, x in records(tmp).items() if x["parameters"]["dataset"] == "funnybirds"]
    assert rec["n_images"] == dict(train=32, test=12, interventions=4) and rec["scale"] == "small"
    (tmp/"data/FunnyBirds/test_interventions/1/000003/body_foot.png").unlink()
    r = run(tmp, dataset="funnybirds", data_root=tmp/"data", classes=None, n_train_per_class=None, n_test_per_class=None)
    assert r.returncode and "body_foot.png" in r.stderr + r.stdout


@pytest.mark.parametrize("params,says", [(dict(dataset="cub", data_root="nowhere", classes=None, n_train_per_class=None, n_test_per_class=None), "dataset toybirds"), (dict(dilation=4), "odd number"), (dict(topkk=3), "topk")])
def test_bad_parameters(tmp, params, says):
    r = run(tmp, **params)
    assert r.returncode and says in r.stderr + r.stdout
