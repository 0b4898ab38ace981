"""Guards of protoquant.model: one file holds it all, is whole or not there, and belongs to one backbone."""
import json
import warnings

import pytest
import torch

from protoquant import backbones, codebook as C, model as M
from protoquant.core import ConfigError, WeightsError
from protoquant.features import Tokens
from protoquant.head import NonNegLinear, match
from protoquant.recipes import get_recipe
from pieces import gen, randn


def tiny(name="test_resnet", seed=0, classes=3):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        return backbones.create(name, "random", num_classes=classes, img_size=None if "vit" in name else 64)


@pytest.fixture(scope="module")
def resnet(): return tiny()


def make(b, m=8, classes=3, silent=0, full=True):
    n = 6
    t = Tokens(randn(n, b.grid[0] * b.grid[1], b.d, seed=3), torch.arange(n) % classes, b.grid, [f"bird {i}" for i in range(n)])
    space = C.principal_space(t, 4)
    space = C.Space(b.d, space.center, space.basis, .5)
    pr = C.project(C.Codebook(randn(m, b.d, seed=4), space), t)
    book = C.Codebook(pr.codes, space, randn(silent, b.d, seed=5) if silent else None)
    extra = dict(index=C.nearest_patches(book, t, 3), projection=pr, recipe=get_recipe("grounded"), metrics=dict(top1=71.25)) if full else {}
    return M.ProtoQuant(b, book, NonNegLinear(classes, m, gen(6), .2, 1.), .2, [f"class é {i}" for i in range(classes)], **extra)


