"""Guards of protoquant.datasets: miniature trees, bad input, a server that hangs up, and the real sets where PROTOQUANT_DATA is set."""
import hashlib, http.server, io, os, re, shutil, tarfile, threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw

from protoquant import datasets as D, toybirds
from protoquant.core import ConfigError, DataError

SIZE = (60, 40)


def noise(seed, size=SIZE, mode="RGB"):
    w, h = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)).convert(mode)


def mini_cub(root, classes=(3, 7, 9), n_train=3, n_test=2):
    "CUB's official layout, with gaps in its ids."
    d = Path(root)/"CUB_200_2011"
    rows = dict.fromkeys(("images", "image_class_labels", "train_test_split", "bounding_boxes", "parts/part_locs"), "")
    i = 0
    for c in classes:
        (d/f"images/{c:03d}.Bird_{c}").mkdir(parents=True)
        for k in range(n_train + n_test):
            i += 2
            file = f"{c:03d}.Bird_{c}/b_{i}.png"
            noise(i).save(d/"images"/file)
            rows["images"] += f"{i} {file}\n"
            rows["image_class_labels"] += f"{i} {c}\n"
            rows["train_test_split"] += f"{i} {int(k < n_train)}\n"
            rows["bounding_boxes"] += f"{i} 5.0 6.7 30.9 20.0\n"
            rows["parts/part_locs"] += f"{i} 1 12.5 9.0 1\n{i} 2 0.0 0.0 0\n"
    (d/"parts").mkdir()
    for f, text in rows.items(): (d/f"{f}.txt").write_text(text)
    (d/"classes.txt").write_text("".join(f"{c} {c:03d}.Bird_{c}\n" for c in range(1, 11)))
    (d/"parts/parts.txt").write_text("1 back\n2 left eye\n")
    return d


def edit(file, old, new, count=1):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, count))


@pytest.fixture
def cub(tmp_path): return mini_cub(tmp_path)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path_factory, request):
    "No test but those on the real data sees PROTOQUANT_DATA, none touches the user's cache."
    if "real_root" not in request.fixturenames: monkeypatch.delenv("PROTOQUANT_DATA", raising=False)
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


# CUB ------------------------------------------------------------------------------------------------------------------------------

def test_cub(cub):
    ds = D.load("cub", cub.parent)
    assert (len(ds.train), len(ds.test), ds.class_ids, ds.class_names[1]) == (9, 6, [3, 7, 9], "007.Bird_7")
    assert ds.train.labels.dtype == np.int64 and ds.train.labels.tolist() == [0]*3 + [1]*3 + [2]*3
    assert (ds.crop, ds.resize) == ("bbox", "squash")
    assert ds.train.ids[0] == "003.Bird_3/b_2.png"
    assert ds.train.bbox(0) == (5.0, 6.7, 30.9, 20.0) and ds.train.crop_box(0) == (5, 6, 35, 26)          # integers, PROTOCOLS A.3
    assert ds.train.parts(0) == [D.Part("back", 12.5, 9.0, True), D.Part("left eye", 0.0, 0.0, False)]
    assert np.array_equal(np.asarray(ds.train.image(0)), np.asarray(noise(2))[6:26, 5:35])
    assert "| images | 9 | 6 |" in ds._repr_markdown_() and "9 train" in repr(ds)


def test_cub_full_images(cub):
    ds = D.load("cub", cub.parent, crop="none")
    assert ds.train.crop_box(0) == (0, 0, *SIZE) and np.array_equal(np.asarray(ds.train.image(0)), np.asarray(noise(2)))
    assert ds.train.fingerprint != D.load("cub", cub.parent).train.fingerprint


def test_cub_root_may_be_the_folder_itself(cub, monkeypatch):
    a, b = D.load("cub", cub), D.load("cub", str(cub.parent))
    monkeypatch.setenv("PROTOQUANT_DATA", str(cub.parent))
    assert a.fingerprint == b.fingerprint == D.load("cub").fingerprint == D.load("cub", "").fingerprint


def test_cub_subset_by_images_txt(cub):
    f = cub/"images.txt"
    f.write_text("".join(l for l in f.read_text().splitlines(True) if "007" not in l))
    shutil.rmtree(cub/"images/007.Bird_7")
    with pytest.warns(UserWarning, match="subset of 10 images.*list 5 images"): ds = D.load("cub", cub)
    assert ds.class_ids == [3, 9] and len(ds.train) == 6 and sorted(set(ds.test.labels)) == [0, 1]


def test_crop_is_cut_at_the_border(cub):
    edit(cub/"bounding_boxes.txt", "2 5.0 6.7 30.9 20.0", "2 -3.0 30.0 500.0 20.0")
    assert D.load("cub", cub).train.crop_box(0) == (0, 30, 60, 40)
    edit(cub/"bounding_boxes.txt", "2 -3.0 30.0 500.0 20.0", "2 90.0 30.0 50.0 20.0")
    with pytest.raises(DataError, match="b_2.png holds no pixel"): D.load("cub", cub).train.image(0)


