"""The benchmark (`make bench`): ratios of seconds, all measured in this one run, printed as a Markdown table and kept as JSON.

1. Spherical k-means of stage 1 against faiss: the same unit vectors, codes, passes and threads; one function measures both losses.
2. Stage 2 from presence that was computed once, against the same epochs with presence computed in every step.
3. Both stages of `grounded` from the store, against the released procedure, which runs the backbone in every epoch.
4. Peak memory of fitting 4000 codes on 294,000 tokens of 768 channels.
5. Purity, misalignment, FunnyBirds and editing: the files bench_*.py beside this one, each against its own limit or reference.
"""
import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from protoquant import backbones, core, datasets, features
from protoquant.codebook import Codebook, Directions, Space, mean_token, spherical_kmeans, unit
from protoquant.core import generator, write_json
from protoquant.features import FeatureStore, Tokens, extract
from protoquant.metrics import top1
from protoquant.recipes import get_recipe
from protoquant.results import environment, git_state
from protoquant.training import codes_by_kmeans, fit_codes_and_head, fit_head, linear_probe, make_space, train
from protoquant.head import presence_of

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 4 * 2**30   # bytes that fitting may take
ROOMS = ["purity", "misalignment", "funnybirds", "editing"]   # tools/bench_<name>.py with rows()
PARTS = ["kmeans", "stage2", "fit", "memory", *ROOMS]


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def timed(f, *a, **kw):
    "What f returns, and the seconds it took."
    began = time.perf_counter()
    out = f(*a, **kw)
    return out, time.perf_counter() - began


def row(what, ours, theirs, reference, quality="", note="", **more):
    "A line of the table; seconds of ours and of the reference."
    say(f"  -> {what}: {ours:.2f} s, {reference} {theirs:.2f} s; {quality}")      # a run that is cut short leaves this
    return dict(what=what, ours=ours, reference=theirs, ratio=ours / max(theirs, 1e-9), against=reference, quality=quality, note=note, **more)


# -- 1: stage 1

def mean_loss(u, codes, piece=4096):
    "Mean of 1 - cos between unit rows and their nearest codes."
    c = unit(codes).T
    return sum(float((1 - (x @ c).amax(1)).sum(dtype=torch.float64)) for x in u.split(piece)) / len(u)


def faiss_kmeans(u, m, passes, seed, threads):
    "Directions of the codes (M, r) from faiss, from all rows of u."
    import faiss
    faiss.omp_set_num_threads(threads)
    km = faiss.Kmeans(u.shape[1], m, niter=passes, spherical=True, seed=seed, max_points_per_centroid=len(u), min_points_per_centroid=1)
    km.train(u.numpy())
    return torch.from_numpy(km.centroids)


def compare_kmeans(tokens, space, name, m, passes, seed, repeats=1, reference=faiss_kmeans):
    "Ours reads the tokens from the store and is timed with that; faiss gets finished unit vectors."
    u = space(tokens.read(slice(None)).flatten(0, 1))
    ours, theirs, threads = [], [], torch.get_num_threads()
    for r in range(repeats):
        say(f"k-means, {name}, M={m}, {passes} passes over {len(u)} tokens of {u.shape[1]} numbers ({r + 1} of {repeats})")
        km, s = timed(lambda: spherical_kmeans(Directions(tokens, space), m, generator(seed, "codebook"), passes=passes))
        theirs_codes, t = timed(reference, u, m, passes, seed, threads)
        ours.append(s); theirs.append(t)
    a, b = mean_loss(u, km.codes), mean_loss(u, theirs_codes)
    return row(f"spherical k-means, {name}, M={m}", min(ours), min(theirs), "faiss", f"loss {a:.4f} / {b:.4f}",
               f"{passes} passes, {len(u)} x {u.shape[1]}" + (f", best of {repeats}" if repeats > 1 else ""),
               loss=a, loss_reference=b, seconds=ours, seconds_reference=theirs, m=m, passes=passes, n_tokens=len(u), channels=u.shape[1])


