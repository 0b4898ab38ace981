"""Guards of protoquant.figures: every figure draws from its records, says what it shows, and names the command where it cannot."""
import json
from dataclasses import asdict, replace

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from protoquant import backbones, datasets, figures as F
from protoquant.codebook import nearest_patches
from protoquant.core import ConfigError, DataError, WeightsError
from protoquant.features import extract
from protoquant.manifest import ARTEFACTS, Row, measured
from protoquant.model import ProtoQuant
from protoquant.pruning import logical_prune, physical_prune
from protoquant.recipes import get_recipe
from protoquant.results import Run, paper_values
from protoquant.training import train

OPTIONS = dict(figure1=dict(steps=1, n=2), figure2={}, figure3={})
PICTURES = tuple(f"figure{i}" for i in range(1, 20) if i not in (6, 7, 8))
TOY = dict(dataset="toybirds", classes=4, n_train_per_class=6, n_test_per_class=2, val_fraction=.34, codebook_size=12, topk=3, recipe="grounded", seed=40)
pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(autouse=True)
def closed():
    yield
    assert not plt.get_fignums()      # what is drawn is closed
    plt.close("all")


def leave(home, params, metrics, experiment="cub", n_images=None, models=None, weights="", data=None, recipe=None):
    "A run folder as the experiments leave it."
    run = Run.start(experiment, dict(params, crop=None, output_dir="results", views=1), data or {}, weights, home, recipe=recipe)
    for name, model in (models or {}).items(): model.save(run.file(name))
    if models: pd.DataFrame([dict(stage=1, epoch=e, metric="loss", value=1 / (e + 1)) for e in range(3)]).to_csv(run.file("history.csv"), index=False)
    return run.finish(metrics, n_images or dict(train=16, val=8, test=8))


def model_run(home, backbone, size):
    "A trained model of a tiny random backbone, its black box in a run folder of its own; rows and record."
    data = datasets.load("toybirds", **datasets.options(TOY))
    torch.manual_seed(40)
    with pytest.warns(UserWarning): net = backbones.create(backbone, "random", num_classes=data.n_classes, img_size=size)
    t = datasets.eval_transform(net.size, net.mean, net.std, data.resize)
    how = get_recipe("grounded", epochs_stage1=3, epochs_stage2=3)
    a, b = datasets.validation_split(data.train.labels, TOY["val_fraction"], TOY["seed"])
    tokens = extract(net, data.train, t, quiet=True)
    found = train(tokens.subset(a), tokens.subset(b), TOY["codebook_size"], how, net.head)
    few = physical_prune(found.book, logical_prune(found.head, TOY["topk"]))[:2]
    models = {n: ProtoQuant(net, *parts, found.temperature, data.class_names, t, how, nearest_patches(parts[0], tokens.subset(a), 6))
              for n, parts in {"model.safetensors": (found.book, found.head), "model_topk.safetensors": few}.items()}
    box = leave(home, dict(dataset="toybirds", backbone=backbone), dict(top1=1.), "blackbox")
    from safetensors.torch import save_file
    save_file({k: v.contiguous() for k, v in net.model.state_dict().items()}, home/"blackbox"/box["key"]/"model.safetensors")
    params = dict(TOY, backbone=backbone, img_size=size, weights="/somewhere/model.safetensors")
    record = leave(home, params, dict(top1=50., codes_topk=len(few[0])), models=models, weights=net.hash, recipe=asdict(how), data=data.fingerprints)
    rows = [Row("box", "smoke", "blackbox", dict(dataset="toybirds", backbone=backbone), ("table3",), files=("model.safetensors",)),
            Row("model", "smoke", "cub", dict(params, weights="@box/model.safetensors"), PICTURES, files=("model.safetensors", "model_topk.safetensors"))]
    return rows, record


