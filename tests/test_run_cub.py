"""nbs/run_cub.ipynb through the command line, on a tiny ToyBirds with a tiny random backbone: the whole way from images to a record."""
from functools import partial
import json

import pytest

import pieces
from pieces import run_experiment

pytest.importorskip("papermill")
TINY = dict(dataset="toybirds", classes=4, n_train_per_class=8, n_test_per_class=3, backbone="test_resnet", weights="random", codebook_size=24, topk=3, epochs_stage1=3,
            epochs_stage2=6, val_fraction=.25)


run = partial(run_experiment, "cub", tiny=TINY)
records = lambda tmp, experiment="cub": pieces.records(tmp, experiment)


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.mark.parametrize("recipe", ["grounded", "paper", "released"])
def test_a_recipe_runs_and_leaves_everything(tmp, recipe):
    r = run(tmp, recipe=recipe)
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = [(f, r) for f, r in records(tmp).items() if r["parameters"]["recipe"] == recipe]
    m = rec["metrics"]
    need = {"top1_linear_probe", "top1_blackbox", "top1_quantised_head", "top1", "top1_last", "top1_topk", "codes", "codes_used", "grounding_cosine", "seconds_stage1", "seconds_stage2"}
    assert need <= set(m) and m["codes"] == 24 and 0 <= m["top1"] <= 100 and rec["n_images"] == dict(train=24, val=8, test=12) and rec["scale"] == "smoke"
    assert m["top1_topk_exact"] == pytest.approx(m["top1_topk"]) and m["local_size_topk"] <= 3
    assert (m["grounding_cosine"] == pytest.approx(1, abs=1e-4)) == (recipe == "grounded")
    assert rec["recipe"]["name"] == recipe and rec["git"].keys() == {"commit", "dirty"}
    for name in ("executed.ipynb", "model.safetensors", "model_topk.safetensors", "figures/explanation.png"): assert (folder/name).exists()
    assert "ProtoQuant, 3 codes per class" in r.stdout and str(tmp) not in (folder/"run.json").read_text()


def test_the_same_run_is_not_repeated_and_a_record_alone_is_not_enough(tmp):
    (folder, before), = [(f, r) for f, r in records(tmp).items() if r["parameters"]["recipe"] == "grounded"]
    assert "--force runs it again" in run(tmp, recipe="grounded").stdout
    assert json.loads((folder/"run.json").read_text()) == before
    (folder/"model.safetensors").unlink()
    again = run(tmp, recipe="grounded")
    assert again.returncode == 0 and "--force" not in again.stdout
    after = json.loads((folder/"run.json").read_text())
    same = lambda r: {k: v for k, v in r["metrics"].items() if "second" not in k}
    assert same(after) == same(before) and (folder/"model.safetensors").exists()      # the same seed, the same numbers


def test_saved_models_load_and_agree_with_the_record(tmp):
    import warnings
    import torch
    from protoquant import backbones, datasets
    from protoquant.core import WeightsError
    from protoquant.model import ProtoQuant
    (folder, rec), = [(f, r) for f, r in records(tmp).items() if r["parameters"]["recipe"] == "grounded"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(TINY.get("seed", 40))
        other = backbones.create("test_vit", "random", num_classes=4)
    with pytest.raises(WeightsError, match=other.hash): ProtoQuant.load(folder/"model.safetensors", other)


def test_two_views_of_each_training_image(tmp):
    r = run(tmp, views=2)
    assert r.returncode == 0, r.stderr[-3000:]


@pytest.mark.parametrize("params,says", [(dict(codebook_size=0), "at least one code"), (dict(codebook_size=10**6), "larger than the number of training tokens"), (dict(topk=25), "topk=25"),
                                         (dict(backbone="test_resnett"), "Did you mean"), (dict(recipe="groundet"), "Did you mean grounded"), (dict(dataset="toybird"), "toybirds"),
                                         (dict(dataset="cub", data_root="nowhere"), "protoquant run cub -p dataset toybirds")])
def test_mistakes_stop_the_run_with_what_to_do(tmp, params, says):
    if params.get("dataset") == "cub": params = {**params, "classes": None, "n_train_per_class": None, "n_test_per_class": None, "data_root": str(tmp/"nowhere")}
    r = run(tmp, **params)
    assert r.returncode and says in r.stderr, r.stderr[-1500:]
    assert not [x for x in records(tmp).values() if x["parameters"].items() >= params.items()]
