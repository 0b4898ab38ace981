"""Benchmark of protoquant.misalignment: what the noise attack costs in passes of the backbone, and what batches bring to pgd.

`rows()` gives rows like those of tools/bench.py, all measured in this one process; run alone, it prints them.
"""
import argparse
import sys
import time
import warnings

import torch

from protoquant import backbones, datasets
from protoquant.adapters import batches, as_model
from protoquant.codebook import Codebook
from protoquant.core import WeightsError, generator
from protoquant.head import NonNegLinear
from protoquant.misalignment import Setup, attack, measure, target
from protoquant.model import ProtoQuant
from bench import row, say, timed     # the folder of this file is on the path: as a script, and from tools/bench.py


class Counted:
    "A model that counts the images that go through it."
    def __init__(self, model): self.model, self.seen = model, 0
    def __getattr__(self, k): return getattr(self.model, k)
    def activations(self, x):
        self.seen += len(x)
        return self.model.activations(x)


def a_model(name, weights, codes, classes, img_size=None, seed=40, device="cpu"):
    "A ProtoQuant with made-up codes and weights: what it costs does not depend on what it has learned."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: net = backbones.create(name, weights, img_size=img_size, device=device)
        except WeightsError: net = backbones.create(name, "random", num_classes=classes, img_size=img_size, device=device)
    g = generator(seed, "bench")
    w = torch.rand(classes, codes, generator=g) * (torch.rand(classes, codes, generator=g) < 10 / codes)
    return ProtoQuant(net, Codebook(torch.randn(codes, net.d, generator=g)), NonNegLinear.of(w + torch.eye(classes, codes)), .1).to(device)


def passes(model, images, mode, batch):
    "One pass of the model over the images: decoding, transform, backbone, maps."
    with torch.no_grad():
        for _, x in batches(model, images, mode, batch): model.activations(x)


def noise_row(pq, images, mode, batch=32, repeats=2):
    "The noise attack with all its numbers against the same number of images going once through the model."
    model = Counted(as_model(pq))
    passes(model, images.subset(slice(0, batch)), mode, batch)                     # warm up
    theirs = min(timed(passes, model, images, mode, batch)[1] for _ in range(repeats))
    model.seen = 0
    ours = min(timed(measure, model, images, Setup(), mode, batch, quiet=True)[1] for _ in range(repeats))
    n = model.seen / repeats / len(images)
    return row(f"misalignment, noise, {len(images)} images", ours, theirs, "one pass of the model", f"{n:.2f} backbone passes an image (limit 2.2)",
               f"{1000 * ours / len(images):.0f} ms an image with decoding and all numbers; {pq.backbone.name}, {len(pq.book)} codes", passes=n)


def pgd_row(pq, images, mode, batch=32, steps=10):
    "pgd in batches against one image at a time, from decoded images."
    model, setup = as_model(pq), Setup("pgd", steps=steps)
    x, n = torch.cat([x for _, x in batches(model, images, mode, batch)]), len(images)
    def run(size): return torch.cat([target(a.after.maps, a.who) for r in torch.arange(n).split(size) for a in [attack(model, x[r], images.labels[r.numpy()], [images.ids[i] for i in r], setup)]])
    attack(model, x[:2], images.labels[:2], images.ids[:2], Setup("pgd", steps=1))     # warm up
    (a, ours), (b, theirs) = timed(run, batch), timed(run, 1)
    return row(f"misalignment, pgd of {steps} steps, batches of {min(batch, n)}, {pq.backbone.name} at {pq.backbone.size[0]}", ours, theirs, "one image at a time",
               f"throughput x {theirs / ours:.2f}; mean target {a.mean():.3f} / {b.mean():.3f}", f"{n} images, {torch.get_num_threads()} threads",
               throughput=theirs / ours, seconds_image=ours / n, steps=steps)


def rows(quick=False, device="cpu"):
    "All rows. `quick`: a small version whose numbers mean nothing."
    ds = datasets.load("toybirds", n_train_per_class=1, n_test_per_class=2, classes=16)
    images, out = ds.test.subset(slice(0, 4 if quick else 32)), []
    small = a_model("test_resnet", "random", 60, 16, img_size=64, device=device)
    pq = small if quick else a_model("tf_efficientnet_lite0", "packaged", 500, 50, device=device)
    say(f"misalignment: noise, {pq.backbone.name}")
    out.append(noise_row(pq, images, ds.resize))
    for m in ([small] if quick else [pq, small]):
        say(f"misalignment: pgd, {m.backbone.name}")
        out.append(pgd_row(m, images, ds.resize, steps=2 if quick else 5))
    return out


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--quick", action="store_true", help="a small version; its numbers mean nothing")
    p.add_argument("--device", default="cpu")
    args = p.parse_args(argv)
    for r in rows(args.quick, args.device):
        print(f"{r['what']}: {r['ours']:.2f} s, {r['against']} {r['reference']:.2f} s, ratio {r['ratio']:.2f}; {r['quality']}; {r['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