def compare_stage1(tokens, recipe, m, seed, reference=faiss_kmeans):
    "Stage 1 of `grounded` with all it needs (space, k-means, codes in token space; no projection) against faiss on all channels."
    from dataclasses import replace
    say(f"stage 1 of grounded, M={m}")
    def ours():
        space = make_space(recipe.spaces[0], tokens, recipe)
        return codes_by_kmeans(tokens, m, replace(recipe, project=False), space, seed)
    codes, s = timed(ours)
    u = Space(tokens.d, mean_token(tokens))(tokens.read(slice(None)).flatten(0, 1))
    theirs, t = timed(reference, u, m, recipe.epochs_stage1, seed, torch.get_num_threads())
    space = codes.book.space
    v = space(tokens.read(slice(None)).flatten(0, 1))
    back = space.center + theirs                             # faiss's codes as points of token space
    a, b = mean_loss(v, codes.book.directions()), mean_loss(v, space(back))
    return row(f"stage 1 of grounded, M={m}", s, t, "faiss, all channels", f"loss in grounded's space {a:.4f} / {b:.4f}",
               f"its space (rank {space.rank}) made, codes brought back", loss=a, loss_reference=b, m=m, passes=recipe.epochs_stage1)


# -- 2: stage 2

def compare_stage2(train_, val, book, temperature, recipe, seed, epochs):
    "The same epochs of stage 2, from cached presence and with presence computed in every step."
    from dataclasses import replace
    say(f"stage 2, M={len(book)}, {epochs} epochs, presence computed once")
    def cached():
        s, sv = presence_of(train_, book, temperature), presence_of(val, book, temperature)
        return fit_head(s, train_.labels, sv, val.labels, recipe, seed=seed, epochs=epochs)
    a, s = timed(cached)
    say(f"stage 2, M={len(book)}, {epochs} epochs, presence computed in every step")
    frozen = replace(recipe, train_codebook=False, tune_codebook=False, mixup=False)
    b, t = timed(fit_codes_and_head, train_, val, book, temperature, frozen, seed=seed, epochs=epochs)
    return row(f"stage 2 from cached presence, M={len(book)}", s, t, "presence in every step", f"val. accuracy {a.val_top1:.1f} / {b.val_top1:.1f} %",
               f"{epochs} epochs, computing presence once is counted", val_top1=a.val_top1, val_top1_reference=b.val_top1, epochs=epochs)


# -- 3: the whole fit

