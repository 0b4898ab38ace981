"""tools/pictures.py without a browser: which images are explained, files that are small enough, a clear end where no browser can be had."""
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent/"tools"))
import browser as B
import pictures as P
from protoquant import backbones, datasets, features
from protoquant.codebook import Codebook, nearest_patches
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from pieces import gen


def test_images_of_first_middle_and_last_class_with_the_median_confidence():
    labels = torch.arange(5).repeat_interleave(5)
    logits = torch.zeros(25, 5)
    logits[torch.arange(25), labels] = torch.tensor([1., 5., 3., 2., 4.]).repeat(5)
    assert P.chosen(logits, labels) == [2, 12, 22]
    logits[20:] = 0; logits[20:, 1] = 9          # the last class is never named
    logits[2] = 0; logits[2, 1] = 9              # of the four that are left in the first, the lower median
    assert P.chosen(logits, labels) == [3, 12, 17]
    assert P.chosen(logits[:5], labels[:5]) == [3] and P.chosen(logits[20:], labels[20:]) == []


def test_pictures_are_saved_within_a_limit(tmp_path):
    rng = np.random.default_rng(0)
    flat = Image.new("RGB", (300, 200), "white")
    n = P.save_png(flat, tmp_path/"flat.png")
    assert n == (tmp_path/"flat.png").stat().st_size < 2000 and Image.open(tmp_path/"flat.png").mode == "RGB"
    noise = Image.fromarray(rng.integers(0, 256, (400, 500, 3), np.uint8))
    assert P.save_png(noise, tmp_path/"noise.png", 150_000) <= 150_000
    got = Image.open(tmp_path/"noise.png")
    assert got.mode == "P" and 200 <= got.width < 500


def test_white_at_the_right_and_below_is_cut_off():
    im = Image.new("RGB", (300, 200), "white")
    im.paste("red", (20, 10, 120, 60))
    assert P.trimmed(im).size == (128, 68) and P.trimmed(Image.new("RGB", (9, 9), "white")).size == (9, 9)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "A small model with what `report.open_run` gives."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        net = backbones.create("test_resnet", "random", img_size=64)
    data = datasets.load("toybirds", n_train_per_class=3, n_test_per_class=3, classes=4)
    t = datasets.eval_transform(net.size, net.mean, net.std, "squash")
    train = features.extract(net, data.train, t, cache=tmp_path_factory.mktemp("stores"), quiet=True)
    book = Codebook(train.read(slice(None)).flatten(0, 1)[::4][:10].clone())
    model = ProtoQuant(net, book, NonNegLinear(4, 10, gen(3), .2, 1.), .1, data.class_names, t, index=nearest_patches(book, train, 5))
    return SimpleNamespace(folder=tmp_path_factory.mktemp("run"), model=model, data=data, train=data.train, view="full")


def test_without_a_browser_the_rest_is_made_and_it_is_said(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("protoquant.report.open_run", lambda folder: run)
    monkeypatch.setenv("PROTOQUANT_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(B, "find_browser", lambda: None)
    monkeypatch.setattr(B, "install_browser", lambda: "there is no apt-get to install it with")
    monkeypatch.setattr(P, "widget", lambda *a: pytest.fail("a browser was started"))
    assert P.main([str(run.folder), "--out", str(tmp_path/"out")]) == B.MISSING == 3
    said = capsys.readouterr()
    assert "there is no apt-get" in said.err.splitlines()[-1] and "toybirds_explained_1.png" in said.out
    made = sorted(p.name for p in (tmp_path/"out").iterdir())
    assert made == [P.EXPLAINED.format(i) for i in range(1, len(made) + 1)] and made
    assert all((tmp_path/"out"/n).stat().st_size <= P.LIMIT and min(Image.open(tmp_path/"out"/n).size) > 400 for n in made)


def test_only_drawn_birds_stand_in_the_readme(run, tmp_path, monkeypatch):
    other = SimpleNamespace(**{**vars(run), "data": SimpleNamespace(name="cub")})
    monkeypatch.setattr("protoquant.report.open_run", lambda folder: other)
    with pytest.raises(SystemExit, match="ToyBirds is needed"): P.main([str(run.folder), "--out", str(tmp_path)])


def test_a_run_that_is_not_there_is_one_line(tmp_path, capsys):
    assert P.main([str(tmp_path/"none"), "--out", str(tmp_path)]) == 1
    assert "there is no run folder" in capsys.readouterr().err
