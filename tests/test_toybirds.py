"""protoquant.toybirds: one picture per key, true annotations, local interventions, layouts that others can read."""
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageFilter

from protoquant import toybirds as T
from protoquant.core import ConfigError, DataError, StoreError

keys = st.tuples(st.integers(0, 2**40), st.sampled_from(("train", "test", "val")), st.integers(0, 10**6), st.integers(0, 49))
few = settings(max_examples=25, deadline=None)
# colours and names typed again here, from PROTOCOLS F.1, so that a slip in the module shows
COLOURS = {"eye": [(255, 255, 253), (255, 255, 254)], "beak": [(255, 255, 0)], "foot": [(255, 0, 1), (255, 0, 2)],
           "wing": [(0, 255, 1), (0, 255, 2)], "tail": [(0, 0, 255)]}


def pixels(im, colours):
    a = np.asarray(im.convert("RGB")).astype(int)
    return sum((a == c).all(-1) for c in np.array(colours)) > 0


def grown(mask, n=5):
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).filter(ImageFilter.MaxFilter(n))) > 0


def array(im):
    return np.asarray(im).astype(int)


def touched(s, ids):
    "Pixels of which the thing has at least one visible quarter."
    return np.isin(T.quarter_map(s), ids).reshape(256, 2, 256, 2).any((1, 3))


# -- classes
def test_classes_are_unique_and_two_parts_apart():
    table = T.class_table()
    assert len(table) == 50 and T.PARTS == dict(beak=4, eye=3, foot=4, tail=9, wing=6)
    for a, b in itertools.combinations(table, 2):
        assert sum(a[p] != b[p] for p in T.PARTS) >= 2
    for c in table:
        assert all(0 <= c[p] < n for p, n in T.PARTS.items())
    for p, n in T.PARTS.items():
        assert {c[p] for c in table} == set(range(n))
    assert all(T.class_table(n) == table[:n] for n in (1, 7, 49))


@pytest.mark.parametrize("n", [0, -1, 51])
def test_number_of_classes_out_of_range(n):
    for call in (lambda: T.class_table(n), lambda: T.scene(0, "train", 0, n_classes=n), lambda: T.scenes("train", 1, n)):
        with pytest.raises(ConfigError, match="1 to 50 classes"): call()


@pytest.mark.parametrize("label", [-1, 5, 50])
def test_label_out_of_range(label):
    with pytest.raises(ConfigError, match="0 to 4"): T.scene(0, "train", 0, label=label, n_classes=5)


def test_no_negative_index():
    with pytest.raises(ConfigError, match="from 0"): T.scene(0, "train", -1)
    with pytest.raises(ConfigError, match="negative"): T.scenes("train", -1)


# -- determinism
CHILD = """
import hashlib, json, sys
from protoquant import toybirds as T
for key in json.loads(sys.argv[1]):
    s = T.scene(*key)
    print(hashlib.sha256(T.render(s).tobytes() + T.part_map(s).tobytes() + json.dumps(T.annotate(s)).encode()).hexdigest())
"""


def test_same_picture_in_another_process_and_order():
    todo = [(s, sp, i) for s in (0, 7) for sp in ("train", "test") for i in (0, 49, 120)]
    out = []
    for order, hashseed in ((todo, "1"), (todo[::-1], "2")):
        env = dict(os.environ, PYTHONHASHSEED=hashseed, PYTHONPATH=str(Path(T.__file__).parents[1]))
        r = subprocess.run([sys.executable, "-c", CHILD, json.dumps(order)], env=env, capture_output=True, text=True, check=True)
        out.append(r.stdout.split())
    assert out[0] == out[1][::-1] and len(set(out[0])) == len(todo)


def test_the_world_s_random_state_is_left_alone():
    import random
    random.seed(1), np.random.seed(1)
    before = random.getstate(), np.random.get_state()[1].copy()
    T.render(T.scene(0, "train", 0))
    assert random.getstate() == before[0] and (np.random.get_state()[1] == before[1]).all()


