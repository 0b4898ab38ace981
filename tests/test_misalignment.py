"""Guards of protoquant.misalignment: the four numbers, the box and the attacks against loops; what an attack may change; properties; bad input."""
import math
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import backbones, datasets, misalignment as A, toybirds
from protoquant.adapters import Activations, as_model
from protoquant.codebook import Codebook
from protoquant.core import ConfigError, DataError, generator
from protoquant.head import NonNegLinear
from protoquant.misalignment import Setup
from protoquant.model import ProtoQuant
from pieces import Images, gen, randn

FAST = dict(steps=6, step=.1)
NUMBERS = ["before", "after", "pac", "prc", "plc", "target", "target_after"]


class Net:
    "Two convolutions; every map sees the whole image a little. Two classes share code 1, nobody uses code 4."
    size, grid, mean, std = (24, 30), (4, 5), (.4, .5, .6), (.2, .25, .3)
    def __init__(self, seed=0, shift=0.):
        self.a, self.b, self.shift, self.seen = randn(5, 3, 6, 6, seed=seed) / 6, randn(5, 5, 3, 3, seed=seed + 1) / 6, shift, 0
        self.class_weights = torch.tensor([[.9, .5, 0, -1, 0], [0, .8, .7, -1, -1], [-2, 0, .1, .6, 0]])
    def activations(self, x):
        self.seen += len(x)
        z = torch.nn.functional.conv2d(x, self.a, stride=6)
        maps = torch.nn.functional.conv2d(torch.cat([z[..., -1:], z, z[..., :1]], -1).tanh(), self.b, padding=(1, 0)) + z.mean((2, 3), keepdim=True) + self.shift
        s = maps.amax((2, 3))
        return Activations(maps, s, s @ self.class_weights.relu().T)


class Window:
    "Fixed bumps (a prototype a class) times 1 plus the mean of a window of the image."
    size, grid, mean, std, class_weights = (40, 40), (5, 5), (0.,) * 3, (1.,) * 3, torch.eye(3)
    def __init__(self, lo, hi): self.lo, self.hi = lo, hi
    def activations(self, x):
        maps = torch.zeros(3, 5, 5); maps[0, 1, 1], maps[1, 3, 3], maps[2, 1, 3] = 1., .8, .5
        maps = maps * (1 + x[:, :, self.lo:self.hi, self.lo:self.hi].mean((1, 2, 3)))[:, None, None, None]
        return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)))


def batch(n=3, seed=0, size=(24, 30)):
    return randn(n, 3, *size, seed=seed + 50), torch.arange(n) % 3, [f"class/image-{seed}-{i}.jpg" for i in range(n)]


def rows_of(model, x, y, ids, **kw):
    s = Setup(**kw)
    return A.image_rows(model, A.attack(model, x, y, ids, s), y, ids, s)


# -- a slow oracle: one image, loops, nothing shared with the code

def slow_cubic(m, h, w):
    "Bicubic interpolation with a = -0.75, borders repeated, centres of pixels aligned (what OpenCV's INTER_CUBIC does)."
    def kernel(t, a=-.75):
        t = abs(t)
        return (a + 2) * t**3 - (a + 3) * t**2 + 1 if t <= 1 else a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.
    H, W = len(m), len(m[0])
    out = [[0.] * w for _ in range(h)]
    for i in range(h):
        u = (i + .5) * H / h - .5
        for j in range(w):
            v = (j + .5) * W / w - .5
            for p in range(math.floor(u) - 1, math.floor(u) + 3):
                for q in range(math.floor(v) - 1, math.floor(v) + 3):
                    out[i][j] += kernel(u - p) * kernel(v - q) * m[min(max(p, 0), H - 1)][min(max(q, 0), W - 1)]
    return out


def slow_linear(m, h, w):
    H, W = len(m), len(m[0])
    out = [[0.] * w for _ in range(h)]
    for i in range(h):
        u = min(max((i + .5) * H / h - .5, 0), H - 1)
        for j in range(w):
            v = min(max((j + .5) * W / w - .5, 0), W - 1)
            p, q = int(u), int(v)
            for pp, a in ((p, 1 - (u - p)), (min(p + 1, H - 1), u - p)):
                for qq, b in ((q, 1 - (v - q)), (min(q + 1, W - 1), v - q)): out[i][j] += a * b * m[pp][qq]
    return out


