"""nbs/run_blackbox.ipynb through the command line, on a tiny ToyBirds with a tiny network: fine-tuning, interruption, the record, and the file that a frozen experiment takes."""
import os
from pathlib import Path

import pandas as pd
import pytest
import torch

import pieces
from pieces import run_experiment

pytest.importorskip("papermill")
ROOT = Path(__file__).resolve().parent.parent
TINY = dict(dataset="toybirds", classes=3, n_train_per_class=8, n_test_per_class=2, backbone="test_resnet", weights="random", img_size=32, epochs=3, warmup=1, micro_batch=4, val_fraction=.25)


run = lambda tmp, *more, experiment="blackbox", **params: run_experiment(experiment, tmp, *more, tiny=TINY, **params)
records = lambda tmp, experiment="blackbox": pieces.records(tmp, experiment)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def full(tmp):
    r = run(tmp)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp).items()
    return r, folder, rec


def test_a_run_leaves_a_record_a_file_and_no_state(tmp, full):
    from protoquant.blackbox import read_card
    r, folder, rec = full
    m = rec["metrics"]
    assert {"top1_blackbox", "top1_blackbox_last", "top5_blackbox", "val_top1", "selected_epoch", "seconds_epoch", "batch_used"} <= set(m)
    assert rec["n_images"] == dict(train=18, val=6, test=6) and rec["scale"] == "smoke" and rec["recipe"]["epochs"] == 3 and rec["recipe"]["micro_batch"] == 4
    assert {p.name for p in folder.iterdir()} == {"run.json", "executed.ipynb", "model.safetensors", "history.csv", "figures"}
    h = pd.read_csv(folder/"history.csv")
    best = h[h.metric == "val_top1"].value.max()
    assert m["val_top1"] == pytest.approx(best) and sorted(h.epoch.unique()) == [0, 1, 2]
    card = read_card(folder/"model.safetensors")
    assert card["metrics"]["top1_blackbox"] == pytest.approx(m["top1_blackbox"]) and card["val_fraction"] == .25 and card["test"] == rec["data"]["test"] and card["source_hash"] == rec["weights"]
    assert "black box, its own head" in r.stdout and str(tmp) not in (folder/"run.json").read_text()


def test_the_same_run_is_not_repeated(tmp, full):
    _, folder, rec = full
    assert "--force runs it again" in run(tmp).stdout
    assert records(tmp)[folder] == rec


def test_a_frozen_experiment_takes_the_file(tmp, full):
    _, folder, rec = full
    r = run(tmp, experiment="cub", weights=folder/"model.safetensors", epochs=None, warmup=None, micro_batch=None, codebook_size=12, topk=2, epochs_stage1=2, epochs_stage2=3)
    assert r.returncode == 0, r.stderr[-3000:]
    (_, cub), = records(tmp, "cub").items()
    assert cub["weights"] == rec["made"]
    assert cub["metrics"]["top1_blackbox"] == pytest.approx(rec["metrics"]["top1_blackbox"], abs=100 / 6 + .1)      # stored features are in half precision


def test_an_interrupted_run_continues_to_the_same_result(tmp, full, tmp_path):
    "A sitecustomize of the kernel ends the process after the second epoch's state, as a power cut would."
    _, folder, rec = full
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"sitecustomize.py").write_text("import os\nfrom protoquant import blackbox as b\nold = b.Trainer.save_state\n"
        "def save(self, path, val, done, *a):\n    old(self, path, val, done, *a)\n    if done == 2: os._exit(9)\nb.Trainer.save_state = save\n")
    path = os.pathsep.join([str(tmp_path/"site"), str(ROOT)])
    broken = run(tmp_path, env=dict(PYTHONPATH=path))
    assert broken.returncode and not records(tmp_path)
    state, = (tmp_path/"results").rglob("state.pt")
    assert torch.load(state, weights_only=True)["done"] == 2
    assert run(tmp_path).returncode == 0
    (other, again), = records(tmp_path).items()
    drop = lambda m: {k: v for k, v in m.items() if "second" not in k and k != "epochs_resumed"}
    assert other.name == folder.name and again["metrics"]["epochs_resumed"] == 2 and drop(again["metrics"]) == drop(rec["metrics"]) and not state.exists()
    from safetensors.torch import load_file
    a, b = load_file(folder/"model.safetensors"), load_file(other/"model.safetensors")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_only_the_head_of_weights_that_know_other_classes(tmp, full):
    _, folder, _ = full
    r = run(tmp, weights=folder/"model.safetensors", classes=4, mode="head", epochs=1, mixup=0, cutmix=0, augment="none")
    assert r.returncode == 0, r.stderr[-3000:]
    rec, = [r for r in records(tmp).values() if r["parameters"]["classes"] == 4]
    assert rec["recipe"]["mode"] == "head" and rec["parameters"]["weights"] == ".../model.safetensors"


@pytest.mark.parametrize("params,says", [(dict(optimizer="adam"), "Did you mean adamw"), (dict(lr=1e30, optimizer="sgd", warmup=0), "training has diverged")])
def test_mistakes_stop_the_run_with_what_to_do(tmp, full, params, says):
    before = len(records(tmp))
    r = run(tmp, **params)
    assert r.returncode and says in r.stderr, r.stderr[-1500:]
    assert len(records(tmp)) == before
