"""FunnyBirds' protocols from one pass over distinct pictures, against an evaluation that runs the backbone wherever a protocol asks for a logit."""
import sys
import time
import warnings

import numpy as np
import torch

from protoquant import backbones, datasets, funnybirds
from protoquant.adapters import Activations
from protoquant.funnybirds import FULL, PARTS, parts_of


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


class Channels:
    "A backbone's channels as prototypes, with random weights; counts the pictures that it sees."
    def __init__(self, net, classes=50, seed=0):
        self.net, self.ran = net, 0
        self.size, self.grid, self.mean, self.std = net.size, net.grid, net.mean, net.std
        self.class_weights = torch.rand(classes, net.d, generator=torch.Generator().manual_seed(seed))
    def activations(self, x):
        self.ran += len(x)
        maps = self.net.features(x).float()
        s = maps.amax((2, 3))
        return Activations(maps, s, s @ self.class_weights.T)


class Naive:
    "The protocols as published: each runs over the images for itself, one picture at a time, and asks the model for every logit and explanation anew."
    def __init__(self, model, images, rows, thresholds=funnybirds.THRESHOLDS):
        self.model, self.images, self.rows, self.thresholds = model, images, rows, thresholds
        self.transform = funnybirds.input_transform(model)
        self.pictures, self.sets, self.pairs = {}, funnybirds.sufficient_sets(images.class_parts), funnybirds.contrast_pairs(images.class_parts)

    def ask(self, i, bits=None, without=None):
        "Activations of one picture; pictures are prepared once, so that only passes are compared."
        key = (i, bits, without)
        if key not in self.pictures:
            im = self.images.image(i) if bits is None and without is None else self.images.kept(i, parts_of(bits)) if without is None else self.images.without_object(i, without)
            self.pictures[key] = self.transform(im)[None]
        with torch.no_grad(): return self.model.activations(self.pictures[key])

    def logit(self, i, **kw): return self.ask(i, **kw).logits[0].double()

    def explain(self, i, c):
        "PartScores of one class."
        a = self.ask(i)
        masks, item = funnybirds.colour_masks(self.images.part_map(i), self.images.n_objects(i))
        counts, cells = (funnybirds.cell_counts(m, self.model.grid) for m in (funnybirds.dilated(masks), torch.ones(1, *masks.shape[1:], dtype=torch.bool)))
        return funnybirds.sum_scores(a.maps[0], a.presence[:1] * self.model.class_weights[[c]], funnybirds.merged(counts, item), cells)[0]

    def falls(self, i, t):
        "f_t minus f_t without each part and object."
        f = float(self.logit(i)[t])
        return f, torch.tensor([f - float(self.logit(i, bits=FULL - 2**j)[t]) for j in range(len(PARTS))] + [f - float(self.logit(i, without=k)[t]) for k in range(self.images.n_objects(i))], dtype=torch.float64)

    def important(self, i, c):
        "The explanation at each threshold; the published code computes importance twice for it."
        self.ask(i)
        return self.explain(i, c).important(self.thresholds)

    def checks(self):
        "csdc, pc, dc, d at each threshold."
        T = len(self.thresholds)
        out = {k: [[] for _ in range(T)] for k in ("csdc", "pc", "dc", "d")}
        for i in self.rows:
            t, s = int(self.images.labels[i]), None
            if int(self.logit(i).argmax()) == t:
                s = self.sets[t]
                for a, E in enumerate(self.important(i, t)[:, :len(PARTS)]): out["csdc"][a].append(float(((E & s).sum(1) / s.sum(1)).max()))
            for name, bits_of in (("pc", lambda E: int(funnybirds.bits_of(E))), ("dc", lambda E: FULL - int(funnybirds.bits_of(E)))):
                guess = int(self.logit(i).argmax())
                for a, E in enumerate(self.important(i, guess)[:, :len(PARTS)]):
                    same = int(self.logit(i, bits=bits_of(E)).argmax()) == guess
                    out[name][a].append(float(same if name == "pc" else not same))
            f, fall = self.falls(i, t)
            Q = fall < .05 * abs(f)
            if Q.any():
                for a, E in enumerate(self.important(i, t)): out["d"][a].append(1 - float((E & Q).sum() / Q.sum()))
        return {k: torch.tensor([np.mean(v) if v else np.nan for v in c]) for k, c in out.items()}

    def rest(self):
        "accuracy, bi, sd, ts."
        hits, bad, n, sd, ts = 0, 0, 0, [], []
        for i in self.rows:
            t = int(self.images.labels[i])
            hits += int(self.logit(i).argmax()) == t
            f = float(self.logit(i)[t])
            for k in range(self.images.n_objects(i)): n += 1; fall = f - float(self.logit(i, without=k)[t]); bad += fall > 0 and fall >= .05 * abs(f)
            f, effects = float(self.logit(i)[t]), [float(self.logit(i, bits=FULL - 2**j)[t]) for j in range(len(PARTS))]
            sd.append(float(funnybirds.single_deletion(f - torch.tensor([effects], dtype=torch.float64), self.explain(i, t).importance[None, :len(PARTS)])))
            kept = torch.zeros(1, FULL + 1, len(self.model.class_weights), dtype=torch.float64)
            pair, shared = self.pairs[0][t], self.pairs[1][t]
            self.logit(i)
            for b in FULL - funnybirds.bits_of(shared): kept[0, b] = self.logit(i, bits=int(b))
            ts.append(funnybirds.target_sensitivity(kept, pair[None], shared[None], torch.stack([self.explain(i, int(c)).importance[:len(PARTS)] for c in pair])[None])[0])
        return dict(accuracy=hits / len(self.rows), bi=1 - bad / n, sd=float(np.nanmean(sd)), ts=float(torch.stack(ts).nanmean()))

    def run(self):
        curves, rest = self.checks(), self.rest()
        return rest | funnybirds.aggregate(curves, rest["sd"], rest["ts"], self.thresholds)