def slow_quantile(values, q):
    v = sorted(values)
    at = q * (len(v) - 1)
    return v[int(at)] + (at - int(at)) * (v[min(int(at) + 1, len(v) - 1)] - v[int(at)])


def slow_box(m, size, setup):
    h, w = size
    up = slow_cubic(m, h, w)
    cut = slow_quantile([v for r in up for v in r], setup.percentile / 100)
    hit = [(i, j) for i in range(h) for j in range(w) if up[i][j] >= cut - 1e-9]
    last = 1 if setup.edge == "published" else 0
    return (max(0, min(j for _, j in hit) - setup.margin), max(0, min(i for i, _ in hit) - setup.margin),
            min(w - last, max(j for _, j in hit) + 1 + setup.margin), min(h - last, max(i for i, _ in hit) + 1 + setup.margin))


def slow_plc(a, b, size, q, enlarge=slow_linear):
    tops = []
    for m in (a, b):
        up = enlarge(m, *size)
        cut = slow_quantile([v for r in up for v in r], q)
        tops.append({(i, j) for i in range(size[0]) for j in range(size[1]) if up[i][j] > cut})
    return 100 * (1 - len(tops[0] & tops[1]) / len(tops[0] | tops[1])) if tops[0] | tops[1] else 0.


def slow_image(model, x, y, name, setup):
    "One image (3, h, w) from the start to its row."
    h, w = model.size
    maps = lambda im: model.activations(im[None]).maps[0].clamp(min=0).tolist()
    biggest = lambda ms: [max(v for r in m for v in r) for m in ms]
    W = model.class_weights.tolist()
    k, M = len(W), len(W[0])
    used = [m for m in range(M) if any(W[c][m] > 0 for c in range(k))]
    own = sorted((m for m in range(M) if W[y][m] > 0), key=lambda m: -W[y][m])[:setup.class_codes]
    before = maps(x)
    s = biggest(before)
    who = own if setup.choice == "gt_protos" else [max(used, key=lambda m: s[m])]
    p = max(who, key=lambda m: s[m])
    boxes = {m: slow_box(before[m], model.size, setup) for m in who}
    free = torch.tensor([[not any(b[0] <= j < b[2] and b[1] <= i < b[3] for b in boxes.values()) for j in range(w)] for i in range(h)])
    div = torch.tensor(model.std if setup.units == "pixel" else [1.] * 3)[:, None, None]
    eps, step = setup.eps / div, setup.step / div
    def allowed(im):
        d = torch.minimum(torch.maximum(im - x, -eps), eps)
        im = x + d
        if setup.units == "pixel":
            mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
            im = ((im * std + mean).clamp(0, 1) - mean) / std
        return torch.where(free, im, x)
    u = torch.rand(3, h, w, generator=generator(setup.seed, "misalignment", name.split("/")[-1].rsplit(".", 1)[0])) * 2 - 1
    now = allowed(x + u * eps)
    if setup.attack == "pgd":
        def goal(im): return sum(model.activations(im[None]).maps[0, m].max().clamp(min=0) for m in who) / len(who)
        best = None
        for t in range(setup.steps + 1):
            z = now.clone().requires_grad_()
            v = goal(z)
            if best is None or v.item() < best[0]: best = v.item(), now
            if t < setup.steps: now = allowed(now - step * torch.autograd.grad(v, z)[0].sign())
        if setup.keep == "best": now = best[1]
    after = maps(now)
    s2 = biggest(after)
    rivals = [m for m in used if m not in own]
    return dict(prototype=p, before=s[p], after=s2[p], pac=100 * (1 - s2[p] / s[p]), prc=sum(s2[m] > s2[p] for m in rivals) - sum(s[m] > s[p] for m in rivals),
                plc=slow_plc(before[p], after[p], model.size, setup.quantile), box=boxes[p], image=now)


