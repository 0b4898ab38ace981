"""Guards of protoquant.report: the page says what was measured, nothing on it comes from elsewhere or can be broken by a name, and what is missing is said."""
import base64
import io
import json
import re
import shutil
import warnings
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from fastcore.test import test_close as close
from hypothesis import given, settings, strategies as st
from PIL import Image

from protoquant import backbones, datasets, report as R
from protoquant.codebook import Codebook, nearest_patches
from protoquant.core import ConfigError, DataError, WeightsError, write_json
from protoquant.features import extract
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from protoquant.plots import signed


class Page(HTMLParser):
    "Elements, attributes and text of a page."
    def __init__(self, text):
        super().__init__()
        self.tags, self.attrs, self.text, self.ids, self.links = [], [], "", [], []
        self.feed(text)
    def handle_starttag(self, t, attrs):
        a = dict(attrs)
        self.tags.append(t); self.attrs += [(t, k, v) for k, v in attrs]
        if "id" in a: self.ids.append(a["id"])
        if "href" in a: self.links.append(a["href"])
    def handle_data(self, d): self.text += d


def random_backbone(name="test_resnet", **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backbones.create(name, "random", **kw)


def make_run(folder, data, backbone, params, cache, names=("model_topk.safetensors",), index=True, **record):
    "A run's folder with a model of 12 codes that are training tokens, and a record."
    t = datasets.eval_transform(backbone.size, backbone.mean, backbone.std, data.resize)
    tokens = extract(backbone, data.train, t, cache=cache, quiet=True)
    book = Codebook(tokens.read(slice(0, 3)).flatten(0, 1)[::tokens.positions // 4][:12])
    k = data.n_classes
    head = NonNegLinear.of(torch.rand(k, 12, generator=torch.Generator().manual_seed(1)) * (torch.randn(k, 12, generator=torch.Generator().manual_seed(2)) > -.5))
    model = ProtoQuant(backbone, book, head, .1, data.class_names, t, index=nearest_patches(book, tokens, 4) if index else None)
    for n in names: model.save(folder/n)
    write_json(folder/"run.json", dict(schema=1, experiment="cub", key="the-key", parameters=params, metrics=dict(top1=12.25, top1_topk=50.5, codes=12, odd=None), n_images=dict(train=1, test=2),
                                       scale="smoke", data=data.fingerprints, recipe=dict(name="grounded"), git=dict(commit="abc"), **record))
    return model


TOY = dict(dataset="toybirds", classes=3, n_train_per_class=3, n_test_per_class=2, crop="bbox", recipe="grounded", topk=10, seed=40)


@pytest.fixture(scope="module", params=[("test_resnet", 224), ("test_vit", 224)], ids=["7x7", "14x14"])
def world(request, tmp_path_factory):
    data = datasets.load("toybirds", crop="bbox", **{k: TOY[k] for k in ("classes", "n_train_per_class", "n_test_per_class")})
    b, folder = random_backbone(request.param[0], img_size=request.param[1]), tmp_path_factory.mktemp("run")
    return folder, make_run(folder, data, b, TOY, tmp_path_factory.mktemp("store")), data, b


@pytest.fixture
def toy(tmp_path):
    "A run that a test may spoil."
    data = datasets.load("toybirds", crop="bbox", **{k: TOY[k] for k in ("classes", "n_train_per_class", "n_test_per_class")})
    b, folder = random_backbone(), tmp_path/"run"
    folder.mkdir()
    return folder, make_run(folder, data, b, TOY, tmp_path/"store", names=R.MODELS), data, b


def pictures(text): return {n: Image.open(io.BytesIO(base64.b64decode(d))) for n, d in re.findall(r'<image id="(\w+)" href="data:image/jpeg;base64,([^"]+)"', text)}


# HTML and pictures

@given(st.text(max_size=40), st.text(max_size=40))
@settings(max_examples=80, deadline=None)
def test_whatever_the_text_it_stays_text(text, attr):
    text, attr = (t.replace("\r", "").replace("\x00", "") for t in (text, attr))
    p = Page(R.tag("p", text, R.tag("b", "!"), title=attr))
    assert p.tags == ["p", "b"] and p.text == text + "!" and p.attrs == [("p", "title", attr)]


def test_pieces():
    assert R.tag("p", [1, [None, "&"]], R.Html("<i>"), class_="a", aria_label="b", id=None) == '<p class="a" aria-label="b">1&amp;<i></p>'
    assert R.tag("br") == "<br>" and R.tag("rect") == "<rect></rect>" and isinstance(R.join("a"), R.Html)
    assert R.table(["a"], [[1]]).count("<td>1</td>") == 1


@given(st.integers(8, 300), st.integers(8, 300), st.integers(1_500, 60_000))
@settings(max_examples=25, deadline=None)
def test_pictures_keep_within_their_limit(w, h, limit):
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (h, w, 3), dtype=np.uint8))
    b = R.jpeg(im, limit)
    assert len(b) <= limit and Image.open(io.BytesIO(b)).format == "JPEG"


def test_album_shares_what_is_left():
    im = Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    a = R.Album(60_000, 5)
    for i in range(4): a.add(str(i), im)
    a.add("flat", Image.new("RGB", (200, 200)))
    assert a.used <= 60_000 and a.sizes["0"] == (200, 200)      # shown as large as it was, however it is stored
    b = R.Album(60_000, 5); b.add("flat", Image.new("RGB", (200, 200)))
    for i in range(4): b.add(str(i), im)
    assert b.used <= 60_000 and b.used > 30_000                 # what the flat one left is used


def test_boxed_picture():
    im = Image.new("RGB", (200, 100), "black")
    a = np.asarray(R.boxed(im, (50, 25, 100, 75), side=100, color="#ff0000"))
    assert a.shape == (100, 100, 3) and (a[:25] == 255).all() and (a[75:] == 255).all()                 # a wide picture in a white square
    red = (a == [255, 0, 0]).all(-1)
    ys, xs = np.nonzero(red)
    assert (xs.min(), xs.max(), ys.min(), ys.max()) == (25, 50, 37, 62)                            # half the size, 25 pixels lower
    part = np.asarray(R.boxed(im, (50, 25, 100, 75), (50, 25, 100, 75), 100, "#ff0000"))
    assert (part[50, 50] == 0).all() and not (part[3:-3, 3:-3] == 255).all(-1).any()


# the page

def test_the_page_is_whole_and_alone(world, tmp_path):
    folder, model, data, b = world
    file = R.report(folder, tmp_path/"r.html", n_images=3, n_codes=4, n_patches=3, backbone=b)
    text = file.read_text(encoding="utf-8")
    p, bare = Page(text), re.sub(r"data:image/jpeg;base64,[\w+/=]+", "", text)
    assert len(p.ids) == len(set(p.ids)) and all(l.startswith("data:image/jpeg;base64,") or l[1:] in p.ids for l in p.links)
    assert not re.search(r"https?:|//|url\(|@import|javascript:", bare) and not {"script", "link", "iframe", "object", "embed", "form", "img"} & set(p.tags)
    assert not [a for a in p.attrs if a[1].startswith("on") or a[1] == "src"] and any("default-src 'none'" in (v or "") for t, k, v in p.attrs if t == "meta")
    assert ("meta", "name", "viewport") in p.attrs and text.startswith("<!DOCTYPE html>") and ("html", "lang", "en") in p.attrs
    used = {l[1:] for t, k, l in p.attrs if t == "use"}
    assert used == set(pictures(text))                              # nothing stored in vain, nothing missing
    for w in ("top1_topk", "50.5", "the-key", "grounded", "This is a smoke run"): assert w in p.text
    assert len([i for i in p.ids if i.startswith("class-")]) == 3 and len([i for i in p.ids if i.startswith("code-")]) == len([m for m in range(12) if f'id="code-{m}"' in text])


def test_numbers_on_the_page_are_the_model_s(world, tmp_path):
    folder, model, data, b = world
    c = R.contents(R.open_run(folder, backbone=b), n_images=4, n_codes=3, codes_per_class=5)
    R.fill_album(c)
    assert c.rows == R.chosen_images(6, 4) == sorted(set(c.rows)) and c.run.view == "seen"
    for k, (i, e) in enumerate(zip(c.rows, c.explained)):
        ref = model.explain((data.test, i), n=3)
        close(e.logit, ref.logit); close(e.contribution.sum() + e.rest, e.logit, eps=1e-12)
        text = Page(R.image_card(c, k)).text
        assert f"logit {e.logit:.2f}" in text and f"{e.n_rest} other codes {e.rest:.2f}" in text and e.image in text and ("correct" in text) == (e.label == e.predicted)
        for m, s, w, v in zip(e.codes, e.presence, e.weight, e.contribution): assert f"code {m}  {s:.2f} × {w:.2f} = {v:.2f}" in text
        right = e.label == e.predicted
        d = c.against[k]
        assert d.b.class_id == (int(np.argsort(-e.probabilities, kind="stable")[1]) if right else e.label) and signed(d.logit_difference) in text
    for e in c.classes:
        text = Page(R.class_card(c, e)).text
        order = sorted(range(12), key=lambda m: -float(model.weight[e.class_id, m].detach()))[:5]
        assert [int(m) for m in re.findall(r"code (\d+)  weight", text)] == [m for m in order if model.weight[e.class_id, m] > 1e-3]
    for m in c.codes:
        text = Page(R.code_card(c, m)).text
        assert f"used by " in text and [p.row for p in c.patches[m]] == model.index.image[m].tolist()
        for i in range(3):
            if model.weight[i, m] > 1e-3: assert f"{model.weight[i, m].item():.2f}" in text


def test_boxes_on_the_page_are_where_the_explanation_says(world):
    folder, model, data, b = world
    c = R.contents(R.open_run(folder, backbone=b), n_images=2, n_codes=3)
    R.fill_album(c)
    for k, e in enumerate(c.explained):
        rects = re.findall(r'<rect stroke="#\w+" stroke-width="3.0" x="([-.\d]+)" y="([-.\d]+)" width="([.\d]+)" height="([.\d]+)"', R.image_card(c, k))
        (w, h), (x0, y0, x1, y1) = c.album.sizes[f"i{k}"], (round(v) for v in e.extent)
        want = [((a - x0) * w / (x1 - x0), (t - y0) * h / (y1 - y0), (r - a) * w / (x1 - x0), (u - t) * h / (y1 - y0)) for a, t, r, u in e.box_full]
        close(np.array(rects, float), np.array(want).reshape(-1, 4), eps=1.5)


def test_limits(world, tmp_path):
    folder, _, _, b = world
    big, small = (R.report(folder, tmp_path/f"{m}.html", backbone=b, n_images=2, n_patches=2, max_mb=m) for m in (12., .12))
    stored = lambda f: sum(map(len, re.findall(r"base64,([^\"]+)", f.read_text())))
    assert stored(small) <= .12e6 < stored(big) and set(pictures(small.read_text())) == set(pictures(big.read_text()))
    with pytest.raises(ConfigError, match="allow .* or more, or show less"): R.report(folder, tmp_path/"x.html", backbone=b, max_mb=.001)
    for kw in (dict(n_images=-1), dict(n_codes=-1), dict(n_patches=-2), dict(n_classes=-1), dict(codes_per_class=-1)):
        with pytest.raises(ConfigError, match="cannot be negative"): R.report(folder, tmp_path/"x.html", backbone=b, **kw)
    assert not (tmp_path/"x.html").exists()


def test_a_page_of_little(world, tmp_path):
    folder, _, _, b = world
    text = R.report(folder, tmp_path, backbone=b, n_images=0, n_classes=1, n_patches=0).read_text()          # a folder is given
    assert (tmp_path/"report.html").exists() and "1 of 3 classes" in text and "0 of 6 test images" in text and "no patches" in text
    p = Page(text)
    assert all(l[1:] in p.ids for l in p.links) and "class-1" not in p.ids


def test_same_run_same_page(world, tmp_path):
    folder, _, _, b = world
    a, c = (R.report(folder, tmp_path/n, backbone=b, n_images=2).read_text() for n in ("a.html", "b.html"))
    assert a == c


# names from outside

def test_hostile_names(tmp_path):
    evil = ["<img src=x onerror=alert(1)>", "a\"b'c&d", "</title><script>alert(1)<"]
    for split, n in (("train", 3), ("test", 2)):
        for c, name in enumerate(evil):
            d = tmp_path/"data"/split/name.replace("/", "∕")
            d.mkdir(parents=True)
            for i in range(n): Image.new("RGB", (64, 64), (80 * c, 40 * i, 90)).save(d/f"<b>{i}.png")
    data = datasets.load("imagefolder", str(tmp_path/"data"), quiet=True)
    b, folder = random_backbone(), tmp_path/"run"
    folder.mkdir()
    make_run(folder, data, b, {"dataset": "imagefolder", "data_root": "…", "<u>": "</table>"}, tmp_path/"store", hardware="<script>")
    p = Page(R.report(folder, data_root=str(tmp_path/"data"), backbone=b, n_images=3).read_text())
    assert not {"script", "img", "b>", "u"} & set(p.tags) and not [a for a in p.attrs if a[1].startswith("on")]
    assert "</table>" in p.text and "<b>" in p.text and "<img src=x" in p.text


# what is missing

def test_no_run_no_model_no_record(toy):
    folder, _, _, b = toy
    with pytest.raises(DataError, match="no run folder"): R.report(folder/"nothing", backbone=b)
    (folder/"model_topk.safetensors").unlink()
    assert R.model_file(folder).name == "model.safetensors"
    with pytest.raises(DataError, match="holds no model_topk"): R.report(folder, backbone=b, which="model_topk.safetensors")
    (folder/"model.safetensors").unlink()
    with pytest.raises(DataError, match="run the experiment again"): R.report(folder, backbone=b)
    shutil.copy(folder/"run.json", folder/"model.safetensors")
    with pytest.raises(WeightsError, match="not a model of protoquant"): R.report(folder, backbone=b)


def test_record_missing_or_damaged(toy):
    folder, _, _, b = toy
    for text, what in (("{", "not valid JSON"), ("[]", "not the record"), ("{}", "not the record")):
        (folder/"run.json").write_text(text)
        with pytest.raises(DataError, match=what): R.report(folder, backbone=b)
    (folder/"run.json").unlink()
    with pytest.raises(DataError, match="was not finished"): R.report(folder, backbone=b)


def test_data_missing_or_changed(toy, tmp_path, monkeypatch):
    folder, _, data, b = toy
    record = json.loads((folder/"run.json").read_text())
    def with_parameters(**kw): write_json(folder/"run.json", record | dict(parameters=TOY | kw))
    monkeypatch.setenv("PROTOQUANT_DATA", str(tmp_path/"empty"))
    with_parameters(dataset="imagefolder", data_root=".../gone", classes=None, n_train_per_class=None, n_test_per_class=None, crop=None)
    with pytest.raises(DataError, match="images of this run cannot be found.*data_root="): R.report(folder, backbone=b)
    with_parameters(dataset=None)
    with pytest.raises(DataError, match="names no data set"): R.report(folder, backbone=b)
    with_parameters(dataset="toybird")
    with pytest.raises(ConfigError, match="Did you mean toybirds"): R.report(folder, backbone=b)
    with_parameters(n_test_per_class=1)
    with pytest.raises(DataError, match="toybirds/test is not what the run used"): R.report(folder, backbone=b)
    write_json(folder/"run.json", record | dict(data=None, parameters=TOY | dict(n_train_per_class=2)))
    with pytest.raises(DataError, match="patch index was made for other images"): R.report(folder, backbone=b)
    write_json(folder/"run.json", record | dict(data=None, parameters=TOY | dict(classes=4)))
    with pytest.raises(DataError, match="3 classes, toybirds has 4"): R.report(folder, backbone=b)
    assert not (folder/"report.html").exists()
    assert R.report(folder, backbone=b, data=data, n_images=1) == folder/"report.html"               # the set can be given


def test_index_of_some_training_images(toy):
    folder, model, data, b = toy
    run = R.open_run(folder, backbone=b)
    assert run.train.ids == data.train.ids
    keep = torch.arange(0, 9, 2)
    model.index.image = torch.zeros_like(model.index.image); model.index.ids = [data.train.ids[i] for i in keep]       # as `run_cub`: a part of the training images
    model.save(folder/"model_topk.safetensors")
    run = R.open_run(folder, backbone=b)
    assert run.train.ids == model.index.ids and {p.id for p in R.contents(run, 1).patches[0]} == {data.train.ids[0]}


def test_no_patch_index(toy):
    folder, model, _, b = toy
    model.index = None
    model.save(folder/"model_topk.safetensors")
    with pytest.warns(UserWarning, match="no patch index.*nearest_patches"): text = R.report(folder, backbone=b, n_images=2).read_text()
    p = Page(text)
    assert "codebook.nearest_patches" in p.text and "no patches" in p.text and set(pictures(text)) == {l[1:] for t, k, l in p.attrs if t == "use"}


def test_backbone_that_is_not_public(toy):
    with pytest.raises(WeightsError, match="backbone="): R.report(toy[0])


def test_an_old_report_survives_a_failure(toy, monkeypatch):
    folder, _, _, b = toy
    (folder/"report.html").write_text("old")
    before = sorted(p.name for p in folder.iterdir())
    monkeypatch.setattr(R, "page", lambda c: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError): R.report(folder, backbone=b, n_images=1)
    monkeypatch.setattr(R, "page", lambda c: "\ud800")                                             # cannot be written as UTF-8
    with pytest.raises(UnicodeEncodeError): R.report(folder, backbone=b, n_images=1)
    assert (folder/"report.html").read_text() == "old" and sorted(p.name for p in folder.iterdir()) == before