@pytest.mark.parametrize("name", ("test_resnet", "test_convnext", "test_vit"))
def test_forward_is_the_chain_of_equations(name):
    b = tiny(name)
    m = make(b)
    x = randn(2, 3, *b.size)
    z = b.features(x)
    s = match(z.flatten(2).transpose(1, 2), m.book, .2).amax(1)
    assert float(m.book.space.damping) == .5
    torch.testing.assert_close(m(x), s @ m.weight.T, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(m.from_features(z), m(x)); torch.testing.assert_close(m.from_features(m.tokens(x)), m(x))
    maps = m.maps(z)
    assert maps.shape == (2, 8, *b.grid)
    torch.testing.assert_close(maps.amax((2, 3)), s, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(m.maps(z, [3, 1]), maps[:, [3, 1]])
    m.train()
    assert not b.training and m.classifier.training


@pytest.mark.parametrize("silent, full", [(0, True), (3, True), (0, False)])
def test_saved_and_loaded_is_the_same(tmp_path, resnet, silent, full):
    m, f = make(resnet, silent=silent, full=full), tmp_path/"deep"/"model.safetensors"
    m.save(f)
    l = M.ProtoQuant.load(f, resnet)
    x = randn(2, 3, 64, 64)
    torch.testing.assert_close(l(x), m(x), atol=1e-6, rtol=1e-5)
    assert torch.equal(m.weight, l.weight) and torch.equal(m.book.codes, l.book.codes) and torch.equal(m.book.silent, l.book.silent)
    assert float(l.book.space.damping) == .5 and (l.class_names, l.temperature, l.metrics, l.transform.key) == (m.class_names, m.temperature, m.metrics, m.transform.key)
    assert l.recipe == json.loads(json.dumps(m.recipe))
    if full:
        for part, fields in (("index", ("image", "position", "similarity")), ("projection", ("codes", "image", "position", "cosine"))):
            for k in fields: assert torch.equal(getattr(getattr(m, part), k), getattr(getattr(l, part), k))
        assert l.index.ids == m.index.ids and l.index.grid == m.index.grid
    else: assert l.index is None and l.projection is None
    l.save(tmp_path/"again.safetensors")
    assert (tmp_path/"again.safetensors").read_bytes() == f.read_bytes()


def test_loaded_logits_are_the_same_bit_for_bit(tmp_path, resnet):
    m, x = make(resnet), randn(2, 3, 64, 64)
    m.save(tmp_path/"m.safetensors")
    assert torch.equal(M.ProtoQuant.load(tmp_path/"m.safetensors", resnet)(x), m(x))


def test_pruned_models_survive_too(tmp_path, resnet):
    m, x = make(resnet), randn(2, 3, 64, 64)
    exact, paper, logical = m.limit(2), m.limit(2, exact=False), m.limit(2, physical=False)
    torch.testing.assert_close(exact(x), logical(x), atol=1e-5, rtol=1e-4)
    assert (paper(x) - logical(x)).abs().max() > 1e-4 and len(exact.index) == len(exact.book) == len(exact.projection.codes) and exact.metrics == {}
    exact.save(tmp_path/"m.safetensors")
    l = M.ProtoQuant.load(tmp_path/"m.safetensors", resnet)
    torch.testing.assert_close(l(x), exact(x), atol=1e-6, rtol=1e-5)
    assert len(l.book.silent) == len(exact.book.silent)
    with pytest.raises(ConfigError, match="topk=9"): m.limit(9)


def test_another_backbone_is_refused_with_both_hashes(tmp_path, resnet):
    make(resnet).save(tmp_path/"m.safetensors")
    other = tiny(seed=1)
    with pytest.raises(WeightsError, match=f"{resnet.hash}.*{other.hash}"): M.ProtoQuant.load(tmp_path/"m.safetensors", other)
    with pytest.raises(WeightsError, match=f"needs test_resnet.*'random'.*{resnet.hash}"): M.ProtoQuant.load(tmp_path/"m.safetensors")


def harm(f, how):
    raw = bytearray(f.read_bytes())
    head = 8 + int.from_bytes(raw[:8], "little")
    if how == "tensor": raw[-5] ^= 0xFF
    if how == "first tensor byte": raw[head] ^= 0xFF
    if how == "cut": raw = raw[:-7]
    if how == "header": raw[12] ^= 0xFF
    if how == "empty": raw = raw[:0]
    if how == "temperature":
        at = raw.find(b'temperature\\": 0.2')
        assert at > 0; raw[at + len(b'temperature\\": 0.')] = ord("3")
    f.write_bytes(bytes(raw))


@pytest.mark.parametrize("how", ("tensor", "first tensor byte", "cut", "header", "empty", "temperature"))
def test_a_damaged_file_is_noticed(tmp_path, resnet, how):
    f = tmp_path/"m.safetensors"
    make(resnet).save(f); harm(f, how)
    with pytest.raises(WeightsError, match="m.safetensors .*damaged"): M.ProtoQuant.load(f, resnet)


def test_files_that_are_no_models(tmp_path, resnet):
    from safetensors.torch import save_file
    with pytest.raises(WeightsError, match="no model file"): M.ProtoQuant.load(tmp_path/"none", resnet)
    save_file({"a": torch.zeros(2)}, tmp_path/"a.safetensors")
    with pytest.raises(WeightsError, match="not a model of protoquant"): M.ProtoQuant.load(tmp_path/"a.safetensors", resnet)


@pytest.mark.parametrize("when", ("before", "half way"))
def test_an_interrupted_save_leaves_the_old_file(tmp_path, resnet, monkeypatch, when):
    import safetensors.torch
    f, x = tmp_path/"m.safetensors", randn(1, 3, 64, 64)
    old = make(resnet); old.save(f)
    def dies(t, p, about):
        if when == "half way": open(p, "wb").write(b"half")
        raise KeyboardInterrupt
    with monkeypatch.context() as mp:
        mp.setattr(safetensors.torch, "save_file", dies)
        with pytest.raises(KeyboardInterrupt): make(resnet, m=5).save(f)
    torch.testing.assert_close(M.ProtoQuant.load(f, resnet)(x), old(x), atol=1e-6, rtol=1e-5)
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("change, words", [
    (dict(book=C.Codebook(torch.ones(5, 8))), "5 codes, the head weights 8"), (dict(book=C.Codebook(torch.ones(8, 3))), "3 channels"),
    (dict(class_names=["a"]), "1 class names for 3"), (dict(temperature=0.), "temperature=0"),
    (dict(index=C.PatchIndex(torch.zeros(2, 1), torch.zeros(2, 1), torch.zeros(2, 1), (2, 2), [])), "index describes 2 codes")])
def test_parts_that_do_not_belong_together(resnet, change, words):
    kw = dict(book=C.Codebook(torch.ones(8, resnet.d)), head=NonNegLinear(3, 8))
    with pytest.raises(ConfigError, match=words): M.ProtoQuant(resnet, **{**kw, **change})


def test_maps_need_their_grid(resnet):
    with pytest.raises(ConfigError, match="3 tokens do not fill"): make(resnet).maps(randn(1, 3, resnet.d))


def test_one_image_as_in_a_batch(resnet):
    from pieces import Images
    m, im = make(resnet), Images(size=80).image(1)
    logits, s = m.predict(im)
    torch.testing.assert_close(logits, m(m.transform(im)[None])[0], atol=1e-5, rtol=1e-4)
    assert s.shape == (8,) and (0 <= s).all() and (s <= 1).all()