@pytest.mark.parametrize("kw", [{}, dict(choice="gt_protos"), dict(edge="whole", margin=2, percentile=80.), dict(units="pixel", eps=.3), dict(attack="pgd", **FAST),
                                dict(attack="pgd", keep="last", **FAST), dict(attack="pgd", choice="gt_protos", units="pixel", eps=.1, steps=5, step=.05),
                                dict(class_codes=1, quantile=.6, margin=0, seed=7)])
def test_everything_against_loops(kw):
    setup, model = Setup(**{"margin": 3, **kw}), Net(shift=1.)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    (_, y, ids), x = batch(3), (torch.rand(3, 3, 24, 30, generator=gen(5)) - mean) / std
    a = A.attack(model, x, y, ids, setup)
    rows = A.image_rows(model, a, y, ids, setup)
    for i in range(3):
        want, got = slow_image(model, x[i], int(y[i]), ids[i], setup), rows.iloc[i]
        torch.testing.assert_close(a.x2[i], want["image"], atol=1e-4, rtol=0)
        assert got.prototype == want["prototype"] and (got.x0, got.y0, got.x1, got.y1) == want["box"] and got.prc == want["prc"]
        assert [got[k] for k in ("before", "after", "pac")] == pytest.approx([want[k] for k in ("before", "after", "pac")], abs=2e-3)
        assert got.plc == pytest.approx(want["plc"], abs=4)       # pixels of the border are equal up to rounding, and the quantile may fall among them


def test_location_change_against_loops():
    grow = lambda m, h, w: torch.nn.functional.interpolate(torch.tensor(m)[None, None], size=(h, w), mode="bilinear", align_corners=False)[0, 0].tolist()
    for seed in range(6):
        m, n = torch.rand(2, 4, 5, generator=gen(seed))
        for v in (m, n): np.testing.assert_allclose(slow_linear(v.tolist(), 24, 31), grow(v.tolist(), 24, 31), atol=1e-6)
        for q in (.5, .9): assert A.plc(m[None], n[None], (24, 31), q).item() == pytest.approx(slow_plc(m.tolist(), n.tolist(), (24, 31), q, grow))


def test_bicubic_against_loops_and_opencv():
    m = randn(2, 5, 7)
    up = A.enlarge(m, (33, 21))
    for k in range(2): torch.testing.assert_close(up[k], torch.tensor(slow_cubic(m[k].tolist(), 33, 21)), atol=1e-5, rtol=0)
    cv2 = pytest.importorskip("cv2", reason="OpenCV is not installed; the loops above are its formula")
    for side in (7, 14, 26):
        m = torch.rand(side, side, generator=gen(side))
        theirs = torch.from_numpy(cv2.resize(m.numpy(), (224, 224), interpolation=cv2.INTER_CUBIC))
        torch.testing.assert_close(A.enlarge(m[None], (224, 224))[0], theirs, atol=1e-5, rtol=0)


# -- hand-made cases

@pytest.mark.parametrize("attack", A.ATTACKS)
@pytest.mark.parametrize("choice", A.CHOICES)
@pytest.mark.parametrize("units", A.UNITS)
def test_a_model_that_looks_only_inside_the_box_cannot_be_moved(attack, choice, units):
    r = rows_of(Window(8, 16), torch.zeros(4, 3, 40, 40), [0] * 4, range(4), attack=attack, choice=choice, units=units, eps=.4)
    assert not r[["pac", "plc", "prc"]].to_numpy().any() and r.right_after.all() and (r.protected < .6).all()


def test_a_model_that_looks_elsewhere_falls_by_what_the_attack_can_do():
    "The window's mean falls from 0 to -0.4: activation 1 -> 0.6. Forty steps of 0.01 from U(-0.4, 0.4) reach -0.3 on average."
    x, y, ids = torch.zeros(6, 3, 40, 40), [0] * 6, range(6)
    assert rows_of(Window(32, 40), x, y, ids, attack="pgd", steps=80).pac.to_numpy() == pytest.approx(40., abs=1e-3)
    forty = rows_of(Window(32, 40), x, y, ids, attack="pgd")
    assert forty.pac.mean() == pytest.approx(30., abs=1.5) and not forty.plc.any() and not forty.prc.any()
    noise = rows_of(Window(32, 40), x, y, ids)
    start = A.noise_of(ids, (3, 40, 40))[:, :, 32:40, 32:40] * .4
    assert noise.pac.to_numpy() == pytest.approx(-100 * start.mean((1, 2, 3)).numpy(), abs=1e-3)
    assert forty.pac.to_numpy() == pytest.approx(-100 * (start - .4).clamp(min=-.4).mean((1, 2, 3)).numpy(), abs=1e-3)


