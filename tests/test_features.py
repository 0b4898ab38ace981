"""Guards of protoquant.features: a store is whole or absent, resumes, belongs to one backbone, one transform, one image set."""
import errno
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from protoquant import core, datasets, features as F
from protoquant.core import DataError, StoreError, read_json
from pieces import TESTS, Backbone, Images, python, randn, transform

SMALL = 4   # rows a block in these tests


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch): monkeypatch.setattr(F, "BLOCK", SMALL)


def make(folder, images=None, backbone=None, tf=None, **kw):
    return F.extract(backbone or Backbone(), Images() if images is None else images, tf or transform(), cache=folder, device="cpu", quiet=True, **{"batch_size": 2, **kw})


def live(images, backbone=None, tf=None):
    x = torch.stack([(tf or transform())(images.image(i)) for i in range(len(images))])
    return (backbone or Backbone()).features(x).flatten(2).transpose(1, 2)


class Broken(Exception): pass


class Breaks(Images):
    "Fails, as a killed process would, at one image."
    def __init__(self, at, error=Broken, **kw): super().__init__(**kw); self.at, self.error = at, error
    def image(self, i):
        if i == self.at: raise self.error(f"at {i}")
        return super().image(i)


# -- what is stored is what the backbone gives

def test_store_equals_live_features(tmp_path):
    s, im = make(tmp_path), Images()
    torch.testing.assert_close(s.read(slice(None)), live(im).half().float(), rtol=0, atol=0)
    assert s.labels.tolist() == im.labels.tolist() and s.ids == im.ids and s.grid == (2, 2) and s.array.dtype == np.float16
    assert isinstance(s.array, np.memmap)


def test_store_equals_live_features_of_a_real_model(tmp_path):
    from protoquant import backbones
    with pytest.warns(UserWarning, match="RANDOM"): b = backbones.create("test_resnet", "random", num_classes=3, img_size=32)
    im = Images(n=5, size=32)
    s = make(tmp_path, im, b)
    with torch.no_grad(): want = b.features(torch.stack([transform()(im.image(i)) for i in range(5)])).flatten(2).transpose(1, 2)
    torch.testing.assert_close(s.read(slice(None)), want, rtol=2e-3, atol=2e-3)     # half precision; other batch sizes