@pytest.mark.parametrize("file, old, new, line", [
    ("image_class_labels.txt", "4 3\n", "", "no line for image 4 .*b_4.png.*line 2"),
    ("bounding_boxes.txt", "4 5.0 6.7 30.9 20.0\n", "", "no line for image 4"),
    ("train_test_split.txt", "4 1\n", "", "no line for image 4"),
    ("image_class_labels.txt", "4 3\n", "4 77\n", "line 2: class 77 of image 4 is not in classes.txt"),
    ("parts/part_locs.txt", "4 2 ", "4 16 ", "line 4: part 16 of image 4 is not in parts.txt"),
    ("parts/part_locs.txt", "4 2 ", "999 2 ", "line 4: image id 999"),
    ("bounding_boxes.txt", "4 5.0", "999 5.0", "no line for image 4"),
    ("bounding_boxes.txt", "30.9", "0.0", "line 1: a box of 0.0 x 20.0"),
    ("bounding_boxes.txt", "30.9", "nan", "line 1: .* is not"),
    ("bounding_boxes.txt", "2 5.0", "2 x", "line 1: .* is not"),
    ("bounding_boxes.txt", "2 5.0 6.7", "2 6.7", "line 1: .* is not"),
    ("train_test_split.txt", "4 1\n", "4 2\n", "line 2: '4 2' is not"),
    ("images.txt", "4 003", "2 003", "line 2: id 2 was already in line 1"),
])
def test_cub_inconsistent(cub, file, old, new, line):
    edit(cub/file, old, new)
    with pytest.raises(DataError, match=line) as e: D.load("cub", cub)
    assert str(cub/file) in str(e.value)


@pytest.mark.parametrize("file", ["classes.txt", "image_class_labels.txt", "train_test_split.txt", "bounding_boxes.txt", "parts/parts.txt", "parts/part_locs.txt"])
@pytest.mark.parametrize("how", ["missing", "empty", "binary"])
def test_cub_incomplete_files(cub, file, how):
    if how == "missing": (cub/file).unlink()
    else: (cub/file).write_bytes(b"" if how == "empty" else b"\xff\xfe\x00\x81")
    with pytest.raises(DataError, match="Extract the archive again") as e: D.load("cub", cub)
    assert str(cub/file) in str(e.value)


def test_half_extracted(cub):
    for i in (12, 14, 22): next(cub.glob(f"images/*/b_{i}.png")).unlink()
    with pytest.raises(DataError, match=r"3 of 15 images listed in images.txt are missing, first: 007.Bird_7/b_12.png") as e: D.load("cub", cub)
    assert str(cub) in str(e.value) and "extract the archive again" in str(e.value)


@pytest.mark.parametrize("make, said", [
    (lambda r: None, "does not exist"), (lambda r: r.mkdir(), "is empty"), (lambda r: r.write_text("x"), "is no folder"),
    (lambda r: (r/"other").mkdir(parents=True), "holds neither"), (lambda r: (r/"CUB_200_2011/images").mkdir(parents=True), "half-extracted")])
@pytest.mark.parametrize("how", ["data_root", "PROTOQUANT_DATA"])
def test_no_data_there(tmp_path, monkeypatch, make, said, how):
    root = tmp_path/"data"
    make(root)
    if how == "PROTOQUANT_DATA": monkeypatch.setenv("PROTOQUANT_DATA", str(root))
    monkeypatch.setattr(D, "fetch", lambda *a, **k: pytest.fail("a root that was given must not lead to a download"))
    with pytest.raises(DataError, match=said) as e: D.load("cub", root if how == "data_root" else None)
    for s in (str(root), how, D.ARCHIVES["cub"].url, "protoquant run cub -p dataset toybirds"): assert s in str(e.value)


def test_labels_outside_the_split(cub):
    f = cub/"train_test_split.txt"
    f.write_text(re.sub(r"^(12|14|16) 1$", r"\1 0", f.read_text(), flags=re.M))
    with pytest.raises(DataError, match="1 classes have test images but no training image, first: 007.Bird_7"): D.load("cub", cub)
    f.write_text(re.sub(r" 0$", " 1", f.read_text(), flags=re.M))
    with pytest.raises(DataError, match="no test image"): D.load("cub", cub)


# images ---------------------------------------------------------------------------------------------------------------------------

