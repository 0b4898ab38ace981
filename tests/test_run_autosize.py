"""nbs/run_autosize.ipynb through the command line, on a tiny ToyBirds; the choice against a slow loop."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pieces import randn, records, run_experiment
from protoquant.core import ConfigError
from protoquant.metrics import calibrated_losses, choose_size
from protoquant.training import calibrated_loss


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 30), st.integers(1, 6), st.floats(0, 3), st.integers(0, 99))
def test_choice_against_a_loop(n, k, slack, seed):
    g = np.random.default_rng(seed)
    losses = {2**i: g.gamma(1., 1., n) for i in g.permutation(k)}
    sizes = sorted(losses)
    mean = lambda v: sum(v) / len(v)
    best = sizes[0]
    for m in sizes:
        if mean(losses[m]) < mean(losses[best]): best = m
    want = None
    for m in sizes:
        d = [a - b for a, b in zip(losses[m], losses[best])]
        se = (sum((x - mean(d))**2 for x in d) / (n - 1) / n)**.5
        if want is None and mean(d) <= slack * se + 1e-12: want = m
    c = choose_size(losses, "smallest", slack)
    assert c.size == want and c.by["lowest"] == best == choose_size(losses).size == choose_size(losses, "smallest", 0).size and list(c.table["size"]) == sizes
    assert want <= c.by["middle"] in set(c.table["size"][c.table.near]) and choose_size({m: l * 7 for m, l in losses.items()}, "smallest", slack).size == want      # the unit of the loss does not matter


def test_equal_sizes_give_the_smallest():
    assert choose_size({8: np.ones(5), 2: np.ones(5), 4: np.ones(5)}).size == 2


def test_the_mean_is_the_calibrated_loss():
    l, y = randn(30, 3), torch.arange(30) % 3
    assert float(calibrated_losses(l, y, 0).mean()) == pytest.approx(calibrated_loss(l, y), abs=1e-6)


def test_losses_against_a_loop():
    l, y = randn(12, 3, seed=1), torch.arange(12) % 3
    target = [[1 - .2 + .2 / 3 if c == int(k) else .2 / 3 for c in range(3)] for k in y]
    at = lambda a: [-sum(t * float((a * row).log_softmax(0)[c]) for c, t in enumerate(ts)) for row, ts in zip(l, target)]
    want = min((at(float(a)) for a in torch.logspace(-1, 1.48, 60)), key=sum)
    assert calibrated_losses(l, y, .2).tolist() == pytest.approx(want, abs=1e-5)


def test_right_everywhere_is_not_the_end():
    y = torch.arange(30) % 3
    even, weak = 9. * torch.eye(3)[y], 9. * torch.eye(3)[y] * torch.linspace(.3, 1.7, 30)[:, None]
    assert choose_size({5: calibrated_losses(weak, y, 0), 50: calibrated_losses(even, y, 0)}).size == 5       # both 0: nothing speaks against the smaller
    assert choose_size({5: calibrated_losses(weak, y), 50: calibrated_losses(even, y)}).size == 50


@pytest.mark.parametrize("losses,says", [({}, "no codebook size"), ({1: [1., 2.], 2: [1.]}, "same held-out"), ({1: [1.]}, "two at least"), ({1: [1., float("nan")]}, "not finite")])
def test_losses_that_cannot_be_compared_are_refused(losses, says):
    with pytest.raises(ConfigError, match=says): choose_size(losses)
    with pytest.raises(ConfigError, match="not one of"): choose_size({1: [1., 2.]}, "best")


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    pytest.importorskip("papermill")
    return tmp_path_factory.mktemp("runs")


def test_a_sweep_chooses_without_the_test_images(tmp):
    r = run_experiment("autosize", tmp, codebook_size=None, sizes="6,12,24,100000")
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp, "autosize").items()
    m, seen, test = rec["metrics"], pd.read_csv(folder/"held_out.csv"), pd.read_csv(folder/"test.csv")
    assert set(seen["size"]) == {6, 12, 24} and len(seen) == 3 * 8 and rec["n_images"] == dict(train=24, val=8, test=12) and "top1_M100000" not in m
    choice = choose_size({s: t.loss for s, t in seen.groupby("size")})
    top1 = {s: 100 * test[f"M{s}"].mean() for s in (6, 12, 24)}
    assert m["chosen_size"] == choice.size == m["size_lowest"] and m["size_smallest"] == choice.by["smallest"] and m["top1_chosen"] == pytest.approx(top1[choice.size]) and m["top1_best"] == pytest.approx(max(top1.values()))
    assert m["gap"] == pytest.approx(m["top1_best"] - m["top1_chosen"]) and m["gap"] >= 0 and m["gap_low"] <= m["gap"] <= m["gap_high"]
    for s, t in seen.groupby("size"): assert m[f"criterion_M{s}"] == pytest.approx(t.loss.mean()) and m[f"val_top1_M{s}"] == pytest.approx(100 * t.right.mean()) and m[f"top1_M{s}"] == pytest.approx(top1[s])
    assert "100000 codes are left out" in (folder/"executed.ipynb").read_text() and (folder/"figures/autosize.png").exists() and str(tmp) not in (folder/"run.json").read_text()


def test_parts_hold_out_every_training_image_once(tmp):
    r = run_experiment("autosize", tmp, codebook_size=None, sizes="6,12", parts=2, recipe="paper")
    assert r.returncode == 0, r.stderr[-3000:]
    folder = next(f for f, r in records(tmp, "autosize").items() if r["parameters"]["parts"] == 2)
    seen = pd.read_csv(folder/"held_out.csv")
    assert len(seen) == 2 * 32 and seen[seen["size"] == 6].image.is_unique and records(tmp, "autosize")[folder]["metrics"]["held_out"] == 32


def test_sizes_that_cannot_be_are_refused(tmp):
    before = records(tmp, "autosize")
    for bad, says in ((dict(sizes="6,x"), "whole numbers"), (dict(sizes="0,6"), "at least one code"), (dict(sizes="90000"), "fewer than the smallest"), (dict(sizes="6", parts=1), "2 and more"), (dict(sizes="6", rule="best"), "not one of")):
        r = run_experiment("autosize", tmp, codebook_size=None, **bad)
        assert r.returncode and says in r.stderr
    assert records(tmp, "autosize") == before
