"""Duplicates, reports and stability: oracles, properties, bad input."""
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from pieces import book, randn
from protoquant import datasets, stability as stab
from protoquant.adapters import Activations
from protoquant.core import ConfigError
from protoquant.features import Tokens
from protoquant.metrics import codebook_report, duplicate_codes, duplicate_groups


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 12), st.sampled_from(["plain", "centred", "basis", "damped"]), st.integers(0, 3), st.integers(1, 5), st.floats(-1, .99), st.integers(0, 50))
def test_duplicates_against_a_loop(m, kind, silent, piece, threshold, seed):
    b = book(m, 6, kind, silent, seed)
    u = torch.stack([b.space(c) for c in b.codes.detach()])
    want = {(i, j) for i in range(m) for j in range(i + 1, m) if float(u[i] @ u[j]) > threshold + 1e-5}
    near = {(i, j) for i in range(m) for j in range(i + 1, m) if abs(float(u[i] @ u[j]) - threshold) <= 1e-5}
    pairs = duplicate_codes(b, threshold, piece)
    got = set(zip(pairs.a, pairs.b))
    assert want <= got <= want | near and list(pairs.cosine) == sorted(pairs.cosine, reverse=True)
    groups = duplicate_groups(pairs)
    assert sorted(x for g in groups for x in g) == sorted({x for p in got for x in p})
    of = {x: i for i, g in enumerate(groups) for x in g}
    assert all(of[a] == of[b] for a, b in got)


def test_a_report_of_codes_that_are_tokens():
    t = Tokens(randn(6, 4, 8), torch.arange(6) % 2, (2, 2))
    from protoquant.codebook import Codebook
    codes = torch.stack([t.read([i])[0, 1] for i in range(4)])
    r = codebook_report(Codebook(codes), t, torch.eye(4)[:2])
    assert r["grounding_cosine"] == pytest.approx(1, abs=1e-3) and r["codes"] == 4 and r["global_size"] == 2 and r["local_size"] == 1 and r["sparsity"] == .75
    assert r["codes_used"] + r["codes_dead"] == 4 and 1 <= r["perplexity"] <= 4


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99), st.data())
def test_kept_share_against_sets(b, m, seed, data):
    n = data.draw(st.integers(1, m))
    x, y = randn(b, m, seed=seed), randn(b, m, seed=seed + 1)
    got = stab.kept_share(x, y, n)
    for i in range(b):
        top = lambda s: set(sorted(range(m), key=lambda j: (-float(s[i, j]), j))[:n])
        assert float(got[i]) == pytest.approx(len(top(x) & top(y)) / n)
    assert (stab.kept_share(x, x, n) == 1).all() and torch.equal(stab.kept_share(x, y, n), stab.kept_share(y, x, n))


def test_ties_go_to_the_lower_number():
    assert stab.top_set(torch.zeros(1, 4), 2).tolist() == [[True, True, False, False]]


class Cells:
    "Prototype m is the grey level of cell m; weights of the last three are not positive."
    size, grid, mean, std = (32, 32), (4, 4), (0., 0., 0.), (1., 1., 1.)
    class_weights = torch.cat([torch.eye(13), torch.zeros(13, 3)], 1)
    def activations(self, x):
        maps = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 4) * torch.eye(16).reshape(16, 4, 4)
        s = maps.amax((2, 3))
        return Activations(maps, s, s @ self.class_weights.T)


@pytest.fixture(scope="module")
def birds():
    return datasets.load("toybirds", classes=3, n_train_per_class=1, n_test_per_class=3).test


def test_unused_prototypes_are_not_ranked(birds):
    class Loud(Cells):
        def activations(self, x):
            a = super().activations(x)
            noise = a.presence.clone()
            noise[:, 13:] = torch.rand(len(x), 3) + 5        # the loudest, but no class uses them
            return Activations(a.maps, noise, a.logits)
    same = {"nothing": lambda s, i: s.image(i)}
    assert (stab.stability(Loud(), birds, same, n=5).kept == 1).all()


@pytest.mark.parametrize("by", ["presence", "contribution"])
def test_batches_and_order_do_not_matter(birds, by):
    run = lambda **kw: stab.stability(Cells(), birds, {"dark": stab.brightness(.6), "moved": stab.shift(.1)}, n=3, by=by, **kw).sort_values(["id", "change"], ignore_index=True)
    a = run(batch=32)
    pd.testing.assert_frame_equal(a, run(batch=2, rows=np.random.default_rng(0).permutation(len(birds))))
    assert (a.kept * 3).round(4).isin([0, 1, 2, 3]).all()
    assert len(a) == 2 * len(birds)


def test_a_shift_of_a_box_crop_shows_the_photograph_beyond_it(tmp_path):
    from protoquant import toybirds
    toybirds.write_cub(tmp_path/"CUB_200_2011", n_train_per_class=1, n_test_per_class=1, classes=2, seed=0)
    images = datasets.load("cub", tmp_path).test
    x0, y0, x1, y1 = (int(v) for v in images.crop_box(0))
    full = np.asarray(images.full_image(0))
    d = round(.1 * (x1 - x0)), round(.1 * (y1 - y0))
    got = np.asarray(stab.shift(.1)(images, 0))
    assert got.shape == np.asarray(images.image(0)).shape
    w, h = min(x1 + d[0], full.shape[1]) - x0 - d[0], min(y1 + d[1], full.shape[0]) - y0 - d[1]
    assert (got[:h, :w] == full[y0 + d[1]:y0 + d[1] + h, x0 + d[0]:x0 + d[0] + w]).all()


def test_a_class_with_one_prototype_is_judged_by_that_one(birds):
    class Fickle(Cells):      # each class has one prototype; the others' presence changes wildly
        def activations(self, x):
            a = super().activations(x)
            said = a.logits.argmax(1)
            s = torch.rand(a.presence.shape).scatter(1, said[:, None], 9.)
            return Activations(a.maps, s, a.logits)
    rows = stab.stability(Fickle(), birds, {"nothing": lambda s, i: s.image(i)}, n=5, by="contribution")
    assert (rows.kept == 1).all()


@pytest.mark.parametrize("f,says", [(lambda: stab.brightness(0), "above 0"), (lambda: stab.jpeg(100), "1 to 95"), (lambda: stab.kept_share(torch.zeros(1, 3), torch.zeros(1, 4)), "same shape"),
                                    (lambda: stab.top_set(torch.zeros(1, 3), 4), "3 prototypes"), (lambda: duplicate_codes(book(2, 3), 1.5), "between -1 and 1")])
def test_bad_input(f, says):
    with pytest.raises(ConfigError, match=says): f()


def test_bad_models(birds):
    with pytest.raises(ConfigError, match="presence"): stab.stability(Cells(), birds, by="weight")
    class Wrong(Cells): grid = (5, 5)
    with pytest.raises(ConfigError, match="5, 5"): stab.stability(Wrong(), birds)
