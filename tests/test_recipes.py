"""Guards of protoquant.recipes: every decision is checked, names with typing errors are helped."""
from dataclasses import fields

import pytest
from hypothesis import given, settings, strategies as st

from protoquant import recipes as R
from protoquant.core import ConfigError


def test_the_three_recipes_say_what_the_protocol_says():
    paper, released, grounded = (R.get_recipe(n) for n in ("paper", "released", "grounded"))
    for r in (paper, released):
        assert (r.lr, r.weight_decays, r.epochs_stage1, r.epochs_stage2, r.warmup, r.temperatures, r.label_smoothing) == (.05, (5e-4,), 30, 30, 5, (.1,), .1)
    assert (paper.task_weight, released.task_weight) == (0, 1) and (paper.loss_mean, released.loss_mean) == ("tokens", "elements")
    assert released.train_codebook and released.mixup and not paper.train_codebook and not paper.project and grounded.project
    assert len({R.recipe_hash(r) for r in (paper, released, grounded)}) == 3


@pytest.mark.parametrize("name, near", [("grunded", "grounded"), ("realeased", "released"), ("papers", "paper")])
def test_a_recipe_name_with_a_typing_error(name, near):
    with pytest.raises(ConfigError, match=f"no recipe '{name}'. Did you mean.*{near}"): R.get_recipe(name)


def test_a_field_with_a_typing_error():
    with pytest.raises(ConfigError, match="no field 'temperture'. Did you mean.*temperatures"): R.get_recipe("paper", temperture=.1)


@pytest.mark.parametrize("change, words", [
    (dict(spaces=("plane",)), "unknown space"), (dict(codes="kmean"), "codes='kmean'"), (dict(curve="x"), "curve="), (dict(loss_mean="x"), "loss_mean="),
    (dict(temperatures=(.1, 0.)), "temperature"), (dict(epochs_stage1=0), "at least one epoch"), (dict(epochs_stage2=-1), "at least one epoch"),
    (dict(codes="kmeans", task_weight=1.), "k-means knows no task loss"),
])
def test_values_that_cannot_work(change, words):
    with pytest.raises(ConfigError, match=words): R.get_recipe("paper", **change)


def test_none_keeps_a_value_and_recipes_cannot_be_changed_in_place():
    assert R.get_recipe("paper", epochs_stage1=None) == R.RECIPES["paper"]
    assert R.get_recipe("paper", epochs_stage1=3).epochs_stage1 == 3 and R.RECIPES["paper"].epochs_stage1 == 30
    with pytest.raises(AttributeError): R.RECIPES["paper"].lr = 1


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 10_000), size=st.integers(1, 2048), steps=st.integers(1, 20))
def test_batches(n, size, steps):
    b = R.batch_of(R.Recipe("x", batch_size=size, steps=steps), n)
    assert 1 <= b <= size and (n // b >= steps or b == 1)


def test_differences_hold_all_that_differs_and_nothing_else():
    d = R.differences()
    rs = [R.RECIPES[c] for c in d.columns]
    for f in fields(R.Recipe):
        if f.name not in ("name", "about"): assert (f.name in d.index) == (len({getattr(r, f.name) for r in rs}) > 1), f.name
