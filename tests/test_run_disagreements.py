"""nbs/run_disagreements.ipynb through the command line, on a tiny ToyBirds: every variant measured, from files that can be read again."""
import pandas as pd
import pytest

from pieces import records, run_experiment
from protoquant.metrics import paired_bootstrap

pytest.importorskip("papermill")
FEW = dict(topk=3, batch_train_mode=8)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


def test_every_decision_has_its_number(tmp):
    r = run_experiment("disagreements", tmp, **FEW)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp, "disagreements").items()
    m, said = rec["metrics"], pd.read_csv(folder/"predictions.csv")
    right = {c: (said[c] == said.label).to_numpy() for c in said if c not in ("image", "label")}
    assert set(right) == {"base", "task_loss", "element_mean", "train_mode", "train_mode_undrifted", "trainable_codes", "lr_curve", "mixup", "projection", "limited", "removed_codes", "released",
                          "leaked_test_checkpoint", "leaked_released"}
    for n, v in right.items():
        assert m[f"top1_{n}"] == pytest.approx(100 * v.mean())
        beside = dict(removed_codes="limited", leaked_released="released").get(n, "base")
        if n != "base": assert [m[f"delta_{n}{e}"] for e in ("", "_low", "_high")] == pytest.approx(paired_bootstrap(v, right[beside]))
    assert m["top1_class_token"] is None and m["delta_class_token"] is None       # a CNN has none
    assert m["stage1_trainings"] == 9                                             # base, task loss, element mean, curve, mixup, train mode, released, two leaked
    assert rec["scale"] == "smoke" and rec["n_images"] == dict(train=24, val=8, test=12) and not list((tmp/"results").glob("cub/*"))
    assert "leaked" in (folder/"executed.ipynb").read_text() and (folder/"figures/disagreements.png").exists() and str(tmp) not in (folder/"run.json").read_text()


def test_the_same_run_is_read_back(tmp):
    before = records(tmp, "disagreements")
    r = run_experiment("disagreements", tmp, **FEW)
    assert r.returncode == 0 and "--force runs it again" in r.stdout and records(tmp, "disagreements") == before


def test_a_vit_has_a_class_token_and_nothing_that_train_mode_moves(tmp):
    r = run_experiment("disagreements", tmp, **FEW, backbone="test_vit", recipe="grounded", img_size=160, codebook_size=20)
    assert r.returncode == 0, r.stderr[-3000:]
    m = next(r["metrics"] for r in records(tmp, "disagreements").values() if r["parameters"]["backbone"] == "test_vit")
    assert m["top1_class_token"] is not None and m["delta_train_mode"] == 0 and m["top1_task_loss"] is None and "top1_train_mode_undrifted" not in m
