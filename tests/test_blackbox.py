"""Guards of protoquant.blackbox: interruption, several processes, several workers, full disks, divergence, files, torchvision's weights, timing."""
import contextlib
import copy
import json
import os
import random
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn

from pieces import python
from protoquant import backbones, blackbox as B
from protoquant.compat import import_timm, import_torchvision
from protoquant.core import ConfigError, DataError, StoreError, WeightsError, hash_json
from protoquant.features import Tokens
from protoquant.training import _stage1_loss

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights.*", "ignore:.*cannot be filled.*", "ignore:.*lr_scheduler.*")
CPU = dict(device="cpu", workers=0)


class Squares:
    "Images of noise in which the colour says the class."
    def __init__(self, n=24, k=3, split="train", rows=None, size=32):
        self.n, self.k, self.size, self.name, self.split = n, k, size, "squares", split
        self.rows = np.arange(n) if rows is None else np.asarray(rows)
        self.labels, self.ids = self.rows % k, [f"{split}-{i}" for i in self.rows]
        self.fingerprint = self.stamp = hash_json([split, self.rows.tolist(), k])
        self.class_names = [f"colour {i}" for i in range(k)]
        self.fail_at = None
    def __len__(self): return len(self.rows)
    def subset(self, rows): return Squares(self.n, self.k, self.split, self.rows[rows], self.size)
    def image(self, i):
        if self.fail_at is not None:
            self.fail_at -= 1
            if self.fail_at < 0: raise KeyboardInterrupt
        rng = np.random.default_rng([self.split == "train", int(self.rows[i])])
        a = rng.integers(0, 120, (self.size, self.size, 3))
        a[..., self.labels[i] % 3] += 100
        return Image.fromarray(a.astype(np.uint8))


class Data:
    name, crop, resize, n_classes = "squares", "none", "squash", 3
    def __init__(self): self.train, self.test = Squares(24), Squares(9, split="test"); self.class_names = self.train.class_names


def config(name="test_convnext", **kw):
    return B.get_config(name, **{**dict(epochs=3, batch_size=8, micro_batch=4, steps=2, lr=.01, warmup=1, augment="none", mixup=0., cutmix=0.), **kw})


def start(c, name="test_convnext", k=3, **kw):
    return B.start_from(name, "random", k, c, **{**dict(img_size=None if name == "test_vit" else 32), **kw})


def tune(c, name="test_convnext", train=None, val=None, **kw):
    return B.fine_tune(start(c, name), train or Squares(24), val if val is not None else Squares(9, split="val"), c, **{**CPU, **kw})


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# decisions

@pytest.mark.parametrize("bad,says", [(dict(mode="heads"), "Did you mean head"), (dict(optimizer="lamb"), "adamw, sgd"), (dict(curve="cosine"), "exact, released"), (dict(epochs=-1), "at least 0"),
                                      (dict(batch_size=0), "at least 1"), (dict(batch_size=2.5), "whole number"), (dict(lr=0.), "above 0"), (dict(lr=float("nan")), "above 0"), (dict(lr=float("inf")), "above 0"),
                                      (dict(min_lr=1.), "between 0"), (dict(mixup=-.1), "between 0"), (dict(label_smoothing=1.5), "between 0 and 1"), (dict(drop_path=2), "drop_path"),
                                      (dict(weight_decay=float("nan")), "weight_decay"), (dict(smoothing=.1), "Did you mean label_smoothing"), (dict(micro_batch=1), "mix two images"), (dict(precision="half"), "precision")])
def test_decisions_that_cannot_work(bad, says):
    with pytest.raises(ConfigError, match=says): B.get_config("resnet50", **bad)


def test_the_papers_black_boxes_name_weights_that_exist():
    tags = import_timm().list_pretrained()
    for name, c in B.CONFIGS.items():
        if name == "default": continue
        assert name in import_timm().list_models() and (c.source in tags if c.source != "torchvision" else name in B.TORCHVISION)
        assert c.source == "torchvision" or c.source.split(".")[0] == name
        d = B.decisions(c)
        assert set(d["from"]) <= {B.P, B.C, B.OURS} and (d["from"] != "").all() and "this run" not in set(d["from"])
    for name, (tv, tag) in B.TORCHVISION.items():
        assert tag in import_torchvision().models.get_model_weights(tv).__members__


