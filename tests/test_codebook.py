"""Guards of protoquant.codebook: Eq. 2-4 against loops, k-means and projection as properties, memory."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import codebook as C
from protoquant.core import ConfigError, DataError
from protoquant.features import Tokens
from pieces import book, gen, labelled, python, randn, space

KINDS = ("plain", "centred", "basis", "damped")


def slow_similarity(z, c, s):
    "What a token counts for a code, in plain Python: the cosine, less where the token is short and the space damps."
    return slow_cosine(z, c, s, float(s.damping))


def slow_cosine(z, c, s, damping=0.):
    "Cosine of two vectors around a centre, in a subspace, in plain Python."
    def inside(v):
        v = [float(a) - float(b) for a, b in zip(v, s.center)]
        return [sum(v[i] * float(s.basis[i, r]) for i in range(len(v))) for r in range(s.basis.shape[1])] if s.basis.shape[1] else v
    a, b = inside(z), inside(c)
    return sum(x * y for x, y in zip(a, b)) / ((math.sqrt(sum(x * x for x in a)) + damping) * math.sqrt(sum(y * y for y in b)))


# -- Eq. 2-4

@pytest.mark.parametrize("kind", KINDS)
def test_similarity_and_assignment_eq_3(kind):
    b, z = book(5, 6, kind), randn(2, 4, 6, seed=9)
    sim, idx = b.similarities(z), b.assign(z)
    for i in range(2):
        for j in range(4):
            want = [slow_similarity(z[i, j], c, b.space) for c in b.codes]
            assert sim[i, j].tolist() == pytest.approx(want, abs=1e-5)
            assert int(idx[i, j]) == max(range(5), key=want.__getitem__)


@pytest.mark.parametrize("mean", ("tokens", "elements"))
def test_codebook_loss_eq_4(mean):
    z, codes, idx = randn(7, 4).requires_grad_(), randn(3, 4, seed=1).requires_grad_(), torch.tensor([0, 1, 2, 1, 0, 0, 1])
    want = sum((z[n, c].item() - codes[idx[n], c].item())**2 for n in range(7) for c in range(4)) / (7 if mean == "tokens" else 28)
    loss = C.codebook_loss(z, codes, idx, mean)
    assert loss.item() == pytest.approx(want, rel=1e-5)
    loss.backward()
    assert z.grad is None and codes.grad is not None


def test_gradient_of_eq_4_vanishes_where_a_code_is_the_mean_of_its_tokens():
    z, idx = randn(20, 4), torch.arange(20) % 3
    codes = torch.stack([z[idx == m].mean(0) for m in range(3)]).requires_grad_()
    C.codebook_loss(z, codes, idx).backward()
    assert codes.grad.abs().max() < 1e-6


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 9), silent=st.integers(0, 4), kind=st.sampled_from(KINDS), seed=st.integers(0, 99))
def test_quantise_gives_codes_and_never_silent_ones(m, silent, kind, seed):
    b, z = book(m, 6, kind, silent, seed), randn(3, 5, 6, seed=seed + 50)
    q = b.quantise(z)
    assert q.shape == z.shape
    assert all(any(torch.equal(t, c) for c in b.codes) for t in q.flatten(0, 1))
    assert int(b.assign(z).max()) < m and b.similarities(z).shape[-1] == m + silent


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(("centred", "basis")), scale=st.floats(.1, 10), seed=st.integers(0, 99))
def test_cosine_around_a_centre_ignores_lengths_and_a_common_shift(kind, scale, seed):
    s, z, c = space(kind, 6, seed), randn(4, 6, seed=seed + 7), randn(3, 6, seed=seed + 8)
    b = C.Codebook(c, s)
    long = s.center + scale * (z - s.center)
    torch.testing.assert_close(b.similarities(long), b.similarities(z), atol=1e-4, rtol=0)
    shift = randn(6, seed=seed + 9)
    moved = C.Codebook(c + shift, C.Space(6, s.center + shift, s.basis))
    torch.testing.assert_close(moved.similarities(z + shift), b.similarities(z), atol=1e-4, rtol=0)


def test_a_zero_token_has_no_similarity_and_no_nan():
    assert torch.equal(book(3, 4).similarities(torch.zeros(1, 4)), torch.zeros(1, 3))


def test_orthogonal_codes_as_published():
    few, many = C.orthogonal_codes(4, 6, gen()), C.orthogonal_codes(40, 6, gen())
    torch.testing.assert_close(few @ few.T, torch.eye(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(many.T @ many, torch.eye(6), atol=1e-5, rtol=0)
    assert float(many.norm(dim=1).mean()) == pytest.approx(math.sqrt(6 / 40), rel=.05)


@pytest.mark.parametrize("make, words", [
    (lambda: C.Codebook(torch.zeros(0, 4)), "at least one code"), (lambda: C.Codebook(torch.zeros(4)), "at least one code"),
    (lambda: C.Codebook(torch.tensor([[1., math.nan]])), "NaN"), (lambda: book(2, 4).assign(torch.zeros(3, 5)), "5 channels, the codes 4"),
    (lambda: C.Space(4, torch.zeros(3)), "4 channels"), (lambda: C.orthogonal_codes(0, 4, gen()), "codebook_size=0"),
    (lambda: C.principal_space(labelled(), 0), "rank=0"), (lambda: C.principal_space(labelled(), 13), "rank=13"),
])
def test_bad_input(make, words):
    with pytest.raises(ConfigError, match=words): make()


# -- spaces and streaming

def test_principal_space_is_that_of_the_covariance():
    t = labelled()
    z = torch.from_numpy(t.array).double().flatten(0, 1)
    s = C.principal_space(t, 3)
    cov = torch.cov(z.T, correction=0)
    top = torch.linalg.eigvalsh(cov)[-3:].flip(0)
    got = s.basis.double()
    torch.testing.assert_close(got.T @ got, torch.eye(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close((got.T @ cov @ got).diag(), top, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(s.center.double(), z.mean(0), atol=1e-4, rtol=0)


@settings(max_examples=20, deadline=None)
@given(chunk=st.integers(1, 400), keep=st.booleans(), kind=st.sampled_from(KINDS))
def test_directions_in_any_chunks_are_the_same(chunk, keep, kind):
    t = labelled(per_class=5)
    s = space(kind, t.d)
    d = C.Directions(t, s, chunk, 1 << 30 if keep else 0)
    want = s(t.read(slice(None)).flatten(0, 1))
    for _ in range(2):
        starts, parts = zip(*d)
        torch.testing.assert_close(torch.cat(parts), want, atol=1e-6, rtol=0)
        assert list(starts) == list(np.cumsum([0] + [len(p) for p in parts])[:-1])
    next(iter(C.Directions(t, s, chunk, 1 << 30)))
    torch.testing.assert_close(d.rows([5, 0, 5, 100]), want[[5, 0, 5, 100]], atol=1e-6, rtol=0)


def test_directions_abandoned_half_way_are_not_taken_for_all():
    t = labelled(per_class=5)
    d = C.Directions(t, chunk=40)
    next(iter(d))
    assert sum(len(u) for _, u in d) == t.n_tokens == sum(len(u) for _, u in d)


# -- k-means

def slow_pass(u, codes):
    sums, counts, loss = [[0.] * u.shape[1] for _ in codes], [0] * len(codes), 0.
    for row in u.tolist():
        cos = [sum(a * b for a, b in zip(row, c)) for c in codes.tolist()]
        m = max(range(len(cos)), key=cos.__getitem__)
        sums[m] = [a + b for a, b in zip(sums[m], row)]
        counts[m] += 1
        loss += 1 - cos[m]
    return sums, counts, loss / len(u)


def test_one_pass_against_a_loop():
    t = labelled(per_class=3)
    d = C.Directions(t, space("centred", t.d), chunk=50)
    codes = C.unit(randn(5, t.d))
    sums, counts, loss, worst = C.lloyd_pass(d, codes)
    u = torch.cat([u for _, u in d])
    want = slow_pass(u, codes)
    torch.testing.assert_close(sums, torch.tensor(want[0]), atol=1e-3, rtol=1e-4)
    assert counts.tolist() == want[1] and loss == pytest.approx(want[2], abs=1e-5)
    served = (u @ codes.T).max(1).values
    torch.testing.assert_close(served[worst], served.sort().values[:5], atol=1e-6, rtol=0)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 40), chunk=st.integers(9, 300), seed=st.integers(0, 20))
def test_kmeans_does_not_depend_on_the_chunk(m, chunk, seed):
    t = labelled(per_class=8, noise=.2)
    runs = [C.spherical_kmeans(C.Directions(t, chunk=c), m, gen(seed), passes=4, exact=4) for c in (chunk, 10**6)]
    torch.testing.assert_close(runs[0].codes, runs[1].codes, atol=1e-4, rtol=0)
    assert runs[0].losses == pytest.approx(runs[1].losses, abs=1e-5) and torch.equal(runs[0].counts, runs[1].counts)


@settings(max_examples=15, deadline=None)
@given(m=st.integers(1, 60), seed=st.integers(0, 20))
def test_kmeans_gives_unit_codes_counts_all_tokens_and_never_gets_worse(m, seed):
    t = labelled(per_class=8)
    km = C.spherical_kmeans(C.Directions(t), m, gen(seed), passes=8, exact=8)
    assert km.codes.shape == (m, t.d) and int(km.counts.sum()) == t.n_tokens
    torch.testing.assert_close(km.codes.norm(dim=1), torch.ones(m), atol=1e-4, rtol=0)
    assert len(km.losses) == 9 and all(b <= a + 1e-5 for a, b in zip(km.losses, km.losses[1:]))


@pytest.mark.parametrize("m, passes", [(5, 2), (40, 8), (40, 3)])
def test_kmeans_with_many_channels(m, passes):
    "256 channels and more may take another way to the same kind of result."
    t = labelled(per_class=15, d=300, noise=.3)
    runs = [C.spherical_kmeans(C.Directions(t, space("centred", 300), c), m, gen(4), passes=passes) for c in (60, 8192, 60)]
    for km in runs:
        assert km.codes.shape == (m, 300) and int(km.counts.sum()) == t.n_tokens and len(km.losses) == passes + 1
        assert all(b <= a + 1e-4 for a, b in zip(km.losses, km.losses[1:]))
        torch.testing.assert_close(km.codes.norm(dim=1), torch.ones(m), atol=1e-4, rtol=0)
        u = torch.cat([u for _, u in C.Directions(t, space("centred", 300))])
        assert float((1 - (u @ km.codes.T).amax(1)).mean()) == pytest.approx(km.losses[-1], abs=1e-4)
    assert torch.equal(runs[0].codes, runs[2].codes) and runs[0].losses[-1] == pytest.approx(runs[1].losses[-1], abs=5e-3)


def test_dead_codes_are_revived(monkeypatch):
    clumps = torch.eye(8)[torch.arange(400) % 8] + .05 * randn(400, 8)
    t = Tokens(clumps[:, None], torch.zeros(400), (1, 1))
    monkeypatch.setattr(C, "kmeans_plus_plus", lambda u, m, gen: torch.zeros(m, dtype=torch.long))   # all codes start in one place
    km = C.spherical_kmeans(C.Directions(t), 8, gen(), passes=10)
    assert km.revived >= 7 and (km.counts > 0).all() and km.losses[-1] < .4 * km.losses[0]


def test_as_many_codes_as_tokens_gives_each_its_own():
    t = Tokens(randn(12, 1, 6), torch.zeros(12), (1, 1))
    km = C.spherical_kmeans(C.Directions(t), 12, gen())
    assert (km.counts == 1).all() and km.losses[-1] < 1e-5


@pytest.mark.parametrize("m, words", [(0, "at least one"), (-3, "at least one"), (433, "larger than the number of training tokens, 432")])
def test_impossible_codebook_sizes(m, words):
    with pytest.raises(ConfigError, match=words): C.spherical_kmeans(C.Directions(labelled()), m, gen())


def test_same_tokens_everywhere_is_no_trap():
    t = Tokens(torch.ones(6, 2, 3), torch.zeros(6), (1, 2))
    km = C.spherical_kmeans(C.Directions(t), 3, gen(), passes=3)
    assert torch.isfinite(km.codes).all() and km.losses[-1] == pytest.approx(0, abs=1e-5)


def test_usage_counts_every_token_once():
    t, b = labelled(), book(7, 12)
    u = C.usage(b, t)
    want = [0] * 7
    for row in t.read(slice(None)).flatten(0, 1): want[max(range(7), key=lambda m: slow_cosine(row, b.codes[m], b.space))] += 1
    assert u.counts.tolist() == want and u.used + u.dead == 7
    assert C.Usage(torch.tensor([5, 5, 5, 5])).perplexity == pytest.approx(4) and C.Usage(torch.tensor([9, 0])).perplexity == pytest.approx(1)


def test_features_that_are_not_finite_name_the_image():
    z = randn(5, 4, 3); z[3, 2, 1] = math.nan
    with pytest.raises(DataError, match="'d'"): C.mean_token(Tokens(z, torch.zeros(5), (2, 2), list("abcde")))


# -- projection and patches

@settings(max_examples=25, deadline=None)
@given(m=st.integers(1, 16), kind=st.sampled_from(KINDS), seed=st.integers(0, 50))
def test_projected_codes_are_training_tokens_of_their_own(m, kind, seed):
    t, b = labelled(per_class=3, side=2), book(m, 12, kind, seed=seed)
    p = C.project(b, t, candidates=m)
    for code, i, j, cos in zip(p.codes, p.image, p.position, p.cosine):
        token = t.read([int(i)])[0, int(j)]
        assert torch.equal(code, token)
    assert len({(int(i), int(j)) for i, j in zip(p.image, p.position)}) == m
    for k in range(m): assert float(p.cosine[k]) == pytest.approx(slow_cosine(p.codes[k], b.codes[k], b.space), abs=1e-4)
    near = C.grounding(b, t)
    assert (p.cosine <= near + 1e-5).all() and (p.cosine.max() >= near.max() - 1e-5)


def test_a_code_that_is_a_token_projects_onto_itself_and_projecting_twice_changes_nothing():
    t = labelled(per_class=3, side=2)
    b = C.Codebook(t.read(slice(None)).flatten(0, 1)[::7], space("basis", 12))
    p = C.project(b, t)
    torch.testing.assert_close(p.codes, b.codes.detach()); assert float(p.cosine.min()) > 1 - 1e-4
    torch.testing.assert_close(C.project(C.Codebook(p.codes, b.space), t).codes, p.codes)


def test_crowded_codes_still_get_tokens_of_their_own():
    t = labelled(per_class=3, side=2)
    crowd = C.Codebook(t.read([0])[0, :1] + 1e-3 * randn(20, 12))      # more codes in one place than candidates
    p = C.project(crowd, t, candidates=4)
    assert len({(int(i), int(j)) for i, j in zip(p.image, p.position)}) == 20


@pytest.mark.parametrize("kind", KINDS)
def test_nearest_patches_against_a_loop(kind):
    t, b = labelled(per_class=2, side=2), book(3, 12, kind)
    p = C.nearest_patches(b, t, n=4)
    for m in range(3):
        best = [max((slow_cosine(t.read([i])[0, j], b.codes[m], b.space), -j) for j in range(4)) for i in range(len(t))]
        want = sorted(range(len(t)), key=lambda i: -best[i][0])[:4]
        assert p.image[m].tolist() == want and p.position[m].tolist() == [-best[i][1] for i in want]
        assert p.similarity[m].tolist() == pytest.approx([best[i][0] for i in want], abs=1e-4)
    assert C.nearest_patches(b, t, n=99).image.shape == (3, len(t))


# -- memory: many codes, few tokens

PEAK = """
import json, resource, sys, torch
torch.set_num_threads(1)
from protoquant import codebook as C, head
from protoquant.features import Tokens
M, n = 20000, 450
tokens = Tokens(torch.randn(n, 49, 16, generator=torch.Generator().manual_seed(0)).half(), torch.zeros(n), (7, 7))
book = C.Codebook(torch.randn(M, 16, generator=torch.Generator().manual_seed(1)))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
if sys.argv[1] == "presence": few = tokens.subset(range(200)); head.presence_of(few.subset(range(2)), book); before = peak(); out = head.presence_of(few, book)
if sys.argv[1] == "patches": few = tokens.subset(range(200)); C.nearest_patches(book, few.subset(range(2)), 5); before = peak(); out = C.nearest_patches(book, few, 5)
if sys.argv[1] == "usage": C.usage(book, tokens.subset(range(2))); before = peak(); out = C.usage(book, tokens)
if sys.argv[1] == "project":
    wide = Tokens(torch.randn(100, 49, 512, generator=torch.Generator().manual_seed(3)).half(), torch.zeros(100), (7, 7))
    wanted = C.Codebook(wide.read(slice(None)).flatten(0, 1)[:4096]); C.project(C.Codebook(wanted.codes[:50]), wide, candidates=1); before = peak(); out = C.project(wanted, wide, candidates=1)
