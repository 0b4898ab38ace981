"""Purity against slow loops and against answers that are known: parts, ties, selection, projection, files, disk and memory."""
import dataclasses
import itertools
import math
import os
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw

from protoquant import backbones, datasets, features, purity as P, toybirds
from protoquant.adapters import Activations, AttributionModel
from protoquant.codebook import Codebook
from protoquant.core import ConfigError, DataError
from protoquant.datasets import Part
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from pieces import gen, randn

CUB = ["back", "beak", "belly", "breast", "crown", "forehead", "left eye", "left leg", "left wing", "nape", "right eye", "right leg", "right wing", "tail", "throat"]
few = settings(max_examples=40, deadline=None)


# -- a slow oracle of D.6 to D.8: one list of 0 and 1 for each part, met in the order of the patches

def slow_purity(patches, notes, merge, denominator, ties):
    "patches: (image, box) of one prototype; notes: for each image [(name, x, y, visible), ...]."
    lists = {}
    for image, (x0, y0, x1, y1) in patches:
        here = {n: int(x0 <= x <= x1 and y0 <= y <= y1) for n, x, y, v in notes[image] if v}
        moved = {}
        for n, hit in here.items():
            partner = n.replace("left", "right")
            if merge and partner != n and partner in [m for m, *_ in notes[image]]: moved[partner] = hit
            else: lists.setdefault(n, []).append(hit)
        for n, hit in moved.items():
            if n in here: lists[n][-1] = max(lists[n][-1], hit)
            else: lists.setdefault(n, []).append(hit)
    names = P.merged_names([n for n, *_ in notes[0]], P.SIDES if merge else None)[0]
    order = list(lists) if ties == "seen" else [n for n in names if n in lists]
    mean = {n: sum(v) / (len(v) if denominator == "visible" else len(patches)) for n, v in lists.items()}
    best, most = ("", 0., 0), ("", 0., 0)
    for n in order:
        hits = sum(lists[n])
        if (mean[n], hits) > (best[1], best[2]): best = n, mean[n], hits
        if hits > most[2]: most = n, mean[n], hits
    return *best, *most


def random_case(seed, names=CUB, images=6, prototypes=4, patches=10, hidden=.4):
    rng = np.random.default_rng(seed)
    notes = [[(n, float(rng.integers(0, 9)), float(rng.integers(0, 9)), bool(rng.random() > hidden)) for n in names] for _ in range(images)]
    corner = rng.integers(0, 7, (prototypes * patches, 2)).astype(float)
    box = np.concatenate([corner, corner + rng.integers(0, 5, (prototypes * patches, 2))], 1)
    row, owner = rng.integers(0, images, prototypes * patches), np.repeat(np.arange(prototypes), patches)
    get = lambda i: np.array([[p[i] for p in note] for note in notes])
    return notes, P.PartTable(list(names), get(1), get(2), get(3).astype(bool), np.full((images, 2), 9.)), owner, row, box


@few
@given(st.integers(0, 10**6), st.sampled_from(P.DENOMINATORS), st.sampled_from(P.TIES), st.booleans(), st.sampled_from([CUB, list(toybirds.PARTS), ["left eye", "right eye"]]), st.floats(0, 1))
def test_scores_against_the_loop(seed, denominator, ties, merge, names, hidden):
    notes, parts, owner, row, box = random_case(seed, names, hidden=hidden)
    t = P.score_parts(P.count_hits(owner, row, box, parts, P.SIDES if merge else None, piece=7), denominator, ties)
    for k in range(4):
        part, pur, hits, most, most_pur, most_hits = slow_purity([(r, b) for o, r, b in zip(owner, row, box) if o == k], notes, merge, denominator, ties)
        got = t.iloc[k]
        assert got.purity == pytest.approx(pur) and got.part == part and got.hits == hits
        assert got.most_part == most and got.most_purity == pytest.approx(most_pur) and got.most_hits == most_hits


