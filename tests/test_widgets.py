"""Guards of protoquant.widgets: clicks do what the state says, errors become sentences, uploads of any kind are survived. The real browser is in tests/browser."""
import datetime
import io
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import matplotlib
matplotlib.use("Agg")
from protoquant import backbones, datasets, features, widgets as W
from protoquant.codebook import Codebook, nearest_patches, usage
from protoquant.core import ConfigError, DataError
from protoquant.editing import Editor
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from pieces import gen, randn

K, M = 3, 14


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = backbones.create("test_resnet", "random", img_size=64)
    data = datasets.load("toybirds", n_train_per_class=4, n_test_per_class=4, classes=K)
    t = datasets.eval_transform(net.size, net.mean, net.std, "squash")
    train, test = (features.extract(net, s, t, cache=tmp_path_factory.mktemp("stores"), quiet=True) for s in (data.train, data.test))
    codes = train.read(slice(None)).flatten(0, 1)[torch.randperm(train.n_tokens, generator=gen(1))[:M]] + .01 * randn(M, train.d, seed=2)
    book = Codebook(codes)
    model = ProtoQuant(net, book, NonNegLinear(K, M, gen(3), .2, 1.), .1, data.class_names, t, index=nearest_patches(book, train, 3))
    return model, data, test, usage(book, train)


@pytest.fixture
def view(world): return W.inspect(*world, per_page=5)


def packed(im, kind="PNG", **kw):
    f = io.BytesIO()
    im.save(f, kind, **kw)
    return f.getvalue()


def give(view, content, name="x.png"):
    view.uploader.value = (dict(name=name, type="", size=len(content), content=content, last_modified=datetime.datetime.now(datetime.timezone.utc)),)


def test_search_and_sort(world):
    model, _, _, use = world
    purity = pd.DataFrame(dict(code=[3, 1], purity=[.9, .4]))
    cat, w = W.Catalogue(model, use, purity), model.weight.detach().numpy()
    assert cat.find() == list(np.argsort(-w.max(0), kind="stable")) and cat.find(by="code") == list(range(M))
    assert cat.find("7") == [7] and cat.find("99") == [] and cat.find("no such bird") == []
    for c in range(K):
        got = cat.find(class_id=c)
        assert got == [m for m in np.argsort(-w[c], kind="stable") if w[c, m] > 1e-3] and set(cat.find(model.class_names[c].upper())) == set(got)
    assert cat.find(by="purity")[:2] == [3, 1] and len(cat.find(by="purity")) == M
    assert [int(use.counts[m]) for m in cat.find(by="usage")] == sorted(use.counts.tolist(), reverse=True)
    for bad, says in ((dict(by="size"), "sorted by"), (dict(class_id=7), "no class 7"), (dict(class_id="Toybird_1"), "Did you mean")):
        with pytest.raises(ConfigError, match=says): cat.find(**bad)
    for bad, says in ((pd.DataFrame(dict(code=[1])), "columns"), (pd.Series([1.], [M]), "outside"), ([1, 2], "does not fit")):
        with pytest.raises(ConfigError, match=says): W.Catalogue(model, purity=bad)
    with pytest.raises(ConfigError, match="usage"): W.Catalogue(model).find(by="usage")


def test_pages_turn_and_stop_at_the_ends(view):
    seen = []
    for _ in range(4):
        seen += [c["code"] for c in view.cards if c["code"] is not None and c["code"] not in seen]
        view.next.click()
    assert seen == view.catalogue.find() and "page 3 of 3" in view.page_text.value
    assert [c["box"].layout.display for c in view.cards] == ["flex"] * 4 + ["none"]
    for _ in range(5): view.back.click()
    assert "page 1 of 3" in view.page_text.value
    view.search.value = "nothing like it"
    assert view.page_text.value == "no code fits" and all(c["box"].layout.display == "none" for c in view.cards)


def test_thumbnails_are_square_also_at_the_border(view):
    for c in range(M):
        a = np.asarray(view._thumb(c))
        assert a.shape == (96, 96, 3) and (a.reshape(-1, 3) > 0).any(1).mean() > .95        # no empty margin