def test_a_changed_decision_is_marked():
    d = B.decisions(B.get_config("resnet50", lr=.5, epochs=30))
    assert d[d["from"] == "this run"].index.tolist() == ["lr"] and d.note["lr"] == "instead of 0.001"


# schedule

@settings(max_examples=40, deadline=None)
@given(epochs=st.integers(1, 60), warmup=st.integers(0, 8), lr=st.floats(1e-5, 1), curve=st.sampled_from(["exact", "released"]))
def test_schedule(epochs, warmup, lr, curve):
    r = B.schedule(B.get_config("default", epochs=epochs, warmup=warmup, lr=lr, min_lr=1e-6, curve=curve))
    assert len(r) == epochs and all(1e-6 - 1e-12 <= v <= lr * (1 + 1e-9) for v in r)
    w = min(warmup, epochs - 1)
    if curve == "exact": assert max(r) == pytest.approx(lr)
    if epochs > w + 1: assert r[w:] == sorted(r[w:], reverse=True)
    assert r[:w + 1 if curve == "exact" else w] == sorted(r[:w + 1 if curve == "exact" else w])


def test_released_schedule_against_the_formula():
    "PROTOCOLS A.2: stepped with epoch + 1, five warm-up epochs inside the cosine."
    r, lo, hi, n, w = B.schedule(B.get_config("default", curve="released", epochs=20)), 1e-6, 1e-3, 20, 5
    want = [lo + (hi - lo) * e / w if e < w else lo + (hi - lo) * (1 + np.cos(np.pi * e / n)) / 2 for e in range(n)]
    assert r == pytest.approx(want)


# random numbers

def test_seeded_leaves_the_global_generators_alone_also_after_an_error():
    def draw(): return torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    want = draw()
    torch.manual_seed(1); np.random.seed(1); random.seed(1)
    with contextlib.suppress(ZeroDivisionError), B.seeded(40, "x"):
        draw(); 1 / 0
    assert draw() == want


def test_training_neither_reads_nor_changes_the_global_generators():
    c = config(mixup=.8, cutmix=1., augment="released", drop_path=.3, epochs=2)
    torch.manual_seed(5); before = torch.get_rng_state()
    a = tune(c)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6); np.random.seed(7); random.seed(8)
    assert same(a.last, tune(c).last)


@pytest.mark.parametrize("kind", B.CHOICES["augment"])
@pytest.mark.parametrize("resize", ["squash", "center"])
def test_a_view_depends_on_seed_epoch_and_image_only(kind, resize):
    t = B.augmentation(kind, 32, (.5,) * 3, (.5,) * 3, resize)
    v, w = B._Views(Squares(size=48), t, 1), B._Views(Squares(size=48).subset([5, 2]), t, 1)
    first = v[3, 5][0]
    v[0, 1]; torch.rand(3)
    assert first.shape == (3, 32, 32) and torch.equal(first, v[3, 5][0]) and torch.equal(first, w[3, 0][0]) and torch.isfinite(first).all()
    others = [v[e, 5][0] for e in range(4, 12)]
    assert all(torch.equal(first, o) for o in others) == (kind == "none")


def test_workers_change_nothing_and_their_errors_arrive():
    c = config(augment="released", mixup=.8, epochs=1)
    assert same(tune(c).last, tune(c, workers=2).last)
    class Broken(Squares):
        def image(self, i): raise DataError(f"image {self.ids[i]} cannot be decoded")
    with pytest.raises(DataError, match="cannot be decoded"): tune(c, train=Broken(24), workers=2)


# batches

@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 5000), batch=st.integers(1, 2048), steps=st.integers(1, 8), micro=st.integers(2, 64), mixed=st.booleans())
def test_an_epoch_always_has_a_step(n, batch, steps, micro, mixed):
    c = B.get_config("default", batch_size=batch, steps=steps, micro_batch=micro, mixup=.8 * mixed, cutmix=0.)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        b, m = B.batch_sizes(c, n)
    assert 1 <= m <= b <= n and n // b >= 1 and (not mixed or b % 2 == m % 2 == 0)
    assert b <= max(batch, 2)