def test_pictures_do_not_follow_from_their_neighbours():
    first = T.render(T.scene(0, "train", 5)).tobytes()
    for i in range(9): T.render(T.scene(0, "train", i), parts=("beak",))
    assert T.render(T.scene(0, "train", 5)).tobytes() == first


def test_the_label_decides_the_parts_and_nothing_else():
    a, b = T.scene(3, "train", 4, label=0), T.scene(3, "train", 4, label=1)
    for f in ("jitter", "body", "light", "background", "objects"):
        assert getattr(a, f) == getattr(b, f)
    assert {k: a.pose[k] for k in ("flip", "angle", "limbs")} == {k: b.pose[k] for k in ("flip", "angle", "limbs")} and a.variants != b.variants


def test_a_larger_set_begins_with_the_smaller_one():
    small, large = T.scenes("test", 2, 6, seed=1), T.scenes("test", 4, 6, seed=1)
    assert [s for s in large if s.index < 12] == small
    assert [s.label for s in large] == sorted(s.label for s in large)
    assert not {s.light["seed"] for s in T.scenes("train", 2, 6, seed=1)} & {s.light["seed"] for s in small}


# -- scenes
@few
@given(keys)
def test_scene_survives_json(key):
    seed, split, index, label = key
    s = T.scene(seed, split, index, label)
    again = T.Scene.from_dict(json.loads(json.dumps(s.to_dict())))
    assert again == s == T.scene(seed, split, index, label)
    assert T.render(again, 64).tobytes() == T.render(s, 64).tobytes()
    assert s.label == label and s.variants == T.class_table()[label] and 1 <= len(s.objects) <= 4


@few
@given(keys, st.sampled_from((64, 256, 300)))
def test_box_and_centres(key, size):
    s = T.scene(*key)
    note = T.annotate(s, size)
    x, y, w, h = note["bbox"]
    assert 0 <= x and 0 <= y and x + w <= size and y + h <= size and min(w, h) > 0
    assert list(note["parts"]) == list(T.PARTS)
    for u, v, visible in note["parts"].values():
        assert (u, v) == (0, 0) if not visible else x <= u <= x + w - 1 and y <= v <= y + h - 1


@few
@given(keys)
def test_the_bird_is_inside_the_frame(key):
    s = T.scene(*key)
    points = np.concatenate([T.place(p, s.pose) for _, _, shapes in T.bird_shapes(s) for p, _ in shapes])
    assert points.min() >= T.MARGIN - .02 and points.max() <= 256 - T.MARGIN + .02


# -- part maps
@pytest.mark.parametrize("i", range(6))
def test_annotations_against_a_loop_over_the_part_map(i):
    s = T.scene(1, "test", i)
    im = T.part_map(s)
    owner = {c: p for p, cs in COLOURS.items() for c in cs}
    by_colour, bird = {c: [] for c in owner}, []
    for y in range(256):
        for x in range(256):
            c = im.getpixel((x, y))
            if c in owner: by_colour[c].append((x, y))
            if c in owner or c == (170, 170, 170): bird.append((x, y))
    seen = {p: max((by_colour[c] for c in COLOURS[p]), key=len) for p in T.PARTS}      # the larger twin
    note = T.annotate(s)
    xs, ys = zip(*bird)
    assert note["bbox"] == (min(xs), min(ys), max(xs) - min(xs) + 1, max(ys) - min(ys) + 1)
    for p, at in seen.items():
        if len(at) >= T.MIN_PIXELS:
            mx, my = (sum(v)/len(at) for v in zip(*at))
            assert note["parts"][p][2] == 1 and abs(note["parts"][p][0] - mx) <= .051 and abs(note["parts"][p][1] - my) <= .051
        else: assert note["parts"][p] == (0, 0, 0)