def test_edits_by_click_equal_an_editor(world, view):
    model, data, test, _ = world
    view.cards[2]["button"].click()
    code = view.code
    view.off_buttons["softmax"].click()
    view.which.value, view.variant.value = "1, 2", "weight"
    view.buttons["merge"].click()
    view.weight_class.value, view.weight_value.value, view.which.value = 1, 2.5, "4"
    view.buttons["set weight"].click()
    want = Editor(model, test).switch_off(code, "softmax").merge([1, 2]).reweight(4, 1, 2.5)
    assert view.editor.done == want.done and torch.equal(view.editor.logits, want.logits)
    assert f"<b>{want.accuracy:.2f} %</b>" in view.status.value and "3 edits" in view.status.value
    assert "off (softmax)" in view.code_title.value and any(c["code"] == code and c["button"].button_style == "danger" for c in view.cards)
    for _ in range(3): view.buttons["undo"].click()
    assert view.editor.done == [] and "0 edits" in view.status.value and f"code {code}: on" in view.code_title.value
    view.buttons["undo"].click()
    assert "nothing to undo" in view.message.value
    for _ in range(3): view.buttons["redo"].click()
    assert torch.equal(view.editor.logits, want.logits)
    view.on_button.click()
    assert code not in view.editor.off


def test_mistakes_become_sentences_and_change_nothing(view):
    for text, button, says in (("99", "off", "no code 99"), ("-1", "off", "no code -1"), ("", "off", "field of codes"), ("a b", "on", "field of codes"), ("1 2", "set weight", "one code number"), ("1", "merge", "two or more")):
        view.which.value = text
        view.buttons[button].click()
        assert says in view.message.value and view.editor.done == [], (text, button, view.message.value)
    view.sort.value = "purity"
    assert "purity room" in view.message.value
    view.list_path.value = "there-is-none.json"
    view.buttons["replay"].click()
    assert "no list of edits" in view.message.value
    view.show_code(0)
    with pytest.raises(ConfigError, match=f"0 to {M - 1}"): view.show_code(M)


def test_lists_of_classes_say_what_is_chosen(view):
    "A list in a browser is empty where the value is None."
    assert (view.of_class.label, view.pick_class.label, view.weight_class.label) == ("all classes", "predicted class", "Toybird 01")
    view.of_class.value = 1
    assert view.found == view.catalogue.find(class_id=1)
    view.of_class.value = W.ALL
    assert view.found == view.catalogue.find() and view.of_class.label == "all classes"
    view.choose(2)
    assert view.shown.class_id == view.shown.predicted


def test_flipped_images_are_shown_and_open_in_the_explainer(view):
    view.edit("switch_off", list(range(8)))
    flips = view.editor.flips()
    there = [c for c in view.flip_cards if c["box"].layout.display != "none"]
    assert len(flips) and [c["row"] for c in there] == flips.row[:8].tolist() and flips.effect[0] in there[0]["text"].value
    assert "; 1 edit, 8 of 14 codes off" in view.status.value
    there[-1]["button"].click()
    assert view.tabs.selected_index == 1 and view.pick.value == view.row == there[-1]["row"] and view.shown.image == view.test.ids[view.row]
    view.buttons["undo"].click()
    assert all(c["box"].layout.display == "none" for c in view.flip_cards) and "; 0 edits," in view.status.value


def test_all_codes_of_a_class_off(view):
    view.weight_class.value = 1
    view.buttons["all of this class off"].click()
    assert "Toybird_02: no code is left" in view.status.value and not (view.editor.predictions == 1).any()
    view.pick_class.value = 1
    view.choose(0)
    assert view.shown.logit == 0 and len(view.code_buttons) == 0 and "logit 0.00" in view.headline.value
    view.buttons["all of this class off"].click()
    assert "one or more" in view.message.value


def test_lists_of_another_model_are_refused(world, view, tmp_path):
    model, data, test, _ = world
    other = W.inspect(ProtoQuant(model.backbone, model.book, NonNegLinear(K, M, gen(9), .2, 1.), .1, data.class_names, model.transform, index=model.index), data, test)
    other.list_path.value = view.list_path.value = str(tmp_path/"edits.json")
    other.edit("switch_off", 3)
    other.buttons["export"].click()
    view.edit("switch_off", 5)
    view.buttons["replay"].click()
    assert model.hash in view.message.value and other.model.hash in view.message.value and view.editor.off == {5: "weight"}