def photo(size=(64, 48)):
    im = Image.new("RGB", size, (200, 60, 30))
    ImageDraw.Draw(im).rectangle((0, 0, size[0]//2 - 1, size[1]), fill=(20, 90, 220))    # the left half is blue
    return im


@pytest.mark.parametrize("name, mode", [("a.png", "RGB"), ("a.png", "RGBA"), ("a.png", "P"), ("a.gif", "P"), ("a.jpg", "RGB"), ("a.jpg", "CMYK"),
                                        ("a.webp", "RGB"), ("a.tif", "CMYK"), ("a.bmp", "RGB")])
def test_any_mode_becomes_rgb(tmp_path, name, mode):
    im = photo().quantize(16) if mode == "P" else photo().convert(mode)
    im.save(tmp_path/name)
    got = D.decode(tmp_path/name)
    assert got.mode == "RGB" and np.abs(np.asarray(got, float)[[10, 10], [10, 50]] - [[20, 90, 220], [200, 60, 30]]).max() <= 12


def test_grey_and_sixteen_bits(tmp_path):
    ramp = np.arange(256, dtype=np.uint8)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path/"l.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(tmp_path/"l16.png")
    Image.fromarray(ramp).convert("LA").save(tmp_path/"la.png")
    Image.fromarray(ramp > 127).save(tmp_path/"one.png")
    want = np.stack([ramp]*3, -1)
    for f in ("l.png", "l16.png", "la.png"): assert np.array_equal(np.asarray(D.decode(tmp_path/f)), want), f
    assert np.array_equal(np.asarray(D.decode(tmp_path/"one.png")), (want > 127) * 255)


def test_alpha_is_dropped_not_blended(tmp_path):
    im = photo(); im.putalpha(0); im.save(tmp_path/"a.png")
    assert np.array_equal(np.asarray(D.decode(tmp_path/"a.png")), np.asarray(photo()))
    q = photo().quantize(8); q.save(tmp_path/"p.png", transparency=bytes([0]*8))
    assert np.array_equal(np.asarray(D.decode(tmp_path/"p.png")), np.asarray(q.convert("RGB")))


@pytest.mark.parametrize("turn, back", [(1, None), (3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270), (8, Image.Transpose.ROTATE_90), (2, Image.Transpose.FLIP_LEFT_RIGHT)])
def test_exif(tmp_path, turn, back):
    exif = Image.Exif(); exif[0x0112] = turn
    photo().save(tmp_path/"a.png", exif=exif)
    want = photo() if back is None else photo().transpose(back)
    s = D.ImageSet("x", "train", [D.Sample("a", 0, tmp_path/"a.png")], ["c"])
    assert np.array_equal(np.asarray(s.image(0)), np.asarray(want)) and s.image_size(0) == want.size == s.crop_box(0)[2:]


def test_undecodable(cub):
    a, b = cub/"images/003.Bird_3/b_4.png", cub/"images/009.Bird_9/b_30.png"
    a.write_bytes(a.read_bytes()[:-900])                        # truncated
    b.write_bytes(b"")                                          # empty
    ds = D.load("cub", cub)
    with pytest.raises(DataError, match=r"003.Bird_3/b_4.png cannot be decoded.*skip_bad=True.*bad_images\(\)"): ds.train.image(1)
    assert list(ds.train.bad_images(quiet=True)) == ["003.Bird_3/b_4.png"] and list(ds.test.bad_images(quiet=True)) == ["009.Bird_9/b_30.png"]
    with pytest.warns(UserWarning) as w: kept = D.load("cub", cub, skip_bad=True)
    said = " ".join(str(x.message) for x in w)
    assert "1 of 9 images" in said and "b_4.png" in said and "1 of 6 images" in said and "b_30.png" in said
    assert len(kept.train) == 8 and len(kept.test) == 5 and not kept.train.bad_images(quiet=True)
    assert kept.train.labels.tolist() == [0]*2 + [1]*3 + [2]*3 and kept.train.fingerprint != ds.train.fingerprint


@pytest.mark.parametrize("keep", [.1, .5, .9, .99])
@pytest.mark.parametrize("fmt", ["jpg", "png"])
def test_truncation_never_passes(tmp_path, keep, fmt):
    f = tmp_path/f"a.{fmt}"
    noise(0, (80, 80)).save(f)
    f.write_bytes(f.read_bytes()[:int(f.stat().st_size * keep)])
    with pytest.raises(DataError, match=f"a.{fmt}"): D.decode(f)


def test_skip_bad_may_not_empty_a_class(cub):
    for f in (cub/"images/003.Bird_3").iterdir(): f.write_bytes(b"no image")
    with pytest.warns(UserWarning):
        assert D.load("cub", cub, skip_bad=True).train.labels.tolist() == [1]*3 + [2]*3     # neither split has the class any more
    noise(0).save(cub/"images/003.Bird_3/b_8.png")                                           # a test image
    with pytest.warns(UserWarning), pytest.raises(DataError, match="no training image, first: 003.Bird_3"): D.load("cub", cub, skip_bad=True)


def test_file_that_went_away(cub):
    ds = D.load("cub", cub)
    next(cub.glob("images/*/b_2.png")).unlink()
    with pytest.raises(DataError, match="the file is gone"): ds.train.image(0)
    with pytest.raises(DataError, match="the file is gone"): ds.train.crop_box(0)


def test_subset(cub):
    s = D.load("cub", cub).train
    assert s.subset([4, 0]).ids == [s.ids[4], s.ids[0]] and s.subset(slice(2, 4)).ids == s.ids[2:4]
    assert s.subset(s.labels == 1).labels.tolist() == [1, 1, 1] and len(s.subset([])) == 0 and s.subset([-1]).ids == s.ids[-1:]
    assert np.array_equal(np.asarray(s.subset([4]).image(0)), np.asarray(s.image(4))) and s.subset([4]).parts(0) == s.parts(4)
    assert s.subset(range(len(s))).fingerprint == s.fingerprint != s.subset([0, 1]).fingerprint
    with pytest.raises(DataError, match="9 images"): s.subset([9])


def test_fingerprint_and_stamp(cub, tmp_path):
    a = D.load("cub", cub)
    shutil.copytree(cub, tmp_path/"copy/CUB_200_2011")          # copytree keeps the times
    b = D.load("cub", tmp_path/"copy")
    assert (a.train.fingerprint, a.train.stamp) == (b.train.fingerprint, b.train.stamp)
    f = Path(b.train.samples[0].source)
    os.utime(f, ns=(1, 1))
    c = D.load("cub", tmp_path/"copy")
    assert c.train.fingerprint == a.train.fingerprint and c.train.stamp != a.train.stamp and c.test.stamp == a.test.stamp
    edit(tmp_path/"copy/CUB_200_2011/bounding_boxes.txt", "2 5.0", "2 6.0")
    assert D.load("cub", tmp_path/"copy").train.fingerprint != a.train.fingerprint


# image folders --------------------------------------------------------------------------------------------------------------------

def mini_folder(root, splits=("train", "test"), classes="ab", n=2):
    for s in splits:
        for c in classes:
            (d := Path(root)/s/c).mkdir(parents=True)
            for k in range(n): noise(k).save(d/f"{k}.PNG")
    return Path(root)


def test_imagefolder(tmp_path):
    r = mini_folder(tmp_path/"mine", ("train", "val"))
    (r/"train/a/deep").mkdir(); noise(9).save(r/"train/a/deep/x.jpeg"); (r/"train/a/notes.txt").write_text("no image"); (r/"train/a/._0.png").write_text("junk")
    for ds in (D.load("imagefolder", r), D.load("imagefolder", tmp_path, folder="mine")):
        assert ds.class_names == ["a", "b"] and ds.train.ids == ["train/a/0.PNG", "train/a/1.PNG", "train/a/deep/x.jpeg", "train/b/0.PNG", "train/b/1.PNG"]
        assert (len(ds.test), ds.test.split, ds.resize, ds.train.bbox(0), ds.train.parts(0)) == (4, "test", "center", None, None)


def test_imagefolder_prefers_test_to_val(tmp_path):
    r = mini_folder(tmp_path, ("train", "val", "test"))
    assert D.load("imagefolder", r).test.ids[0].startswith("test/")


@pytest.mark.parametrize("splits, classes", [(("train",), "ab"), (("a", "b"), "xy"), (("test",), "ab")])
def test_imagefolder_without_split(tmp_path, splits, classes):
    r = mini_folder(tmp_path, splits, classes)
    with pytest.raises(DataError, match="needed are .*train/<class>.*test/<class>") as e: D.load("imagefolder", r)
    assert str(r) in str(e.value) and splits[0] in str(e.value)


def test_imagefolder_bad(tmp_path):
    r = mini_folder(tmp_path/"x")
    with pytest.raises(DataError, match="does not exist"): D.load("imagefolder", tmp_path/"nowhere")
    with pytest.raises(ConfigError, match="crop='bbox': imagefolder has 'none'"): D.load("imagefolder", r, crop="bbox")
    (r/"train/c").mkdir()
    with pytest.raises(DataError, match="train/c holds no image"): D.load("imagefolder", r)
    (r/"train/c").rmdir(); shutil.copytree(r/"train/a", r/"test/c")
    with pytest.raises(DataError, match="class 'c' is not a folder of"): D.load("imagefolder", r)
    with pytest.raises(DataError, match="data_root or set PROTOQUANT_DATA.*dataset toybirds"): D.load("imagefolder")


# FunnyBirds -----------------------------------------------------------------------------------------------------------------------

def mini_funny(root):
    import json
    d = Path(root)/"FunnyBirds"
    entries = dict(train=[dict(class_idx=c, index=1000*c + k) for c in (2, 5) for k in range(2)], test=[dict(class_idx=c) for c in (2, 2, 5)])
    for split, es in entries.items():
        for n, e in enumerate(es):
            for kind in (split, f"{split}_part_map")[:1 + (split == "test")]:
                f = d/kind/str(e["class_idx"])/f"{e.get('index', n):06d}.png"
                f.parent.mkdir(parents=True, exist_ok=True)
                im = noise(n, (64, 64))
                if kind != split:
                    im = Image.new("RGB", (64, 64)); p = ImageDraw.Draw(im)
                    p.rectangle((10, 20, 14, 26), fill=(255, 255, 0)); p.rectangle((0, 0, 1, 1), fill=(0, 255, 1)); p.rectangle((40, 30, 49, 39), fill=(0, 255, 2))
                    p.rectangle((50, 50, 60, 60), fill=(204, 204, 209))
                im.putalpha(255); im.save(f)
        (d/f"dataset_{split}.json").write_text(json.dumps(es))
    (d/"classes.json").write_text(json.dumps([dict(class_idx=c, parts={}) for c in (2, 5)]))
    return d


def test_funnybirds(tmp_path):
    d = mini_funny(tmp_path)
    ds = D.load("funnybirds", tmp_path)
    assert (ds.class_ids, ds.resize, ds.crop) == ([2, 5], "squash", "none") and ds.train.ids[-1] == "5/005001.png" and ds.test.ids == ["2/000000.png", "2/000001.png", "5/000002.png"]
    assert ds.test.labels.tolist() == [0, 0, 1] and ds.test.image(0).mode == "RGB" and ds.train.scene(1)["index"] == 2001
    assert ds.train.parts(0) is None and ds.test.part_map(0).getpixel((12, 22)) == (255, 255, 0)
    p = {q.name: q[1:] for q in ds.test.parts(0)}
    assert p == dict(beak=(12., 23., True), eye=(0., 0., False), foot=(0., 0., False), tail=(0., 0., False), wing=(44.5, 34.5, True))    # the larger wing
    next((d/"test/5").iterdir()).unlink()
    with pytest.raises(DataError, match="1 of 3 images listed in dataset_test.json are missing, first: 5/000002.png"): D.load("funnybirds", tmp_path)


@pytest.mark.parametrize("break_it, said", [
    (lambda d: (d/"dataset_train.json").unlink(), "dataset_train.json is missing"), (lambda d: (d/"dataset_train.json").write_text("[{"), "not valid JSON"),
    (lambda d: (d/"dataset_train.json").write_text('[{"x": 1}]'), "class_idx"), (lambda d: (d/"classes.json").write_text('[{"class_idx": 2}]'), "class 5 .*not in classes.json"),
    (lambda d: (d/"dataset_test.json").unlink(), "half-extracted")])
def test_funnybirds_bad(tmp_path, break_it, said):
    break_it(mini_funny(tmp_path))
    with pytest.raises(DataError, match=said): D.load("funnybirds", tmp_path)


# ToyBirds -------------------------------------------------------------------------------------------------------------------------

def test_toybirds_in_memory_and_on_disk(tmp_path):
    kw = dict(n_train_per_class=2, n_test_per_class=1, classes=4, seed=3)
    toybirds.write_cub(tmp_path/"CUB_200_2011", **kw)
    for crop in ("none", "bbox"):
        mem, disk = D.load("toybirds", crop=crop, **kw), D.load("cub", tmp_path, crop=crop)
        for a, b in ((mem.train, disk.train), (mem.test, disk.test)):
            assert a.labels.tolist() == b.labels.tolist() and len(a) == len(b)
            for i in range(len(a)):
                assert np.array_equal(np.asarray(a.image(i)), np.asarray(b.image(i))) and np.array_equal(np.asarray(a.full_image(i)), np.asarray(b.full_image(i)))
                assert (a.bbox(i), a.parts(i), a.crop_box(i), a.image_size(i)) == (b.bbox(i), b.parts(i), b.crop_box(i), b.image_size(i))


def test_toybirds_defaults():
    ds = D.load("toybirds")
    assert (len(ds.train), len(ds.test), ds.n_classes, ds.crop, ds.resize) == (1500, 500, 50, "none", "squash")
    assert len(set(ds.train.ids)) == 1500 and (np.bincount(ds.test.labels) == 10).all() and ds.train.bad_images() == {}


def test_toybirds_identity(monkeypatch):
    def make(**kw): return D.load("toybirds", **(dict(n_train_per_class=2, n_test_per_class=1, classes=3) | kw))
    a, b = make(), make()
    assert (a.fingerprint, a.train.stamp, a.test.stamp) == (b.fingerprint, b.train.stamp, b.test.stamp)
    others = [make(seed=1), make(classes=4), make(n_train_per_class=3), make(crop="bbox")]
    assert len({x.train.fingerprint for x in (a, *others)}) == len({x.train.stamp for x in (a, *others)}) == 5
    assert a.train.subset([0, 1]).stamp != a.train.subset([2, 3]).stamp != a.train.stamp
    for i in range(2): assert np.array_equal(np.asarray(a.train.image(i)), np.asarray(b.train.image(i)))
    more = make(n_train_per_class=3).train                        # more images a class: the old ones stay as they are
    assert set(a.train.ids) <= set(more.ids) and np.array_equal(np.asarray(more.image(more.ids.index(a.train.ids[-1]))), np.asarray(a.train.image(len(a.train) - 1)))
    draw = toybirds.render                                        # another drawing, another store
    before = a.train.stamp
    monkeypatch.setattr(toybirds, "render", lambda *x, **k: draw(*x, **k).transpose(Image.Transpose.FLIP_TOP_BOTTOM))
    assert make().train.stamp != before and make().fingerprint == a.fingerprint


def test_toybirds_scene_allows_interventions():
    s = D.load("toybirds", n_train_per_class=1, n_test_per_class=1, classes=2).train.subset([1])
    whole, without = np.asarray(s.image(0), int), np.asarray(toybirds.render(s.scene(0), parts=[p for p in toybirds.PARTS if p != "tail"]), int)
    tail = np.all(np.asarray(s.part_map(0)) == (0, 0, 255), -1)
    changed = np.abs(whole - without).sum(-1) > 0
    assert tail.sum() > 100 and changed[tail].mean() > .8 and changed.sum() < 3 * tail.sum()


@pytest.mark.parametrize("kw", [dict(classes=0), dict(classes=51), dict(n_train_per_class=0), dict(n_test_per_class=1.5)])
def test_toybirds_bad(kw):
    with pytest.raises(ConfigError, match=next(iter(kw)) if kw != dict(classes=51) else "51"): D.load("toybirds", **kw)


# load -----------------------------------------------------------------------------------------------------------------------------

def test_load_says_what_there_is(cub):
    with pytest.raises(ConfigError, match="Did you mean toybirds"): D.load("toybird")
    with pytest.raises(ConfigError, match="There are: cub, imagefolder, toybirds, funnybirds"): D.load("zzz")
    with pytest.raises(ConfigError, match="'bbox' or 'none'"): D.load("cub", cub, crop="box")
    with pytest.raises(ConfigError, match="takes no parameter 'classes'"): D.load("cub", cub, classes=3)
    with pytest.raises(ConfigError, match="Did you mean n_train_per_class"): D.load("toybirds", n_train_per_clas=3)
    assert all(e.about and "\n" not in e.about for e in D.REGISTRY.values())


# download -------------------------------------------------------------------------------------------------------------------------

class Server:
    "Serves one body; hangs up after `drops[i]` bytes of the i-th answer; notes the Range of each request."
    def __init__(self, body, drops=(), ranges=True, status=None):
        self.body, self.drops, self.ranges, self.status, self.asked = body, list(drops), ranges, status, []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *a): pass
            def do_GET(self):
                want = self.headers.get("Range")
                server.asked.append(want)
                start = int(re.match(r"bytes=(\d+)-", want)[1]) if want and server.ranges else 0
                if server.status or start >= len(server.body):
                    self.send_response(server.status or 416); self.send_header("Content-Range", f"bytes */{len(server.body)}"); self.send_header("Content-Length", "0"); self.end_headers(); return
                data = server.body[start:]
                self.send_response(206 if start else 200); self.send_header("Content-Length", str(len(data))); self.end_headers()
                if server.drops: data = data[:server.drops.pop(0)]
                self.wfile.write(data)
                self.close_connection = True

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/CUB_200_2011.tgz"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self): return self
    def __exit__(self, *a): self.http.shutdown(); self.http.server_close()


BODY = np.random.default_rng(0).bytes(1_000_003)


def resume(tmp_path, **kw): return D.Resume(tmp_path/"x.part", pause=0, quiet=True, **kw)


def test_download_goes_on_after_a_drop(tmp_path):
    with Server(BODY, drops=[500_000, 250_000]) as s:
        resume(tmp_path)(s.url, tmp_path/"x")
        assert (tmp_path/"x").read_bytes() == BODY and not (tmp_path/"x.part").exists()
        assert s.asked[0] is None and len(s.asked) == 3
        first, second = (int(a[6:-1]) for a in s.asked[1:])
        assert 0 < first <= 500_000 and first < second <= first + 250_000


def test_download_goes_on_in_another_run(tmp_path):
    import requests
    with Server(BODY, drops=[500_000]) as s:
        with pytest.raises(requests.RequestException): resume(tmp_path, attempts=0)(s.url, tmp_path/"x")
        have = (tmp_path/"x.part").stat().st_size
        assert 0 < have <= 500_000 and (tmp_path/"x.part").read_bytes() == BODY[:have]
        resume(tmp_path)(s.url, tmp_path/"x")
        assert s.asked == [None, f"bytes={have}-"] and (tmp_path/"x").read_bytes() == BODY


def test_download_without_range_support(tmp_path):
    (tmp_path/"x.part").write_bytes(b"old")
    with Server(BODY, ranges=False) as s:
        resume(tmp_path)(s.url, tmp_path/"x")
        assert s.asked == ["bytes=3-"] and (tmp_path/"x").read_bytes() == BODY


def test_download_whose_part_is_complete_or_too_long(tmp_path):
    for part, n in ((BODY, 1), (BODY + b"more", 2)):
        (tmp_path/"x.part").write_bytes(part)
        with Server(BODY) as s:
            resume(tmp_path)(s.url, tmp_path/"x")
            assert len(s.asked) == n and (tmp_path/"x").read_bytes() == BODY


def test_download_gives_up(tmp_path):
    import requests
    with Server(BODY, status=404) as s:
        with pytest.raises(requests.HTTPError): resume(tmp_path)(s.url, tmp_path/"x")
        assert len(s.asked) == 1                                 # 'not found' is no matter of patience
    with Server(BODY, drops=[0] * 9) as s:
        with pytest.raises(requests.RequestException): resume(tmp_path, attempts=3)(s.url, tmp_path/"x")
        assert len(s.asked) == 3


def archive(tmp_path):
    mini_cub(tmp_path/"src")
    (tmp_path/"src/attributes.txt").write_text("not wanted")
    buf = io.BytesIO()
    with tarfile.open(fileobj=buf, mode="w:gz") as t:
        t.add(tmp_path/"src/attributes.txt", "attributes.txt"); t.add(tmp_path/"src/CUB_200_2011", "CUB_200_2011")
    return buf.getvalue()


def use(monkeypatch, server, digest): monkeypatch.setitem(D.ARCHIVES, "cub", D.Archive(server.url, digest, "CUB_200_2011", 1000))


def test_fetch(tmp_path, monkeypatch):
    body = archive(tmp_path)
    with Server(body, drops=[len(body)//2]) as s:
        use(monkeypatch, s, "md5:" + hashlib.md5(body).hexdigest())
        ds = D.load("cub")
        assert len(s.asked) == 2
        assert ds.fingerprint == D.load("cub", tmp_path/"src").fingerprint == D.load("cub").fingerprint and len(s.asked) == 2   # no second download
    cache = D.cache_dir("data")
    assert sorted(p.name for p in cache.iterdir() if not p.name.endswith(".lock")) == ["CUB_200_2011"]


def test_fetch_wrong_checksum(tmp_path, monkeypatch):
    with Server(BODY) as s:
        use(monkeypatch, s, "md5:" + "0"*32)
        with pytest.raises(DataError, match="hash") as e: D.load("cub")
    said = str(e.value)
    assert str(D.cache_dir("data")/"CUB_200_2011") in said and s.url in said and "protoquant run cub -p dataset toybirds" in said
    assert not [p for p in D.cache_dir("data").iterdir() if not p.name.endswith(".lock")]


def test_fetch_offline(monkeypatch):
    with Server(BODY) as s: pass                                 # a port where nobody listens any more
    use(monkeypatch, s, "md5:" + "0"*32)
    monkeypatch.setattr(D.time, "sleep", lambda s: None)
    with pytest.raises(DataError) as e: D.load("cub")
    for part in (str(D.cache_dir("data")/"CUB_200_2011"), s.url, "protoquant run cub -p dataset toybirds"): assert part in str(e.value)


@pytest.mark.parametrize("evil", ["../out.txt", "CUB_200_2011/../../out.txt", "/tmp_out.txt"])
def test_unpack_stays_inside(tmp_path, evil):
    with tarfile.open(tmp_path/"a.tgz", "w:gz") as t:
        for name in (evil, "CUB_200_2011/images.txt"):
            info = tarfile.TarInfo(name); info.size = 1; t.addfile(info, io.BytesIO(b"x"))
        link = tarfile.TarInfo("CUB_200_2011/link"); link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"; t.addfile(link)
    D.unpack(tmp_path/"a.tgz", tmp_path/"in/CUB_200_2011" if (tmp_path/"in").mkdir() is None else None, quiet=True)
    assert [p.name for p in (tmp_path/"in/CUB_200_2011").iterdir()] == ["images.txt"] and sorted(p.name for p in tmp_path.iterdir()) == ["a.tgz", "in"]


def test_unpack_all_or_nothing(tmp_path):
    body = archive(tmp_path)
    (tmp_path/"cut.tgz").write_bytes(body[:len(body)//2])
    (tmp_path/"in").mkdir()
    with pytest.raises((EOFError, tarfile.TarError, OSError)): D.unpack(tmp_path/"cut.tgz", tmp_path/"in/CUB_200_2011", quiet=True)
    assert not list((tmp_path/"in").iterdir())


# transforms -----------------------------------------------------------------------------------------------------------------------

MEAN, STD = (.485, .456, .406), (.229, .224, .225)


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("size", [(300, 200), (150, 333), (224, 224), (31, 500)])
def test_eval_transform_is_torchvisions(mode, size):
    D.import_torchvision()
    from torchvision.transforms import v2
    im = noise(1, size)
    head = [v2.Resize((224, 224))] if mode == "squash" else [v2.Resize(256), v2.CenterCrop(224)]
    want = v2.Compose([*head, v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(im)
    assert torch.equal(D.eval_transform(224, MEAN, STD, mode)(im), want)


def test_rectangular_input():
    t = D.eval_transform((96, 160), MEAN, STD, "squash")
    assert t(noise(0)).shape == (3, 96, 160) and t.size == (96, 160)
    with pytest.raises(ConfigError, match="equal for 'center'"): D.eval_transform((96, 160), MEAN, STD, "center")


@pytest.mark.parametrize("mode", ["squash", "center"])
@pytest.mark.parametrize("size", [(300, 200), (200, 300), (257, 199)])
def test_to_image_finds_the_dot(mode, size):
    im = Image.new("RGB", size); ImageDraw.Draw(im).rectangle((110, 90, 125, 105), fill=(255, 255, 255))
    t = D.eval_transform(224, (0,)*3, (1,)*3, mode)
    ys, xs = np.nonzero(t(im)[0].numpy() > .5)
    got = t.to_image((xs.min(), ys.min(), xs.max() + 1, ys.max() + 1), size)
    assert np.abs(np.array(got) - (110, 90, 126, 106)).max() < 1.2


def test_keys_hold_all_that_matters():
    base = dict(size=224, mean=MEAN, std=STD, mode="squash")
    keys = {f(**(base | change)).key for f in (D.eval_transform, D.augment_transform)
            for change in ({}, dict(size=192), dict(size=(224, 192)), dict(mean=(.5,)*3), dict(std=(.5,)*3), dict(mode="center"))}
    assert len(keys) == 12
    assert D.eval_transform(np.int64(224), torch.tensor(MEAN).double().tolist(), list(STD), "squash").key.startswith("eval squash 224x224")
    assert D.eval_transform(224, MEAN, STD).key == D.eval_transform((224, 224), list(MEAN), list(STD), "squash").key


def test_augment_is_repeatable_and_varies():
    t, im = D.augment_transform(64, MEAN, STD, "center"), noise(3, (90, 120))
    def draw(seed): torch.manual_seed(seed); return t(im)
    assert draw(0).shape == (3, 64, 64) and torch.equal(draw(0), draw(0)) and len({draw(s).sum().item() for s in range(8)}) > 4


@pytest.mark.parametrize("kw", [dict(mode="pad"), dict(size=0), dict(std=(0., 1., 1.)), dict(mean=(.5,))])
def test_transform_bad(kw):
    with pytest.raises(ConfigError): D.eval_transform(**(dict(size=32, mean=MEAN, std=STD) | kw))


# validation split -----------------------------------------------------------------------------------------------------------------

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 7), min_size=1, max_size=120), st.floats(0, .95), st.integers(0, 10**6))
def test_validation_split(labels, fraction, seed):
    train, val = D.validation_split(labels, fraction, seed)
    assert sorted([*train, *val]) == list(range(len(labels))) and list(val) == sorted(val)
    y = np.array(labels)
    for c in set(labels):
        n, v = (y == c).sum(), (y[val] == c).sum()
        assert n - v >= 1 and abs(v - n*fraction) < 1 + max(0, n*fraction - (n - 1))
    again = D.validation_split(labels, fraction, seed)
    assert np.array_equal(val, again[1])


def test_validation_split_values():
    y = np.repeat(np.arange(50), 30)
    train, val = D.validation_split(y)
    assert len(val) == 150 and (np.bincount(y[val]) == 3).all() and not np.array_equal(val, D.validation_split(y, seed=41)[1])
    assert len(D.validation_split(y, 0)[1]) == 0
    for f in (-.1, 1., 2): 
        with pytest.raises(ConfigError): D.validation_split(y, f)


# the real sets --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def real_root():
    root = os.environ.get("PROTOQUANT_DATA")
    if not root: pytest.skip("PROTOQUANT_DATA is not set: the real data sets are not read")
    return Path(root)


def test_real_cub(real_root):
    if not (real_root/"CUB_200_2011/images.txt").exists(): pytest.skip(f"{real_root} has no CUB_200_2011")
    ds = D.load("cub")
    assert ds.class_names[0] == "001.Black_footed_Albatross" and len(ds.train.parts(0)) == 15
    for s in (ds.train, ds.test):
        for i in range(0, len(s), 97):
            w, h = s.image_size(i)
            x0, y0, x1, y1 = s.crop_box(i)
            assert 0 <= x0 < x1 <= w and 0 <= y0 < y1 <= h and s.image(i).size == (x1 - x0, y1 - y0)
            seen = [p for p in s.parts(i) if p.visible]
            assert seen and all(0 <= p.x <= w and 0 <= p.y <= h for p in seen)
    if ds.n_classes == 50: assert (len(ds.train), len(ds.test), ds.class_ids) == (1500, 1389, list(range(1, 51)))


def test_real_cub_images_decode(real_root):
    if not (real_root/"CUB_200_2011/images.txt").exists(): pytest.skip(f"{real_root} has no CUB_200_2011")
    ds = D.load("cub", crop="none")
    assert not ds.test.subset(slice(0, 400)).bad_images(quiet=True)
    assert ds.test.image(0).size == ds.test.image_size(0) == ds.test.crop_box(0)[2:]


def test_real_funnybirds(real_root):
    if not (real_root/"FunnyBirds").is_dir(): pytest.skip(f"{real_root} has no FunnyBirds")
    ds = D.load("funnybirds")
    assert ds.n_classes == 50 and len(ds.test) == 500 and ds.test.image(7).size == (256, 256)
    for i in range(0, 500, 50):
        p = ds.test.parts(i)
        assert [q.name for q in p] == ["beak", "eye", "foot", "tail", "wing"] and sum(q.visible for q in p) >= 3
        m = np.asarray(ds.test.part_map(i))
        assert m.shape == (256, 256, 3) and tuple(m[0, 0]) in {(0, 0, 0)} | {(204, 204, 204 + k) for k in range(50)}


def test_toybirds_with_another_scene_have_another_fingerprint():
    import copy
    a = D.load("toybirds", classes=3, n_train_per_class=1, n_test_per_class=2).test
    b = a.subset(range(len(a)))
    assert a.fingerprint == b.fingerprint and a.stamp == b.stamp
    b.samples = copy.deepcopy(b.samples)
    b.samples[-1].scene.objects = []                          # same id, seed and index; another picture
    assert a.fingerprint != b.fingerprint and a.stamp != b.stamp