@pytest.mark.parametrize("attack", A.ATTACKS)
def test_a_constant_activation_has_no_rank_change(attack):
    class Constant(Net):
        def activations(self, x):
            maps = super().activations(x).maps * 0 + torch.tensor([.9, .7, .5, .3, 2.])[None, :, None, None]
            return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)) @ self.class_weights.relu().T)
    r = rows_of(Constant(), *batch(4), attack=attack, **FAST)
    assert not r[["prc", "pac", "plc"]].to_numpy().any() and set(r.prototype) == {0}      # code 4 is larger, but nobody uses it


def test_numbers_by_hand():
    v = A.pac(torch.tensor([.8, .8, .5, 0.]), torch.tensor([.6, 1., 0., .4]))
    assert v[:3].tolist() == pytest.approx([25, -25, 100], abs=1e-4) and v[3].isnan()
    peak, peak2 = torch.tensor([[.8, .5, .7, .9]]), torch.tensor([[.6, .6, .7, .9]])
    other = torch.tensor([[False, True, True, True]])
    assert A.prc(peak, peak2, torch.tensor([0]), other).item() == 1                          # .6 is not above .6
    assert A.prc(peak2, peak, torch.tensor([0]), other).item() == -1 and A.prc(peak, peak2, torch.tensor([3]), other).item() == 0
    m = torch.arange(20.).reshape(1, 4, 5)
    n = m.clone(); n[0, 0, 0] = 18.5
    assert A.plc(m, n, (4, 5)).item() == pytest.approx(200 / 3) and A.plc(m, -m, (4, 5)).item() == 100
    zero = torch.zeros(1, 4, 5)
    assert A.plc(zero, zero, (4, 5)).item() == 0 and A.plc(zero, m, (4, 5)).item() == 100    # empty union; empty before
    s = A.summary(pd.DataFrame(dict(attack="noise", choice="top_proto", reading="maps", eps=.4, units="normalised", pac=[10., math.nan, 20.], plc=[0., 30, 60], prc=[1, 0, -1],
                                    right=[True, True, False], right_after=[True, False, False], protected=[.1, .2, .3]))).iloc[0]
    assert (s.n, s.undefined, s.pac, s.plc, s.prc) == (3, 1, 15, 30, 0) and s.ac == pytest.approx(100 / 3) and s.protected == pytest.approx(20)
    assert s.pac_se == pytest.approx(5) and s.acc_before == pytest.approx(200 / 3) and s.acc_after == pytest.approx(100 / 3)


def test_the_published_gradient_is_zero_and_the_published_attack_is_noise():
    "PROTOCOLS 0, row 18: cross-entropy over a single logit."
    model, (x, y, ids) = Net(shift=1.), batch(4)
    a = A.attack(model, x, y, ids, Setup())
    now = A.random_start(model, x, a.free, ids, Setup())
    lo, hi = A.limits(model, x, a.free, Setup())
    for _ in range(40):
        z = now.clone().requires_grad_()
        g, = torch.autograd.grad(torch.nn.functional.cross_entropy(A.target(model.activations(z).maps, a.who).mean().reshape(1, 1), torch.tensor([0])), z)
        assert not g.any()
        now = (now - .01 * g.sign()).clamp(lo, hi)
    assert torch.equal(now, a.x2)


# -- what an attack may do