@few
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_bounds(seed, hidden):
    _, parts, owner, row, box = random_case(seed, hidden=hidden)
    c = P.count_hits(owner, row, box, parts)
    assert (0 <= c.hits).all() and (c.hits <= c.visible).all() and (c.visible <= c.patches[:, None]).all() and (c.patches == 10).all()
    seen, every = P.score_parts(c), P.score_parts(c, "all")
    assert seen.purity.between(0, 1).all() and (seen.purity >= seen.most_purity).all() and (seen.most_hits >= seen.hits).all()
    assert (every.purity <= seen.purity).all() and ((seen.purity == 0) == (seen.part == "")).all()
    assert (every.hits == every.most_hits).all()                # one denominator for all parts: the purest is the most frequent


@few
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_order_of_the_patches_does_not_matter(seed, random):
    _, parts, owner, row, box = random_case(seed)
    order = list(range(len(owner))); random.shuffle(order)
    a, b = (P.score_parts(P.count_hits(owner[o], row[o], box[o], parts), ties="table") for o in (np.arange(len(owner)), np.array(order)))
    assert a.equals(b)
    seen = [P.score_parts(P.count_hits(owner[o], row[o], box[o], parts)) for o in (np.arange(len(owner)), np.array(order))]
    assert (seen[0].purity == seen[1].purity).all() and (seen[0].hits == seen[1].hits).all()       # of equal parts another may be named


def test_names():
    names, group = P.merged_names(CUB)
    assert len(names) == 12 and [names[g] for g in group[[6, 7, 8]]] == ["right eye", "right leg", "right wing"]
    assert P.merged_names(CUB, None)[0] == CUB and P.merged_names(list(toybirds.PARTS))[0] == list(toybirds.PARTS)
    assert P.merged_names(["left eye"])[0] == ["left eye"]


def test_edges_belong_to_the_patch():
    x = np.array([[0, 32, 32.001, -.001]])
    assert P.in_box(np.array([[0, 0, 32, 32]]), x, np.full((1, 4), 32.)).tolist() == [[True, True, False, False]]


# -- geometry (D.5)

def slow_box(i, w, size):
    "One axis, in words of D.5."
    skip = round((size - 32) / (w - 1))
    if w == 26:
        lo = max(0, (i - 1) * skip + 4)
        if i == w - 1: lo -= 4
        hi = lo + 32
    else: lo, hi = i * skip, min(size, i * skip + 32)
    if i == w - 1 or hi == size: lo, hi = size - 32, size
    return lo, hi


@pytest.mark.parametrize("w,size,skip", [(7, 224, 32), (8, 256, 32), (13, 224, 16), (14, 224, 15), (26, 224, 8), (28, 224, 7), (16, 512, None), (5, 160, None)])
def test_boxes(w, size, skip):
    from protoquant.explain import patch_box
    if skip: assert round((size - 32) / (w - 1)) == skip
    for i, j in itertools.product(range(w), repeat=2):
        y0, y1, x0, x1 = *slow_box(i, w, size), *slow_box(j, w, size)
        assert patch_box(i * w + j, (w, w), size, geometry="pipnet") == (x0, y0, x1, y1)
    assert slow_box(w - 1, w, size) == (size - 32, size)


@few
@given(st.tuples(*[st.integers(0, 200)] * 4), st.integers(1, 64))
def test_shrinking(v, patch):
    b = np.array([min(v[0], v[2]), min(v[1], v[3]), max(v[0], v[2]), max(v[1], v[3])], float)
    s = P.shrunk_boxes(b[None], patch)[0]
    for lo, hi, a, z in ((b[0], b[2], s[0], s[2]), (b[1], b[3], s[1], s[3])):
        excess = hi - lo - patch
        assert (a, z) == ((lo, hi) if excess <= 0 else (lo + excess // 2, hi - excess // 2))
    assert (P.shrunk_boxes(b[None], None)[0] == b).all()


# -- projection

@few
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 7), st.integers(2, 30))
def test_top_images_as_pandas_has_them(seed, n, batch, images):
    score = torch.randint(0, 4, (images, 3), generator=gen(seed)).float() / 4        # many ties
    place = torch.randint(0, 49, (images, 3), generator=gen(seed + 1))
    sink = P.TopPatches(n)
    for r in torch.arange(images).split(batch): sink.add(r, score[r], place[r])
    owner, image, where, value = sink.found()
    for m in range(3):
        want = pd.DataFrame(dict(i=range(images), s=score[:, m].numpy())).nlargest(n, "s")
        of = owner == m
        assert image[of].tolist() == want.i.tolist() and value[of].tolist() == want.s.tolist() and where[of].tolist() == place[want.i.tolist(), m].tolist()
    assert sink.best.tolist() == score.amax(0).tolist()