class LiveTokens(Tokens):
    "Tokens that run the backbone each time they are read: what training without a store is."
    def __init__(self, backbone, images, transform, batch=32, workers=4):
        h, w = backbone.grid
        super().__init__(np.broadcast_to(np.float16(0), (len(images), h * w, backbone.d)), images.labels, (h, w), images.ids)
        self.backbone, self.images, self.transform, self.batch, self.workers, self.ran = backbone, images, transform, batch, workers, 0
    def read(self, rows, device="cpu"):
        from concurrent.futures import ThreadPoolExecutor
        rows = np.arange(len(self))[rows.numpy() if isinstance(rows, torch.Tensor) else rows]
        with ThreadPoolExecutor(self.workers) as pool:
            parts = [features._forward(self.backbone, x, torch.device(device))[0].float()
                     for _, x in features._loaded(self.images, self.transform, np.array_split(rows, -(-len(rows) // self.batch)), pool)]
        self.ran += len(rows)
        return torch.cat(parts).to(device)


def backbone_epoch(backbone, images, transform, n=512):
    "Seconds of one pass of the backbone over the images (decoding, transform, forward), from n images spread over the set."
    few = np.unique(np.linspace(0, len(images) - 1, min(n, len(images))).astype(int))
    live = LiveTokens(backbone, images, transform)
    live.read(few[:32])                                       # warm up
    return timed(live.read, few)[1] * len(images) / len(few), len(few)


def compare_fit(backbone, ds, transform, m, seed, changes=None, full=False, folder=None, cache=None):
    "Two rows: the fit from the store, and with the one-off extraction; the reference is the released procedure."
    changes = changes or {}
    say(f"extracting {len(ds.train)} training images (timed)")
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        store, extraction = timed(extract, backbone, ds.train, transform, cache=tmp)
        say(f"  {extraction:.1f} s; test images, from the user's cache where they are there (not timed)")
        test = extract(backbone, ds.test, transform, cache=cache)
        tr, va = datasets.validation_split(store.labels)
        def ours():
            s = FeatureStore(store.folder)                    # with its checksums
            return train(s.subset(tr), s.subset(va), m, get_recipe("grounded", **changes), None, seed)
        say(f"grounded, both stages from the store, M={m}")
        fit, s = timed(ours)
        acc = top1(test, fit.book, fit.head.weight.detach(), fit.temperature)
        say(f"  {s:.1f} s, {acc:.1f} %; released, both stages from the store, M={m}")
        released = get_recipe("released", **changes)
        head = linear_probe(store.subset(tr), store.subset(va)).head
        ref, steps = timed(train, store.subset(tr), store.subset(va), m, released, head, seed)
        acc_ref = top1(test, ref.book, ref.head.weight.detach(), ref.temperature)
        epochs, images = released.epochs_stage1 + released.epochs_stage2, ds.train.subset(tr)
        say(f"  {steps:.1f} s, {acc_ref:.1f} %; one epoch of the backbone")
        epoch, n = backbone_epoch(backbone, images, transform)
        theirs, how = steps + epochs * epoch, (f"EXTRAPOLATED: {epochs} epochs of the backbone at {epoch:.1f} s (measured on {n} of {len(images)} images) "
                                               f"+ {steps:.1f} s for its steps (measured)")
        if full:
            say(f"released with the backbone in all of its {epochs} epochs: about {theirs / 60:.0f} minutes")
            live = LiveTokens(backbone, images, transform)
            ref, theirs = timed(train, live, store.subset(va), m, released, head, seed)
            acc_ref, how = top1(test, ref.book, ref.head.weight.detach(), ref.temperature), f"really run: the backbone saw {live.ran} images ({live.ran / len(images):.0f} epochs)"
    more = dict(top1=acc, top1_reference=acc_ref, extraction=extraction, backbone_epoch=epoch, steps_reference=steps, epochs=epochs,
                extrapolated=not full, m=m, trials=len(fit.trials))
    quality = f"test accuracy {acc:.1f} / {acc_ref:.1f} %"
    return [row(f"grounded from the store, M={m}", s, theirs, "released, backbone in every epoch", quality, how, **more),
            row(f"... with the one-off extraction, M={m}", s + extraction, theirs, "released, backbone in every epoch", quality, "as above", **more)]


# -- 4: memory

def fit_large(m, n_images, d, passes, folder, seed=40):
    "Fit m codes on made-up tokens that lie on disk; returns the peak memory of this process and the seconds. Runs in a process of its own."
    tokens = np.lib.format.open_memmap(Path(folder)/"tokens.npy", mode="w+", dtype=np.float16, shape=(n_images, 49, d))
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((500, d), dtype=np.float32)
    for part in np.array_split(np.arange(n_images), -(-n_images // 500)):
        tokens[part] = centres[rng.integers(500, size=(len(part), 49))] + rng.standard_normal((len(part), 49, d), dtype=np.float32)
    tokens.flush(); del tokens
    t = Tokens(np.load(Path(folder)/"tokens.npy", mmap_mode="r"), torch.zeros(n_images), (7, 7))
    codes, seconds = timed(codes_by_kmeans, t, m, get_recipe("grounded", epochs_stage1=passes), Space(d, mean_token(t)), seed)
    assert codes.book.codes.shape == (m, d) and codes.projection is not None
    return dict(peak=core.peak_memory() * 2**30, seconds=seconds)


def peak_memory(m=4000, n_images=6000, d=768, passes=2, folder=None):
    "A dict of what was fitted and of the peak; in a fresh process."
    say(f"memory: {m} codes on {n_images * 49} tokens of {d} channels, {passes} passes and projection")
    with tempfile.TemporaryDirectory(dir=folder) as tmp:
        cmd = [sys.executable, str(Path(__file__).resolve()), "--memory-child", json.dumps(dict(m=m, n_images=n_images, d=d, passes=passes, folder=tmp))]
        r = subprocess.run(cmd, stdout=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL)
    if r.returncode: raise SystemExit(f"bench: the memory measurement ended with status {r.returncode}")
    return dict(m=m, n_tokens=n_images * 49, channels=d, passes=passes, limit=LIMIT, **json.loads(r.stdout.strip().splitlines()[-1]))


# -- report

def table(rows, memory=None):
    "Markdown."
    out = ["| what | ours, s | reference, s | ours / reference | times faster | quality, ours / reference | reference | how |", "|---|--:|--:|--:|--:|---|---|---|"]
    out += [f"| {r['what']} | {r['ours']:.2f} | {r['reference']:.2f} | {r['ratio']:.3f} | {1 / r['ratio']:.1f} | {r['quality']} | {r['against']} | {r['note']} |" for r in rows]
    if memory:
        out += ["", f"Peak memory of fitting {memory['m']} codes on {memory['n_tokens']:,} tokens of {memory['channels']} channels: {memory['peak'] / 2**30:.2f} GiB "
                    f"(limit {memory['limit'] / 2**30:.0f} GiB), {memory['seconds']:.0f} s for {memory['passes']} passes and projection."]
    return "\n".join(out)


def slug(name): return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def choose_data(name, root):
    "'cub' where PROTOQUANT_DATA holds it, else 'toybirds'; or what was asked for."
    return name or ("cub" if root and (Path(root)/"CUB_200_2011").is_dir() else "toybirds")


def room_rows(room, data, quick):
    "Rows of tools/bench_<room>.py; small ones, whose numbers mean nothing, where `quick`."
    if str(ROOT/"tools") not in sys.path: sys.path.insert(0, str(ROOT/"tools"))
    say(room)
    small = dict(purity=dict(m=40, n=24, repeats=1), misalignment=dict(quick=True), funnybirds=dict(images=1, backbone="test_resnet", weights="random", img_size=64),
                 editing=dict(size=dict(classes=8, codes=40, images=60, rank=7), repeats=1))
    return importlib.import_module(f"bench_{room}").rows(**(dict(name=data) if room == "purity" else {}), **(small[room] if quick else {}))


def load(name, quick):
    "Backbone, data set and transform. `quick`: the first six classes."
    b = backbones.create("tf_efficientnet_lite0", "packaged")
    ds = datasets.load(name, quiet=True, **(dict(n_train_per_class=15, n_test_per_class=5, classes=6) if quick and name == "toybirds" else {}))
    if quick:
        ds.train = ds.train.subset(np.concatenate([np.flatnonzero(ds.train.labels == c)[:15] for c in range(6)]))
        ds.test = ds.test.subset(np.concatenate([np.flatnonzero(ds.test.labels == c)[:5] for c in range(6)]))
    return b, ds, datasets.eval_transform(b.size, b.mean, b.std, ds.resize)


def has_faiss():
    try: import faiss; return faiss.__version__
    except ImportError: return None


def run(args):
    "All measurements; returns the record."
    name = choose_data(args.data, os.environ.get("PROTOQUANT_DATA"))
    began, load_before, faiss = time.time(), os.getloadavg(), has_faiss()
    say(f"{name}{', QUICK: its numbers mean nothing' if args.quick else ''}; {torch.get_num_threads()} threads, load {load_before[0]:.1f}")
    b, ds, tf = load(name, args.quick)
    store = extract(b, ds.train, tf)
    tr, va = datasets.validation_split(store.labels)
    train_, val = store.subset(tr), store.subset(va)
    sizes, few = ((50, 200), dict(epochs_stage1=3, epochs_stage2=3)) if args.quick else ((500, 2000), {})
    recipe, rows = get_recipe("grounded", **few), []
    if faiss and "kmeans" in args.only:
        centred, own = Space(train_.d, mean_token(train_)), make_space(recipe.spaces[0], train_, recipe)
        for m in sizes:
            rows.append(compare_kmeans(train_, centred, "all channels, centred", m, recipe.epochs_stage1, args.seed, 2 if m <= 500 else 1))
            rows.append(compare_kmeans(train_, own, f"grounded's space ({recipe.spaces[0]}, rank {own.rank})", m, recipe.epochs_stage1, args.seed, 2))
        rows.append(compare_stage1(train_, recipe, sizes[0], args.seed))
    elif not faiss: say("faiss is not installed: its comparisons are left out (python3 tools/bootstrap.py dev demo bench)")
    if "stage2" in args.only:
        book = codes_by_kmeans(train_, sizes[0], recipe, make_space(recipe.spaces[0], train_, recipe), args.seed).book
        rows.append(compare_stage2(train_, val, book, recipe.temperatures[0], recipe, args.seed, min(20, recipe.epochs_stage2)))
    if "fit" in args.only: rows += compare_fit(b, ds, tf, sizes[0], args.seed, few, args.full)
    for room in ROOMS:
        if room in args.only: rows += room_rows(room, name, args.quick)
    memory = None if args.skip_memory or "memory" not in args.only else peak_memory(**(dict(m=400, n_images=600) if args.quick else {}))
    env = environment("cpu")
    env["versions"]["faiss"] = faiss
    return dict(data=name, quick=args.quick, parts=args.only, seed=args.seed, n=dict(train=len(train_), val=len(val), test=len(ds.test), tokens=train_.n_tokens),
                backbone=b.spec, threads=torch.get_num_threads(), load=[load_before[0], os.getloadavg()[0]], seconds=time.time() - began,
                **env, **git_state(ROOT), rows=rows, memory=memory)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--data", choices=("cub", "toybirds"), help="data set (default: cub where PROTOQUANT_DATA has it, else toybirds)")
    p.add_argument("--quick", action="store_true", help="a small version in less than a minute; its numbers mean nothing and are not kept")
    p.add_argument("--full", action="store_true", help="really run the released procedure, with the backbone in every epoch (an hour on two cores)")
    p.add_argument("--skip-memory", action="store_true", help="leave out the memory measurement")
    p.add_argument("--only", type=lambda t: t.split(","), default=PARTS, metavar="PARTS", help=f"some of {','.join(PARTS)}; not kept unless --output says where")
    p.add_argument("--seed", type=int, default=40)
    p.add_argument("--output", help="JSON file (default: results/bench/<hardware>.json; none with --quick, --only or --skip-memory)")
    p.add_argument("--memory-child", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.memory_child:
        print(json.dumps(fit_large(**json.loads(args.memory_child))))
        return 0
    if bad := set(args.only) - set(PARTS): p.error(f"--only: there is no {', '.join(sorted(bad))}; there are {', '.join(PARTS)}")
    r = run(args)
    print(f"{r['hardware']}; {r['data']}, {r['n']['train']} training images, {r['n']['tokens']} tokens; seed {r['seed']}; "
          f"load of the machine {r['load'][0]:.1f} before, {r['load'][1]:.1f} after\n")
    print(table(r["rows"], r["memory"]))
    out = args.output or (None if args.quick or set(args.only) != set(PARTS) or args.skip_memory else ROOT/"results"/"bench"/f"{slug(r['hardware'])}.json")
    if out:
        write_json(out, r)
        say(f"written to {Path(out).resolve().relative_to(ROOT) if Path(out).resolve().is_relative_to(ROOT) else out}")
    say(f"{r['seconds']:.0f} s in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())
