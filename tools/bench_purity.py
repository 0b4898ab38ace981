"""Purity from stored features, for the benchmark (`make bench`): projection of 2000 prototypes on the test images, selection, counting.

The features are extracted before, once, and are not timed. The limit is ten seconds on two cores. Codes are training tokens and every weight is positive, so all prototypes are scored: the most there can be to do.
"""
import argparse
import sys
import time

import numpy as np
import torch

from protoquant import backbones, datasets
from protoquant.codebook import Codebook, Space, mean_token
from protoquant.core import generator
from protoquant.features import extract
from protoquant.head import NonNegLinear
from protoquant.model import ProtoQuant
from protoquant.purity import project_prototypes, purity_of, used_prototypes

LIMIT = 10.   # seconds


def random_model(backbone, tokens, m, classes, transform, seed=40):
    "m codes that are tokens, all with weight."
    pick = torch.randperm(tokens.n_tokens, generator=generator(seed, "bench purity"))[:m]
    codes = torch.stack([tokens.read([int(i) // tokens.positions])[0, int(i) % tokens.positions] for i in pick])
    return ProtoQuant(backbone, Codebook(codes, Space(tokens.d, mean_token(tokens))), NonNegLinear(classes, m, generator(seed, "head")), .1, transform=transform)


def measure(model, tokens, images):
    "Purity of all prototypes, the seconds it took, and the processor's seconds (of all threads; they hardly depend on what else runs)."
    began, cpu = time.perf_counter(), time.process_time()
    patches = project_prototypes(model, tokens, quiet=True)
    best = patches.score.reshape(model.weight.shape[1], -1)[:, 0]
    result = purity_of(patches.select(used_prototypes(model.weight, best)), images)
    return result, time.perf_counter() - began, time.process_time() - cpu


def rows(name="cub", m=2000, repeats=2, cache=None, limit=LIMIT, n=None):
    "Lines as tools/bench.py prints them: `ours` are our seconds, `reference` the limit."
    b = backbones.create("tf_efficientnet_lite0", "packaged")
    ds = datasets.load(name, crop="none", quiet=True)
    images = ds.test if n is None else ds.test.subset(range(min(n, len(ds.test))))
    tf = datasets.eval_transform(b.size, b.mean, b.std, "squash")
    tokens = extract(b, images, tf, cache=cache)
    model = random_model(b, tokens, min(m, tokens.n_tokens), ds.n_classes, tf)
    runs = [measure(model, tokens, images) for _ in range(repeats)]
    (r, ours, cpu) = min(runs, key=lambda run: run[1])
    return [dict(what=f"purity from stored features, M={len(model.book)}, {len(images)} images", ours=ours, reference=limit, ratio=ours / limit, against="limit",
                 quality=f"purity {r.mean:.3f} ± {r.sd:.3f} of {len(r)} prototypes (random codes)", note=f"{torch.get_num_threads()} threads, {tokens.d} channels, {cpu:.1f} s of processor time, best of {repeats}; image sizes read from disk",
                 seconds=[s for _, s, _ in runs], cpu=cpu, m=len(model.book), images=len(images), prototypes=len(r), purity=r.mean)]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", default="cub", choices=("cub", "toybirds"))
    p.add_argument("--codes", type=int, default=2000)
    args = p.parse_args(argv)
    for r in rows(args.data, args.codes): print(f"{r['what']}: {r['ours']:.2f} s (limit {r['reference']:.0f} s), {np.round(r['seconds'], 2).tolist()}; {r['quality']}; {r['note']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