@few
@given(st.integers(0, 10**6), st.randoms(use_true_random=False))
def test_the_order_of_the_images_does_not_matter(seed, random):
    score, place = torch.rand(20, 4, generator=gen(seed)), torch.randint(0, 49, (20, 4), generator=gen(seed))
    order = list(range(20)); random.shuffle(order)
    def best(rows):
        sink = P.TopPatches(5)
        for r in torch.arange(20).split(6): sink.add(r, score[rows][r], place[rows][r])
        owner, image, where, value = sink.found()
        return owner.tolist(), [rows[i] for i in image], where.tolist(), value.tolist()
    assert best(list(range(20))) == best(order)


def test_strong_images_against_a_loop():
    score, place = torch.rand(11, 3, generator=gen()), torch.randint(0, 49, (11, 3), generator=gen())
    sink = P.StrongPatches(.5)
    for r in torch.arange(11).split(4): sink.add(r, score[r], place[r])
    want = [(m, i, int(place[i, m]), float(score[i, m])) for m in range(3) for i in range(11) if score[i, m] > .5]
    assert [tuple(float(v) for v in row) for row in zip(*sink.found())] == [tuple(map(float, w)) for w in want]


def test_places_by_column_then_row():
    maps = torch.randint(0, 3, (4, 5, 3, 6), generator=gen()).float()
    got = P.places(maps)
    for b, m in itertools.product(range(4), range(5)):
        best = min(((-float(maps[b, m, h, w]), w, h) for h in range(3) for w in range(6)))
        assert divmod(int(got[b, m]), 6) == (best[2], best[1])


# -- pictures whose parts are known

COLOURS = dict(beak="red", **{"left eye": "blue", "right eye": "blue"}, tail="lime", wing="yellow")


class Dots(datasets.ImageSet):
    "Pictures of 280x140 with a coloured square in the middle of a tile for each visible part."
    def __init__(self, n=30, hidden=.2, seed=0):
        rng = np.random.default_rng(seed)
        self.where, self.shown = [rng.permutation(49)[:len(COLOURS)] for _ in range(n)], rng.random((n, len(COLOURS))) >= hidden
        super().__init__("dots", "test", [datasets.Sample(f"dots/{i}.png", 0, None) for i in range(n)], ["dots"])
    def image_size(self, i): return 280, 140
    def parts(self, i): return [Part(k, 40 * (t % 7) + 20., 20 * (t // 7) + 10., bool(v)) for k, t, v in zip(COLOURS, self.where[i], self.shown[i])]
    def full_image(self, i):
        im = Image.new("RGB", self.image_size(i))
        for p in self.parts(i):
            if p.visible: ImageDraw.Draw(im).rectangle((p.x - 8, p.y - 4, p.x + 8, p.y + 4), fill=COLOURS[p.name])
        return im


class Colours:
    "Prototype k fires where the colour of part k is."
    size, grid, mean, std = (224, 224), (7, 7), (0., 0., 0.), (1., 1., 1.)
    colours = torch.tensor([[1., 0, 0], [0, 0, 1], [0, 1, 0], [1, 1, 0]])
    class_weights = torch.eye(4)
    def activations(self, x):
        maps = torch.einsum("bchw,mc->bmhw", F.normalize(F.avg_pool2d(x, 32), dim=1), F.normalize(self.colours, dim=1)).sub(.9).relu() * 10
        return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)) @ self.class_weights.T)


