"""Guards of protoquant.head: Eq. 6, 8 and 10 against loops; probabilities, presence and weights as properties."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import head as H
from protoquant.core import ConfigError
from protoquant.features import Tokens
from pieces import book, gen, labelled, randn
from test_codebook import KINDS, slow_similarity


def slow_match(z, b, T):
    "Eq. 6 for one token: a softmax over all codes, the silent ones in the denominator."
    e = [math.exp(slow_similarity(z, c, b.space) / T) for c in [*b.codes, *b.silent]]
    return [x / sum(e) for x in e[:len(b)]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("silent", (0, 2))
@pytest.mark.parametrize("T", (.1, 1.))
def test_matching_and_pooling_eq_6_and_8(kind, silent, T):
    b, z = book(4, 5, kind, silent), randn(2, 3, 5, seed=20)
    p, s = H.match(z, b, T), H.presence(z, b, T)
    want = [[slow_match(z[i, j], b, T) for j in range(3)] for i in range(2)]
    torch.testing.assert_close(p, torch.tensor(want), atol=1e-4, rtol=1e-3)
    pooled = [[max(want[i][j][m] for j in range(3)) for m in range(4)] for i in range(2)]
    torch.testing.assert_close(s, torch.tensor(pooled), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(H.pool_presence(p), s, atol=1e-6, rtol=1e-4)


def test_logits_eq_10():
    lin, s = H.NonNegLinear(3, 5, gen(), 0., 1.).requires_grad_(False), torch.rand(4, 5, generator=gen(1))
    out = lin(s)
    for i in range(4):
        for k in range(3):
            assert float(out[i, k]) == pytest.approx(sum(max(0., float(lin.raw[k, m])) * float(s[i, m]) for m in range(5)), abs=1e-5)
    part = H.contributions(s, lin.weight, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(part.sum(1), out[torch.arange(4), torch.tensor([0, 1, 2, 0])])


@settings(max_examples=40, deadline=None)
@given(m=st.integers(1, 9), silent=st.integers(0, 5), kind=st.sampled_from(KINDS), T=st.floats(.02, 2), seed=st.integers(0, 99))
def test_probabilities_sum_to_one_with_the_silent_codes(m, silent, kind, T, seed):
    b, z = book(m, 6, kind, silent, seed), randn(2, 4, 6, seed=seed + 60)
    p = H.match(z, b, T)
    every = (b.similarities(z) / T).softmax(-1)
    torch.testing.assert_close(p.sum(-1) + every[..., m:].sum(-1), torch.ones(2, 4), atol=1e-5, rtol=0)
    assert (p >= 0).all() and ((p.sum(-1) < 1).all() or not silent or T < .1)
    s = H.presence(z, b, T)
    assert (s >= 0).all() and (s <= 1 + 1e-6).all()
    torch.testing.assert_close(s, p.amax(1), atol=1e-6, rtol=1e-4)


@settings(max_examples=15, deadline=None)
@given(budget=st.integers(1, 100_000), silent=st.integers(0, 3), kind=st.sampled_from(KINDS))
def test_presence_in_any_chunks_is_the_same(budget, silent, kind):
    t, b = labelled(per_class=3), book(7, 12, kind, silent)
    whole = H.presence(t.read(slice(None)), b, .1)
    torch.testing.assert_close(H.presence_of(t, b, .1, budget=budget), whole, atol=1e-6, rtol=1e-4)
    assert not H.presence_of(t, b, .1).requires_grad and (whole <= 1).all()


def test_presence_stays_finite_at_small_temperatures():
    t, b = labelled(per_class=2), book(6, 12)
    for T in (1e-3, 1e-2):
        s = H.presence_of(t, b, T)
        assert torch.isfinite(s).all() and (s >= 0).all() and (s <= 1 + 1e-6).all()
        torch.testing.assert_close(H.presence(t.read(slice(None)), b, T), s, atol=1e-4, rtol=1e-2)


def test_chunks_over_columns_of_the_log_sum_exp():
    x = randn(5, 10) * 50
    torch.testing.assert_close(H._logsumexp(x, 3), x.logsumexp(1))


@settings(max_examples=30, deadline=None)
@given(k=st.integers(1, 5), m=st.integers(1, 8), mean=st.floats(-2, 2), seed=st.integers(0, 99))
def test_weights_are_never_negative_and_masked_ones_stay_zero(k, m, mean, seed):
    lin = H.NonNegLinear(k, m, gen(seed), mean, 1.)
    lin.mask &= torch.rand(k, m, generator=gen(seed + 1)) > .4
    opt, s = torch.optim.AdamW([lin.raw], lr=.5, weight_decay=.1), torch.rand(6, m, generator=gen(seed))
    for _ in range(3):
        opt.zero_grad(); (lin(s) - randn(6, k, seed=seed)).pow(2).sum().backward(); opt.step()
    assert (lin.weight >= 0).all() and (lin.weight[~lin.mask] == 0).all()
    again = H.NonNegLinear.of(lin.weight)
    assert torch.equal(again.weight, lin.weight) and len(list(again.parameters())) == 1


def test_zero_weights_stay_zero_under_training():
    w = torch.tensor([[1., 0., 2.]])
    lin = H.NonNegLinear.of(w)
    opt = torch.optim.AdamW([lin.raw], lr=.1)
    for _ in range(5): opt.zero_grad(); (-lin(torch.ones(1, 3))).sum().backward(); opt.step()
    assert lin.weight[0, 1].item() == 0 and lin.weight[0, 0].item() > 1


@pytest.mark.parametrize("make, words", [
    (lambda: H.match(randn(1, 4), book(2, 4), 0.), "temperature=0"), (lambda: H.presence(randn(1, 1, 4), book(2, 4), -1), "temperature=-1"),
    (lambda: H.presence_of(labelled(), book(2, 12), math.nan), "temperature=nan"), (lambda: H.presence_of(labelled(), book(2, 5)), "12 channels, the codes 5"),
    (lambda: H.NonNegLinear(0, 3), "empty"), (lambda: H.NonNegLinear(3, 0), "empty"), (lambda: H.NonNegLinear.of(torch.tensor([[-1.]])), "negative"),
])
def test_bad_input(make, words):
    with pytest.raises(ConfigError, match=words): make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_agrees_with_the_cpu():
    "Tolerance: presence 1e-4."
    t = labelled(per_class=40)
    cpu, gpu = (H.presence_of(t, book(30, 12, "basis", 3), .1, d) for d in ("cpu", "cuda"))
    torch.testing.assert_close(gpu, cpu, atol=1e-4, rtol=0)
