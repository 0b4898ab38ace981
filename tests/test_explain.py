"""Guards of protoquant.explain: box geometry worked out by hand, sums that are exact, round trips, bad input."""
import json

import numpy as np
import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings, strategies as st
from PIL import Image

from protoquant import backbones, datasets, explain as E
from protoquant.codebook import Codebook, PatchIndex, Space, nearest_patches
from protoquant.core import ConfigError, DataError
from protoquant.features import Tokens, extract
from protoquant.head import NonNegLinear, presence_of
from protoquant.model import ProtoQuant


def rand(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    "ToyBirds cut to their boxes under a tiny random backbone, 12 codes that are training tokens."
    data = datasets.load("toybirds", n_train_per_class=4, n_test_per_class=2, classes=3, crop="bbox")
    with pytest.warns(UserWarning, match="RANDOM"): b = backbones.create("test_resnet", "random")
    t = datasets.eval_transform(b.size, b.mean, b.std, "squash")
    tokens = extract(b, data.train, t, cache=tmp_path_factory.mktemp("store"), quiet=True)
    book = Codebook(tokens.read([0, 5, 9]).flatten(0, 1)[::6][:12], Space(b.d, tokens.pooled().mean(0)))
    head = NonNegLinear.of(torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) * (rand(3, 12, seed=2) > -.5))
    model = ProtoQuant(b, book, head, .1, data.class_names, t, index=nearest_patches(book, tokens, 4))
    return model, data, tokens


# geometry

@pytest.mark.parametrize("n,size,expected", [
    (7, 224, {0: (0, 32), 3: (96, 128), 6: (192, 224)}),
    (8, 256, {0: (0, 32), 1: (32, 64), 7: (224, 256)}),
    (8, 224, {1: (27, 59), 6: (162, 194), 7: (192, 224)}),
    (13, 224, {0: (0, 32), 1: (16, 48), 11: (176, 208), 12: (192, 224)}),
    (14, 224, {0: (0, 32), 1: (15, 47), 12: (180, 212), 13: (192, 224)}),
    (26, 224, {0: (0, 32), 1: (4, 36), 2: (12, 44), 24: (188, 220), 25: (192, 224)}),
    (28, 224, {0: (0, 32), 1: (7, 39), 26: (182, 214), 27: (192, 224)})])
def test_pipnet_boxes_by_hand(n, size, expected):
    for i, interval in expected.items():
        for j, other in expected.items():
            assert E.patch_box(i * n + j, (n, n), size, geometry="pipnet") == (other[0], interval[0], other[1], interval[1])


