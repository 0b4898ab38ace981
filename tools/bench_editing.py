"""Speed of editing and of opening the browser at CUB-200's size (200 classes, 2,000 codes, 5,794 images, 7x7 tokens; synthetic weights): lines for tools/bench.py."""
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from protoquant.codebook import Codebook, PatchIndex, Space
from protoquant.core import generator
from protoquant.datasets import DataSet, ImageSet, Sample, eval_transform
from protoquant.editing import Editor
from protoquant.features import Tokens
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from protoquant.widgets import inspect

SIZE = dict(classes=200, codes=2000, images=5794, side=7, channels=768, rank=199)   # rank: Fisher directions of 200 classes
TARGETS = dict(weight=.05, softmax=.5, browser=2., memory=500 * 2**20)              # seconds, seconds, seconds, bytes


class Net(torch.nn.Module):
    "Name and shape of a backbone that is never run."
    def __init__(self, d, side):
        super().__init__()
        self.name, self.hash, self.d, self.size, self.mean, self.std, self.grid = "none", "synthetic", d, (224, 224), (0., 0., 0.), (1., 1., 1.), (side, side)


def synthetic(classes, codes, images, side, channels, rank, seed=0):
    "A model and tokens that lie around its codes."
    g = generator(seed, "bench editing")
    centres = torch.randn(codes, channels, generator=g)
    a = np.empty((images, side * side, channels), np.float16)
    for i in range(0, images, 256):
        n = min(256, images - i)
        a[i:i + n] = (centres[torch.randint(codes, (n, side * side), generator=g)] + 1.5 * torch.randn(n, side * side, channels, generator=g)).half().numpy()
    basis = torch.linalg.qr(torch.randn(channels, rank, generator=g)).Q if rank < channels else None
    train = [f"image-{i}" for i in range(images)]
    pick = lambda hi: torch.randint(hi, (codes, 10), generator=g)
    index = PatchIndex(pick(images), pick(side * side), torch.rand(codes, 10, generator=g).sort(1, descending=True).values, (side, side), train)
    model = ProtoQuant(Net(channels, side), Codebook(centres, Space(channels, torch.zeros(channels), basis)), NonNegLinear(classes, codes, g, 0., .3),
                       .1, [f"class {c}" for c in range(classes)], eval_transform(224, (0, 0, 0), (1, 1, 1)), index=index)
    return model, Tokens(a, torch.arange(images) % classes, (side, side), train)


def pictures(folder, tokens, class_names, side=(500, 375)):
    "A data set of photograph-sized JPEG files, ten of them under many names, so that opening the browser decodes what it shows."
    rng, files = np.random.default_rng(0), []
    for i in range(10):
        files.append(Path(folder)/f"{i}.jpg")
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8)).resize(side, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    samples = [Sample(n, int(y), files[i % 10]) for i, (n, y) in enumerate(zip(tokens.ids, tokens.labels))]
    make = lambda split: ImageSet("synthetic", split, samples, class_names)
    return DataSet("synthetic", make("train"), make("test"), class_names, list(range(len(class_names))))


def timed(f, *a):
    began = time.perf_counter()
    f(*a)
    return time.perf_counter() - began


def row(what, ours, target, quality, note=""):
    "A line of the table; `reference` is the target."
    return dict(what=what, ours=ours, reference=target, ratio=ours / target, against="target", quality=quality, note=note)


def rows(seed=0, repeats=5, size=None):
    "The lines: weight variant, softmax variant, opening the browser, memory (in GiB)."
    size = SIZE | (size or {})
    model, tokens = synthetic(**size, seed=seed)
    began = time.perf_counter()
    editor = Editor(model, tokens)
    ready = time.perf_counter() - began
    what = f"{size['images']} images, {size['codes']} codes, {size['classes']} classes"
    def step(code, variant):
        editor.switch_off(code, variant)
        return editor.logits, editor.accuracy, editor.flips()
    out = []
    for variant in ("weight", "softmax"):
        off = [timed(step, c, variant) for c in range(repeats)]
        back = [timed(editor.undo) for _ in off]
        out.append(row(f"switch a code off, variant {variant}", min(off), TARGETS[variant], what,
                       f"logits, accuracy and flips; best of {repeats}, worst {max(off):.3f} s; undo {min(back):.3f} s; prepared once in {ready:.1f} s"))
    with tempfile.TemporaryDirectory() as folder:
        data = pictures(folder, tokens, model.class_names)
        seconds = [timed(inspect, model, data, tokens) for _ in range(repeats)]
    out.append(row("open the browser of codes", min(seconds), TARGETS["browser"], what, f"all views made, first page drawn; best of {repeats}, worst {max(seconds):.2f} s"))
    editor.switch_off(0, "softmax")
    out.append(row("memory of the editor's state, GiB", editor.nbytes / 2**30, TARGETS["memory"] / 2**30, what, "with one code removed"))
    return out


if __name__ == "__main__":
    for r in rows(): print(f"{r['what']}: {r['ours']:.3f}, target {r['reference']:.3f} (ratio {r['ratio']:.2f}); {r['note']}")