class Anywhere(Colours):
    def __init__(self, M=300, seed=0): self.class_weights, self.gen = torch.ones(1, M), gen(seed)
    def activations(self, x):
        maps = torch.rand(len(x), self.class_weights.shape[1], *self.grid, generator=self.gen)
        return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)) @ self.class_weights.T)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("hidden", [0, .3, .6])
def test_a_prototype_that_fires_exactly_on_a_part_is_pure(seed, hidden):
    images = Dots(40, hidden, seed)
    r = P.purity_of(P.project_prototypes(Colours(), images, quiet=True), images)
    assert r.mean == 1 and r.sd == 0 and r.pure == 4 and r.table.part.tolist() == ["beak", "right eye", "tail", "wing"]
    assert (r.table.hits == r.table.visible).all() and (r.table.patches == 10).all()


@pytest.mark.parametrize("keep", [["beak"], ["beak", "tail", "wing"]])
def test_a_prototype_that_fires_anywhere_has_the_expected_purity(keep):
    class Some(Dots):
        def parts(self, i): return [p for p in super().parts(i) if p.name in keep]
    images = Some(40, 0, 1)
    r = P.purity_of(P.project_prototypes(Anywhere(), images, quiet=True), images)
    n, p, g = 10, 1 / 49, len(keep)
    at_most = [sum(math.factorial(n) // math.prod(map(math.factorial, (*c, n - sum(c)))) * p**sum(c) * (1 - g * p)**(n - sum(c))
                   for c in itertools.product(range(m + 1), repeat=g) if sum(c) <= n) for m in range(n + 1)]
    prob, v = np.diff(at_most, prepend=0), np.arange(n + 1) / n
    mean = (v * prob).sum(); sd = ((v**2 * prob).sum() - mean**2)**.5
    assert prob.sum() == pytest.approx(1) and (g > 1 or mean == pytest.approx(1 / 49))
    assert abs(r.mean - mean) < 3.3 * sd / len(r)**.5


def test_benchmark_selects_on_the_training_images():
    class Late(Colours):
        "A fourth prototype that only a training image shows, a fifth without weight, a sixth that never fires."
        class_weights = torch.cat([torch.eye(4), torch.zeros(4, 1), torch.ones(4, 1)], 1)
        def activations(self, x):
            a = super_maps(x)
            maps = torch.cat([a, a[:, :1], a[:, :1] * .05], 1)
            return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)) @ self.class_weights.T)
    super_maps = lambda x: Colours().activations(x).maps
    train, test = Dots(20, seed=3), Dots(20, seed=4)
    b = P.measure_purity(Late(), train, test, quiet=True)
    assert b.used.tolist() == [True] * 4 + [False] * 2 and sorted(b.test.table.prototype) == [0, 1, 2, 3]
    free = P.measure_purity(Late(), train, test, clamp=None, quiet=True)
    assert free.used.tolist() == [True] * 4 + [False, True]
    m = b.metrics("_x")
    assert m["purity_test_x"] == 1 and m["prototypes_x"] == 4 and m["prototypes_dropped_x"] == 2 and m["purity_all_train_x"] == 1 and m["pure_train_x"] == 4
    assert len(b.train_all.patches) == train.shown[:, [0, 3, 4]].sum() + train.shown[:, 1:3].any(1).sum()      # every image that shows the colour


def test_selection_by_hand():
    w = torch.tensor([[.5, .5, 5e-4, 5e-6, 0.], [.1, .2, 0, 0, -1.]])
    assert P.used_prototypes(w, [.11, .1, 0, 1, 1]).tolist() == [True, False, True, False, False]
    assert P.used_prototypes(w, [.11, .1, 0, 1, 1], clamp=.2).tolist() == [False, False, True, False, False]
    assert P.used_prototypes(w, [.11, .1, 0, 1, 1], None).tolist() == [True, True, True, False, False]
    with pytest.raises(ConfigError, match="no prototype has a positive weight"): P.used_prototypes(-w.abs(), np.ones(5))
    with pytest.raises(ConfigError, match="clamp=None"): P.used_prototypes(torch.ones(1, 3), [.1, .05, 0])
    with pytest.raises(ConfigError, match="of 5 prototypes, the scores of 3"): P.used_prototypes(w, np.ones(3))