def test_a_batch_larger_than_the_training_set_says_what_happens():
    with pytest.warns(UserWarning, match=r"batches of 1024 cannot be filled from 24 training images .* batches of 12 are used, 2 steps an epoch"):
        t = B.Trainer(start(c := config(batch_size=1024, micro_batch=64)), Squares(24), c, **CPU)
    assert t.steps == 2 and len(t.plan(0)) == 2
    with pytest.raises(DataError, match="1 training images; mixing needs at least two"): B.batch_sizes(B.CONFIGS["default"], 1)
    with pytest.raises(DataError, match="0 training images"): B.batch_sizes(config(), 0)


def test_an_epoch_shows_each_image_at_most_once_in_a_new_order():
    t = B.Trainer(start(c := config(batch_size=10, micro_batch=4)), Squares(24), c, **CPU)
    rows = [[i for parts in t.plan(e) for _, r in parts for i in r] for e in (0, 1)]
    assert rows[0] != rows[1] and all(len(r) == len(set(r)) == 20 for r in rows) and [len(r) for _, r in t.plan(0)[0]] == [4, 4, 2]


@settings(max_examples=25, deadline=None)
@given(n=st.integers(0, 10**6), cut=st.booleans(), smooth=st.sampled_from([0., .1]))
def test_labels_are_the_shares_of_the_pixels(n, cut, smooth):
    "Images of one constant each: the mean pixel tells the share of each image."
    k = 6
    mix = B.mixer(B.get_config("default", mixup=.8 * (not cut), cutmix=1. * cut, label_smoothing=smooth), k)
    x = torch.arange(k).float()[:, None, None, None].expand(k, 3, 8, 8).contiguous()
    xm, t = mix(x.clone(), torch.arange(k), n, "mix")
    assert torch.allclose(t.sum(1), torch.ones(k), atol=1e-5)
    plain = (t - smooth / k) / (1 - smooth)
    assert torch.allclose((plain * torch.arange(k)).sum(1), xm.mean((1, 2, 3)), atol=1e-4)


# interruption

JOBS = dict(adamw=dict(mixup=.8, cutmix=1., augment="released", drop_path=.3), sgd=dict(optimizer="sgd", head_lr=5., curve="released", augment="deit"), head=dict(mode="head", augment="paper"),
            scaled=dict(precision="float16"))


@pytest.mark.parametrize("job", JOBS)
def test_interrupted_equals_uninterrupted_bit_for_bit(job, tmp_path):
    c, state = config(**JOBS[job]), tmp_path/"state.pt"
    whole = tune(c, name := "test_resnet")
    images = Squares(24)
    images.fail_at = 24 + 13                                     # in the middle of the second epoch
    with pytest.raises(KeyboardInterrupt): tune(c, name, images, state=state)
    torch.rand(7); np.random.rand(); random.random()
    again = tune(c, name, state=state)
    assert again.resumed == 1 and same(again.last, whole.last) and same(again.model.state_dict(), whole.model.state_dict())
    assert (again.epoch, again.val_top1, again.val_loss) == (whole.epoch, whole.val_top1, whole.val_loss)
    drop = lambda h: h[h.metric != "seconds"].reset_index(drop=True)
    assert drop(again.history).equals(drop(whole.history))
    done = tune(c, name, state=state)                            # a finished state: nothing is trained again
    assert done.resumed == 3 and same(done.model.state_dict(), whole.model.state_dict())


def test_an_interruption_while_writing_keeps_the_old_state(tmp_path, monkeypatch):
    c, state, real = config(), tmp_path/"state.pt", B._torch_save
    def half(obj, path):
        if obj["done"] == 2:
            Path(path).write_bytes(b"half")
            raise KeyboardInterrupt
        real(obj, path)
    monkeypatch.setattr(B, "_torch_save", half)
    with pytest.raises(KeyboardInterrupt): tune(c, state=state)
    monkeypatch.setattr(B, "_torch_save", real)
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    again = tune(c, state=state)
    assert again.resumed == 1 and same(again.last, tune(c).last)