@pytest.mark.parametrize("n", (1, 3, 4, 5, 8, 11))
@pytest.mark.parametrize("batch", (1, 3, 4, 64))
def test_any_number_of_images_in_any_batches(tmp_path, n, batch):
    im = Images(n=n)
    s = make(tmp_path, im, batch_size=batch)
    torch.testing.assert_close(s.read(slice(None)), live(im).half().float(), rtol=0, atol=0)
    assert len(s.meta["crc"]) == -(-n // SMALL) and not s.damaged() and s.meta["extracted"] == n


def test_second_time_nothing_runs(tmp_path):
    first = make(tmp_path)
    im, b = Images(), Backbone()
    again = make(tmp_path, im, b)
    assert not im.seen and not b.batches and again.key == first.key
    assert sorted(p.name for p in (tmp_path/first.key).iterdir()) == ["meta.json", "tokens.npy"]


# -- interrupted

@pytest.mark.parametrize("error", (Broken, KeyboardInterrupt))
def test_an_interrupted_extraction_resumes(tmp_path, error):
    with pytest.raises(error): make(tmp_path, Breaks(9, error, n=11), workers=1)
    [folder] = [p for p in tmp_path.iterdir() if p.is_dir()]
    with pytest.raises(FileNotFoundError): F.FeatureStore(folder)                   # half a store is no store
    finished = [b for b, c in enumerate(read_json(folder/"partial.json")["crc"]) if c is not None]
    assert finished == [0, 1]
    im = Images(n=11)
    s = make(tmp_path, im)
    assert set(im.seen) - {0} == {8, 9, 10}            # image 0 only tells the grid
    torch.testing.assert_close(s.read(slice(None)), live(Images(n=11)).half().float(), rtol=0, atol=0)
    assert s.meta["extracted"] == 3


KILLED = """
import os, signal, sys
from pieces import Backbone, Images, transform
from protoquant import features as F
F.BLOCK = 4
class Dies(Images):
    def image(self, i):
        if i == 9: os.kill(os.getpid(), signal.SIGKILL)
        return super().image(i)
F.extract(Backbone(), Dies(n=11), transform(), cache=sys.argv[1], device="cpu", quiet=True, batch_size=2, workers=1)
"""

def test_a_killed_process_leaves_its_finished_blocks(tmp_path):
    r = subprocess.run([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert r.returncode == -9, r.stderr
    im = Images(n=11)
    s = make(tmp_path, im)
    assert not {1, 2, 3} & set(im.seen) and {9, 10} <= set(im.seen)
    torch.testing.assert_close(s.read(slice(None)), live(Images(n=11)).half().float(), rtol=0, atol=0)


# -- damaged and stale

def flip(path, where):
    "Turn over one byte of the tokens, `where` bytes after the header."
    start = np.load(path, mmap_mode="r").offset
    with open(path, "r+b") as f:
        f.seek(start + where); byte = f.read(1)
        f.seek(start + where); f.write(bytes([byte[0] ^ 0xFF]))


def test_a_flipped_byte_is_noticed_and_only_its_block_is_made_again(tmp_path):
    s = make(tmp_path)
    row = 4 * 6 * 2                                      # bytes of an image
    flip(s.folder/"tokens.npy", 5 * row + 3)
    with pytest.raises(StoreError, match="1 blocks .* damaged"): F.FeatureStore(s.folder)
    assert F.FeatureStore(s.folder, verify=False).damaged() == [1]
    im = Images()
    again = make(tmp_path, im)
    assert set(im.seen) - {0} == {4, 5, 6, 7}
    torch.testing.assert_close(again.read(slice(None)), live(Images()).half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("harm", ("cut", "header", "empty", "no tokens", "no meta", "meta cut", "meta of another", "meta without crc", "other shape"))
def test_any_damage_is_repaired_and_never_read(tmp_path, harm):
    s = make(tmp_path)
    f, m = s.folder/"tokens.npy", s.folder/"meta.json"
    if harm == "cut": f.write_bytes(f.read_bytes()[:-10])
    if harm == "header": f.write_bytes(b"x" + f.read_bytes()[1:])
    if harm == "empty": f.write_bytes(b"")
    if harm == "no tokens": f.unlink()
    if harm == "no meta": m.unlink()
    if harm == "meta cut": m.write_text(m.read_text()[:40])
    if harm == "meta of another": m.write_text(json.dumps({**read_json(m), "key": "another", "crc": [1, 2, 3]}))
    if harm == "meta without crc": m.write_text(json.dumps({k: v for k, v in read_json(m).items() if k != "crc"}))
    if harm == "other shape": np.save(f, np.zeros((3, 4, 6), np.float16))
    again = make(tmp_path)
    torch.testing.assert_close(again.read(slice(None)), live(Images()).half().float(), rtol=0, atol=0)
    assert not again.damaged() and again.meta["key"] == s.key and again.meta["labels"] == Images().labels.tolist()


def test_a_repair_that_is_interrupted_at_once_keeps_the_good_blocks(tmp_path):
    s = make(tmp_path)
    flip(s.folder/"tokens.npy", 5 * 48)
    with pytest.raises(Broken): make(tmp_path, Breaks(5), workers=1)
    im = Images()
    make(tmp_path, im)
    assert set(im.seen) - {0} == {4, 5, 6, 7}


def test_whatever_tokens_depend_on_is_in_the_key(tmp_path):
    b, im, tf = Backbone(), Images(), transform()
    key = F.store_key(b, im, tf)
    others = [F.store_key(Backbone("other"), im, tf), F.store_key(b, Images(stamp="touched"), tf), F.store_key(b, Images(split="test"), tf),
              F.store_key(b, im, transform("other")), F.store_key(b, im, tf, view=1)]
    assert len({key, *others}) == 6 and key == F.store_key(Backbone(), Images(), transform())
    make(tmp_path); make(tmp_path, backbone=Backbone("other"))
    assert len([p for p in tmp_path.iterdir() if p.is_dir()]) == 2


def test_a_changed_file_is_another_store(tmp_path):
    d = tmp_path/"set"
    for split in ("train", "test"):
        for c in ("a", "b"):
            (d/split/c).mkdir(parents=True)
            Images().image(len(c)).save(d/split/c/"x.png")
    stamp = lambda: datasets.load("imagefolder", d, quiet=True).train.stamp
    before = stamp()
    Images(seed=5).image(1).save(d/"train"/"a"/"x.png"); os.utime(d/"train"/"a"/"x.png", (1, 1))
    assert stamp() != before


def test_a_store_of_another_backbone_is_refused_with_both_hashes(tmp_path):
    s = make(tmp_path, backbone=Backbone("0123"))
    s.check(Backbone("0123"))
    with pytest.raises(StoreError, match="0123.*4567"): s.check(Backbone("4567"))


# -- two at once

TWICE = """
import json, sys, time
from pieces import Backbone, Images, transform
from protoquant import features as F
class Slow(Images):
    def image(self, i): time.sleep(.02); return super().image(i)
im = Slow(n=30)
s = F.extract(Backbone(), im, transform(), cache=sys.argv[1], device="cpu", quiet=True, batch_size=2)
print(json.dumps([len(im.seen), float(s.read(slice(None)).sum()), s.key]))
"""

def test_two_processes_make_one_store(tmp_path):
    cmd = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + TWICE, str(tmp_path)]
    two = [subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1")) for _ in range(2)]
    out = [p.communicate(timeout=120) for p in two]
    assert [p.returncode for p in two] == [0, 0], out[0][1] + out[1][1]
    (a, sa, ka), (b, sb, kb) = [json.loads(o.strip().splitlines()[-1]) for o, _ in out]
    assert sorted((a, b)) == [0, 31] and sa == sb and ka == kb and len([p for p in tmp_path.iterdir() if p.is_dir()]) == 1


# -- full disk

def no_store(folder):
    "No file that reads as a store, and no tokens left."
    for d in [p for p in folder.iterdir() if p.is_dir()]:
        with pytest.raises((FileNotFoundError, StoreError)): F.FeatureStore(d)
        assert not (d/"tokens.npy").exists() and not (d/"meta.json").exists()


def test_too_little_space_is_said_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(core.shutil, "disk_usage", lambda p: type("U", (), dict(free=100))())
    with pytest.raises(StoreError, match="the feature store of 10 images.*PROTOQUANT_CACHE"): make(tmp_path)
    no_store(tmp_path)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="no posix_fallocate on this system")
def test_a_disk_that_fills_up_meanwhile(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(os, "posix_fallocate", full)
        with pytest.raises(StoreError, match="no room.*No space left.*PROTOQUANT_CACHE"): make(tmp_path)
    no_store(tmp_path)
    assert len(make(tmp_path)) == 10                     # and there is room again


def test_a_disk_too_full_for_the_record(tmp_path, monkeypatch):
    def full(*a): raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as m:
        m.setattr(F, "write_json", full)
        with pytest.raises(StoreError): make(tmp_path)
    [d] = [p for p in tmp_path.iterdir() if p.is_dir()]
    with pytest.raises(FileNotFoundError): F.FeatureStore(d)


# -- bad images, bad numbers

@pytest.mark.parametrize("value", (float("nan"), float("inf"), 1e6))
def test_features_that_are_not_finite_name_the_image(tmp_path, value):
    class Bad(Backbone):
        def features(self, x):
            z = super().features(x).clone()
            if self.batches == 4: z[1, 2] = value        # the first batch tells the grid: images 4, 5
            return z
    with pytest.raises(DataError, match="1 images are not finite.*image-5"): make(tmp_path, backbone=Bad())
    with pytest.raises(FileNotFoundError): F.FeatureStore([p for p in tmp_path.iterdir() if p.is_dir()][0])
    assert not make(tmp_path).damaged()


def folder_of_images(d, n=6):
    for split in ("train", "test"):
        for c in ("a", "b"):
            (d/split/c).mkdir(parents=True)
            for i in range(n): Images().image(i).save(d/split/c/f"{i}.png")
    return d


def test_an_image_that_cannot_be_decoded_stops_with_its_name(tmp_path):
    d = folder_of_images(tmp_path/"set")
    (d/"train"/"b"/"3.png").write_bytes((d/"train"/"b"/"3.png").read_bytes()[:60])
    (d/"train"/"b"/"5.png").write_bytes(b"nothing")
    im = datasets.load("imagefolder", d, quiet=True).train
    with pytest.raises(DataError, match=r"b/3.*cannot be decoded.*skip_bad=True.*bad_images"): make(tmp_path/"cache", im)
    assert len(im.bad_images()) == 2
    with pytest.warns(UserWarning, match="2"): left = datasets.load("imagefolder", d, skip_bad=True, quiet=True).train
    assert len(make(tmp_path/"cache", left)) == 10


def test_an_empty_set(tmp_path):
    with pytest.raises(DataError, match="no images"): make(tmp_path, Images(n=0))


# -- views of tokens

def test_tokens_that_do_not_fit():
    with pytest.raises(StoreError, match="grid of 2x3"): F.Tokens(randn(2, 5, 3), [0, 1], (2, 3))
    with pytest.raises(StoreError, match="2 images but 3 labels"): F.Tokens(randn(2, 6, 3), [0, 1, 2], (2, 3))


def test_subsets_of_subsets_and_batches():
    t = F.Tokens(randn(9, 4, 3), torch.arange(9), (2, 2))
    s = t.subset([8, 3, 5]).subset([2, 0])
    assert s.labels.tolist() == [5, 8] and s.ids == ["5", "8"] and torch.equal(s.read(slice(None)), t.read([5, 8]))
    mask = t.labels >= 7
    assert t.subset(mask).ids == ["7", "8"] == t.subset(slice(7, None)).ids and len(t.subset([])) == 0 and t.subset([-1]).ids == ["8"]
    for wrong in ([9], mask[:5], [1.5]):
        with pytest.raises(StoreError, match="9 images"): t.subset(wrong)
    seen = torch.cat([r for r, _ in t.batches(2, shuffle=torch.Generator().manual_seed(1))])
    assert sorted(seen.tolist()) == list(range(9)) and seen.tolist() != list(range(9))
    torch.testing.assert_close(t.pooled(), t.read(slice(None)).mean(1))
    m = t.as_map(t.read([1]))
    assert m.shape == (1, 3, 2, 2) and torch.equal(m[0, :, 1, 0], t.read([1])[0, 2])


def test_augmented_views_differ_and_repeat(tmp_path):
    def augment(im): return transform()(im) + torch.rand(())
    augment.key = "noise"
    def views(folder, seed=40, workers=4):
        return [v.read(slice(None)) for v in F.extract_views(Backbone(), Images(), transform(), augment, 3, seed, cache=folder, device="cpu", quiet=True, workers=workers)]
    a, b = views(tmp_path/"a"), views(tmp_path/"b", workers=1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert not torch.equal(a[1], a[2]) and not torch.equal(a[1], views(tmp_path/"a", seed=41)[1])
    assert torch.equal(a[0], make(tmp_path/"a").read(slice(None)))