@given(st.integers(2, 40), st.data())
@settings(max_examples=60, deadline=None)
def test_pipnet_boxes_are_always_32_pixels_inside_the_input(n, data):
    i, size = data.draw(st.integers(0, n * n - 1)), data.draw(st.integers(64, 400))
    x0, y0, x1, y1 = E.patch_box(i, (n, n), size, geometry="pipnet")
    assert (x1 - x0, y1 - y0) == (32, 32) and 0 <= x0 and x1 <= size and 0 <= y0 and y1 <= size


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 500), st.integers(1, 500))
@settings(max_examples=60, deadline=None)
def test_cells_tile_the_input(H, W, h, w):
    boxes = np.array([E.patch_box(i, (H, W), (h, w)) for i in range(H * W)])
    close(((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sum(), h * w, eps=1e-6 * h * w)
    close(boxes.max(0)[2:], (w, h)); close(boxes.min(0)[:2], (0, 0))


def test_shrinking_is_symmetric():
    assert E._shrunk(0, 39, 32) == (3, 36) and E._shrunk(5, 37, 32) == (5, 37)       # (39-32)//2 = 3 at either end
    assert E.patch_box(0, (2, 2), 224, patch=32) == (40, 40, 72, 72)                 # a cell of 112 keeps its centre at 56


@pytest.mark.parametrize("kw,text", [(dict(position=49), "not on a grid"), (dict(position=-1), "not on a grid"),
                                     (dict(geometry="square"), "there are"), (dict(geometry="pipnet", size=20), "does not fit")])
def test_impossible_boxes(kw, text):
    with pytest.raises(ConfigError, match=text): E.patch_box(**{**dict(position=0, grid=(7, 7), size=224), **kw})


def test_box_through_centre_crop_and_bird_crop(world):
    _, data, _ = world
    x0, y0, x1, y1 = data.test.crop_box(1)
    squash, center = (datasets.eval_transform(224, (0, 0, 0), (1, 1, 1), m) for m in ("squash", "center"))
    close(E.to_full_image((0, 0, 112, 224), squash, data.test, 1), (x0, y0, (x0 + x1) / 2, y1), eps=1e-6)
    inner = E.to_full_image((0, 0, 224, 224), center, data.test, 1)
    assert x0 <= inner[0] < inner[2] <= x1 and y0 <= inner[1] < inner[3] <= y1
    close(min(inner[2] - inner[0], inner[3] - inner[1]), min(x1 - x0, y1 - y0) * 224 / 256, eps=.5)


# sums

@given(st.integers(0, 10_000), st.integers(0, 12), st.floats(0, 2), st.sampled_from([(2, 3), (7, 7), (14, 14)]))
@settings(max_examples=40, deadline=None)
def test_shown_and_rest_sum_to_the_logit(seed, n, least, grid):
    z, book = rand(grid[0] * grid[1], 5, seed=seed), Codebook(rand(10, 5, seed=seed + 1))
    W = rand(4, 10, seed=seed + 2).relu()
    ex = E.explain_tokens(z, book, W, .1, grid, n=n, min_contribution=least)
    close(ex.contribution.sum() + ex.rest, ex.logit, eps=1e-12 * (1 + ex.logit))
    close(ex.logit, float(presence_of(Tokens(z[None], [0], grid), book)[0] @ W[ex.class_id]), eps=1e-4)
    assert len(ex) <= n and (ex.contribution >= least).all() and (np.diff(ex.contribution) <= 0).all() and ex.n_rest == 10 - len(ex)
    close(ex.map.max((1, 2)), ex.presence); close(ex.map.reshape(len(ex), grid[0] * grid[1])[range(len(ex)), ex.position], ex.presence)
    assert E.Explanation.from_dict(json.loads(ex.to_json())).to_dict() == ex.to_dict()


def test_silent_codes_stay_in_the_denominator():
    z, codes, W = rand(9, 6), rand(8, 6, seed=1), torch.ones(2, 5)
    part, all_ = E.explain_tokens(z, Codebook(codes[:5], silent=codes[5:]), W), E.explain_tokens(z, Codebook(codes), torch.cat([W, torch.zeros(2, 3)], 1))
    close(part.contribution, all_.contribution, eps=1e-6); assert part.codes.tolist() == all_.codes.tolist()


def test_a_class_without_evidence():
    ex = E.explain_tokens(rand(4, 3), Codebook(rand(5, 3)), torch.zeros(2, 5))
    assert len(ex) == 0 and ex.logit == ex.rest == 0 and ex.map.shape == (0, 2, 2) and ex.box.shape == (0, 4)
    assert E.Explanation.from_dict(json.loads(ex.to_json())).map.shape == (0, 2, 2) and len(ex.to_frame()) == 0
    assert "5 others" in ex._repr_markdown_()


# the model's methods

def test_explain_agrees_with_the_model(world):
    model, data, tokens = world
    for i in range(len(data.test)):
        ex = model.explain((data.test, i), min_contribution=0, n=100)
        logits = model(model.transform(data.test.image(i))[None])[0].detach().numpy()
        assert ex.predicted == logits.argmax() and (ex.label, ex.image) == (data.test.labels[i], data.test.ids[i]) and ex.rest == 0
        close(ex.logit, float(logits.max()), eps=1e-4); close(ex.probabilities, np.exp(logits) / np.exp(logits).sum(), eps=1e-4)
        close(ex.extent, data.test.crop_box(i), eps=1e-6)
        x0, y0, x1, y1 = ex.extent
        assert (ex.box_full >= [x0 - 1e-6, y0 - 1e-6] * 2).all() and (ex.box_full <= [x1 + 1e-6, y1 + 1e-6] * 2).all()


def test_explanation_of_a_picture_equals_that_of_the_set(world):
    model, data, _ = world
    a, b = model.explain(data.test.image(2)), model.explain((data.test, 2))
    assert a.label is None and b.label == data.test.labels[2]
    close(a.contribution, b.contribution); close(a.box, b.box)
    close(a.box_full + np.tile(data.test.crop_box(2)[:2], 2), b.box_full, eps=1e-6)


def test_patches_come_along_and_survive_json(world):
    model, data, _ = world
    ex = model.explain((data.test, 0), n=3, min_contribution=0, train=data.train, n_patches=2)
    assert [[p.row for p in ps] for ps in ex.patches] == [model.index.image[c, :2].tolist() for c in ex.codes]
    p = ex.patches[0][0]
    assert p.id == data.train.ids[p.row] and p.class_name == data.class_names[data.train.labels[p.row]]
    assert p.box_full == E.to_full_image(E.patch_box(p.position, model.grid, model.transform.size), model.transform, data.train, p.row)
    again = E.Explanation.from_dict(json.loads(ex.to_json()))
    assert again.patches == ex.patches and again.to_dict() == ex.to_dict()


def test_picture_modes(world):
    model, data, _ = world
    im = data.test.image(0)
    for mode in ("L", "RGBA", "P", "I;16"): assert model.explain(im.convert("L").convert(mode) if mode == "I;16" else im.convert(mode)).image == "image"
    close(model.explain(im.convert("RGBA")).logit, model.explain(im).logit)


def test_class_explanation(world):
    model, data, tokens = world
    s, W = presence_of(tokens, model.book, .1), model.weight.detach()
    for by in ("weight", "contribution"):
        ce = model.explain_class(1, 4, tokens, by=by)
        key = ce.weight if by == "weight" else ce.mean_contribution
        assert (np.diff(key) <= 0).all() and ce.n_images == 4 and ce.n_codes == int((W[1] > 1e-3).sum())
        close(ce.mean_contribution.sum() + ce.rest, ce.mean_logit, eps=1e-9)
        close(ce.mean_logit, float((s @ W.T)[tokens.labels == 1, 1].mean()), eps=1e-4)
        for m, others in zip(ce.codes, ce.shared):
            assert [c for c, _, _ in others] == sorted((c for c in (0, 2) if W[c, m] > 1e-3), key=lambda c: -W[c, m])
        assert E.ClassExplanation.from_dict(json.loads(ce.to_json())).to_dict() == ce.to_dict()
        assert len(ce.to_frame()) == len(ce) and data.class_names[1] in ce._repr_markdown_()
    given_presence = model.explain_class(data.class_names[1], 4, presence=s, labels=tokens.labels)
    close(given_presence.mean_contribution, model.explain_class(1, 4, tokens).mean_contribution, eps=1e-6)


def test_class_explanation_by_weight_alone():
    ce = E.explain_class(torch.tensor([[0., 2., 1., 1e-4], [3., 0., .5, 0.]]), 0)
    assert ce.codes.tolist() == [1, 2] and ce.n_codes == 2 and ce.mean_logit is None
    assert ce.shared == [[], [(1, "1", .5)]] and list(ce.to_frame()) == ["code", "weight", "n_shared", "shared_with"]
    assert E.ClassExplanation.from_dict(json.loads(ce.to_json())).to_dict() == ce.to_dict()


# bad input

@pytest.mark.parametrize("image,text", [("bird.png", "not str"), (3, "not int"), ((1, 2), "not tuple")])
def test_not_an_image(world, image, text):
    with pytest.raises(ConfigError, match=text): world[0].explain(image)


def test_bad_requests(world):
    model, data, tokens = world
    with pytest.raises(ConfigError, match="no image 6"): model.explain((data.test, 6))
    with pytest.raises(ConfigError, match="Did you mean"): model.explain((data.test, 0), "Toybird_1")
    with pytest.raises(ConfigError, match="no class 3"): model.explain((data.test, 0), 3)
    with pytest.raises(ConfigError, match="cannot be negative"): model.explain((data.test, 0), n=-1)
    with pytest.raises(ConfigError, match="no class"): model.explain_class(-1)
    with pytest.raises(ConfigError, match="needs the presence"): model.explain_class(0, by="contribution")
    with pytest.raises(ConfigError, match="'weight' or 'contribution'"): model.explain_class(0, by="size")
    with pytest.raises(DataError, match="no image of class"): model.explain_class(0, presence=torch.rand(2, 12), labels=[1, 2])
    with pytest.raises(DataError, match="2 images but 1 labels"): model.explain_class(0, presence=torch.rand(2, 12), labels=[1])
    with pytest.raises(ConfigError, match="5 codes does not fit"): model.explain_class(0, presence=torch.rand(2, 5))


@pytest.mark.parametrize("code", [-1, 12, 1.5, True])
def test_no_such_code(world, code):
    model, data, _ = world
    with pytest.raises(ConfigError, match="0 to 11"): model.patches_of(code, data.train)


def test_index_missing_or_of_other_images(world):
    model, data, _ = world
    t, ix = model.transform, model.index
    with pytest.raises(DataError, match="nearest_patches"): E.patches_of(0, None, data.train, t)
    with pytest.raises(DataError, match="other images: 12 there, 6 in toybirds/test"): model.patches_of(0, data.test)
    with pytest.raises(DataError, match="at row 11 .* nothing"): model.patches_of(0, data.train.subset(range(11)))
    with pytest.raises(DataError, match="other images"): model.explain((data.test, 0), train=data.test)
    swapped = PatchIndex(ix.image, ix.position, ix.similarity, ix.grid, ix.ids[::-1])
    with pytest.raises(DataError, match="at row 0"): E.patches_of(0, swapped, data.train, t)


def test_tokens_that_do_not_fit():
    book, W = Codebook(rand(4, 3)), torch.ones(2, 4)
    with pytest.raises(ConfigError, match="do not fill a grid"): E.evidence(rand(5, 3), book, W)
    with pytest.raises(ConfigError, match="do not fill a grid"): E.evidence(rand(4, 3), book, W, grid=(3, 3))
    with pytest.raises(ConfigError, match="for 3 codes"): E.evidence(rand(4, 3), book, torch.ones(2, 3))
    with pytest.raises(DataError, match="not finite"): E.evidence(torch.full((4, 3), torch.nan), book, W)


# differences: sums exact, codes of both sides, round trips

def slow_parts(ev_a, a, ev_b, b):
    "Code by code, in Python floats."
    return [float(ev_a.presence[m]) * float(ev_a.weight[a, m]) - float(ev_b.presence[m]) * float(ev_b.weight[b, m]) for m in range(len(ev_a.presence))]


def check_difference(d, parts):
    shown = dict(zip(d.codes.tolist(), d.difference))
    for m, v in shown.items(): close(v, parts[m], eps=1e-12)
    hidden = [v for m, v in enumerate(parts) if m not in shown]
    close(d.rest_for, sum(v for v in hidden if v > 0), eps=1e-12); close(d.rest_against, sum(v for v in hidden if v < 0), eps=1e-12)
    close(d.difference.sum() + d.rest, d.logit_difference, eps=1e-12); close(d.logit_difference, sum(parts), eps=1e-12)
    for e in (d.a, d.b): close(e.contribution.sum() + e.rest, e.logit, eps=1e-12)
    assert d.a.codes.tolist() == d.b.codes.tolist() and (np.diff(np.abs(d.difference)) <= 1e-12).all()
    assert E.Difference.from_json(d.to_json()).to_dict() == d.to_dict()
    f = d.to_frame()
    close(f.difference, f.contribution_a - f.contribution_b); close(f.contribution_a, f.presence_a * f.weight_a); close(f.contribution_b, f.presence_b * f.weight_b)


@pytest.mark.parametrize("n", [0, 1, 4, 12])
def test_why_not_against_loops(world, n):
    model, data, _ = world
    for i in range(len(data.test)):
        e, _ = E._seen(model, (data.test, i))
        for a, b in ((0, 1), (1, 2), (2, 0)):
            d = model.why_not((data.test, i), b, a, n=n)
            assert d.kind == "classes" and d.sides() == (data.class_names[a], data.class_names[b]) and len(d) <= n and d.missing is None
            check_difference(d, slow_parts(e, a, e, b))
            close(d.a.presence, d.b.presence); assert (d.a.position == d.b.position).all()


def test_compare_against_loops(world):
    model, data, _ = world
    for i, j in ((0, 3), (5, 1), (2, 2)):
        ea, eb = (E._seen(model, (data.test, k))[0] for k in (i, j))
        for c in (None, 0, data.class_names[2]):
            d = model.compare((data.test, i), (data.test, j), c)
            number = {None: int(ea.logits.argmax()), 0: 0}.get(c, 2)
            assert d.kind == "images" and d.sides() == (data.test.ids[i], data.test.ids[j]) and d.a.class_id == d.b.class_id == number
            check_difference(d, slow_parts(ea, number, eb, number)); close(d.a.weight, d.b.weight)
            if i == j: assert len(d) == 0 and d.logit_difference == d.rest == 0


def test_differences_agree_with_the_model_and_swap_their_sign(world):
    model, data, _ = world
    logits = model(model.transform(data.test.image(3))[None])[0].detach()
    d, back = (model.why_not((data.test, 3), b, a) for a, b in ((0, 2), (2, 0)))
    close(d.logit_difference, float(logits[0] - logits[2]), eps=1e-4); close(d.logit_difference, -back.logit_difference, eps=1e-12)
    assert set(d.codes) == set(back.codes)
    said = f"{d.logit_difference:+.3f}"
    assert said in d._repr_markdown_() and "not **" in d._repr_markdown_() and "in `" in model.compare((data.test, 0), (data.test, 1))._repr_markdown_()


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=15), st.integers(0, 15), st.floats(0, 1))
@settings(max_examples=80, deadline=None)
def test_both_sides_are_heard(values, n, least):
    v = torch.tensor(values, dtype=torch.double)
    got = E.both_sides(v, n, least).tolist()
    big = [m for m, x in enumerate(values) if abs(x) >= least and x]
    assert len(got) == len(set(got)) == min(n, len(big)) and set(got) <= set(big)
    for side in (1, -1):
        mine = [m for m in big if side * values[m] > 0]
        assert sum(side * values[m] > 0 for m in got) >= min(n // 3, len(mine))
        for m in got:                                                    # within a side, no larger one is left out
            if side * values[m] > 0: assert all(abs(values[o]) <= abs(values[m]) or o in got for o in mine)


def test_what_is_missing(world):
    model, data, tokens = world
    s = presence_of(tokens, model.book, .1)
    e, _ = E._seen(model, (data.test, 0))
    b = int(e.logits.argsort(descending=True)[1])
    miss = model.why_not((data.test, 0), b, presence=s, labels=tokens.labels).missing
    rows = [i for i in range(len(tokens)) if tokens.labels[i] == b]
    slow = [float(e.weight[b, m]) * (sum(float(s[i, m]) for i in rows) / len(rows) - float(e.presence[m])) for m in range(12)]
    for m, v in zip(miss.codes, miss.shortfall): close(v, slow[m], eps=1e-6)
    assert miss.codes.tolist() == [m for m in sorted(range(12), key=lambda m: -slow[m]) if slow[m] >= .01][:5] and miss.n_images == 4
    close(miss.shortfall.sum() + miss.rest, miss.mean_logit - miss.logit, eps=1e-12); close(sum(slow), miss.mean_logit - miss.logit, eps=1e-5)
    assert E.Shortfall.from_json(miss.to_json()).to_dict() == miss.to_dict() and list(miss.to_frame()["code"]) == miss.codes.tolist()
    assert miss.class_name == data.class_names[b] and "usually" in repr(miss)


def test_patches_come_with_a_difference(world):
    model, data, _ = world
    d = model.why_not((data.test, 0), 1, 0, train=data.train, n_patches=2)
    assert [[p.row for p in ps] for ps in d.a.patches] == [model.index.image[c, :2].tolist() for c in d.codes]
    again = E.Difference.from_json(d.to_json())
    assert again.a.patches == d.a.patches and again.to_dict() == d.to_dict()


# sharing

@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 999))
@settings(max_examples=40, deadline=None)
def test_sharing_and_overlap_against_loops(k, M, seed):
    W = rand(k, M, seed=seed).relu()
    sh = E.sharing(W)
    slow = {m: [c for c in range(k) if W[c, m] > 1e-3] for m in range(M)}
    assert {int(m): sorted(c for c, _, _ in cs) for m, cs in zip(sh.codes, sh.classes)} == {m: cs for m, cs in slow.items() if cs}
    assert (np.diff(sh.n_users) <= 0).all() and sh.n_users.tolist() == [len(slow[int(m)]) for m in sh.codes]
    for m, cs in zip(sh.codes, sh.classes): assert [w for _, _, w in cs] == sorted((float(W[c, m]) for c in slow[int(m)]), reverse=True)
    assert E.overlap(W).to_numpy().tolist() == [[sum(W[a, m] > 1e-3 and W[b, m] > 1e-3 for m in range(M)) for b in range(k)] for a in range(k)]
    assert E.Sharing.from_json(sh.to_json()).to_dict() == sh.to_dict() and len(sh.to_frame()) == int((W > 1e-3).sum()) and "shared" in repr(sh)