def test_saved_model_and_list_come_back(world, view, tmp_path):
    model = world[0]
    view.model_path.value, view.list_path.value = str(tmp_path/"m.safetensors"), str(tmp_path/"e.json")
    view.edit("switch_off", [3, 4], "softmax"); view.edit("merge", [1, 2])
    view.buttons["save"].click(); view.buttons["export"].click()
    back = ProtoQuant.load(tmp_path/"m.safetensors", model.backbone)
    assert back.edits["edits"] == view.editor.done
    torch.testing.assert_close(back.from_features(world[2].read(slice(None))), view.editor.logits, atol=2e-5, rtol=2e-5)
    fresh = W.inspect(*world)
    fresh.list_path.value = str(tmp_path/"e.json")
    fresh.edit("switch_off", 7)
    fresh.buttons["replay"].click()
    assert fresh.editor.done == view.editor.done and torch.equal(fresh.editor._sum, view.editor._sum)
    again = W.inspect(back, world[1], world[2])                # an edited model can be inspected, its patches follow
    again.cards[0]["button"].click()
    assert len(again.patches) == 3 and again.patches[0].id == view.model.patches_of(back.edits["codes"][again.code], world[1].train)[0].id


def test_explanations_follow_the_edits(world, view):
    view.pick.value = 5
    assert view.shown.image == world[1].test.ids[5] and len(view.code_buttons) == len(view.shown)
    top = int(view.shown.codes[0])
    view.edit("switch_off", top)
    assert top not in view.shown.codes
    view.code_buttons[0].click()
    assert view.code == view.shown.codes[0] and view.map.layout.display == "block" and Image.open(io.BytesIO(view.map.value)).size[0] > 200
    view.flip_button.click()
    rows = sorted(view.editor.flips().row)
    assert view.pick.value in rows if rows else "No image has flipped" in view.message.value


@pytest.mark.parametrize("content, check", [
    (packed(Image.new("L", (50, 40), 90)), lambda im: im.getpixel((0, 0)) == (90, 90, 90)),
    (packed(Image.new("LA", (50, 40), (90, 0))), lambda im: im.getpixel((0, 0)) == (255, 255, 255)),
    (packed(Image.new("RGBA", (50, 40), (255, 0, 0, 255))), lambda im: im.getpixel((0, 0)) == (255, 0, 0)),
    (packed(Image.new("RGBA", (50, 40), (9, 9, 9, 0)).quantize()), lambda im: im.getpixel((0, 0)) == (255, 255, 255)),
    (packed(Image.new("P", (50, 40), 0), "GIF", transparency=0), lambda im: im.getpixel((0, 0)) == (255, 255, 255)),
    (packed(Image.fromarray(np.full((40, 50), 65535, np.uint16))), lambda im: im.getpixel((0, 0)) == (255, 255, 255)),
    (packed(Image.new("CMYK", (50, 40)), "JPEG"), lambda im: im.size == (50, 40)),
    (packed(Image.new("RGB", (5000, 3000), "red"), "JPEG"), lambda im: max(im.size) == 1600),
    (packed(Image.new("RGB", (1, 1), "red")), lambda im: im.size == (1, 1))])
def test_uploads_of_any_kind_become_rgb(content, check, view):
    im = W.read_upload(content)
    assert im.mode == "RGB" and check(im)
    give(view, content)
    assert "x.png" in view.headline.value and view.message.value.count("B00020") == 0


def test_boxes_on_a_tiny_picture_are_drawn_on_its_enlargement():
    im = W.boxed(Image.new("RGB", (8, 6), "white"), [(0, 0, 4, 3)])
    assert im.size == (320, 240) and im.getpixel((120, 60)) == (255, 255, 255) and im.getpixel((160, 60)) != (255, 255, 255)
    assert W.boxed(Image.new("RGB", (640, 480), "white"), [], side=100).size == (100, 75)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind, mode", (("JPEG", "RGB"), ("PNG", "RGBA")))