def test_a_state_of_another_job_is_refused(tmp_path):
    c, state = config(epochs=1), tmp_path/"state.pt"
    tune(c, state=state)
    before = state.read_bytes()
    for other, kw, says in ((replace(c, lr=.02), {}, "lr is 0.02 and was 0.01"), (replace(c, epochs=9), {}, "epochs is 9 and was 1"), (c, dict(seed=41), "seed is 41 and was 40"),
                            (c, dict(train=Squares(30)), "train is"), (c, dict(val=Squares(3, split="val")), "val is"), (c, dict(resize="center"), "resize is 'center'")):
        with pytest.raises(ConfigError, match=f"another job: .*{says}.*Delete it"): tune(other, state=state, **kw)
    with pytest.raises(ConfigError, match="backbone is 'test_resnet' and was 'test_convnext'"): tune(c, "test_resnet", state=state)
    assert state.read_bytes() == before


def test_a_damaged_state_says_so(tmp_path):
    state = tmp_path/"state.pt"
    tune(c := config(epochs=1), state=state)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(DataError, match="cannot be read.*delete it"): tune(c, state=state)


# divergence and disks

def test_a_loss_that_is_no_number_names_epoch_and_step():
    class Late(nn.Module):
        def __init__(self, m): super().__init__(); self.m, self.calls = m, 0
        def forward(self, x):
            self.calls += self.training
            return self.m(x) * (float("nan") if self.calls > 2 * 3 + 2 * 1 else 1)    # two micro-batches a step, three steps an epoch
        def get_classifier(self): return self.m.get_classifier()
        @property
        def num_classes(self): return self.m.num_classes
    box = start(c := config())
    box.model = Late(box.model)
    with pytest.raises(ConfigError, match="the loss is nan in epoch 2, step 2 of 3: training has diverged.*smaller lr"): B.fine_tune(box, Squares(24), Squares(9, split="val"), c, **CPU)


def test_divergence_leaves_the_state_of_the_last_good_epoch(tmp_path):
    state = tmp_path/"state.pt"
    with pytest.raises(ConfigError, match="epoch 2, step"): tune(config(optimizer="sgd", lr=1e30, warmup=1, epochs=3), state=state)
    assert torch.load(state, weights_only=True)["done"] == 1


