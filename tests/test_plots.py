"""Guards of protoquant.plots: what is drawn is what was measured; bad input is refused; the caller's style is left alone."""
import io

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings, strategies as st
from matplotlib.patches import Rectangle
from PIL import Image

from protoquant import backbones, datasets, explain as E, plots as P
from protoquant.codebook import Codebook, PatchIndex, Usage, nearest_patches
from protoquant.core import ConfigError, DataError
from protoquant.features import extract
from protoquant.head import NonNegLinear, presence_of
from protoquant.model import ProtoQuant

GRIDS = [(7, 7), (14, 14)]
W = torch.tensor([[2., 1., .5, 0., 0., .2], [0., 0., 1.5, 1., 0., .2], [0., .4, 0., 0., 0., .2]])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def data(): return datasets.load("toybirds", n_train_per_class=3, n_test_per_class=1, classes=3, crop="bbox")


@pytest.fixture(scope="module")
def transform(): return datasets.eval_transform(224, (0, 0, 0), (1, 1, 1), "squash")


def make(data, transform, grid, n_codes=3, same_place=False):
    "An explanation of test image 1 and an index of random patches of the training images."
    g = torch.Generator().manual_seed(0)
    N = grid[0] * grid[1]
    index = PatchIndex(torch.stack([torch.randperm(9, generator=g)[:5] for _ in range(6)]), torch.randint(N, (6, 5), generator=g),
                       torch.rand(6, 5, generator=g).sort(1, descending=True)[0], grid, list(data.train.ids))
    codes = np.arange(n_codes)
    m = torch.rand(n_codes, N, generator=g).double()
    if same_place: m[:, 3] = 2
    pos, s = m.argmax(1).numpy(), m.amax(1).numpy()
    w = np.array([2., 1., .5])[:n_codes]
    box = np.array([E.patch_box(p, grid, 224) for p in pos]).reshape(-1, 4)
    full = np.array([E.to_full_image(b, transform, data.test, 1) for b in box]).reshape(-1, 4)
    extent = E.to_full_image((0, 0, 224, 224), transform, data.test, 1)
    patches = [E.patches_of(c, index, data.train, transform) for c in codes]
    ex = E.Explanation(data.test.ids[1], 1, 0, 0, float((w * s).sum() + .7), np.array([.5, .3, .2]), codes, s, w, w * s, pos, box, full,
                       m.reshape(n_codes, *grid).numpy(), .7, 6 - n_codes, (224, 224), extent, data.class_names, patches)
    return ex, index


def boxes(ax): return [p.get_bbox().extents.tolist() for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()]
def texts(fig): return " ".join(t.get_text() for t in fig.findobj(matplotlib.text.Text))
def shown(axes): return [a for a in axes if a.images]


# boxes and pictures

def test_boxes_are_drawn_where_they_are(data):
    ax = P.show_image(plt.subplots()[1], (data.test, 0))
    want = [[10., 20., 42., 52.], [100., 0., 132., 32.], [10., 20., 42., 52.]]
    assert P.draw_boxes(ax, want, labels=["a", "b", "c"]) is ax
    assert boxes(ax) == want and [t.get_text() for t in ax.texts] == ["a", "b", "c"]
    solid, other, dashed = ax.patches
    assert solid.get_linestyle() == other.get_linestyle() != dashed.get_linestyle()        # the same place twice: both colours stay visible
    assert len({matplotlib.colors.to_hex(p.get_edgecolor()) for p in ax.patches}) == 3
    assert P.draw_boxes(ax, []) is ax and len(ax.patches) == 3


@pytest.mark.parametrize("bad", [[1, 2, 3, 4], [[1, 2, 3]]])
def test_boxes_of_the_wrong_shape(bad):
    with pytest.raises(ConfigError, match=r"\(n, 4\)"): P.draw_boxes(plt.subplots()[1], bad)