@settings(max_examples=25, deadline=None)
@given(attack=st.sampled_from(A.ATTACKS), choice=st.sampled_from(A.CHOICES), units=st.sampled_from(A.UNITS), keep=st.sampled_from(A.KEEP), edge=st.sampled_from(A.EDGES),
       eps=st.floats(.01, 1), step=st.floats(.005, .5), steps=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_change_stays_outside_of_the_box_and_in_the_ball(attack, choice, units, keep, edge, eps, step, steps, seed):
    model, s = Net(seed, 1.), Setup(attack, choice, eps, step, steps, units, keep, margin=2, edge=edge, seed=seed)
    mean, std = (torch.tensor(v)[:, None, None] for v in (model.mean, model.std))
    _, y, ids = batch(2, seed)
    x = (torch.rand(2, 3, 24, 30, generator=gen(seed)) - mean) / std
    a = A.attack(model, x, y, ids, s)
    d = a.x2 - x
    assert not d[~a.free.expand_as(d)].any()
    for (x0, y0, x1, y1), i in zip(a.boxes.tolist(), a.owner.tolist()):
        assert not d[i, :, y0:y1, x0:x1].any() and 0 <= x0 < x1 <= 30 - (edge == "published") and 0 <= y0 < y1 <= 24 - (edge == "published")
    assert (d.abs() <= (eps / std if units == "pixel" else eps) + 1e-5).all()
    if units == "pixel": assert ((a.x2 * std + mean) >= -1e-5).all() and ((a.x2 * std + mean) <= 1 + 1e-5).all()
    if a.free.any(): assert d.any()


@settings(max_examples=20, deadline=None)
@given(choice=st.sampled_from(A.CHOICES), units=st.sampled_from(A.UNITS), eps=st.floats(.02, 1), step=st.floats(.01, 1), steps=st.integers(1, 6), seed=st.integers(0, 99))
def test_pgd_lowers_the_target_at_least_as_far_as_noise(choice, units, eps, step, steps, seed):
    model, b = Net(seed, 1.), batch(3, seed)
    noise, pgd = (rows_of(model, *b, attack=k, choice=choice, units=units, eps=eps, step=step, steps=steps, margin=2) for k in A.ATTACKS)
    assert (pgd.target_after <= noise.target_after + 1e-6).all() and (pgd.target == noise.target).all()
    assert (pgd.step <= steps).all() and (noise.step == 0).all()


def test_pgd_keeps_the_best_image_or_the_last():
    model, b = Net(shift=1.), batch(4)
    best, last = (rows_of(model, *b, attack="pgd", keep=k, eps=.1, steps=7, step=.15, margin=2) for k in A.KEEP)
    assert (best.target_after <= last.target_after + 1e-6).all() and (best.target_after < last.target_after - 1e-4).any() and (last.step == 7).all()
    assert rows_of(model, *b, attack="pgd", margin=2).pac.mean() > rows_of(model, *b, margin=2).pac.mean() + 5      # the published strength does something


def test_pgd_works_where_gradients_are_off():
    model, b = Net(shift=1.), batch(2)
    want = A.attack(model, *b, Setup("pgd", **FAST)).x2
    with torch.no_grad(): assert torch.equal(A.attack(model, *b, Setup("pgd", **FAST)).x2, want)
    with torch.inference_mode(): assert torch.equal(A.attack(model, b[0] + 0, *b[1:], Setup("pgd", **FAST)).x2, want)


# -- properties

unit = st.floats(0, 1, width=32)


@settings(max_examples=60, deadline=None)
@given(a=st.floats(1e-3, 1), b=unit, c=unit)
def test_pac_is_bounded_and_falls_as_the_activation_rises(a, b, c):
    v = A.pac(torch.tensor([a] * 3), torch.tensor([b, c, a]))
    assert (v <= 100).all() and abs(v[2]) < 1e-9
    if b < c: assert v[0] >= v[1]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), q=st.floats(.05, .95), H=st.integers(1, 5), W=st.integers(1, 5), scale=st.sampled_from((.25, 1., 4.)))
def test_plc_is_bounded_symmetric_and_zero_for_equal_maps(seed, q, H, W, scale):
    m, n = torch.rand(2, 1, H, W, generator=gen(seed))
    v = A.plc(m, n, (11, 13), q).item()
    assert 0 <= v <= 100 and v == pytest.approx(A.plc(n, m, (11, 13), q).item())
    assert A.plc(m, m * scale, (11, 13), q).item() == 0


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), M=st.integers(1, 8))
def test_prc_is_bounded_and_turns_its_sign_when_time_runs_backwards(seed, M):
    s, s2 = torch.rand(2, 4, M, generator=gen(seed))
    p, other = torch.randint(M, (4,), generator=gen(seed)), torch.rand(4, M, generator=gen(seed + 1)) > .5
    v = A.prc(s, s2, p, other)
    assert (v.abs() <= other.sum(1)).all() and torch.equal(A.prc(s2, s, p, other), -v) and not A.prc(s, s, p, other).any()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), percentile=st.floats(50, 99), margin=st.integers(0, 12), H=st.integers(1, 6), W=st.integers(1, 6))
