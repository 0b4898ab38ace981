"""What the benchmarks ask of a model, and what happens where a model does not give it."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

from protoquant import adapters
from protoquant.adapters import Activations, AttributionModel, ProtoQuantModel, PrototypeModel, as_model, batches, check_activations, class_prototypes
from protoquant.codebook import Codebook, Space
from protoquant.core import ConfigError
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant


class Plain:
    size, grid, mean, std = (8, 8), (2, 2), (0., 0., 0.), (1., 1., 1.)
    def __init__(self, weights): self.class_weights = torch.as_tensor(weights, dtype=torch.float)
    def activations(self, x):
        maps = torch.nn.functional.adaptive_avg_pool2d(x.mean(1, keepdim=True), 2).repeat(1, self.class_weights.shape[1], 1, 1)
        return Activations(maps, maps.amax((2, 3)), maps.amax((2, 3)) @ self.class_weights.T)


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def pq(request):
    import warnings
    from protoquant import backbones
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = backbones.create(request.param, "random", num_classes=3)
    g = torch.Generator().manual_seed(1)
    space = Space(net.d, torch.randn(net.d, generator=g) * .1)
    book = Codebook(torch.randn(9, net.d, generator=g), space, torch.randn(2, net.d, generator=g))      # two silent codes
    return ProtoQuant(net, book, NonNegLinear.of(torch.rand(3, 9, generator=g)), .1)


def test_the_logits_are_the_models_own_in_both_readings(pq):
    x = torch.randn(2, 3, *pq.backbone.size, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for reading in adapters.READINGS:
            m = as_model(pq, reading)
            assert isinstance(m, PrototypeModel)
            act = check_activations(m, m.activations(x), 2)
            assert torch.allclose(act.logits, pq(x), atol=1e-4) and torch.allclose(act.presence, act.maps.amax((2, 3)))
        soft = as_model(pq).activations(x)
        assert torch.allclose(soft.presence, pq.presence(pq.tokens(x)), atol=1e-5) and torch.allclose(soft.maps, pq.maps(pq.tokens(x)), atol=1e-6)


def test_cosine_maps_against_a_loop(pq):
    x = torch.randn(1, 3, *pq.backbone.size, generator=torch.Generator().manual_seed(3))
    m = as_model(pq, "cosine")
    with torch.no_grad():
        z, maps, c = pq.backbone.features(x)[0].double(), m.activations(x).maps[0], pq.book.space.center.double()
        for i, j, k in [(0, 0, 0), (m.grid[0] - 1, 0, 4), (0, m.grid[1] - 1, 8)]:
            a, b = z[:, i, j] - c, pq.book.codes[k].double() - c
            assert float(maps[k, i, j]) == pytest.approx(float(a @ b / a.norm() / b.norm()), abs=1e-4)


def test_tokens_that_do_not_fill_the_grid(pq):
    with pytest.raises(ConfigError, match="do not fill the grid"): as_model(pq).activations_of(torch.randn(1, 5, pq.backbone.d))


@pytest.mark.parametrize("name,wrong", [("maps", torch.zeros(2, 3, 2, 3)), ("presence", torch.zeros(2, 4)), ("logits", torch.zeros(2, 3))])
def test_a_wrong_shape_is_named_with_both_shapes(name, wrong):
    good = dict(maps=torch.zeros(2, 3, 2, 2), presence=torch.zeros(2, 3), logits=torch.zeros(2, 2))
    m = Plain(torch.ones(2, 3))
    check_activations(m, Activations(**good), 2)
    with pytest.raises(ConfigError) as e: check_activations(m, Activations(**{**good, name: wrong}), 2)
    assert name in str(e.value) and str(tuple(wrong.shape)) in str(e.value) and str(tuple(good[name].shape)) in str(e.value)


def test_what_is_no_model_is_refused():
    with pytest.raises(ConfigError, match="activations"): as_model(object())
    m = Plain(torch.ones(2, 3)); m.grid = 7, 7, 7
    with pytest.raises(ConfigError, match="pairs"): as_model(m)
    m.grid, m.class_weights = (2, 2), [[1.]]
    with pytest.raises(ConfigError, match="list"): as_model(m)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 12), st.integers(0, 99))
def test_class_prototypes(k, m, n, seed):
    w = torch.randn(k, m, generator=torch.Generator().manual_seed(seed))
    if not (w > 0).any(): return
    own = class_prototypes(Plain(w), n)
    for c in range(k):
        want = sorted((float(v) for v in w[c] if v > 0), reverse=True)[:n]
        assert sorted((float(v) for v in w[c][own[c]]), reverse=True) == want


def test_an_attribution_map_is_one_prototype_a_class():
    m = AttributionModel(lambda x: x.mean((1, 2, 3))[:, None].repeat(1, 3), lambda x, t: x.mean(1)[:, ::4, ::4] * (1 + t)[:, None, None], 3, (8, 8), (2, 2))
    act = check_activations(as_model(m), m.activations(torch.ones(2, 3, 8, 8)), 2)
    assert act.presence.tolist() == [[1., 2., 3.]] * 2 and torch.equal(m.class_weights, torch.eye(3))


def test_batches_hold_the_images_asked_for_in_their_order():
    from protoquant import datasets
    images = datasets.load("toybirds", n_train_per_class=1, n_test_per_class=2, classes=3).test
    m = Plain(torch.ones(2, 3))
    t = adapters.input_transform(m)
    got = [(list(r), x) for r, x in batches(m, images, rows=[4, 0, 3], batch=2)]
    assert [r for r, _ in got] == [[4, 0], [3]]
    assert torch.equal(got[0][1][1], t(images.image(0))) and torch.equal(got[1][1][0], t(images.image(3)))