def test_pictures_keep_their_coordinates_and_get_small():
    im = Image.new("RGB", (1000, 500))
    ax = P.show_image(plt.subplots()[1], im, side=100)
    assert ax.images[0].get_array().shape[:2] == (50, 100) and ax.images[0].get_extent() == [0, 1000, 500, 0]
    ax = P.show_image(plt.subplots()[1], im, 100, window=(100.4, 50, 300, 150.2), square=True)
    assert ax.images[0].get_extent() == [100, 300, 151, 50]
    close(np.ptp(ax.get_xlim()), 200); close(np.ptp(ax.get_ylim()), 200)
    with pytest.raises(ConfigError, match="no pixel"): P.show_image(ax, im, window=(1000, 0, 1100, 10))
    for bad in ("x.png", 3, (1, 2)):
        with pytest.raises(ConfigError, match="a picture is"): P.picture(bad)


def test_names_and_colours():
    assert P.short("001.Black_footed_Albatross") == "Black footed Alba…" and P.short("Toybird_01") == "Toybird 01" and P.short(3) == "3"
    assert P.colour(0) == P.colour(len(P.COLOURS)) and len(set(P.COLOURS)) == 8
    assert P.ink_on("white") == "black" and P.ink_on("#0072B2") == "white"


# heat maps

@pytest.mark.parametrize("grid", GRIDS)
def test_heat_is_where_the_map_is(grid):
    m = np.zeros(grid); m[2, 4] = 1.
    o = P.overlay(Image.new("RGB", (140, 280), "white"), m)
    hot = o[..., 0] - o[..., 2]
    y, x = np.unravel_index(hot.argmax(), hot.shape)
    assert o.shape == (280, 140, 3) and 0 <= o.min() and o.max() <= 1
    assert abs(y - 2.5 * 280 / grid[0]) <= 280 / grid[0] / 2 and abs(x - 4.5 * 140 / grid[1]) <= 140 / grid[1] / 2
    assert not hot[:, :140 // grid[1]].any()


def test_heat_shares_the_given_scale():
    im, m = Image.new("RGB", (70, 70), "grey"), np.full((7, 7), .5)
    close(P.overlay(im, m, vmax=1.)[0, 0], P.overlay(im, m * .2, vmax=.2)[0, 0])
    assert np.abs(P.overlay(im, m, vmax=1.) - P.overlay(im, m)).max() > .05
    close(P.overlay(im, 0 * m, vmax=1.), P.overlay(im, m, vmin=.5, vmax=1.))
    assert np.isfinite(P.overlay(im, 0 * m)).all()


def test_heat_covers_its_extent_only():
    im, extent = Image.new("RGB", (100, 60), "grey"), (20, 10, 60, 40)
    d = np.abs(P.overlay(im, np.ones((7, 7)), extent) - P.overlay(im, np.zeros((7, 7)), extent, vmax=1.)).sum(-1) > 1e-6
    assert d[10:40, 20:60].all() and d.sum() == 30 * 40
    assert P.overlay(im, np.ones((7, 7)), (-10, -10, 120, 80)).shape == (60, 100, 3)       # larger than the picture


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 90), st.integers(1, 90))
@settings(max_examples=30, deadline=None)
def test_interpolation_stays_in_range(H, W, w, h):
    m = np.random.default_rng(H * 100 + W).random((H, W))
    s = P.spread(torch.tensor(m), (w, h))
    assert s.shape == (h, w) and m.min() - 1e-6 <= s.min() and s.max() <= m.max() + 1e-6


# prototypes