def test_the_box_holds_the_peak(seed, percentile, margin, H, W):
    m = torch.rand(3, H, W, generator=gen(seed))
    up = A.enlarge(m, (17, 19))
    for b, u in zip(A.protected_box(m, (17, 19), percentile, margin, "whole").tolist(), up):
        i, j = divmod(int(u.argmax()), 19)
        assert b[0] <= j < b[2] and b[1] <= i < b[3]
    wide, tight = (A.protected_box(m, (17, 19), percentile, g) for g in (margin, 0))
    assert (wide[:, :2] <= tight[:, :2]).all() and (wide[:, 2:] >= tight[:, 2:]).all() and (wide[:, 2] <= 18).all() and (wide[:, 3] <= 16).all()


@pytest.mark.parametrize("attack", A.ATTACKS)
def test_neither_order_nor_batch_size_matters(attack):
    images, model, s = Images(7), Net(shift=1.), Setup(attack, margin=2, **FAST)
    a = A.measure(model, images, s, batch=7, quiet=True)
    for rows, size in ((A.published_order(7), 7), (np.arange(7), 1), ([6, 2, 0, 1, 5, 3, 4], 3)):
        b = A.measure(model, images, s, batch=size, rows=rows, quiet=True).set_index("image").loc[a.image].reset_index()
        assert b.image.tolist() == a.image.tolist() and (b[["prototype", "prc", "x0", "y0", "x1", "y1"]] == a[["prototype", "prc", "x0", "y0", "x1", "y1"]]).all(axis=None)
        np.testing.assert_allclose(b[NUMBERS], a[NUMBERS], atol=2e-3)
        got, want = A.summary(b).iloc[0], A.summary(a).iloc[0]
        assert [got[k] for k in A.SCORES] == pytest.approx([want[k] for k in A.SCORES], abs=2e-3)


def test_another_seed_is_another_noise_and_each_image_has_its_own():
    u = A.noise_of(["a/x.jpg", "y", "b/x.png"], (3, 9, 9))
    assert torch.equal(u[0], u[2]) and not torch.equal(u[0], u[1]) and u.min() >= -1 and u.max() <= 1
    assert not torch.equal(u, A.noise_of(["a/x.jpg", "y", "b/x.png"], (3, 9, 9), seed=1))


def test_the_published_order():
    state = np.random.get_state()
    try:
        np.random.seed(20230527); want = np.random.permutation(50)
    finally: np.random.set_state(state)
    assert A.published_order(50).tolist() == want.tolist() and A.published_order(50, 7).tolist() == want[:7].tolist()
    with pytest.raises(ConfigError, match="n_images=0"): A.published_order(50, 0)


def test_noise_costs_two_passes_and_pgd_one_a_step_and_three():
    images, model = Images(7), Net(shift=1.)
    A.measure(model, images, Setup(margin=2), batch=3, quiet=True)
    assert model.seen / 7 == 2 <= 2.2
    for keep, n in (("best", 9), ("last", 8)):
        model.seen = 0
        A.measure(model, images, Setup("pgd", keep=keep, steps=6), batch=3, quiet=True)
        assert model.seen == 7 * n


# -- ProtoQuant