def test_part_map_has_the_agreed_colours_and_no_other():
    used = set()
    for i in range(8):
        s = T.scene(2, "train", i)
        m = T.part_map(s)
        assert m.mode == "RGB" and m.size == (256, 256)
        colours = {c for _, c in m.getcolors(65536)}
        allowed = {(0, 0, 0), (170, 170, 170), *itertools.chain(*COLOURS.values()), *((204, 204, 204 + k) for k in range(len(s.objects)))}
        assert colours <= allowed
        used |= colours
    assert {(255, 0, 1), (255, 0, 2)} <= used   # two feet


def test_part_map_lies_on_the_image():
    "The eye's white and black, drawn without light, grain and jitter, must fall on the eye's pixels."
    s = T.scene(0, "train", 0)
    s.light.update(level=1., slope=0., tint=[1., 1., 1.], noise=0.)
    s.jitter = {k: [0., 1., 1.] for k in s.jitter}
    s.objects = []
    assert s.variants["wing"] == 1
    blue = pixels(T.render(s), [(0x1c, 0x50, 0xff)])   # the wing's own blue
    wing = pixels(T.part_map(s), COLOURS["wing"])
    assert blue.sum() > 500 and not (blue & ~wing).any()
    ys, xs = np.nonzero(blue)
    assert abs(xs.mean() - T.annotate(s)["parts"]["wing"][0]) < 12 and abs(ys.mean() - T.annotate(s)["parts"]["wing"][1]) < 12


def test_a_part_behind_an_object_is_not_visible():
    s = T.scene(0, "train", 0)
    x, y, _ = T.annotate(s)["parts"]["beak"]
    s.objects = [dict(kind="bush", x=x, y=y, size=90., angle=0., colour="#4f8f4f", front=True)]
    assert T.annotate(s)["parts"]["beak"] == (0, 0, 0)
    s.objects[0]["front"] = False
    assert T.annotate(s)["parts"]["beak"][2] == 1


# -- interventions
@pytest.mark.parametrize("i", range(0, 24, 3))
def test_removing_a_part_is_local(i):
    s = T.scene(0, "test", i)
    full, m = array(T.render(s)), T.part_map(s)
    for p in T.PARTS:
        kept = set(T.PARTS) - {p}
        changed = (array(T.render(s, parts=kept)) != full).any(-1)
        region = pixels(m, COLOURS[p])
        assert not (changed & ~touched(s, T.PART_IDS[p])).any()
        assert (changed & ~grown(region)).sum() <= 4    # slivers, thinner than half a pixel, that the part map does not have
        assert changed[region].mean() > .5 or region.sum() < 50
        assert not pixels(T.part_map(s, parts=kept), COLOURS[p]).any()
        assert T.annotate(s, parts=kept)["parts"][p] == (0, 0, 0)


@pytest.mark.parametrize("i", range(0, 24, 4))
def test_removing_an_object_is_local(i):
    s = T.scene(0, "test", i)
    full, m = array(T.render(s)), T.part_map(s)
    for k in range(len(s.objects)):
        kept = [j for j in range(len(s.objects)) if j != k]
        changed = (array(T.render(s, objects=kept)) != full).any(-1)
        assert not (changed & ~touched(s, [T.OBJECT0 + k])).any()
        assert (changed & ~grown(pixels(m, [(204, 204, 204 + k)]))).sum() <= 4


def test_a_removed_part_leaves_body_or_background():
    s = T.scene(0, "train", 12)
    s.objects = []
    eye, tail = pixels(T.part_map(s), COLOURS["eye"]), pixels(T.part_map(s), COLOURS["tail"])
    without = array(T.part_map(s, parts=("beak", "foot", "wing")))
    assert (without[eye] == 170).all() and (without[tail] == 0).all()


def test_order_and_container_of_kept_parts_do_not_matter():
    s = T.scene(0, "train", 1)
    a = T.render(s, parts=("wing", "beak")).tobytes()
    assert a == T.render(s, parts=["beak", "wing"]).tobytes() == T.render(s, parts={"beak", "wing"}).tobytes()
    assert T.render(s).tobytes() == T.render(s, parts=T.PARTS, objects=range(len(s.objects))).tobytes()