FULL = """
import json, resource, signal, sys, warnings
warnings.simplefilter("ignore")
import test_blackbox as t
from protoquant.core import StoreError
folder = sys.argv[1]
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
c, data, said = t.config(epochs=2), t.Data(), []
def limit(n): resource.setrlimit(resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
def attempt(f):
    try: f()
    except StoreError as e: said.append(str(e))
    limit(resource.RLIM_INFINITY)
attempt(lambda: t.tune(c, state=folder + "/state.pt", each_epoch=lambda row: limit(100_000)))
box = t.start(c)
tuned = t.B.fine_tune(box, data.train, data.test, c, **t.CPU)
limit(100_000)
attempt(lambda: t.B.save(folder + "/m.safetensors", box, tuned, data))
print(json.dumps(said))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on file sizes")
def test_a_full_disk_is_named_and_the_last_state_is_kept(tmp_path):
    said = python(FULL, str(tmp_path))
    assert len(said) == 2 and all("is full" in s and "run again" in s and str(tmp_path/n) in s for s, n in zip(said, ("state.pt", "m.safetensors")))
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]
    again = tune(c := config(epochs=2), state=tmp_path/"state.pt")
    assert again.resumed == 1 and same(again.last, tune(c).last)


def test_room_is_asked_for_before_training(tmp_path, monkeypatch):
    import collections
    monkeypatch.setattr(B.shutil, "disk_usage", lambda p: collections.namedtuple("U", "total used free")(1, 1, 2**20))
    seen = []
    with pytest.raises(StoreError, match="needs 0.0. GiB .* are free"): tune(config(), state=tmp_path/"s"/"state.pt", each_epoch=seen.append)
    assert not seen


# what is trained

def test_head_mode_changes_the_last_layer_only():
    for name in ("test_resnet", "test_convnext", "test_vit"):
        c = config(name, mode="head", epochs=1, drop_path=.5)
        box = start(c, name)
        before = copy.deepcopy(box.model.state_dict())
        B.fine_tune(box, Squares(12), Squares(3, split="val"), c, **CPU)
        changed = {k for k, v in box.model.state_dict().items() if not torch.equal(v, before[k])}
        assert changed == {n for n, p in box.model.named_parameters() if any(p is q for q in box.model.get_classifier().parameters())}


@pytest.mark.parametrize("how", ["batch", "fixed"])
def test_batch_statistics(how):
    c = config(epochs=1, batchnorm=how)
    box = start(c, "test_resnet")
    before = {k: v.clone() for k, v in box.model.state_dict().items() if "running" in k}
    B.fine_tune(box, Squares(24), Squares(3, split="val"), c, **CPU)
    moved = [k for k in before if not torch.equal(before[k], box.model.state_dict()[k])]
    assert len(moved) == (len(before) if how == "batch" else 0)


def test_the_checkpoint_with_the_best_validation_accuracy_is_kept():
    assert B._better(None, 0, 1) and B._better(dict(top1=50, loss=1), 50, .9) and not B._better(dict(top1=50, loss=1), 50, 1) and not B._better(dict(top1=50, loss=1), 49, 0)
    r = tune(config(epochs=5, lr=.02))
    v = r.history.query("metric == 'val_top1'").value.tolist()
    assert r.val_top1 == max(v) and v[r.epoch] == max(v)
    p = B.predict(r.model, val := Squares(9, split="val"), r.transform)
    assert 100 * float((p.argmax(1).numpy() == val.labels).mean()) == pytest.approx(r.val_top1)


def test_it_learns_colours():
    r = tune(config("test_resnet", epochs=8, lr=.02, batch_size=8), "test_resnet", Squares(48))
    assert r.val_top1 == 100


def test_without_validation_images_the_last_epoch_is_taken():
    r = tune(config(), val=Squares(9, split="val").subset([]))
    assert r.epoch == 2 and np.isnan(r.val_top1) and same(r.model.state_dict(), r.last) and "val_top1" not in set(r.history.metric)


def test_no_epochs():
    c = config(epochs=0)
    box = start(c)
    before = copy.deepcopy(box.model.state_dict())
    r = B.fine_tune(box, Squares(24), Squares(9, split="val"), c, **CPU)
    assert r.epoch is None and same(r.model.state_dict(), before) and not len(r.history) and 0 <= r.val_top1 <= 100
    box.new_head = True
    with pytest.raises(ConfigError, match="random head as it is"): B.fine_tune(box, Squares(24), Squares(9, split="val"), c, **CPU)


# starts and files

@pytest.fixture
def weights(tmp_path):
    def make(name, k=7, **kw):
        torch.manual_seed(3)
        torch.save(import_timm().create_model(name, num_classes=k, **kw).state_dict(), p := tmp_path/f"{name}.pt")
        return p
    return make


def test_a_source_with_the_same_classes_keeps_its_head(weights):
    sd = torch.load(p := weights("test_resnet", 7))
    kept, new, new2 = (B.start_from("test_resnet", p, k, config("test_resnet"), seed=s) for k, s in ((7, 40), (3, 40), (3, 41)))
    assert not kept.new_head and torch.equal(kept.model.fc.weight, sd["fc.weight"]) and new.new_head and new.model.fc.weight.shape[0] == 3 and torch.equal(new.model.conv1[0].weight, sd["conv1.0.weight"])
    assert kept.hash == new.hash and not torch.equal(new.model.fc.weight, new2.model.fc.weight) and repr(new).startswith("BlackBox(test_resnet from test_resnet.pt")


@pytest.mark.parametrize("name,weights_,kw,says", [("test_resnet", "source", {}, "no source weights are configured"), ("test_resnet", "torchvision", {}, "no torchvision weights are known"),
                                                   ("test_vit", "random", dict(img_size=64), "has positions for 160x160 pixels"), ("test_resnett", "random", {}, "Did you mean"), ("test_resnet", "nowhere.pt", {}, "no weights file")])
def test_starts_that_cannot_work(name, weights_, kw, says):
    with pytest.raises((ConfigError, WeightsError), match=says): B.start_from(name, weights_, 3, B.CONFIGS["default"], **kw)


@pytest.mark.parametrize("name,norm", [("test_resnet", "auto"), ("test_convnext", "auto"), ("test_vit", "auto"), ("test_vit", "features"), ("test_vit", "head"), ("test_efficientnet", "auto"), ("test_vit2", "auto")])
def test_the_file_loads_unchanged(name, norm, weights, tmp_path):
    c, data = config(name, epochs=1, norm=norm, drop_path=0. if "efficient" in name else .1), Data()
    box = B.start_from(name, weights(name), 3, c)
    r = B.fine_tune(box, data.train.subset(range(8)), data.test, c, **CPU)
    B.save(tmp_path/"m.safetensors", box, r, data, dict(top1=12.5, worst=np.float32(1)), seed=40)
    frozen = backbones.create(name, str(tmp_path/"m.safetensors"), norm=norm)
    x = torch.randn(3, 3, *box.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(): assert torch.allclose(frozen(x), r.model(x), atol=1e-5)
    assert (frozen.size, frozen.mean, frozen.std, frozen.num_classes) == (box.size, box.mean, box.std, 3)
    card = B.read_card(tmp_path/"m.safetensors")
    assert card["metrics"] == dict(top1=12.5, worst=1.) and card["class_names"] == data.class_names and card["train"] == data.train.fingerprint and card["recipe"]["norm"] == norm
    assert card["name"] == name and card["source"] == f"{name}.pt" and card["seed"] == 40 and card["epoch"] == 0


def test_files_without_a_card(tmp_path):
    from safetensors.torch import save_file
    save_file(dict(a=torch.zeros(1)), tmp_path/"a.safetensors")
    with pytest.raises(WeightsError, match="says nothing about them"): B.read_card(tmp_path/"a.safetensors")
    (tmp_path/"b.safetensors").write_bytes(b"no")
    with pytest.raises(WeightsError, match="cannot be read"): B.read_card(tmp_path/"b.safetensors")


# torchvision

def test_torchvision_resnet_has_timms_names():
    tv, t = import_torchvision().models.resnet50(weights=None).eval(), import_timm().create_model("resnet50").eval()
    t.load_state_dict(B.from_torchvision(tv.state_dict(), "resnet50"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad(): assert torch.allclose(tv(x), t(x), atol=1e-4)


def test_torchvision_file_is_made_once_and_loads(tmp_path, monkeypatch):
    models, asked = import_torchvision().models, []
    state = models.resnet50(weights=None).state_dict()
    def get(self, *a, **kw): asked.append(self.name); return state
    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", get)
    for _ in range(2): p = B.torchvision_file("resnet50", tmp_path)
    assert asked == ["IMAGENET1K_V2"] and p.name == "resnet50.torchvision_IMAGENET1K_V2.safetensors"
    assert torch.equal(backbones.create("resnet50", str(p)).model.fc.weight, state["fc.weight"])


def test_torchvision_without_a_network_and_with_other_weights(tmp_path, monkeypatch):
    models = import_torchvision().models
    def get(self, *a, **kw): raise OSError("no route to host")
    monkeypatch.setattr(models.ResNet50_Weights, "get_state_dict", get)
    with pytest.raises(WeightsError, match="could not be had .*no route to host.*local file"): B.torchvision_file("resnet50", tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(WeightsError, match="not torchvision's weights of resnet50"): B.from_torchvision(models.resnet18(weights=None).state_dict(), "resnet50")


# several processes

SHARDED = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import torch
import test_blackbox as t
r = t.shared(sys.argv[2] + "/state.pt")
if r.rank == 0: torch.save(dict(last=r.last, top1=r.val_top1, loss=r.val_loss), sys.argv[2] + "/out.pt")
torch.distributed.destroy_process_group()
"""


