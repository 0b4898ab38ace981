"""Guards of protoquant.pruning: what each kind of pruning changes and what it leaves, exactly."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import pruning as P
from protoquant.core import ConfigError
from protoquant.head import NonNegLinear, presence
from protoquant.recipes import get_recipe
from test_codebook import KINDS
from pieces import book, gen, labelled, randn

cases = dict(k=st.integers(1, 5), m=st.integers(2, 12), seed=st.integers(0, 99))


def layer(k, m, seed, mean=.2): return NonNegLinear(k, m, gen(seed), mean, 1.)


@settings(max_examples=50, deadline=None)
@given(top=st.integers(1, 12), **cases)
def test_logical_pruning_keeps_the_largest_weights_and_touches_nothing_else(top, k, m, seed):
    top = min(top, m)
    h = layer(k, m, seed)
    before = h.state_dict()["raw"].clone()
    p = P.logical_prune(h, top)
    for row, kept in zip(h.weight.tolist(), p.weight.tolist()):
        order = sorted(range(m), key=lambda j: -row[j])[:top]
        assert kept == [w if j in order and w > 0 else 0. for j, w in enumerate(row)]
    assert torch.equal(h.raw, before) and h.mask.all()              # the given layer is as it was
    assert ((p.weight == h.weight) | (p.weight == 0)).all() and ((p.weight > 0).sum(1) <= top).all()
    assert torch.equal(P.logical_prune(p, top).weight, p.weight)
    assert torch.equal(P.logical_prune(h, m).weight, h.weight)


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), T=st.floats(.05, 1), **cases)
def test_logical_pruning_never_touches_presence_and_exact_physical_pruning_never_logits(kind, T, k, m, seed):
    b, h, z = book(m, 6, kind, seed=seed), layer(k, m, seed), randn(4, 3, 6, seed=seed + 1)
    p = P.logical_prune(h, 1)
    s = presence(z, b, T)
    if not (p.weight > 0).any(): return
    b2, h2, keep = P.physical_prune(b, p, exact=True)
    s2 = presence(z, b2, T)
    torch.testing.assert_close(s2, s[:, keep], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(h2(s2), p(s), atol=1e-4, rtol=1e-4)
    assert len(b2) == len(keep) == int((p.weight > 0).any(0).sum()) and len(b2) + len(b2.silent) == m
    b3, h3, keep3 = P.physical_prune(b2, P.logical_prune(h2, 1), exact=True)      # twice is once
    torch.testing.assert_close(h3(presence(z, b3, T)), h2(s2), atol=1e-4, rtol=1e-4)


def test_pruning_by_contribution_ranks_by_weight_times_mean_presence():
    h, s, y = layer(3, 6, 1), torch.rand(9, 6, generator=gen(2)), torch.arange(9) % 3
    seen = P.class_presence(s, y, 3)
    for c in range(3):
        assert seen[c].tolist() == pytest.approx([float(sum(s[i, m] for i in range(9) if y[i] == c)) / 3 for m in range(6)], abs=1e-6)
    p = P.logical_prune(h, 2, seen)
    for c in range(3):
        gain = [h.weight[c, m].item() * seen[c, m].item() for m in range(6)]
        want = [m for m in sorted(range(6), key=lambda m: -gain[m])[:2] if gain[m] > 0]
        assert sorted((p.weight[c] > 0).nonzero().flatten().tolist()) == sorted(want)
    assert ((p.weight == h.weight) | (p.weight == 0)).all()
    with pytest.raises(ConfigError, match="topk=7"): P.logical_prune(h, 7, seen)


def test_the_papers_physical_pruning_changes_logits():
    "Disagreement 13: the denominator loses terms, so presence can only grow."
    b, z = book(30, 6), randn(10, 4, 6, seed=4)
    p = P.logical_prune(layer(4, 30, 1), 2)
    b2, h2, keep = P.physical_prune(b, p, exact=False)
    old, new = presence(z, b, .1), presence(z, b2, .1)
    assert len(keep) < 30 and not len(b2.silent) and (new >= old[:, keep] - 1e-6).all()
    assert (h2(new) - p(old)).abs().max() > .05


@pytest.mark.parametrize("k", (0, -1, 8, 100))
def test_impossible_k(k):
    with pytest.raises(ConfigError, match=f"topk={k}: between 1 and the 7 codes"): P.logical_prune(layer(3, 7, 0), k)


def test_nothing_left():
    with pytest.raises(ConfigError, match="nothing would be left"): P.physical_prune(book(5, 4), layer(3, 5, 0, mean=-50.))


def test_min_weight():
    h = NonNegLinear.of(torch.tensor([[.5, .05, 0.], [0., .08, 0.]]))
    assert P.active_codes(h.weight).tolist() == [True, True, False] and P.active_codes(h.weight, .1).tolist() == [True, False, False]
    b2, h2, keep = P.physical_prune(book(3, 4), h, min_weight=.1)
    assert keep.tolist() == [0] and h2.weight.tolist() == [[.5], [0.]]


@pytest.mark.parametrize("codes", (False, True))
def test_tuning_keeps_the_mask_and_the_silent_codes(codes):
    train, val = labelled(), labelled(per_class=4, seed=2)
    r = get_recipe("paper", epochs_tune=3, tune_codebook=codes, batch_size=16, warmup=1)
    p = P.logical_prune(layer(4, 10, 3), 2)
    b, h, _ = P.physical_prune(book(10, 12), p)
    codes_before, raw = b.codes.detach().clone(), h.raw.detach().clone()
    tuned, fit = P.tune(train, val, b, h, .2, r)
    assert ((fit.head.weight > 0) <= (h.weight > 0)).all() and torch.equal(fit.head.mask, h.mask)
    assert torch.equal(h.raw, raw) and torch.equal(b.codes, codes_before)           # what was given is as it was
    assert torch.equal(tuned.silent, b.silent) and torch.equal(tuned.codes, codes_before) != codes
    assert {r["stage"] for r in fit.history} == {3} and (fit.last.weight >= 0).all()