@pytest.mark.parametrize("grid", GRIDS)
def test_prototype_grid(data, transform, grid):
    _, index = make(data, transform, grid)
    fig = P.prototype_grid([2, 0], index, data.train, transform, 4, W[0], title="T")
    assert len(fig.axes) == 8 and all(len(a.images) == 1 for a in fig.axes)
    for row, c in enumerate((2, 0)):
        for ax, p in zip(fig.axes[4 * row:], E.patches_of(c, index, data.train, transform, 4)):
            close(boxes(ax)[0], p.box_full, eps=1e-6)
            assert ax.get_xlabel() == f"{P.short(p.class_name)} · {p.similarity:.2f}"
    assert "code 2\nweight 0.50" in texts(fig) and "code 0\nweight 2.00" in texts(fig) and "T" in texts(fig)
    seen = P.prototype_grid(3, index, data.train, transform, 2, view="seen").axes[0]
    close(seen.images[0].get_extent(), np.array(data.train.crop_box(int(index.image[3, 0])))[[0, 2, 3, 1]], eps=1)


def test_prototype_crops(data, transform):
    _, index = make(data, transform, (7, 7))
    ax = P.prototype_crops(plt.subplots()[1], 1, index, data.train, transform, n=5, side=32)
    a = ax.images[0].get_array()
    n = int((index.similarity[1] >= .01).sum())
    assert a.shape == (34, n * 33 + 1, 3) and not a[0].any() and not a[:, 0].any() and not a[:, 33].any()      # one black pixel around each
    p = E.patches_of(1, index, data.train, transform)[0]
    assert (a[1:33, 1:33] == np.asarray(P.crop_of(data.train.full_image(p.row), p.box_full, 32))).all()
    assert P.crop_strip(E.patches_of(1, index, data.train, transform), data.train, rows=2, side=10).shape == (23, 34, 3)
    none = PatchIndex(index.image, index.position, index.similarity * 0, index.grid, index.ids)
    assert "no similar patch" in P.prototype_crops(plt.subplots()[1], 1, none, data.train, transform).texts[0].get_text()


def test_crops_with_context():
    im = Image.new("RGB", (40, 40), "red"); im.paste("blue", (10, 10, 20, 20))
    assert np.asarray(P.crop_of(im, (10, 10, 20, 20), 10)).mean((0, 1)).round().tolist() == [0, 0, 255]
    wide = np.asarray(P.crop_of(im, (10, 10, 20, 20), 40, context=2))
    assert wide[0, 0].tolist() == [255, 0, 0] and wide[20, 20].tolist() == [0, 0, 255]
    assert np.asarray(P.crop_of(im, (35, 0, 45, 10), 10))[5, 9].tolist() == [255, 255, 255]


def test_missing_index_and_codes(data, transform):
    _, index = make(data, transform, (7, 7))
    with pytest.raises(DataError, match="no patch index"): P.prototype_grid([0], None, data.train, transform)
    with pytest.raises(DataError, match="other images"): P.prototype_grid([0], index, data.test, transform)
    with pytest.raises(ConfigError, match="no code 6"): P.prototype_crops(plt.subplots()[1], 6, index, data.train, transform)
    with pytest.raises(ConfigError, match="no codes to draw"): P.prototype_grid([], index, data.train, transform)
    with pytest.raises(ConfigError, match="'full'"): P.prototype_grid([0], index, data.train, transform, view="crop")


# explanations

@pytest.mark.parametrize("n", [0, 1, 3])
def test_bars_sum_to_the_logit(data, transform, n):
    ex, _ = make(data, transform, (7, 7), n)
    ax = P.contribution_bars(plt.subplots()[1], ex)
    widths = [b.get_width() for b in ax.patches]
    close(widths, [*ex.contribution, ex.rest]); close(sum(widths), ex.logit)
    close([b.get_x() for b in ax.patches], np.concatenate([[0], np.cumsum(widths)[:-1]]))           # a staircase
    close(ax.patches[-1].get_x() + ax.patches[-1].get_width(), ex.logit)
    assert f"logit {ex.logit:.2f}" in ax.get_title(loc="left") and f"{6 - n} other codes" in ax.get_yticklabels()[-1].get_text()