def test_a_rotated_photograph_stands_upright(orientation, kind, mode):
    im = Image.new(mode, (60, 40), "white")
    im.paste((255, 0, 0) + (255,) * (mode == "RGBA"), (0, 0, 20, 13))
    exif = Image.Exif(); exif[0x0112] = orientation
    got = W.read_upload(packed(im, kind, exif=exif))
    assert got.size == ((40, 60) if orientation > 4 else (60, 40))
    w, h = got.size
    corner = {1: (3, 3), 2: (w - 4, 3), 3: (w - 4, h - 4), 4: (3, h - 4), 5: (3, 3), 6: (w - 4, 3), 7: (w - 4, h - 4), 8: (3, h - 4)}[orientation]
    r, g, b = got.getpixel(corner)
    assert r > 200 and g < 90 and b < 90


def bomb():
    "A header that claims 60,000 x 60,000 pixels."
    import struct, zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("content, says", [
    (b"", "not a picture"), (b"hello", "not a picture"), (packed(Image.new("RGB", (50, 40)))[:60], "not a picture"), (bomb(), "too many pixels"),
    (packed(Image.new("1", (10000, 9000))), "10000x9000 pixels"), (b"\0" * (W.MAX_BYTES + 1), "MiB")])
def test_what_is_no_picture_or_too_large_is_refused(content, says, view):
    with pytest.raises(DataError, match=says): W.read_upload(content, "it.png")
    if len(content) < 1 << 20:
        view.choose(2)
        give(view, content, "it.png")
        assert says in view.message.value and view.shown.image == view.test.ids[2]


def test_names_from_outside_are_escaped(view):
    give(view, packed(Image.new("RGB", (50, 40))), "<img src=x onerror=alert(1)>.png")
    assert "<img" not in view.headline.value and "&lt;img" in view.headline.value
    give(view, b"no", "<b>.png")
    assert "<b>" not in view.message.value


def test_without_a_patch_index_views_say_what_is_missing(world):
    model, data, test, _ = world
    bare = W.inspect(ProtoQuant(model.backbone, model.book, model.classifier, .1, data.class_names, model.transform), data, test)
    assert "no patch index" in bare.message.value and "nearest_patches" in bare.message.value
    bare.cards[0]["button"].click()
    assert any("nearest_patches" in getattr(w, "value", "") for w in bare.code_view.children)
    bare.off_buttons["weight"].click(); bare.choose(1)
    assert bare.editor.off == {bare.code: "weight"} and len(bare.shown)
    with pytest.raises(DataError, match="nearest_patches"): W.code_figure(bare.model, 0, data.train)


def test_index_of_some_of_the_images_or_of_others(world):
    model, data, test, _ = world
    few = data.train.subset([5, 2, 7])
    index = type(model.index)(model.index.image % 3, model.index.position, model.index.similarity, model.index.grid, list(few.ids))
    assert W.training_images(index, data.train).ids == few.ids
    with pytest.raises(DataError, match="other images"): W.training_images(index, data.test)


def test_figures_draw(world):
    import matplotlib.pyplot as plt
    model, data, test, _ = world
    editor = Editor(model, test, data.test)
    for e in (editor, editor.switch_off(list(range(6))), Editor(model, test).switch_off(0)):
        fig = W.edit_figure(e)
        assert f"{len(e.flips())} of {len(test)} images flipped" in fig.get_suptitle() + "".join(t.get_text() for s in fig.subfigs for t in s.texts)
    fig = W.code_figure(model, 2, data.train, n=2)
    assert len(fig.axes) == 3
    with pytest.raises(ConfigError, match="0 to"): W.code_figure(model, M, data.train)
    plt.close("all")


def test_display_has_text_for_pages_without_a_kernel(view):
    d = view._repr_mimebundle_()
    assert d["text/plain"].startswith("Inspector(ProtoQuant") and any("widget-view" in k for k in d)


def test_without_ipywidgets_the_static_views_work_and_the_widget_says_what_to_install(world, monkeypatch):
    model, data, test, _ = world
    monkeypatch.setattr(W, "W", None)
    assert W.code_figure(model, 0, data.train) and W.edit_figure(Editor(model, test))
    with pytest.raises(ConfigError, match="pip install ipywidgets"): W.inspect(model, data, test)