def test_sharing_of_some_codes(world):
    model = world[0]
    sh = model.sharing([5, 0])
    assert sh.codes.tolist() == [5, 0] and set(sh.to_frame().code) <= {5, 0} and sh.n_classes == 3
    assert len(E.sharing(torch.zeros(2, 3))) == 0 and E.sharing(torch.zeros(2, 3), [1]).n_users.tolist() == [0] and len(E.Sharing.from_json(E.sharing(torch.zeros(2, 3)).to_json()).to_frame()) == 0


def test_a_code_explained(world):
    model, data, tokens = world
    for m in range(12):
        co = model.explain_code(m, data.train, tokens, n=2)
        assert [c for c, _, _ in co.classes] == sorted((c for c in range(3) if model.weight[c, m] > 1e-3), key=lambda c: -model.weight[c, m]) and co.n_users == len(co)
        want = model.book.directions()[m]
        for (c, _, _), ps in zip(co.classes, co.patches):
            slow = sorted(((float((model.book.space(tokens.read([i])) @ want).max()), i) for i in range(len(tokens)) if tokens.labels[i] == c), reverse=True)[:2]
            close([p.similarity for p in ps], [v for v, _ in slow], eps=1e-5); assert {p.label for p in ps} == {c}
            close(float(model.book.space(tokens.read([ps[0].row]))[0, ps[0].position] @ want), ps[0].similarity, eps=1e-5)
        assert E.CodeExplanation.from_json(co.to_json()) == co and len(co.to_frame()) == 2 * len(co)
    few = model.explain_code(0, data.train)                                # from the index alone
    assert {p.row for ps in few.patches for p in ps} <= set(model.index.image[0].tolist()) and all(p.label == c for (c, _, _), ps in zip(few.classes, few.patches) for p in ps)
    alone = model.explain_code(0, n_classes=1)
    assert alone.patches is None and len(alone) == 1 <= alone.n_users and list(alone.to_frame()) == ["code", "class_id", "class_name", "weight"]
    assert E.index_of_class(model.book, 0, tokens, 7).image.shape == (1, 0)   # a class without images