if sys.argv[1] == "kmeans": before = peak(); out = C.spherical_kmeans(C.Directions(tokens), M, torch.Generator().manual_seed(2), passes=2)
print(json.dumps(peak() - before))
"""

@pytest.mark.parametrize("what, full, limit", [
    ("presence", 200 * 49 * 20000 * 4, 220), ("patches", 200 * 49 * 20000 * 4, 220), ("kmeans", 450 * 49 * 20000 * 4, 300),
    ("usage", 450 * 49 * 20000 * 4, 220), ("project", 4096 * 49 * 512 * 4, 160)])
def test_no_full_matrix_of_tokens_and_codes(what, full, limit):
    "Growth of the peak in MiB; the full matrix (project: the images of all codes at once) would take `full` bytes."
    grown = python(PEAK, what)
    assert grown < limit < full / 2**21, f"{what} grew by {grown:.0f} MiB, the full matrix has {full / 2**20:.0f}"


# -- CPU and CUDA

@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_agrees_with_the_cpu():
    "Tolerances: similarities 1e-4; final k-means loss 1 % (bfloat16 passes may assign near ties differently)."
    t, b = labelled(per_class=40), book(20, 12, "basis")
    z = t.read(slice(None))
    torch.testing.assert_close(b.to("cuda").similarities(z.cuda()).cpu(), b.to("cpu").similarities(z), atol=1e-4, rtol=0)
    loss = [C.spherical_kmeans(C.Directions(t, device=d), 20, gen(1), passes=6).losses[-1] for d in ("cpu", "cuda")]
    assert loss[1] == pytest.approx(loss[0], rel=.01)