def proto(name, size=64, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = backbones.create(name, "random", num_classes=3, img_size=size, **kw)
    return ProtoQuant(net, Codebook(randn(9, net.d)), NonNegLinear.of(torch.rand(3, 9, generator=gen(2))), .1)


@pytest.mark.parametrize("name,size", [("test_resnet", 64), ("test_convnext", 64), ("test_vit", None)])
@pytest.mark.parametrize("reading", ("softmax", "cosine"))
def test_gradients_reach_the_image_through_a_frozen_backbone(name, size, reading):
    pq = proto(name, size)
    x = randn(2, 3, *pq.backbone.size).requires_grad_()
    as_model(pq, reading).activations(x).maps.amax((2, 3)).sum().backward()
    assert x.grad.abs().sum() > 0 and torch.isfinite(x.grad).all()
    assert all(p.grad is None and not p.requires_grad for p in [*pq.backbone.parameters(), *pq.book.parameters()]) and not pq.backbone.training
    before = {k: v.clone() for k, v in pq.state_dict().items()}
    noise, pgd = (A.attack(as_model(pq, reading), x.detach(), [0, 1], "ab", Setup(k, **FAST)) for k in A.ATTACKS)
    low = [A.target(a.after.maps, a.who) for a in (noise, pgd)]
    assert (low[1] <= low[0] + 1e-6).all() and (~pgd.free.flatten(1).all(1)).all()
    assert all(torch.equal(v, before[k]) for k, v in pq.state_dict().items())      # nothing was trained


def test_memory_and_disk_agree_exactly(tmp_path):
    kw = dict(n_train_per_class=1, n_test_per_class=2, classes=3)
    toybirds.write_cub(tmp_path/"CUB_200_2011", **kw)
    for crop in ("none", "bbox"):
        disk, memory = datasets.load("cub", tmp_path, crop, quiet=True).test, datasets.load("toybirds", crop=crop, **kw).test
        pq = proto("test_resnet")
        a, b = (A.measure(pq, s, Setup("pgd", **FAST), quiet=True).drop(columns="image") for s in (disk, memory))
        pd.testing.assert_frame_equal(a, b, check_exact=True)


def test_rows_say_what_they_are_of():
    r = pd.concat([A.measure(as_model(proto("test_resnet"), reading), datasets.load("toybirds", n_train_per_class=1, n_test_per_class=1, classes=3).test, Setup(k, steps=2), quiet=True)
                   for k in A.ATTACKS for reading in ("softmax", "cosine")])
    s = A.summary(r)
    assert set(zip(s.attack, s.reading)) == {(k, m) for k in A.ATTACKS for m in ("softmax", "cosine")} and (s.n == 3).all()
    assert (s.choice == "top_proto").all() and (s.eps == .4).all() and (s.acc_before - s.acc_after).to_numpy() == pytest.approx(s.ac.to_numpy())


# -- pictures

def test_figures_of_one_image():
    import matplotlib.pyplot as plt
    images = datasets.load("toybirds", n_train_per_class=1, n_test_per_class=1, classes=3).test
    c = A.case(proto("test_resnet"), images, 1, Setup(choice="gt_protos"))
    assert c.image == images.ids[1] and c.maps.shape == c.maps2.shape == (9, *proto("test_resnet").grid) and c.free.shape == (64, 64) and c.picture.size == (64, 64)
    d = np.asarray(c.picture2, int) - np.asarray(c.picture, int)
    assert not d[~c.free.numpy()].any() and d.any()
    fig = A.change_figure(c)
    said = " ".join(t.get_text() for ax in fig.findobj(plt.Axes) for t in [ax.title, *ax.texts]) + " ".join(t.get_text() for t in fig.findobj(plt.Text))
    top = c.maps.amax((1, 2)).argsort(descending=True)[:5].tolist()
    assert all(f"code {m}: {c.maps[m].max():.2f}" in said for m in top) and "noise" in said and "softmax" in said
    few = A.change_figure(c, n=2)
    assert len([a for a in few.findobj(plt.Axes) if a.get_title(loc="left").startswith("code ")]) == 4
    assert len(A.attack_figure([c, c]).axes) == 6
    plt.close("all")


def test_a_picture_of_an_input():
    x = torch.tensor([[[-5., 0, 5]]] * 3)
    assert np.asarray(A.as_picture(x, (.5, .5, .5), (.25, .25, .25)))[0].tolist() == [[0] * 3, [128] * 3, [255] * 3]


# -- bad input

@pytest.mark.parametrize("kw,words", [(dict(eps=0), "nothing would be attacked"), (dict(eps=-.1), "eps=-0.1"), (dict(eps=math.nan), "eps=nan"), (dict(eps=math.inf), "eps=inf"), (dict(step=0), "step=0"),
                                      (dict(steps=0), "steps=0"), (dict(attack="fgsm"), "'noise', 'pgd'"), (dict(choice="all"), "'gt_protos'"), (dict(units="255"), "'pixel'"), (dict(keep="first"), "'last'"),
                                      (dict(edge="none"), "'whole'"), (dict(percentile=100), "percentile=100"), (dict(quantile=1), "quantile=1"), (dict(margin=-1), "margin=-1"), (dict(class_codes=0), "class_codes=0")])
def test_a_setup_that_cannot_work(kw, words):
    with pytest.raises(ConfigError, match=words): Setup(**kw)


def changed(**kw):
    m = Net(shift=1.)
    for k, v in kw.items(): setattr(m, k, v)
    return m


def giving(f):
    m = Net(shift=1.)
    inner = m.activations
    m.activations = lambda x: f(inner(x))
    return m


@pytest.mark.parametrize("model,y,kw,words", [
    (changed(grid=(5, 4)), [0, 1], {}, r"maps of 2 images must be \(2, 5, 5, 4\); it gave \(2, 5, 4, 5\)"),
    (giving(lambda a: Activations(a.maps, a.presence[:, :2], a.logits)), [0, 1], {}, "presence"),
    (giving(lambda a: Activations(a.maps[:1], a.presence, a.logits)), [0, 1], {}, "maps of 2 images"),
    (changed(class_weights=-torch.ones(3, 5)), [0, 1], {}, "no prototype has a positive weight"),
    (changed(class_weights=torch.zeros(3, 5)), [0, 1], dict(choice="gt_protos"), "no prototype has a positive weight"),
    (changed(class_weights=torch.eye(5)[[0, 1]].repeat_interleave(torch.tensor([2, 1]), 0) * torch.tensor([[1.], [0], [1]])), [0, 1], dict(choice="gt_protos"), "class 1 has no prototype"),
    (Net(), [0, 3], {}, "label 3 is not a class of a model with 3"), (Net(), [0, -1], {}, "not a class"),
    (giving(lambda a: Activations(a.maps.detach(), a.presence, a.logits)), [0, 1], dict(attack="pgd"), "no gradient with respect to the image"),
    (giving(lambda a: Activations(torch.ones(2, 5, 4, 5, requires_grad=True), a.presence, a.logits)), [0, 1], dict(attack="pgd"), "no gradient with respect to the image"),
])
def test_a_model_that_cannot_be_attacked(model, y, kw, words):
    x, _, ids = batch(2)
    with pytest.raises(ConfigError, match=words): A.attack(model, x, y, ids, Setup(**kw))


def test_activations_that_are_not_finite_name_the_image():
    x, y, ids = batch(3)
    x[1, 0, 0, 0] = math.nan
    with pytest.raises(DataError, match=r"1 images before the attack, first: class/image-0-1\.jpg"): A.attack(Net(), x, y, ids)


@pytest.mark.parametrize("attack", A.ATTACKS)
def test_an_activation_of_zero_is_left_out_and_counted(attack):
    model, (x, y, ids) = Net(shift=1.), batch(4)
    inner = model.activations
    def some_silent(z):      # the first two images: every map is negative
        a = inner(z)
        return Activations(torch.cat([-1 - a.maps[:2].abs(), a.maps[2:]]), a.presence, a.logits)
    model.activations = some_silent
    r = rows_of(model, x, y, ids, attack=attack, margin=2, **FAST)
    assert r.pac.isna().tolist() == [True, True, False, False] and not r.before[:2].any()
    s = A.summary(r).iloc[0]
    assert (s.n, s.undefined) == (4, 2) and s.pac == pytest.approx(r.pac[2:].mean()) and np.isfinite([s.plc, s.prc, s.ac]).all()
    r.pac = np.nan
    assert np.isnan(A.summary(r).pac[0]) and A.summary(r).undefined[0] == 4


def test_no_images():
    with pytest.raises(DataError, match="no image"): A.measure(Net(), Images(5), rows=[], quiet=True)
    with pytest.raises(ConfigError, match="lacks class_weights"): A.measure(object(), Images(5), quiet=True)