def rows(images=2, backbone="tf_efficientnet_lite0", weights="packaged", img_size=None):
    "One row of the benchmark: seconds and passes of both ways on whole ToyBirds with all their interventions."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = backbones.create(backbone, weights, img_size=img_size)
    birds, model = datasets.load("toybirds", n_train_per_class=1, n_test_per_class=1).test, Channels(net)
    at = list(range(3, 3 + 5 * images, 5))
    say(f"FunnyBirds' protocols on {images} ToyBirds, one pass over distinct pictures")
    began = time.perf_counter()
    m = funnybirds.measure(model, birds, rows=at, quiet=True)
    ours = funnybirds.protocols(m).scores
    ours_s, ours_n = time.perf_counter() - began, model.ran
    say("the same, a pass for every logit that a protocol asks for")
    model.ran, began = 0, time.perf_counter()
    naive = Naive(model, birds, at).run()
    naive_s, naive_n = time.perf_counter() - began, model.ran
    off = max(abs(ours[k] - naive[k]) for k in naive if np.isfinite(naive[k]))
    distinct = len({funnybirds.picture_key(im) for _, _, im in funnybirds.intervened(birds, at)})
    say(f"  -> {ours_s:.2f} s and {ours_n} passes for {distinct} distinct pictures; naive {naive_s:.2f} s and {naive_n} passes; largest difference of a score {off:.1e}")
    return [dict(what=f"FunnyBirds, all protocols, {images} images, {len(funnybirds.THRESHOLDS)} thresholds", ours=ours_s, reference=naive_s, ratio=ours_s / max(naive_s, 1e-9), against="a pass for every logit asked for",
                 quality=f"{ours_n} / {naive_n} passes, scores differ by at most {off:.0e}", note=f"{distinct} distinct pictures, {backbone}", passes=ours_n, passes_reference=naive_n, distinct_pictures=distinct,
                 largest_difference=off)]


if __name__ == "__main__":
    for r in rows(): print(r)
