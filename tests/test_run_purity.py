"""nbs/run_purity.ipynb through the command line, on a tiny ToyBirds: a model trained on demand, its purity, the files a number can be traced through."""
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

import pieces
from pieces import run_experiment

pytest.importorskip("papermill")
TINY = dict(dataset="toybirds", classes=4, n_train_per_class=8, n_test_per_class=3, backbone="test_resnet", weights="random", codebook_size=24, topk=3, epochs_stage1=3, epochs_stage2=6,
            val_fraction=.25)


run = partial(run_experiment, "purity", tiny=TINY)
records = lambda tmp, experiment="purity": pieces.records(tmp, experiment)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_a_run_leaves_numbers_that_can_be_traced(tmp):
    from protoquant import datasets
    from protoquant.purity import purity_of, read_projection
    r = run(tmp)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp).items()
    (model, _), = records(tmp, "cub").items()                     # it was trained on the way
    m = rec["metrics"]
    assert rec["data"]["model"] == model.name and rec["n_images"] == dict(train=32, test=12) and rec["scale"] == "smoke"
    assert m["prototypes_full"] + m["prototypes_dropped_full"] == 24 and m["prototypes_topk"] <= 12
    toys = datasets.load("toybirds", classes=4, n_train_per_class=8, n_test_per_class=3)
    for which in ("full", "topk"):
        for split, images in (("train", toys.train), ("test", toys.test)):
            table = pd.read_csv(folder/f"prototypes_{which}_{split}.csv")
            again = purity_of(read_projection(folder/f"projection_{which}_{split}.csv", images, 160), images)
            assert len(table) == m[f"prototypes_{which}"] == len(again) and table.prototype.tolist() == again.table.prototype.tolist()
            assert np.allclose(table.purity, again.table.purity, atol=1e-12) and 0 <= m[f"purity_{split}_{which}"] <= 1
            assert m[f"purity_{split}_{which}"] == pytest.approx(table.purity.mean()) and m[f"purity_{split}_sd_{which}"] == pytest.approx(table.purity.std(ddof=0))
            assert m[f"pure_{split}_{which}"] == (table.purity > .5).sum() and (table.patches == 10).all()
    for f in ("executed.ipynb", "figures/purity.png", "figures/patches.png"): assert (folder/f).exists()
    assert str(tmp) not in (folder/"run.json").read_text()


def test_the_same_run_is_not_repeated(tmp):
    (folder, before), = records(tmp).items()
    assert "--force runs it again" in run(tmp).stdout
    assert records(tmp) == {folder: before} and len(records(tmp, "cub")) == 1


def test_images_without_parts_stop_the_run_before_anything_is_trained(tmp):
    root = tmp/"plain"
    for split in ("train", "test"):
        (root/split/"a").mkdir(parents=True); Image.new("RGB", (40, 40)).save(root/split/"a"/"1.png")
    r = run(tmp, dataset="imagefolder", data_root=root, classes=None, n_train_per_class=None, n_test_per_class=None)
    assert r.returncode and "have no part annotation" in r.stderr
    assert len(records(tmp, "cub")) == 1 == len(records(tmp))