@pytest.fixture(scope="module", autouse=True)
def defaults():
    "Defaults of the experiments' notebooks that count for these rows."
    known = dict(cub=dict(TOY, crop=None, backbone="", weights="packaged", img_size=None, views=1), blackbox=dict(dataset="", backbone="", views=1), sparsity=dict(TOY, backbone="", views=1), funnybirds=dict(TOY, backbone="", views=1))
    with pytest.MonkeyPatch.context() as m:
        m.setattr("protoquant.manifest._Known.__call__", lambda self, experiment, where: known[experiment])
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setenv("PROTOQUANT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield tmp_path_factory.mktemp("results")


@pytest.fixture(scope="module")
def cnn(home): return model_run(home, "test_resnet", 64)


@pytest.fixture(scope="module")
def vit(home): return model_run(home, "test_vit", 64)


@pytest.mark.parametrize("name", PICTURES)
def test_every_picture_draws_says_what_it_is_and_is_saved(home, cnn, name, tmp_path):
    rows, record = cnn
    d = F.draw(name, "smoke", home, rows, **OPTIONS.get(name, dict(n=2, n_patches=3)))
    assert (d.name, d.runs, d.missing, d.keys, d.scale, d.photographs) == (name, ["model"], [], [record["key"]], "smoke", False)
    for said in (f"Figure {d.number}.", "ToyBirds", "24 training", "test_resnet", "run box", "grounded", "12 codes", "seed 40", "Scale smoke", "compared"): assert said in d.caption
    if name in ("figure2", "figure9"):
        png, pdf = d.save(tmp_path)
        assert [p.name for p in (png, pdf)] == [f"figure_{d.number:02d}.png", f"figure_{d.number:02d}.pdf"]
        assert Image.open(png).info["Keywords"] == record["key"] and Image.open(png).info["Description"] == d.caption.replace("**", "") and record["key"].encode() in pdf.read_bytes()
        assert png.stat().st_size < 400_000 and pdf.stat().st_size < 2_000_000 and b"/FontFile2" in pdf.read_bytes()


@pytest.mark.parametrize("name", ["figure1", "figure2", "figure3", "figure4", "figure9", "figure16"])
def test_grids_of_a_vit(home, vit, name):
    rows, record = vit
    d = F.draw(name, "smoke", home, rows, **OPTIONS.get(name, dict(n=2, n_patches=3)))
    assert d.keys == [record["key"]] and "test_vit" in d.caption


def test_the_same_drawing_gives_the_same_file(home, cnn, tmp_path):
    a, b = (F.draw("figure4", "smoke", home, cnn[0], n=1, n_patches=1).save(tmp_path/n) for n in "ab")
    assert [f.read_bytes() for f in a] == [f.read_bytes() for f in b]


def test_a_png_that_is_too_large_gets_fewer_colours_and_keeps_its_texts(home, cnn, tmp_path, monkeypatch):
    d = F.draw("figure9", "smoke", home, cnn[0], n=1)
    monkeypatch.setitem(F.LIMITS, "png", 1)
    f, = d.save(tmp_path, ["png"])
    im = Image.open(f)
    assert im.mode == "P" and im.info["Keywords"] == d.keys[0] and im.info["Title"] == f"Figure 9: {ARTEFACTS['figure9']}"


def test_eleven_sheets_load_once(home, cnn, monkeypatch):
    F._OPEN.clear()
    loads = []
    monkeypatch.setattr(F.ProtoQuant, "load", classmethod(lambda cls, path, net, old=ProtoQuant.load: loads.append(path) or old(path, net)))
    for i in (9, 10, 15): F.draw(f"figure{i}", "smoke", home, cnn[0], n=1, n_patches=2)
    assert len(loads) == 1


def test_missing_runs_and_files_name_the_command(home, cnn, tmp_path):
    rows, record = cnn
    for name in ("figure1", "figure15"):
        with pytest.raises(F.NotRun, match=f"protoquant reproduce --scale smoke --only {name}$") as e: F.draw(name, "smoke", tmp_path, rows)
        assert e.value.missing == ["model"] and isinstance(e.value, ConfigError)
    with pytest.raises(F.NotRun, match="has no run for it"): F.draw("figure7", "smoke", home, rows)
    bare = replace(rows[1], files=())
    kept = {f: (home/"cub"/record["key"]/f).read_bytes() for f in ("model_topk.safetensors", "history.csv")}
    try:
        for f in kept: (home/"cub"/record["key"]/f).unlink()
        with pytest.raises(F.NotRun, match="model_topk.safetensors is not"): F.draw("figure4", "smoke", home, [rows[0], bare])
    finally:
        for f, b in kept.items(): (home/"cub"/record["key"]/f).write_bytes(b)


def test_a_black_box_that_is_not_there_and_one_of_ones_own(home, cnn, tmp_path):
    rows, record = cnn
    with pytest.raises(F.NotRun, match="model needs its model.safetensors") as e: F.draw("figure4", "smoke", home, [replace(rows[0], files=("nothing",)), rows[1]])
    assert e.value.missing == ["box"]
    file = next((home/"blackbox").glob("*/model.safetensors"))
    own = [replace(rows[1], params=dict(rows[1].params, weights=str(file)))]
    assert F.draw("figure4", "smoke", home, own).keys == [record["key"]]
    with pytest.raises(WeightsError): F.draw("figure4", "smoke", home, [replace(rows[1], params=dict(rows[1].params, weights=str(tmp_path/"no.safetensors")))])


def test_other_images_are_refused(home, cnn, monkeypatch):
    F._OPEN.clear()
    monkeypatch.setattr(datasets.ImageSet, "fingerprint", "other")
    with pytest.raises(DataError, match="made with other images"): F.draw("figure4", "smoke", home, cnn[0])


def test_names_scales_and_options(home, cnn):
    rows, _ = cnn
    for bad, said in (("figure20", "there is no table or figure"), ("table3", "is a table")):
        with pytest.raises(ConfigError, match=said): F.draw(bad, "smoke", home, rows)
    with pytest.raises(ConfigError, match="Did you mean smoke"): F.draw("figure4", "smok", home, rows)
    with pytest.raises(ConfigError, match="Did you mean image"): F.draw("figure4", "smoke", home, rows, imag=3)
    with pytest.raises(ConfigError, match="is not drawn from"): F.draw("figure4", "smoke", home, rows, run="modle")
    with pytest.raises(ConfigError, match="there is no test image 99"): F.draw("figure4", "smoke", home, rows, image=99)
    with pytest.raises(ConfigError, match="no test image"): F.draw("figure4", "smoke", home, rows, image="x")
    with pytest.raises(ConfigError, match="there are 'full', 'topk'"): F.draw("figure4", "smoke", home, rows, model="half")


def test_an_image_by_number_and_by_name(home, cnn):
    ids = datasets.load("toybirds", **datasets.options(TOY)).test.ids
    a, b = (F.draw("figure4", "smoke", home, cnn[0], image=i, n=1, n_patches=1) for i in (5, ids[5]))
    assert a.caption == b.caption and ids[5] in a.caption and "median" not in a.caption


def test_classes_of_the_sheets(home, cnn):
    rows, _ = cnn
    assert "class Toybird 03:" in F.draw("figure10", "smoke", home, rows, classes="Toybird_01,Toybird 03", n=1).caption
    assert "class Toybird 02:" in F.draw("figure15", "smoke", home, rows, classes=1, n=1).caption
    with pytest.raises(ConfigError, match="Did you mean Toybird_01"): F.draw("figure9", "smoke", home, rows, classes="Toybird_1")
    with pytest.raises(ConfigError, match="there is no class 9"): F.draw("figure9", "smoke", home, rows, classes=9)
    d = F.draw("figure17", "smoke", home, rows, n=1)
    assert "ToyBirds has no class spider; Toybird 03 takes its place" in d.caption
    assert "no class daisy" in F.draw("figure5", "smoke", home, rows, n=1).caption and "no class" not in F.draw("figure5", "smoke", home, rows, image_class="Toybird_02", n=1).caption


class Set:
    "Classes of an imagined data set."
    def __init__(self, name, names, ids=()): self.name, self.class_names, self.class_ids, self.n_classes = name, list(names), list(ids), len(names)


def test_a_class_by_word():
    birds = Set("cub", ["001.Black_footed_Albatross", "005.Crested_Auklet", "006.Least_Auklet"])
    assert [F.class_of(w, birds) for w in ("005.Crested_Auklet", "crested auklet", "Auklet", "albatross", "black", 2)] == [1, 1, 1, 0, None, 2]
    things = Set("imagenet", ["wall clock", "spider monkey", "tabby", "digital clock"], [892, 381, 281, 530])
    assert [F.class_of(w, things) for w in ("clock", "cat", "spider", "n02123045", "spider monkey", "daisy")] == [3, 2, None, 2, 1, None]
    with pytest.raises(ConfigError, match="Did you mean"): F.class_of("dasy", things)
    assert [F.class_or_other(w, things, i, F.CLASSES)[0] for i, w in enumerate(F.CLASSES)] == [3, 2, 0, 1, 1]      # the two others in the places of three
    assert F.bird_classes(200) == [0, 40, 80, 119, 159, 199] and F.bird_classes(1) == [0] * 6


def test_a_set_too_large_to_extract_gives_the_same_presence(home, cnn, monkeypatch):
    o = F.one_of(F.look_up("figure9", "smoke", home, cnn[0]))
    rows = np.array([1, 4, 5])
    a = o.presence("topk", "train", rows)
    monkeypatch.setattr(F, "LARGE", 2)
    torch.testing.assert_close(o.presence("topk", "train", rows), a, atol=2e-3, rtol=0)   # the store holds half precision


def test_figure3_puts_pruned_weights_where_their_codes_stand(home, cnn):
    o = F.one_of(F.look_up("figure3", "smoke", home, cnn[0]))
    full, few = o.model("full"), o.model("topk")
    w, name = F._pruned(full, few, 3)
    assert name == "3 codes a class" and torch.equal(w > 0, logical_prune(full.classifier, 3).weight > 0)
    few.book.codes.data += .1
    try: assert "not tuned" in F._pruned(full, few, 3)[1]
    finally: F._OPEN.clear()


def sweep(home, scale=None):
    "Records of a sweep over codebook sizes: sizes x seeds, one missing."
    rows, values = [], {}
    for m in (10, 20):
        for s in (40, 41, 42):
            p = dict(TOY, backbone="b", weights="packaged", codebook_size=m, seed=s)
            rows.append(Row(f"size/{m}/{s}", "smoke", "cub", p, ("figure6",)))
            if (m, s) == (20, 42): continue
            values[m, s] = 50 + m / 10 + s / 7, 40 + m / 10 - s / 7
            leave(home, p, dict(zip(("top1", "top1_quantised_head", "top1_blackbox"), (*values[m, s], 90.))))
    return rows, values


def test_figure6_shows_the_means_of_the_records(tmp_path):
    rows, values = sweep(tmp_path)
    d = F.draw("figure6", "smoke", tmp_path, rows)
    assert d.missing == ["size/20/42"] and len(d.runs) == len(d.keys) == 5 and "1 of 6 runs are missing" in d.caption and "2 to 3 seeds" in d.caption
    for j, head in enumerate(("interpretable head", "pretrained head")):
        for m in (10, 20):
            v = [x[j] for k, x in values.items() if k[0] == m]
            r, = d.data[(d.data["head"] == head) & (d.data.codes == m)].itertuples()
            assert r.mean == pytest.approx(np.mean(v)) and r.sd == pytest.approx(np.std(v, ddof=1)) and r.n == len(v)
    ours, paper = d.fig.axes
    drawn = next(l for l in ours.lines if l.get_color() == F.COLOURS[1] and len(l.get_xdata()) == 2 and l.get_marker() == "o")
    assert drawn.get_ydata() == pytest.approx(d.data[d.data["head"] == "interpretable head"]["mean"].tolist())
    assert sorted(paper.lines[0].get_ydata()) == sorted(paper_values(7).query("metric == 'top1_acc' and row_method.str.startswith('interp')").value)
    assert paper.lines[0].get_linewidth() < drawn.get_linewidth()


def test_paper_and_ours_share_axes_only_at_the_papers_scale(tmp_path):
    t = F.size_data(pd.DataFrame([dict(recipe="paper", codebook_size=500, seed=40, top1=86., top1_quantised_head=84.)]))
    for comparable, n in ((False, 2), (True, 1)):
        fig = F.size_figure(t, F.paper_sizes(), comparable)
        assert len(fig.axes) == n and {l.get_text() for l in fig.legends[0].get_texts()} >= {"interpretable head, ours", "interpretable head, the paper's"}
        plt.close(fig)
    rows, _ = sweep(tmp_path)
    f = next((tmp_path/"cub").glob("*/run.json"))
    for f in (tmp_path/"cub").glob("*/run.json"): f.write_text(json.dumps(json.loads(f.read_text()) | dict(scale="paper")))
    assert len(F.draw("figure6", "paper", tmp_path, rows).fig.axes) == 1
    f.write_text(json.dumps(json.loads(f.read_text()) | dict(scale="small")))       # one run that cannot be compared is enough
    d = F.draw("figure6", "paper", tmp_path, rows)
    assert len(d.fig.axes) == 2 and d.scale == "small" and "cannot be compared" in d.caption


def test_figure7_shows_the_means_of_the_records(tmp_path):
    rows, values = [], {}
    for s in (40, 41):
        p = dict(TOY, backbone="b", weights="packaged", seed=s)
        values[s] = {f"{w}_{k}_K{n}": s + len(n) + len(k) + (7 if w == "codes" else 0) for w in ("top1", "codes") for k in ("frozen", "tuned") for n in ("full", "10", "5") if (k, n) != ("tuned", "full")}
        rows.append(Row(f"s{s}", "smoke", "sparsity", p, ("figure7",)))
        leave(tmp_path, p, values[s], "sparsity")
    d = F.draw("figure7", "smoke", tmp_path, rows)
    assert len(d.data) == 5 and d.missing == []
    for r in d.data.itertuples():
        k = next(k for k, v in F.KINDS.items() if v == r.kind)
        assert r.mean == np.mean([v[f"top1_{k}_K{r.K}"] for v in values.values()]) and r.codes == np.mean([v[f"codes_{k}_K{r.K}"] for v in values.values()])
    assert [t.get_text() for t in d.fig.axes[-1].get_xticklabels()] == ["all", "50", "30", "20", "10", "8", "5", "1"]
    paper = F.paper_sparsity()
    assert len(paper) == 12 and paper.set_index(["kind", "K"]).loc[("frozen", "full"), "mean"] == 87.76


def test_figure8_shows_what_the_records_say(tmp_path):
    keys = [k for k in F.LABELS if k != "accuracy"]
    metrics = {f"{k}{e}": .01 * i + .1 * j for i, k in enumerate(keys) for j, e in enumerate(("_full", "_topk", "_boxes_full", "_boxes_topk"))} | dict(top1_full=80., top1_topk=70., ts_full=float("nan"))
    p = dict(TOY, backbone="b", weights="packaged")
    rows = [Row("fb", "smoke", "funnybirds", p, ("figure8",))]
    leave(tmp_path, p, metrics, "funnybirds", dict(train=9, test=8, interventions=4))
    d = F.draw("figure8", "smoke", tmp_path, rows)
    assert list(d.data.index) == ["all codes", "3 codes a class"] and "4 of them with interventions" in d.caption
    assert d.data.loc["3 codes a class", "mean"] == metrics["mean_topk"] and d.data.loc["all codes", "accuracy"] == .8 and np.isnan(d.data.loc["all codes", "ts"])
    text = [t.get_text() for ax in d.fig.axes for t in ax.texts]
    assert all(f"{k} {v:.2f}" in text for k, v in dict(ProtoQuant=.73, InfoDisent=.68, ProtoPNet=.48).items())
    assert F.draw("figure8", "smoke", tmp_path, rows, way="boxes", models="topk").data.loc["3 codes a class", "mean"] == metrics["mean_boxes_topk"]
    with pytest.raises(F.NotRun, match="no scores"): F.draw("figure8", "smoke", tmp_path, rows, models="other")


def test_records_without_the_numbers(tmp_path):
    for name, experiment in (("figure6", "cub"), ("figure7", "sparsity")):
        p = dict(TOY, backbone="b", weights="packaged")
        leave(tmp_path, p, dict(codes=3), experiment)
        with pytest.raises(F.NotRun, match="have no accuracies"): F.draw(name, "smoke", tmp_path, [Row("r", "smoke", experiment, p, (name,))])