def shared(state=None):
    c = config("test_vit", epochs=2, batch_size=6, micro_batch=2, mixup=.8, cutmix=1., optimizer="sgd", lr=.05, drop_path=.2, warmup=0)
    return tune(c, "test_vit", Squares(12), Squares(3, split="val"), state=state)


def test_two_processes_do_the_steps_of_one(tmp_path):
    "Three micro-batches a step over two processes: what one process draws and adds up, two draw and add up."
    env = dict(os.environ, OMP_NUM_THREADS="1", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(20000 + os.getpid() % 20000))    # as torchrun sets them
    ps = [subprocess.Popen([sys.executable, "-c", SHARDED, str(Path(__file__).resolve().parent), str(tmp_path)], env=dict(env, RANK=str(i), LOCAL_RANK=str(i)), stderr=subprocess.PIPE, text=True)
          for i in range(2)]
    one = shared()
    for p in ps: assert p.wait(300) == 0, p.stderr.read()[-3000:]
    two = torch.load(tmp_path/"out.pt", weights_only=True)
    assert one.val_top1 == pytest.approx(two["top1"]) and one.val_loss == pytest.approx(two["loss"], abs=1e-5)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one.last.values(), two["last"].values()))
    assert torch.load(tmp_path/"state.pt", weights_only=True)["done"] == 2