def test_trace_adds_up():
    images = Dots(30, .5, 7)
    r = P.purity_of(P.project_prototypes(Anywhere(20), images, quiet=True), images)
    for one in r.table.itertuples():
        t = r.trace(one.prototype)
        held = t[[c for c in t if c in ("beak", "right eye", "tail", "wing")]]
        assert held.mean().fillna(0).max() == pytest.approx(one.purity) and t.image.tolist() == list(one.images) and np.allclose(t[["x0", "y0", "x1", "y1"]], one.boxes)
        if one.part: assert held[one.part].sum() == one.hits and held[one.part].notna().sum() == one.visible


# -- models

@pytest.fixture(scope="module")
def toys(): return datasets.load("toybirds", n_train_per_class=4, n_test_per_class=3, classes=3)


@pytest.fixture(scope="module")
def net():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return backbones.create("test_resnet", "random", num_classes=3)


@pytest.fixture(scope="module")
def pq(net):
    return ProtoQuant(net, Codebook(randn(12, net.d).abs()), NonNegLinear.of(torch.rand(3, 12, generator=gen())), .1, transform=datasets.eval_transform(net.size, net.mean, net.std, "squash"))


def test_tokens_and_images_agree(toys, net, pq, tmp_path):
    cropped = datasets.load("toybirds", n_train_per_class=4, n_test_per_class=3, classes=3, crop="bbox").train
    whole = P.whole_images(cropped)
    assert whole.crop == "none" and cropped.crop == "bbox" and whole.image(0).size == (256, 256)
    tokens = features.extract(net, whole, pq.transform, cache=tmp_path, quiet=True)
    stored, live = P.project_prototypes(pq, tokens, 5, quiet=True), P.project_prototypes(pq, cropped, 5, quiet=True)      # images are read whole
    assert np.allclose(stored.score, live.score, atol=5e-3) and stored.ids == live.ids and (stored.position == live.position).mean() > .9
    a, b = P.measure_purity(pq, whole, toys.test, tokens, clamp=None, quiet=True), P.measure_purity(pq, cropped, toys.test, clamp=None, quiet=True)
    assert a.test.table.purity.equals(b.test.table.purity)
    with pytest.raises(DataError, match="found in other images"): P.measure_purity(pq, toys.test, toys.test, tokens, quiet=True)


def test_readings_share_the_places_but_not_the_scores(toys, pq):
    soft, cos = (P.project_prototypes(pq, toys.test, 3, reading=r, quiet=True) for r in ("softmax", "cosine"))
    assert (soft.score <= 1).all() and not np.allclose(soft.score, cos.score) and (soft.score > 0).all()


def test_disk_and_memory_agree_exactly(net, tmp_path):
    mem = datasets.load("toybirds", n_train_per_class=4, n_test_per_class=3, classes=3)
    disk = datasets.read_cub(toybirds.write_cub(tmp_path/"cub", 4, 3, 3), crop="none")
    class Channels:
        size, grid, mean, std, class_weights = net.size, net.grid, net.mean, net.std, torch.ones(1, net.d)
        def activations(self, x):
            m = net.features(x).softmax(1)
            return Activations(m, m.amax((2, 3)), m.amax((2, 3)) @ self.class_weights.T)
    strip = lambda s: [i.split("/")[-1].removesuffix(".png").split(".")[-1] for i in s.ids]
    place = {k: i for i, k in enumerate(strip(disk.train))}
    disk.train = disk.train.subset([place[k] for k in strip(mem.train)])
    disk.test = disk.test.subset([strip(disk.test).index(k) for k in strip(mem.test)])
    a, b = (P.measure_purity(Channels(), d.train, d.test, clamp=None, quiet=True) for d in (mem, disk))
    for x, y in ((a.train, b.train), (a.test, b.test)):
        assert x.table.drop(columns=["images", "boxes"]).equals(y.table.drop(columns=["images", "boxes"]))
        assert all((p == q).all() for p, q in zip(x.table.boxes, y.table.boxes))
    assert a.metrics() == b.metrics()