def test_unknown_part_object_or_size():
    s = T.scene(0, "train", 1)
    for f in (T.render, T.part_map):
        with pytest.raises(ConfigError, match="Did you mean tail"): f(s, parts=("tial",))
        with pytest.raises(ConfigError, match="size=5"): f(s, 5)
    with pytest.raises(ConfigError, match="no object 9"): T.render(s, objects=[9])


# -- on disk: two small readers that know the official layouts only
def read_cub(root):
    table = lambda f: [l.split() for l in (root/f).read_text().splitlines()]
    images = {int(i): n for i, n in table("images.txt")}
    label = {int(i): int(c) for i, c in table("image_class_labels.txt")}
    train = {int(i): int(t) for i, t in table("train_test_split.txt")}
    box = {int(i): tuple(map(float, b)) for i, *b in table("bounding_boxes.txt")}
    classes = {int(c): n for c, n in table("classes.txt")}
    parts = {int(k): n for k, n in table("parts/parts.txt")}
    locs = {(int(i), int(k)): (float(x), float(y), int(v)) for i, k, x, y, v in table("parts/part_locs.txt")}
    return images, label, train, box, classes, parts, locs


def test_cub_layout(tmp_path):
    root = T.write_cub(tmp_path/"toy", 2, 1, classes=4, seed=5)
    images, label, train, box, classes, parts, locs = read_cub(root)
    assert list(images) == list(range(1, 13)) == list(label) == list(train) == list(box)
    assert classes == {1: "001.Toybird_01", 2: "002.Toybird_02", 3: "003.Toybird_03", 4: "004.Toybird_04"}
    assert parts == {1: "beak", 2: "eye", 3: "foot", 4: "tail", 5: "wing"} and len(locs) == 12*5
    expect = {sp: iter(T.scenes(sp, n, 4, seed=5)) for sp, n in (("train", 2), ("test", 1))}
    for i, name in images.items():
        s = next(expect["train" if train[i] else "test"])
        assert name.startswith(classes[label[i]] + "/") and s.label == label[i] - 1
        with Image.open(root/"images"/name) as im:
            assert im.format == "PNG" and np.array_equal(im, T.render(s))
        note = T.annotate(s)
        assert box[i] == note["bbox"]
        for k, p in parts.items(): assert locs[i, k] == note["parts"][p]
    assert all(next(e, None) is None for e in expect.values())
    assert len(list((root/"images").rglob("*.png"))) == 12


def opened(path):
    with Image.open(path) as im:
        assert im.mode == "RGBA" and im.getextrema()[3] == (255, 255)      # the original's readers drop the fourth channel
        return np.asarray(im)[..., :3]


def read_funnybirds(root):
    load = lambda f: json.loads((root/f).read_text())
    classes, parts, train, test = load("classes.json"), load("parts.json"), load("dataset_train.json"), load("dataset_test.json")
    path = lambda mode, r, i: root/mode/str(r["class_idx"])/f"{i:06d}.png"
    return classes, parts, train, test, path


def test_funnybirds_layout(tmp_path):
    root = T.write_funnybirds(tmp_path/"toy", 4, 2, classes=3, seed=5, interventions_per_class=1)
    classes, parts, train, test, path = read_funnybirds(root)
    assert [c["class_idx"] for c in classes] == [0, 1, 2] and [c["parts"] for c in classes] == T.class_table(3)
    assert {p: len({json.dumps(m) for m in v}) for p, v in parts.items()} == T.PARTS
    assert len(train) == 12 and len(test) == 6
    for mode, records, scenes in (("train", train, T.scenes("train", 4, 3, 5)), ("test", test, T.scenes("test", 2, 3, 5))):
        for i, (r, s) in enumerate(zip(records, scenes)):
            there = [p for p in T.PARTS if r[f"{p}_model"] != "placeholder"]
            for p in there: assert parts[p][classes[r["class_idx"]]["parts"][p]]["model"] == r[f"{p}_model"]
            assert T.Scene.from_dict(json.loads(r["toy_scene"])) == s and r["class_idx"] == s.label
            assert np.array_equal(opened(path(mode, r, i)), T.render(s, parts=there))
            assert len(re.findall(r"\b\d+\b", r["bg_objects"])) == len(s.objects)               # as the original's programs count
            assert all(isinstance(v, (int, str)) for v in r.values()) and all("_" in k for k in r)  # what they can read
            if mode == "test":
                assert there == list(T.PARTS) and np.array_equal(opened(path("test_part_map", r, i)), T.part_map(s))