@pytest.mark.parametrize("grid", GRIDS)
def test_explanation_figure(data, transform, grid):
    ex, _ = make(data, transform, grid)
    fig = P.explanation_figure(ex, (data.test, 1), data.train, n_patches=4)
    assert len(fig.axes) == 2 + 3 * 5
    main, bars, *rows = fig.axes
    close(boxes(main), ex.box_full, eps=1e-6)
    for i in range(3):
        heat, *near = rows[5 * i:5 * i + 5]
        close(boxes(heat)[0], ex.box_full[i], eps=1e-6)
        for ax, p in zip(near, ex.patches[i]): close(boxes(ax)[0], p.box_full, eps=1e-6)
        colours = {matplotlib.colors.to_hex(p.get_edgecolor()) for ax in (heat, *near) for p in ax.patches}
        assert colours == {P.colour(i).lower()} == {matplotlib.colors.to_hex(bars.patches[i].get_facecolor())}    # one code, one colour
    assert "but it is Toybird 02" in texts(fig) and f"map (0 to {ex.map.max():.2f})" in texts(fig)


def test_explanation_figure_without_patches_or_codes(data, transform):
    ex, _ = make(data, transform, (7, 7))
    assert len(P.explanation_figure(ex, data.test.full_image(1)).axes) == 2 + 3
    ex.patches = None
    assert len(P.explanation_figure(ex, (data.test, 1), data.train).axes) == 2 + 3
    assert len(P.explanation_figure(make(data, transform, (7, 7), 0)[0], (data.test, 1)).axes) == 2
    seen = P.explanation_figure(ex, (data.test, 1), view="seen").axes[0]
    close(seen.images[0].get_extent(), np.array(data.test.crop_box(1))[[0, 2, 3, 1]], eps=1)


def test_codes_at_the_same_place(data, transform):
    ex, _ = make(data, transform, (7, 7), same_place=True)
    ax = P.explanation_figure(ex, (data.test, 1)).axes[0]
    assert len(set(map(tuple, boxes(ax)))) == 1 and len({matplotlib.colors.to_hex(p.get_edgecolor()) for p in ax.patches}) == 3
    assert len({t.xyann for t in ax.texts}) == 3                                                    # the numbers stand side by side


def test_figures_are_small(data, transform):
    ex, index = make(data, transform, (14, 14))
    for fig, most in ((P.explanation_figure(ex, (data.test, 1), data.train), 600), (P.prototype_grid([0, 1, 2], index, data.train, transform, 5), 600)):
        f = io.BytesIO(); fig.savefig(f)
        assert 5 < f.tell() / 1024 < most


def test_class_sheet(data, transform):
    _, index = make(data, transform, (7, 7))
    ce = E.explain_class(W, 0, 6, torch.rand(4, 6), class_names=data.class_names)
    fig = P.class_sheet(ce, index, data.train, transform, n=3, n_patches=5)
    assert len(shown(fig.axes)) == 6 and "3 of 4 codes, by mean contribution" in texts(fig) and "only in this class" in texts(fig)
    assert [a.get_title(loc="left").split(":")[0] for a in fig.axes[::2]] == [f"code {c}" for c in ce.codes[:3]]
    with pytest.raises(ConfigError, match="has no code"): P.class_sheet(E.explain_class(0 * W, 0), index, data.train, transform)


# codebook, weights, training

def test_code_usage():
    ax = P.code_usage([3, 0, 9, 1, 0])
    line = ax.lines[0]
    assert line.get_ydata().tolist() == [9, 3, 1] and "3 of 5 codes used" in ax.get_title(loc="left") and any("2 dead" in t.get_text() for t in ax.texts)
    assert P.code_usage(Usage(torch.tensor([2, 2])), ax) is ax
    assert "0 of 2" in P.code_usage([0, 0]).get_title(loc="left")
    with pytest.raises(ConfigError, match="no codes"): P.code_usage([])