def test_an_attribution_map_can_be_scored(toys):
    m = AttributionModel(lambda x: x.mean((2, 3)), lambda x, t: F.avg_pool2d(x[torch.arange(len(x)), t], 8), 3, (64, 64), (8, 8))
    r = P.purity_of(P.project_prototypes(m, toys.test, 4, quiet=True), toys.test)
    assert len(r) == 3 and r.table.purity.between(0, 1).all()


def test_maps_come_in_bounded_batches():
    seen = []
    class Large(Colours):
        grid, class_weights = (28, 28), torch.ones(1, 4000)
        def activations(self, x):
            seen.append(len(x))
            return Activations(torch.zeros(len(x), 4000, 28, 28), torch.zeros(len(x), 4000), torch.zeros(len(x), 1))
    p = P.project_prototypes(Large(), Dots(9), 2, quiet=True)
    assert max(seen) * 4000 * 784 * 4 <= 48 << 20 and sum(seen) == 9 and len(p) == 8000
    assert p.image[:2].tolist() == [0, 1]          # all scores equal: the first images


# -- files

def test_a_file_gives_the_same_purity(tmp_path):
    images = Dots(30, .4, 5)
    p = P.project_prototypes(Anywhere(30), images, quiet=True)
    for i, (folder, q) in enumerate([("", p), ("/some/where", p), ("x", P.project_prototypes(Anywhere(30), images, above=.99, quiet=True)),
                                     ("", dataclasses.replace(p, box=p.box + np.array([0, 0, .3, 1 / 3]), patch=None))]):
        P.write_projection(q, tmp_path/f"{i}.csv", folder)
        got = P.read_projection(tmp_path/f"{i}.csv", images, 225 if q.patch is None else 224, q.patch)
        got.size = q.size
        assert (got.box == q.box).all() and (got.prototype == q.prototype).all() and (got.image == q.image).all()
        a, b = P.purity_of(q, images), P.purity_of(got, images)
        drop = ["images", "boxes", "weak"]
        assert a.table.drop(columns=drop).equals(b.table.drop(columns=drop))
    assert (tmp_path/"0.csv").read_text().splitlines()[0] == "prototype,img name,h_min_224,h_max_224,w_min_224,w_max_224"


def write(path, *rows, head=",".join(P.COLUMNS)):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_names_and_boxes_of_other_programs(tmp_path):
    images = Dots(5)
    f = write(tmp_path/"a.csv", "cap,/home/x/dots/3.png,0,112,0,40", r"cap,C:\data\dots\normal_4.png,1.5,33.5,0,32", "12,dots/0.png,0,32,0,32")
    p = P.read_projection(f, images)
    assert p.image.tolist() == [3, 4, 0] and p.prototype.tolist() == ["cap", "cap", "12"]
    t = P.purity_of(p, images).table
    assert t.prototype.tolist() == ["cap", "12"] and t.patches.tolist() == [2, 1]
    assert np.allclose(t.boxes[0][0], [4 * 280 / 224, 40 * 140 / 224, 36 * 280 / 224, 72 * 140 / 224])       # cut to 32, h before w in the file
    assert p.select(["12"]).image.tolist() == [0]


@pytest.mark.parametrize("rows,head,says", [
    (["0,dots/99.png,0,32,0,32"], None, "1 of 1 images are not in dots/test, first: dots/99.png"),
    (["0,dots/1.png,0,32,0,32", "0,dots/2.png,0,x,0,32"], None, "line 3"),
    (["0,dots/1.png,40,32,0,32"], None, "line 2"), (["0,dots/1.png,0,256,0,32"], None, "size="), (["0,,0,32,0,32"], None, "line 2"),
    ([], None, "no patch"), (["0,dots/1.png,0,32"], "prototype,img name,h_min,h_max", "the first line must be")])
