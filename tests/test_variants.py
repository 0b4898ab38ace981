"""One decision at a time: recipes, tokens in train mode, class tokens, shared codes."""
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from pieces import Images, labelled, randn, transform
from protoquant import backbones
from protoquant.features import Tokens
from protoquant.recipes import RECIPES, get_recipe
from protoquant.training import codes_by_gradient, train
from protoquant.variants import VARIANTS, SequenceTokens, Stage1, changed, not_applicable, plain_tokens, side, train_mode_parts, train_mode_tokens


def net(name="test_resnet", size=32):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return backbones.create(name, "random", num_classes=3, img_size=size)


@pytest.mark.parametrize("base", RECIPES)
def test_a_variant_changes_one_decision(base):
    from protoquant.recipes import differences
    for n, v in VARIANTS.items():
        if not_applicable(RECIPES[base], n, net()): continue
        new = changed(RECIPES[base], n)
        d = differences([RECIPES[base], new])
        assert list(d.index) == ([v.field] if v.field else []) and side(RECIPES[base], n)
        if v.field and base != "grounded": assert changed(new, n) == RECIPES[base]


def test_train_mode_against_a_loop():
    b, images, t = net(), Images(9, 32), transform()
    got, drifted = train_mode_tokens(b, images, t, 4, seed=5)
    from protoquant.variants import _batches
    from protoquant.core import generator
    slow = copy.deepcopy(b.model).train()
    norms = [m for m in slow.modules() if isinstance(m, nn.BatchNorm2d)]
    sums, count = [torch.zeros(2, m.num_features) for m in norms], 0
    batches = _batches(9, 4, generator(5, "train mode"))
    assert sorted(map(len, batches)) == [4, 5] and sorted(int(i) for r in batches for i in r) == list(range(9))
    for rows in batches:
        for m in norms: m.momentum = 1.                                    # running statistics = those of this batch
        with torch.no_grad(): z = slow.forward_features(torch.stack([t(images.image(int(i))) for i in rows]))
        assert np.allclose(got.read(rows), z.flatten(2).transpose(1, 2), atol=2e-2, rtol=2e-2)
        for s, m in zip(sums, norms): s += torch.stack([m.running_mean, m.running_var])
        count += 1
    for s, m in zip(sums, [m for m in drifted.model.modules() if isinstance(m, nn.BatchNorm2d)]):
        assert torch.allclose(torch.stack([m.running_mean, m.running_var]), s / count, atol=1e-4, rtol=1e-3)
    assert b.hash == b.hash_now() != drifted.hash and not any(m.training for m in b.modules()) and not any(m.training for m in drifted.modules())


def test_train_mode_does_not_touch_the_global_generator():
    b = net()
    torch.manual_seed(7); want = torch.rand(3)
    torch.manual_seed(7); train_mode_tokens(b, Images(4, 32), transform(), 2)
    assert torch.equal(torch.rand(3), want)


def test_stochastic_depth_is_put_back_where_the_released_models_have_it():
    b = net("test_convnext")
    assert not train_mode_parts(b)
    b.name = "convnext_tiny"                                               # the released ConvNeXts have it, timm's not
    assert train_mode_parts(b)["stochastic depth"] > 1
    images = Images(6, 32)
    (one, drifted), plain = train_mode_tokens(b, images, transform(), 3), plain_tokens(b, images, transform())
    assert drifted.hash == b.hash and np.allclose(plain_tokens(drifted, images, transform()).array, plain.array)     # no running statistics: evaluation is what it was
    rates = [getattr(m.drop_path, "drop_prob", 0.) for m in drifted.model.modules() if type(m).__name__ == "ConvNeXtBlock"]
    assert rates == sorted(rates) and rates[0] == 0 and rates[-1] == pytest.approx(.1) and one.array.shape == plain.array.shape


def test_a_sequence_keeps_its_front_out_of_maps():
    z = randn(5, 10, 4)
    t = SequenceTokens(z, [0, 1, 0, 1, 2], (3, 3), rows=None)
    assert t.grid == (3, 3) and t.positions == 10 and t.n_tokens == 50
    few = t.subset([4, 1]).subset([1])
    assert torch.equal(few.as_map(few.read([0]))[0], z[1, 1:].T.unflatten(1, (3, 3))) and few.labels.tolist() == [1] and few.grid == (3, 3) and few.ids == ["1"]


def test_mixed_sequences_train():
    g = labelled(4, 6, 3, 12)
    z = torch.from_numpy(np.concatenate([g.array.mean(1, keepdims=True), g.array], 1))
    seq = SequenceTokens(z, g.labels, g.grid)
    head = lambda m: m.flatten(2).mean(2)[:, :4] if m.shape[-2:] == (3, 3) else pytest.fail("the head saw the class token")
    codes = codes_by_gradient(seq, seq, 6, get_recipe("released", epochs_stage1=3, mixup=True), head)
    assert codes.book.codes.shape == (6, 12) and torch.isfinite(codes.book.codes).all()


@pytest.mark.parametrize("base", ["paper", "grounded"])
def test_shared_codes_are_the_codes(base):
    t, v = labelled(4, 12), labelled(4, 6, seed=1)
    how = get_recipe(base, epochs_stage1=3, epochs_stage2=2)
    head = lambda m: m.flatten(2).mean(2)[:, :4]
    stage1 = Stage1(8, head)
    for n in ("projection", "trainable_codes", "lr_curve"):
        r = changed(how, n)
        a, b = train(t, v, 8, r, head), train(t, v, 8, r, head, codes=stage1.codes(r, (t, v)))
        assert torch.equal(a.book.codes, b.book.codes) and torch.equal(a.head.weight, b.head.weight)
    assert stage1.learned == (2 if base == "paper" else 1)                 # k-means has no learning rate
    stage1.codes(how, (t, v), "other tokens")
    assert stage1.learned == (3 if base == "paper" else 2)


def test_mixup_alone_leaves_codes_frozen():
    t, v = labelled(4, 12), labelled(4, 6, seed=1)
    how = get_recipe("paper", epochs_stage1=2, epochs_stage2=2, mixup=True)
    r = train(t, v, 8, how, lambda m: m.flatten(2).mean(2)[:, :4])
    assert how.tune_codebook and torch.equal(r.book.codes, r.codes.book.codes) and torch.equal(r.last_book.codes, r.codes.book.codes)