# Table 6

def test_stage1_loss_is_that_of_the_training_room():
    z, y = torch.randn(4, 6, 3, 3), torch.tensor([0, 1, 2, 0])
    class Net:
        d = 6
        def head(self, f): return f.flatten(2).mean(2)[:, :3]
    s = B._Stage1(Net(), 5, config(), 0, "cpu")
    tokens = Tokens(z.flatten(2).transpose(1, 2), y, (3, 3))
    target = torch.eye(3)[y]
    assert s.loss(z, target).item() == pytest.approx(_stage1_loss(s.book, z.flatten(2).transpose(1, 2), target, tokens, Net().head, s.recipe).item(), rel=1e-5)


def test_epoch_times(tmp_path, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(B, "_clock", lambda f, e, d: (f(e), float(next(ticks)))[1])
    t = B.epoch_times("test_resnet", "random", Squares(24), 3, 5, config("test_resnet", mixup=.8), epochs=4, discard=2, img_size=32, cache=tmp_path, **CPU)
    assert t.groupby("kind", sort=False).seconds.apply(list).to_dict() == dict(full=[2, 3], frozen=[6, 7], store=[10, 11]) and set(t.steps) == {3} and set(t.images) == {24}
    a = t.attrs
    assert a["batch"] == 8 and a["images_store"] == 24 and a["seconds_store"] > 0 and a["codebook_size"] == 5
    table = B.timing_table(t)
    assert table.sd.tolist() == pytest.approx([.5**.5] * 3) and table.n.tolist() == [2, 2, 2] and table.saved.iloc[1] == pytest.approx(100 * (2.5 - 6.5) / 2.5) and np.isnan(table.saved.iloc[0])


def test_epoch_times_of_a_few_steps_and_mistakes(tmp_path):
    c = config("test_resnet")
    t = B.epoch_times("test_resnet", "random", Squares(24), 3, 5, c, epochs=1, discard=0, steps=1, img_size=32, cache=tmp_path, **CPU)
    assert set(t.steps) == {1} and set(t.images) == {8} and t.attrs["images_store"] == 8 and (t.seconds > 0).all()
    with pytest.raises(ConfigError, match="at least one epoch"): B.epoch_times("test_resnet", "random", Squares(24), 3, epochs=2, discard=2)
    with pytest.raises(ConfigError, match="there are full, frozen, store"): B.epoch_times("test_resnet", "random", Squares(24), 3, kinds=("ful",))


def test_a_frozen_epoch_changes_codes_and_nothing_else():
    c = config("test_resnet", batch_size=8)
    t = B.Trainer(start(c, "test_resnet"), Squares(24), c, **CPU)
    net = B._frozen(t.box, "cpu")
    s, before = B._Stage1(net, 5, c, 0, "cpu"), copy.deepcopy(net.state_dict())
    codes = s.book.codes.detach().clone()
    B._frozen_epoch(t, s, 0, 2)
    assert same(net.state_dict(), before) and not torch.equal(codes, s.book.codes)


# real photographs

@pytest.mark.skipif(not os.environ.get("PROTOQUANT_DATA"), reason="PROTOQUANT_DATA is not set")
def test_a_head_on_photographs(tmp_path):
    from protoquant import datasets
    data = datasets.load("cub", os.environ["PROTOQUANT_DATA"])
    few = np.concatenate([np.flatnonzero(data.train.labels == c)[:12] for c in range(3)])
    c = B.get_config("tf_efficientnet_lite0", mode="head", epochs=4, warmup=1, lr=.01, batch_size=12, steps=2, augment="none", mixup=0., cutmix=0.)
    box = B.start_from("tf_efficientnet_lite0", "packaged", data.n_classes, c)
    r = B.fine_tune(box, data.train.subset(few), data.train.subset(few[::3]), c, data.resize, **CPU)
    loss = r.history.query("metric == 'loss'").value.tolist()
    assert loss[-1] < loss[0] - .5 and r.val_top1 > 70
    B.save(tmp_path/"m.safetensors", box, r, data)
    assert backbones.create("tf_efficientnet_lite0", str(tmp_path/"m.safetensors")).num_classes == data.n_classes