def test_bad_files(tmp_path, rows, head, says):
    f = write(tmp_path/"a.csv", *rows, **(dict(head=head) if head else {}))
    with pytest.raises(DataError, match=says): P.read_projection(f, Dots(5))
    with pytest.raises(DataError, match="cannot be read"): P.read_projection(tmp_path/"none.csv", Dots(5))


# -- bad input

class Bare(Dots):
    def parts(self, i): return None if i % 2 else []


class Shifted(Dots):
    def parts(self, i): return [p._replace(x=p.x + 200) for p in super().parts(i)]


def test_images_without_parts(tmp_path):
    images = Bare()
    with pytest.raises(DataError, match="1 of 1 images have no part annotation, first: dots/0.png"): P.measure_purity(Colours(), images, images, quiet=True)
    with pytest.raises(DataError, match="30 of 30"): P.part_table(images)
    for split in ("train", "test"):
        (tmp_path/split/"a").mkdir(parents=True); Image.new("RGB", (40, 40)).save(tmp_path/split/"a"/"1.png")
    folder = datasets.load("imagefolder", str(tmp_path))
    with pytest.raises(DataError, match="imagefolder/train.*no part annotation"): P.measure_purity(Colours(), folder.train, folder.test, quiet=True)


def test_cub_without_its_parts_folder(tmp_path):
    cub = toybirds.write_cub(tmp_path/"cub", 1, 1, 2)
    (cub/"parts"/"part_locs.txt").unlink()
    with pytest.raises(DataError, match="part_locs.txt is missing"): datasets.read_cub(cub)


def test_parts_outside_of_the_image():
    images = Shifted(4)
    with pytest.raises(DataError, match=r"dots/test/dots/\d.png: the visible part '.*lies outside of the image of 280x140"): P.part_table(images)
    class Hidden(Shifted):
        def parts(self, i): return [p._replace(visible=False) for p in super().parts(i)]
    assert not P.part_table(Hidden(4)).visible.any()              # where a hidden part is said to be does not matter
    class Nowhere(Dots):
        def parts(self, i): return [p._replace(y=math.nan) for p in super().parts(i)]
    with pytest.raises(DataError, match="outside"): P.part_table(Nowhere(4, 0))


def test_models_that_break_their_word():
    images = Dots(6)
    class Wrong(Colours): grid = (14, 14)
    class Fewer(Colours):
        class_weights = torch.ones(4, 5)
        def activations(self, x):
            maps = torch.zeros(len(x), 4, 7, 7)
            return Activations(maps, maps.amax((2, 3)), torch.zeros(len(x), 4))
    class NaN(Colours):
        def activations(self, x):
            a = super().activations(x)
            a.presence[3] = math.nan
            return a
    class Dead(Colours): class_weights = -torch.eye(4)
    for bad in (Wrong(), Fewer()):
        with pytest.raises(ConfigError, match="declares"): P.project_prototypes(bad, images, quiet=True)
    with pytest.raises(DataError, match="dots/3.png is not finite"): P.project_prototypes(NaN(), images, quiet=True)
    with pytest.raises(ConfigError, match="no prototype has a positive weight"): P.measure_purity(Dead(), images, images, quiet=True)
    with pytest.raises(ConfigError, match="lacks class_weights"): P.project_prototypes(torch.nn.Linear(2, 2), images, quiet=True)
    with pytest.raises(ConfigError, match="n=0"): P.project_prototypes(Colours(), images, 0, quiet=True)
    with pytest.raises(ConfigError, match="geometry"): P.project_prototypes(Colours(), images, geometry="round", quiet=True)
    with pytest.raises(DataError, match="no images"): P.project_prototypes(Colours(), images.subset([]), quiet=True)
    with pytest.raises(ConfigError, match="cannot read stored tokens"): P.project_prototypes(Colours(), features.Tokens(torch.zeros(6, 49, 3), torch.zeros(6), (7, 7)), quiet=True)