def test_funnybirds_interventions(tmp_path):
    root = T.write_funnybirds(tmp_path/"toy", 0, 2, classes=2, interventions_per_class=1)
    _, _, _, test, path = read_funnybirds(root)
    folders = sorted(str(p.parent.relative_to(root)) for p in root.glob("test_interventions/*/*/body_.png"))
    assert folders == ["test_interventions/0/000000", "test_interventions/1/000002"]
    for i in (0, 2):
        s, at = T.Scene.from_dict(json.loads(test[i]["toy_scene"])), path("test_interventions", test[i], i).with_suffix("")
        subsets = {p.name for p in at.glob("body_*.png")}
        assert subsets == {"body_" + "_".join(sorted(k)) + ".png" for n in range(6) for k in itertools.combinations(T.PARTS, n)} and len(subsets) == 32
        assert np.array_equal(opened(at/"body_beak_eye_foot_tail_wing.png"), opened(path("test", test[i], i)))
        assert np.array_equal(opened(at/"body_eye_wing.png"), T.render(s, parts=("eye", "wing")))
        n = len(s.objects)
        assert {p.name for p in (at/"background_interventions").iterdir()} == {f"{k}.png" for k in range(n)}
        for k in range(n):
            assert np.array_equal(opened(at/f"background_interventions/{k}.png"), T.render(s, objects=set(range(n)) - {k}))


def test_all_interventions_by_default(tmp_path):
    root = T.write_funnybirds(tmp_path/"toy", 0, 2, classes=1)
    assert len(list(root.glob("test_interventions/0/*"))) == 2


def test_training_birds_lose_nought_to_five_parts():
    lost = [5 - len(T.kept_parts(s)) for s in T.scenes("train", 12, 50)]
    assert set(lost) == set(range(6)) and 2.2 < np.mean(lost) < 2.8


# -- writing
@pytest.mark.parametrize("write", [T.write_cub, T.write_funnybirds])
def test_a_folder_in_use_is_left_alone(write, tmp_path):
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine"/"note.txt").write_text("keep me")
    with pytest.raises(DataError, match="not empty.*Choose another folder"): write(tmp_path/"mine", 1, 1, classes=1)
    (tmp_path/"file").write_text("")
    with pytest.raises(DataError, match="not empty"): write(tmp_path/"file", 1, 1, classes=1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "mine", "note.txt"]
    (tmp_path/"empty").mkdir()
    assert write(tmp_path/"empty", 1, 1, classes=1).is_dir()


@pytest.mark.parametrize("write", [T.write_cub, T.write_funnybirds])
def test_an_interrupted_write_leaves_nothing(write, tmp_path, monkeypatch):
    calls, real = [], T._save
    def stop(im, path):
        calls.append(path)
        if len(calls) == 3: raise KeyboardInterrupt
        real(im, path)
    monkeypatch.setattr(T, "_save", stop)
    with pytest.raises(KeyboardInterrupt): write(tmp_path/"toy", 2, 2, classes=2)
    assert len(calls) == 3 and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    import shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(StoreError, match="ToyBirds in CUB's layout"): T.write_cub(tmp_path/"toy", 1, 1, classes=1)
    assert list(tmp_path.iterdir()) == []


def test_class_names():
    assert T.class_names(2) == ["Toybird_01", "Toybird_02"] and all(re.fullmatch(r"Toybird_\d\d", n) for n in T.class_names())
