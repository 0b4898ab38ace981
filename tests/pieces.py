"""Small things that several test files use: random tokens, image sets and backbones that cost nothing, Python in a fresh process."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from protoquant.codebook import Codebook, Space
from protoquant.features import Tokens

TESTS = Path(__file__).resolve().parent


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed))


def space(kind, d, seed=0):
    "'plain', 'centred', 'basis' (centre and r = d // 2 orthonormal directions) or 'damped' (as basis, short tokens say less)."
    if kind == "plain": return Space(d)
    center = randn(d, seed=seed + 1)
    if kind == "centred": return Space(d, center)
    return Space(d, center, torch.linalg.qr(randn(d, d, seed=seed + 2)).Q[:, :max(1, d // 2)], .7 if kind == "damped" else 0.)


def book(m, d, kind="plain", silent=0, seed=0, trainable=False):
    return Codebook(randn(m, d, seed=seed + 3), space(kind, d, seed), randn(silent, d, seed=seed + 4) if silent else None, trainable)


def labelled(classes=4, per_class=12, side=3, d=12, seed=0, noise=.6):
    "Tokens in which each class shows a concept of its own in one place, among tokens that all classes share."
    g = gen(seed)
    own, common = torch.randn(classes, d, generator=gen(99)) * 2, torch.randn(5, d, generator=gen(98))
    labels = torch.arange(classes).repeat_interleave(per_class)
    n = len(labels)
    z = common[torch.randint(5, (n, side * side), generator=g)] + noise * torch.randn(n, side * side, d, generator=g)
    z[torch.arange(n), torch.randint(side * side, (n,), generator=g)] = own[labels] + noise * torch.randn(n, d, generator=g)
    return Tokens(z.half(), labels, (side, side))


class Images:
    "An image set of noise, drawn on demand; `seen` counts what was asked for."
    def __init__(self, n=10, size=16, seed=0, name="noise", split="train", stamp="stamp"):
        self.n, self.size, self.seed, self.name, self.split, self.stamp = n, size, seed, name, split, stamp
        self.fingerprint, self.labels, self.ids, self.seen = "print", np.arange(n) % 3, [f"image-{i}" for i in range(n)], []
    def __len__(self): return self.n
    def image(self, i):
        self.seen.append(i)
        return Image.fromarray(np.random.default_rng([self.seed, i]).integers(0, 256, (self.size, self.size, 3), dtype=np.uint8))


def transform(key="plain"):
    def f(im): return torch.from_numpy(np.asarray(im, np.float32) / 255).permute(2, 0, 1)
    f.key = key
    return f


class Backbone:
    "Means of 8x8 squares: 3 channels and their products, exact arithmetic that any process repeats."
    name, d, is_sequence = "means", 6, False
    def __init__(self, hash="hash"): self.hash, self.batches = hash, 0
    def to(self, device): return self
    def features(self, x):
        self.batches += 1
        z = torch.nn.functional.avg_pool2d(x, 8)
        return torch.cat([z, z * z.roll(1, 1)], 1)


def python(code, *args, threads=1, timeout=120, **env):
    "Run code in a fresh interpreter; returns what it printed as JSON in its last line."
    code = f"import sys; sys.path.insert(0, {str(TESTS)!r})\n" + code
    env = dict(os.environ, OMP_NUM_THREADS=str(threads), **env)
    r = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=timeout, env=env, stdin=subprocess.DEVNULL)
    assert r.returncode == 0, r.stderr[-3000:]
    return json.loads(r.stdout.strip().splitlines()[-1])


TINY = dict(dataset="toybirds", classes=4, n_train_per_class=8, n_test_per_class=3, backbone="test_resnet", weights="random", codebook_size=24, epochs_stage1=3, epochs_stage2=6, val_fraction=.25)


def run_experiment(experiment, tmp, *more, tiny=TINY, env=(), **params):
    "Run an experiment through the command line, in tmp/results; `None` leaves a parameter of `tiny` out."
    args = [w for k, v in {**tiny, **params, "output_dir": Path(tmp)/"results"}.items() if v is not None for w in ("-p", k, str(v))]
    env = dict(os.environ, PROTOQUANT_CACHE=str(Path(tmp)/"cache"), OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore", **dict(env))
    return subprocess.run([sys.executable, "-c", "import sys; from protoquant.cli import main; sys.exit(main())", "run", experiment, "--quiet", *args, *more], cwd=TESTS.parent, env=env,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL)


def records(tmp, experiment):
    "The complete records in tmp/results: folder -> record."
    return {p.parent: json.loads(p.read_text()) for p in (Path(tmp)/"results"/experiment).glob("*/run.json")}