def test_weight_structure():
    fig = P.weight_structure(W, ["a", "b", "c"])
    a, b, c = fig.axes[:3]
    m = a.images[0].get_array()
    assert m.shape == (3, 5)                                                     # the code without weight is left out
    best = m.filled(0).argmax(0)
    assert (np.diff(best) >= 0).all() and "5 of 6 codes used" in a.get_title(loc="left") and [t.get_text() for t in a.get_yticklabels()] == ["a", "b", "c"]
    assert sum(p.get_height() for p in b.patches) == 3 and sum(p.get_height() for p in c.patches) == 5
    lone = torch.zeros(5, 3000); lone[4, 7] = 1.; lone[0] = .01
    shown_ = P.weight_structure(lone).axes[0].images[0].get_array()
    assert shown_.shape == (5, 600) and shown_.max() == 1                         # a lone entry is not averaged away
    assert "0 of 6" in P.weight_structure(0 * W).axes[0].get_title(loc="left")
    with pytest.raises(ConfigError, match=r"\(classes, codes\)"): P.weight_structure(W[0])


LONG = [dict(stage=s, epoch=e, metric=m, value=v) for s, m, vs in ((1, "loss", [3, 2]), (2, "loss", [2, 1.5]), (2, "val_top1", [50, 60]), (2, "lr", [.1, .01]))
        for e, v in enumerate(vs)]


@pytest.mark.parametrize("history", [LONG, pd.DataFrame(LONG)])
def test_training_curves(history):
    fig = P.training_curves(history, selected={2: 1})
    assert len(fig.axes) == 6 and len([a for a in fig.axes if a.axison]) == 4
    drawn = {(a.get_title(loc="left"), l.get_label()): l.get_ydata().tolist() for a in fig.axes for l in a.lines if l.get_label() != "kept"}
    assert drawn == {("stage 1", "loss"): [3, 2], ("stage 2", "loss"): [2, 1.5], ("stage 2", "val_top1"): [50, 60], ("stage 2", "lr"): [.1, .01]}
    assert sum(l.get_label() == "kept" for a in fig.axes for l in a.lines) == 3


def test_wide_history_and_gaps():
    wide = [dict(epoch=0, loss=2., val=40., lr=.1), dict(epoch=1, loss=1., val=None, lr=.1)]
    df = P.long_history(wide)
    assert len(df) == 5 and set(df.stage) == {1} and len(P.training_curves(wide).axes) == 3
    for bad in ([], [dict(loss=1)]):
        with pytest.raises(ConfigError, match="rows with an epoch"): P.training_curves(bad)


def test_accuracy_bars():
    t = pd.DataFrame(dict(model=["probe", "ProtoQuant", "none"], accuracy=[71.4, 73.2, None], sd=[np.nan, .4, np.nan], paper=[np.nan, 85.9, np.nan]))
    ax = P.accuracy_bars(t)
    bars = [p for p in ax.patches if isinstance(p, Rectangle)]
    assert [b.get_width() for b in bars] == [71.4, 73.2] and [t_.get_text().strip() for t_ in ax.texts] == ["71.4", "73.2 ± 0.4"]
    assert ax.get_xlim()[0] == 0 and max(ax.get_xticks()) <= 100 and ax.get_legend().get_texts()[0].get_text() == "paper"
    assert [b.get_width() for b in P.accuracy_bars({"a": 1., "b": 2.}).patches] == [1, 2]
    with pytest.raises(ConfigError, match="no column 'acc'.*Did you mean accuracy"): P.accuracy_bars(t, "acc")
    with pytest.raises(ConfigError, match="holds no number"): P.accuracy_bars(t.iloc[2:])


# style

def test_the_style_is_used_and_left_behind(data):
    before = dict(plt.rcParams)
    ax = P.code_usage([1, 2])
    assert not ax.spines["top"].get_visible() and ax.figure.get_dpi() == 100
    assert dict(plt.rcParams) == before
    with pytest.raises(ConfigError): P.code_usage([])
    assert dict(plt.rcParams) == before
    assert P.jpeg_figures() is None


