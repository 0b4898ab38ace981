"""nbs/run_seeds.ipynb through the command line, on a tiny ToyBirds; the statistics behind it against slow loops."""
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings, strategies as st

from pieces import records, run_experiment
from protoquant.core import ConfigError
from protoquant.metrics import SeedDifference, paired_bootstrap, paired_bootstrap_seeds


def table(s, n, seed):
    g = np.random.default_rng(seed)
    p = g.random(n)
    return (g.random((s, n)) < p).astype(int), (g.random((s, n)) < p * .8).astype(int)


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 4), st.integers(2, 30), st.integers(0, 99))
def test_bootstrap_over_seeds_against_a_loop(s, n, seed):
    a, b = table(s, n, seed)
    g, means = np.random.default_rng(seed + 1), []
    for _ in range(3000):
        rows, cols = g.integers(s, size=s), g.integers(n, size=n)
        means.append(100 * np.mean([[a[r, c] - b[r, c] for c in cols] for r in rows[:1]]) if s == 1 else 100 * (a - b)[np.ix_(rows, cols)].mean())
    d, low, high = paired_bootstrap_seeds(a, b, 20_000)
    assert d == pytest.approx(100 * (a.mean() - b.mean())) and low <= d + 1e-9 and d <= high + 1e-9
    assert np.allclose([low, high], np.quantile(means, [.025, .975]), atol=max(2.5, .2 * np.std(means)) + 100 / n)      # quantiles of a lattice may differ by a step


def test_one_seed_is_the_bootstrap_over_images():
    a, b = table(1, 400, 3)
    assert np.allclose(paired_bootstrap_seeds(a, b, 40_000), paired_bootstrap(a[0], b[0], 40_000), atol=.4)


@settings(deadline=None, max_examples=25)
@given(st.integers(2, 5), st.integers(2, 12), st.integers(0, 99))
def test_variances_against_a_loop(s, n, seed):
    a, b = table(s, n, seed)
    d = [[100. * (a[i, j] - b[i, j]) for j in range(n)] for i in range(s)]
    grand = sum(map(sum, d)) / (s * n)
    rows, cols = [sum(r) / n for r in d], [sum(d[i][j] for i in range(s)) / s for j in range(n)]
    rest = sum((d[i][j] - rows[i] - cols[j] + grand)**2 for i in range(s) for j in range(n)) / ((s - 1) * (n - 1))
    images = s * sum((c - grand)**2 for c in cols) / (n - 1)
    r = SeedDifference.of(a, b)
    assert r.value == pytest.approx(grand) and r.v_seed == pytest.approx(sum((x - grand)**2 for x in rows) / (s - 1)) and r.v_image == pytest.approx(max(0, (images - rest) / s) / n)


@settings(deadline=None, max_examples=25)
@given(st.floats(.01, 9), st.floats(0, 2), st.floats(.3, 8))
def test_seeds_needed_is_the_first_that_has_the_power(v_seed, v_image, d):
    r = SeedDifference(1., v_seed, v_image, 3, 500)
    s = r.seeds_needed(d, most=400)
    every = [r.power(d, seeds=k) for k in range(2, 401)]
    first = next((k for k, p in zip(range(2, 401), every) if p >= .8), None)
    assert s == first and r.seeds_needed(-d, most=400) == s
    if s and s > 40: assert s == pytest.approx(2.8016**2 * v_seed / (d**2 - 2.8016**2 * v_image), rel=.1, abs=3)     # the formula for many seeds


def test_power_has_its_limits():
    r = SeedDifference(1., .1, .5, 3, 300)
    assert r.seeds_needed(1.) is None and r.seeds_needed(0.) is None and r.images_needed(3.) < r.images_needed(2.)
    assert .8 <= r.power(3., images=r.images_needed(3.)) and r.power(0., seeds=20) == pytest.approx(.05, abs=1e-3)
    assert SeedDifference(0., 0., 0., 3, 10).power(1.) == 1
    one = SeedDifference.of([[1, 0, 1]], [[1, 1, 1]])
    assert np.isnan(one.v_seed) and one.seeds_needed(1.) is None


@pytest.mark.parametrize("a,b", [(np.ones((2, 3)), np.ones((2, 4))), (np.ones(3), np.ones(3)), (np.ones((0, 3)), np.ones((0, 3)))])
def test_tables_that_do_not_fit_are_refused(a, b):
    for f in (paired_bootstrap_seeds, SeedDifference.of):
        with pytest.raises(ConfigError, match="same images and seeds"): f(a, b)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    pytest.importorskip("papermill")
    return tmp_path_factory.mktemp("runs")


FEW = dict(recipes="grounded,paper", seeds="1,2", topk=3)


def test_a_run_trains_what_is_missing_and_compares_it(tmp):
    r = run_experiment("seeds", tmp, **FEW)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp, "seeds").items()
    m, models = rec["metrics"], records(tmp, "cub")
    assert len(models) == 4 and m["n_seeds"] == 2 and rec["scale"] == "smoke" and rec["n_images"] == {"test": 12}
    right = pd.read_csv(folder/"right.csv")
    for f, c in models.items():
        p = c["parameters"]
        assert rec["data"][f"{p['recipe']}_{p['seed']}"] == f.name and right[f"{p['recipe']}_{p['seed']}"].mean() * 100 == pytest.approx(c["metrics"]["top1"])
    a, b = (np.stack([right[f"{n}_{s}"] for s in (1, 2)]) for n in ("grounded", "paper"))
    got = [m[f"difference_grounded_paper{e}"] for e in ("", "_low", "_high")]
    assert np.allclose(got, paired_bootstrap_seeds(a, b)) and np.allclose([m[f"difference_grounded_paper_s2{e}"] for e in ("", "_low", "_high")], paired_bootstrap(a[1], b[1]))
    assert m["sd_seeds_paper"] == pytest.approx((100 * b.mean(1)).std(ddof=1)) and m["top1_grounded"] == pytest.approx(100 * a.mean())
    s = SeedDifference.of(a, b)
    for end, d in (("", s.value), ("_0.5", .5), ("_1", 1.), ("_2", 2.)): assert m[f"seeds_needed_grounded_paper{end}"] == s.seeds_needed(d)
    assert (folder/"executed.ipynb").exists() and (folder/"figures/seeds.png").exists() and str(tmp) not in (folder/"run.json").read_text()


def test_one_recipe_or_a_wrong_list_stops_before_anything_is_trained(tmp):
    before = records(tmp, "cub")
    for bad, says in ((dict(recipes="paper"), "two different recipes"), (dict(recipes="paper,groundet"), "Did you mean grounded"), (dict(seeds="1,x"), "whole numbers")):
        r = run_experiment("seeds", tmp, **{**FEW, **bad})
        assert r.returncode and says in r.stderr
    assert records(tmp, "cub") == before and len(records(tmp, "seeds")) == 1