# tables

def test_tables_of_maps_and_patches(world):
    model, data, _ = world
    ex = model.explain((data.test, 0), n=3, min_contribution=0, train=data.train, n_patches=2)
    f = ex.map_frame()
    (H, W), (x0, y0, x1, y1) = ex.grid, ex.extent
    assert len(f) == 3 * H * W
    for r in f.sample(20, random_state=0).itertuples():
        i = ex.codes.tolist().index(r.code)
        close(r.p, ex.map[i, r.row, r.column])
        close((r.x0, r.y0, r.x1, r.y1), E.to_full_image(E.patch_box(r.row * W + r.column, (H, W), ex.size), model.transform, data.test, 0), eps=1e-6)
    close((f.x0.min(), f.y0.min(), f.x1.max(), f.y1.max()), ex.extent)
    p = ex.patch_frame()
    assert p.code.tolist() == np.repeat(ex.codes, 2).tolist() and p["rank"].tolist() == [1, 2] * 3
    close(p[["x0", "y0", "x1", "y1"]].to_numpy(), [q.box_full for ps in ex.patches for q in ps])
    with pytest.raises(DataError, match="pass train="): model.explain((data.test, 0)).patch_frame()


def test_bad_questions(world):
    model, data, tokens = world
    said = model.explain((data.test, 0)).predicted
    with pytest.raises(ConfigError, match="says .* itself"): model.why_not((data.test, 0), said)
    with pytest.raises(ConfigError, match="both classes are"): model.why_not((data.test, 0), 1, 1)
    with pytest.raises(ConfigError, match="no class is called"): model.why_not((data.test, 0), "Puffin")
    with pytest.raises(ConfigError, match="no class 9"): model.compare((data.test, 0), (data.test, 1), 9)
    with pytest.raises(ConfigError, match="not str"): model.compare((data.test, 0), "b.png")
    with pytest.raises(ConfigError, match="cannot be negative"): model.compare((data.test, 0), (data.test, 1), n=-1)
    with pytest.raises(DataError, match="other images"): model.why_not((data.test, 0), 1, 0, train=data.test)
    with pytest.raises(DataError, match="no image of class"): model.why_not((data.test, 0), 1, 0, presence=torch.rand(2, 12), labels=[0, 2])
    with pytest.raises(ConfigError, match="0 to 11"): model.sharing([12])
    with pytest.raises(ConfigError, match="0 to 11"): model.explain_code(-1)
    with pytest.raises(DataError, match="other images"): model.explain_code(0, data.test)