MACHADO = dict(deutan=[[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.011820, .042940, .968881]],      # Machado et al. 2009, severity 1
               protan=[[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]])


def lab(rgb):
    "CIELAB (D65) of linear RGB."
    xyz = rgb @ np.array([[.4124, .3576, .1805], [.2126, .7152, .0722], [.0193, .1192, .9505]]).T / [.9505, 1, 1.089]
    f = np.where(xyz > .008856, np.cbrt(np.maximum(xyz, 0)), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


@pytest.mark.parametrize("eye", ["deutan", "protan"])
def test_colour_blind_people_can_tell_the_first_six_colours_apart(eye):
    c = np.array([matplotlib.colors.to_rgb(c) for c in P.COLOURS[:6]])
    linear = np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055)**2.4)
    v = lab(np.clip(linear @ np.array(MACHADO[eye]).T, 0, 1))
    d = np.linalg.norm(v[:, None] - v[None], axis=-1) + 1e3 * np.eye(6)
    assert d.min() > 12          # 2.3 is just noticeable


# real models on both grids: what was measured is what is drawn

@pytest.fixture(scope="module", params=[("test_resnet", 224), ("test_vit", 224)], ids=["7x7", "14x14"])
def world(request, data, tmp_path_factory):
    name, side = request.param
    with pytest.warns(UserWarning, match="RANDOM"): b = backbones.create(name, "random", img_size=side)
    t = datasets.eval_transform(b.size, b.mean, b.std, "squash")
    tokens = extract(b, data.train, t, cache=tmp_path_factory.mktemp("store"), quiet=True)
    book = Codebook(tokens.read([0, 4, 8]).flatten(0, 1)[:: len(tokens.read([0])[0]) // 4][:12])
    head = NonNegLinear.of(torch.rand(3, 12, generator=torch.Generator().manual_seed(1)) * (torch.randn(3, 12, generator=torch.Generator().manual_seed(2)) > -.5))
    model = ProtoQuant(b, book, head, .1, data.class_names, t, index=nearest_patches(book, tokens, 5))
    assert model.grid == ((7, 7) if name == "test_resnet" else (14, 14))
    return model, data, tokens


def widths(ax): return [b.get_width() for b in ax.patches]


def test_match_grid(world):
    model, data, _ = world
    ex = model.explain((data.test, 1), n=3, min_contribution=0, train=data.train)
    fig = P.match_grid(ex, (data.test, 1), data.train, n=2, n_patches=3)
    assert len(fig.axes) == 2 * 4
    for i in range(2):
        first, *near = fig.axes[4 * i:4 * i + 4]
        close(boxes(first)[0], ex.box_full[i], eps=1e-6); assert f"adds {ex.contribution[i]:.2f}" in first.get_xlabel()
        for ax, p in zip(near, ex.patches[i]): close(boxes(ax)[0], p.box_full, eps=1e-6)
    with pytest.raises(DataError, match="no training patches"): P.match_grid(model.explain((data.test, 1)), (data.test, 1), data.train)
    with pytest.raises(ConfigError, match="nothing to draw"): P.match_grid(model.explain((data.test, 1), n=0, train=data.train), (data.test, 1), data.train)


@pytest.mark.parametrize("n", [0, 1, 5])
def test_difference_bars_end_at_the_difference(world, n):
    model, data, _ = world
    for d in (model.why_not((data.test, 1), 1, 0, n=n, min_difference=0), model.compare((data.test, 0), (data.test, 2), n=n, min_difference=0)):
        ax = P.difference_bars(plt.subplots()[1], d)
        w = widths(ax)
        close(w, [*d.difference, d.rest_for, d.rest_against]); close(sum(w), d.logit_difference, eps=1e-9)
        close([b.get_x() for b in ax.patches], np.concatenate([[0], np.cumsum(w)[:-1]]))
        assert [bool(b.get_hatch()) for b in ax.patches] == [v < 0 for v in w]                  # direction can be read without colour
        assert [t.get_text() for t in ax.texts] == [P.signed(v) for v in w] and len(ax.get_yticklabels()) == n + 2


def test_difference_figures(world):
    model, data, tokens = world
    s = presence_of(tokens, model.book, .1)
    d = model.why_not((data.test, 1), 1, 0, n=2, min_difference=0, train=data.train, n_patches=3, presence=s, labels=tokens.labels)
    fig = P.difference_figure(d, (data.test, 1), train=data.train, n_patches=3)
    assert len(fig.axes) == 2 + 1 + 2 * 4 and "why Toybird 01" in texts(fig) and "not Toybird 02" in texts(fig) and "what is missing for Toybird 02" in texts(fig)
    close(boxes(fig.axes[0]), d.a.box_full, eps=1e-6); close(sum(widths(fig.axes[1])), d.logit_difference, eps=1e-9)
    for i in range(2):
        heat, *near = fig.axes[3 + 4 * i:7 + 4 * i]
        close(boxes(heat)[0], d.a.box_full[i], eps=1e-6)
        for ax, p in zip(near, d.a.patches[i]): close(boxes(ax)[0], p.box_full, eps=1e-6)
    c = model.compare((data.test, 0), (data.test, 1), n=2, min_difference=0)
    fig = P.difference_figure(c, (data.test, 0), data.test.full_image(1))
    assert len(fig.axes) == 3 + 2 * 2
    for ax, e in zip(fig.axes, (c.a, c.b)): close(boxes(ax), e.box_full, eps=1e-6)
    for i in range(2):
        for ax, e in zip(fig.axes[3 + 2 * i:5 + 2 * i], (c.a, c.b)): close(boxes(ax)[0], e.box_full[i], eps=1e-6)
    assert len(P.difference_figure(model.why_not((data.test, 1), 1, 0, n=0, min_difference=0), (data.test, 1)).axes) == 2
    with pytest.raises(ConfigError, match="image_b="): P.difference_figure(c, (data.test, 0))


def test_shortfall_bars(world):
    model, data, tokens = world
    m = model.why_not((data.test, 1), 1, 0, presence=presence_of(tokens, model.book, .1), labels=tokens.labels).missing
    ax = P.shortfall_bars(plt.subplots()[1], m)
    n = len(m)
    close(np.subtract(widths(ax)[:n], widths(ax)[n:2 * n]), m.shortfall, eps=1e-9)
    m.codes = m.codes[:0]; m.weight = m.presence = m.mean_presence = m.shortfall = np.zeros(0)
    assert not P.shortfall_bars(plt.subplots()[1], m).patches


def test_code_sheet(world):
    model, data, tokens = world
    m = int((model.weight > .01).sum(0).argmax())
    co = model.explain_code(m, data.train, tokens, n=3, n_classes=2)
    fig = P.code_sheet(co, data.train)
    assert f"code {m}: 2 of the {co.n_users} classes that use it" in texts(fig) and len(fig.axes) == 4
    for ax, ps, (_, name, w) in zip(fig.axes[::2], co.patches, co.classes):
        close(boxes(ax)[0], ps[0].box_full, eps=1e-6); assert f"{P.short(name)}: weight {w:.2f}\nsimilarity {ps[0].similarity:.2f}" == ax.get_title(loc="left")
    co.patches[1] = []
    assert "none of its images" in texts(P.code_sheet(co, data.train, columns=1))
    with pytest.raises(DataError, match="explain_code"): P.code_sheet(model.explain_code(m), data.train)
    co.classes, co.patches = [], []
    with pytest.raises(ConfigError, match="no class uses"): P.code_sheet(co, data.train)


def test_method_figure(world):
    model, data, _ = world
    fig = P.method_figure(model, (data.test, 1), data.train, n=3, n_classes=3)
    logits = model(model.transform(data.test.image(1))[None])[0].detach().numpy()
    piles = [ax for ax in fig.axes if ax.get_ylabel().startswith("sums")]
    heights = {}
    for b in piles[0].patches: heights[round(b.get_x(), 3)] = heights.get(round(b.get_x(), 3), 0) + b.get_height()
    close(list(heights.values()), sorted(logits, reverse=True), eps=1e-4)                       # piles are the logits
    d = model.why_not((data.test, 1), int(logits.argsort()[-2]), n=3, min_difference=0)
    assert all(f"{s:.2f}" in texts(fig) for s in d.a.presence) and f"{model.grid[0]}×{model.grid[1]}" in texts(fig)
    for c in logits.argsort()[::-1]:
        for m in d.codes: assert (f"{model.weight[c, m].item():.2f}" if model.weight[c, m] > 0 else "0") in texts(fig)
    model_ = ProtoQuant(model.backbone, model.book, model.classifier, .1, data.class_names, model.transform)
    with pytest.raises(DataError, match="no patch index"): P.method_figure(model_, (data.test, 1), data.train)


def test_components_keep_distances():
    z = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    v = P.components(z, 2)
    assert v.shape == (9, 2) and v.min() == 0 and v.max() == 1
    c = (z - z.mean(0)).double()
    first = (c @ torch.linalg.svd(c).Vh[0]).numpy()
    assert abs(np.corrcoef(first, v[:, 0])[0, 1]) > 1 - 1e-9
    assert not P.components(torch.ones(4, 3), 2).any()


def test_training_figure():
    g = torch.Generator().manual_seed(0)
    z, a, b = (torch.randn(n, 5, generator=g) for n in (40, 6, 6))
    fig = P.training_figure(z, a, b, [3, 2, 1.5], {"start": W + 1, "end": W, "cut": W * (W > 1)})
    t = texts(fig)
    assert f"start\n18 weights, 6 codes" in t and f"end\n{int((W > 0).sum())} weights, {int((W.max(0).values > 0).sum())} codes" in t and "cut\n2 weights, 2 codes" in t
    assert [l.get_ydata().tolist() for ax in fig.axes for l in ax.lines if ax.get_xlabel() == "pass"] == [[3, 2, 1.5]] and "6 codes move" in t
    with pytest.raises(ConfigError, match="are needed"): P.training_figure(z, a[:5], b, [1], {"W": W})
    with pytest.raises(ConfigError, match="a column for each"): P.training_figure(z, a, b, [1], {"W": W[:, :4]})


def test_overlap_matrix():
    ax = P.overlap_matrix(plt.subplots()[1], W, ["a", "b", "c"])
    n = E.overlap(W).to_numpy()
    assert [int(t.get_text()) for t in ax.texts] == n.ravel().tolist()
    off = n[~np.eye(3, dtype=bool)]
    assert f"{off.mean():.1f} on average" in ax.get_title(loc="left") and ax.images[0].get_array().mask.diagonal().all()
    assert "one class" in P.overlap_matrix(plt.subplots()[1], W[:1]).get_title(loc="left")
    assert not P.overlap_matrix(plt.subplots()[1], torch.rand(40, 6)).texts                      # many classes: no numbers, no names


def test_the_first_figure_of_a_notebook_is_shown(monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    monkeypatch.delenv("MPLBACKEND", raising=False)      # as in a notebook
    cells = ["from protoquant import plots\nimport torch", "plots.code_usage(torch.tensor([3, 2, 1]));", "plots.code_usage(torch.tensor([3, 2, 1]));"]
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    nbclient.NotebookClient(nb, timeout=300, kernel_name="python3").execute()
    assert [[o.output_type for o in c.outputs] for c in nb.cells] == [[], ["display_data"], ["display_data"]]