def test_results_that_cannot_be():
    images = Dots(6)
    p = P.project_prototypes(Colours(), images, quiet=True)
    with pytest.raises(DataError, match="found in other images: 6 there, 5"): P.purity_of(p, images.subset(range(5)))
    with pytest.raises(DataError, match="no patch"): P.purity_of(p.select([]), images)
    with pytest.raises(ConfigError, match="denominator"): P.purity_of(p, images, "ten")
    with pytest.raises(ConfigError, match="ties"): P.purity_of(p, images, ties="last")
    with pytest.raises(ConfigError, match="was not scored"): P.purity_of(p, images).trace(9)
    quiet = P.measure_purity(Colours(), images, images, above=2, quiet=True)           # nothing is that strong
    assert quiet.train_all is None and quiet.metrics()["purity_all_train"] is None and quiet.metrics()["prototypes_all_test"] == 0


# -- the benchmark's piece

def test_bench_measures_all_prototypes(toys, net, pq, tmp_path):
    import importlib.util
    from pathlib import Path
    spec = importlib.util.spec_from_file_location("bench_purity", Path(__file__).resolve().parent.parent/"tools"/"bench_purity.py")
    bench = importlib.util.module_from_spec(spec); spec.loader.exec_module(bench)
    tokens = features.extract(net, toys.test, pq.transform, cache=tmp_path, quiet=True)
    model = bench.random_model(net, tokens, 7, 3, pq.transform)
    flat = tokens.read(slice(None)).flatten(0, 1)
    assert all((flat == c).all(1).any() for c in model.book.codes)                     # its codes are tokens
    r, wall, cpu = bench.measure(model, tokens, toys.test)
    assert 1 <= len(r) <= 7 and wall > 0 and cpu > 0 and r.table.purity.between(0, 1).all()


# -- pictures

def test_figures_show_what_was_counted():
    import matplotlib.pyplot as plt
    images = Dots(12, .3)
    r = P.purity_of(P.project_prototypes(Colours(), images, quiet=True), images)
    fig = P.patch_figure(r, [2, 0], n=4)
    assert len(fig.axes) == 8 and "purity 1.00" in fig.axes[0].texts[0].get_text() and "tail" in fig.axes[0].texts[0].get_text()
    shown = sum(p.visible for p in images.parts(int(r.trace(2).row[0])))
    assert len(fig.axes[0].lines) == shown                                            # one mark a visible part
    fig = P.purity_figure(dict(train=r, test=r))
    assert fig.axes[0].get_legend().get_texts()[0].get_text() == "train: 1.00 ± 0.00" and sum(b.get_height() for b in fig.axes[0].patches) == pytest.approx(2)
    with pytest.raises(ConfigError, match="no prototypes"): P.patch_figure(r, [])
    plt.close("all")


# -- real data

@pytest.mark.skipif("PROTOQUANT_DATA" not in os.environ, reason="PROTOQUANT_DATA is not set")
def test_real_parts_are_inside_and_merge_to_twelve():
    if not os.path.isdir(os.path.join(os.environ["PROTOQUANT_DATA"], "CUB_200_2011")): pytest.skip("no CUB_200_2011 in PROTOQUANT_DATA")
    ds = datasets.load("cub", crop="none")
    t = P.part_table(ds.test)
    assert sorted(t.names) == sorted(CUB) and len(P.merged_names(t.names)[0]) == 12 and len(t) == len(ds.test)
    w, h = ds.test.image_size(0)
    eyes = t.names.index("beak")
    if t.visible[0, eyes]:
        col, row = int(t.x[0, eyes] // (w / 7)), int(t.y[0, eyes] // (h / 7))
        box = P.full_boxes(np.array([[32 * col, 32 * row, 32 * col + 32, 32 * row + 32]]), (224, 224), t.size[:1])
        assert P.in_box(box, t.x[:1], t.y[:1])[0, eyes]
