"""The manifest: what is wrong with one is said before anything runs; grids, references, and which record belongs to which row."""
import json
import warnings

import pytest

pytest.importorskip("papermill")
nbformat = pytest.importorskip("nbformat")

from protoquant import cli, manifest as mf
from protoquant.core import ConfigError
from protoquant.results import SCHEMA

TEXT = """
smoke:
  defaults: {dataset: toybirds, classes: 8}
  files: {box: "@box/model.safetensors"}
  rows:
  - {id: box, experiment: blackbox, params: {epochs: 2}, serves: [table3], stands: {row_method: black-box}, files: [model.safetensors]}
  - id: sweep
    experiment: cub
    params: {weights: "@box", recipe: grounded}
    grid: {codebook_size: [20, 40], seed: [40, 41]}
    serves: [table7, figure6]
    stands: {row_method: "codebook={codebook_size}"}
    minutes: 2
  - {id: after, experiment: purity, params: {codebook_size: 20}, after: ["sweep/codebook_size=20/seed=40"], serves: [table5]}
"""


@pytest.fixture
def read(tmp_path):
    "Read the manifest, with one piece of its text replaced by another."
    def f(old="", new="", scale="smoke", **kw):
        assert not old or old in TEXT
        (tmp_path/"m.yaml").write_text(TEXT.replace(old, new) if old else new or TEXT)
        return mf.read_manifest(scale, tmp_path/"m.yaml", **kw)
    return f


def test_the_grid_is_spread_in_an_order_that_can_run(read):
    rows = read()
    assert [r.id for r in rows] == ["box", *(f"sweep/codebook_size={m}/seed={s}" for m in (20, 40) for s in (40, 41)), "after"]
    assert rows[1].params == dict(dataset="toybirds", classes=8, weights="@box/model.safetensors", recipe="grounded", codebook_size=20, seed=40)
    assert rows[1].stands == dict(row_method="codebook=20") and rows[1].minutes == 2 and rows[1].serves == ("table7", "figure6")
    assert [mf.needed(r) for r in rows[:2]] == [(), ("box",)] and mf.needed(rows[-1]) == ("sweep/codebook_size=20/seed=40",)
    assert read(scale="small") == []


@pytest.mark.parametrize("old,new,says", [
    ("dataset: toybirds", "dataset: toybird", "row box: no data set is called 'toybird'. Did you mean toybirds"),
    ("experiment: cub\n", "experiment: cubb\n", "row sweep: there is no experiment 'cubb'"),
    ("grid: {codebook_size", "grid: {codebok_size", "Did you mean codebook_size"),
    ("seed: [40, 41]}", "seed: [40, x]}", "parameter seed='x' is of type str; int is needed"),
    ("[table7, figure6]", "[tabel7]", "no table or figure 'tabel7'"),
    ("[table7, figure6]", "table7", "row sweep: serves='table7' is of type str; list is needed"),
    ("minutes: 2", "minutes: soon", "a number is needed"), ("minutes: 2", "minutes: yes", "a number is needed"), ("minutes: 2", "minuts: 2", "Did you mean minutes"),
    ("    experiment: cub\n", "", "row sweep has no 'experiment'"), ("{id: after", "{id: box", "two rows of this name"),
    ('weights: "@box"', 'weights: "@bix"', "no file named 'bix'. Did you mean box"), ('weights: "@box"', 'weights: "@bix/f"', "it waits for 'bix'. Did you mean box"),
    ("params: {epochs: 2}", 'params: {weights: "@after/x"}', None), ("params: {epochs: 2}", 'params: {weights: "@sweep/codebook_size=20/seed=40/x"}', "wait for each other"),
    ("codebook={codebook_size}", "codebook={codebok_size}", "names the parameter 'codebok_size'"), ("row_method: black-box", "method: black-box", "'stands' has 'method'"),
    ("  rows:", "  row:", "has 'row'. Did you mean rows"), ("  rows:", "  rows: {}\n  files:", None), ("smoke:", "smok:", "has to have the scales"),
    ("smoke:", "smoke: [", "is not YAML"), ("- {id: box", "- just text\n  - {id: box", "row number 1 is a str")])
def test_what_is_wrong_is_named(read, old, new, says):
    if says is None:
        with pytest.raises(ConfigError): read(old, new)
    else:
        with pytest.raises(ConfigError) as e: read(old, new)
        assert says in str(e.value) and "\n" not in str(e.value)


def test_a_manifest_that_is_not_there_and_an_unknown_scale(read, tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"): mf.read_manifest("smoke", tmp_path/"none.yaml")
    with pytest.raises(ConfigError, match="Did you mean small"): read(scale="smal")
    for new in ("[1, 2]", "smoke: 3"):
        with pytest.raises(ConfigError): read(new=new)


def test_a_file_of_ones_own_takes_the_place_of_a_row(read):
    rows = read(files=dict(box="mine.safetensors"))
    assert rows[-1].id == "after" and all(not mf.needed(r) for r in rows if r.id.startswith("sweep"))
    assert {r.params["weights"] for r in rows if r.id.startswith("sweep")} == {"mine.safetensors"}
    with pytest.raises(ConfigError, match="no file named 'bux'. Did you mean box"): read(files=dict(bux="x"))


def test_rows_of_an_artefact(read):
    rows = read()
    ids = lambda *a, **kw: [r.id for r in mf.rows_for(rows, *a, **kw)]
    assert ids(["Table 3"]) == ["box"] and ids(["table5"], needs=False) == ["after"] and ids(["table5"]) == ["box", "sweep/codebook_size=20/seed=40", "after"]
    assert ids() == [r.id for r in rows] and ids(["figure1"]) == []
    with pytest.raises(ConfigError, match="Did you mean figure"): ids(["figur6"])


# ---- records

@pytest.fixture
def leave(tmp_path):
    "Leave a record in tmp_path/results; returns its folder."
    def f(experiment="cub", key="a", drop=(), date="2026-01-01T00:00:00+00:00", **params):
        known = {k: d for k, (d, _) in cli.parameters(cli.find_experiment(experiment)).items()}
        given = {**known, "dataset": "toybirds", "classes": 8, **params}
        r = dict(schema=SCHEMA, experiment=experiment, key=key, parameters={k: v for k, v in given.items() if k not in drop}, metrics=dict(top1=70.), n_images=dict(train=1), scale="smoke",
                 hardware="h", seconds=1., date=date, git=dict(commit=None))
        folder = tmp_path/"results"/experiment/key
        folder.mkdir(parents=True, exist_ok=True)
        (folder/"run.json").write_text(json.dumps(r))
        return folder
    return f


SWEEP = dict(weights=".../model.safetensors", recipe="grounded", codebook_size=20, seed=40)


def found(read, tmp_path):
    return {i: r["key"] for i, r in mf.found_runs(read(), tmp_path/"results").items() if r}


def test_a_record_belongs_to_the_row_with_its_parameters(read, leave, tmp_path):
    assert found(read, tmp_path) == {}
    leave(**SWEEP)
    leave(key="b", **{**SWEEP, "seed": 41})
    leave(key="other", **{**SWEEP, "seed": 43})
    leave(key="image-net", **{**SWEEP, "codebook_size": 40, "weights": "packaged"})       # another backbone, not the row's file
    assert found(read, tmp_path) == {"sweep/codebook_size=20/seed=40": "a", "sweep/codebook_size=20/seed=41": "b"}
    leave(key="newer", date="2026-02-01T00:00:00+00:00", **SWEEP)
    assert found(read, tmp_path)["sweep/codebook_size=20/seed=40"] == "newer"
    m = mf.measured(read(), mf.found_runs(read(), tmp_path/"results"))
    assert list(m.row) == ["sweep/codebook_size=20/seed=40", "sweep/codebook_size=20/seed=41"] and list(m.top1) == [70., 70.] and m.stands_row_method[0] == "codebook=20" and m.n_train[0] == 1


@pytest.mark.parametrize("weights", ["model.safetensors", "results/blackbox/x/model.safetensors", ".../my box.safetensors"])
def test_weights_from_a_file_are_a_file_wherever_it_lies(read, leave, tmp_path, weights):
    leave(**{**SWEEP, "weights": weights})
    assert list(found(read, tmp_path)) == ["sweep/codebook_size=20/seed=40"]


def test_a_record_from_before_a_parameter_was_added_still_counts(read, leave, tmp_path):
    leave(drop=("val_fraction",), **SWEEP)      # its default is a number: what was used then cannot be known
    assert found(read, tmp_path) == {}
    leave(drop=("epochs_stage1", "img_size", "device"), **SWEEP)   # their default is None
    assert list(found(read, tmp_path)) == ["sweep/codebook_size=20/seed=40"]
    leave(epochs_stage1=3, **SWEEP)             # set to something: another run
    assert found(read, tmp_path) == {}


def test_a_row_without_its_files_is_not_complete(read, leave, tmp_path):
    folder = leave("blackbox", epochs=2)
    assert found(read, tmp_path) == {}
    (folder/"model.safetensors").touch()
    assert found(read, tmp_path) == {"box": "a"}


def test_damaged_and_older_records_are_left_out_by_name(read, leave, tmp_path):
    good = leave(**SWEEP)
    base = json.loads((good/"run.json").read_text())
    bad = dict(half="{ \"schema\"", empty="", list="[1]", old=json.dumps(base | dict(schema=SCHEMA - 1)), dateless=json.dumps({k: v for k, v in base.items() if k != "date"}), text=json.dumps(base | dict(parameters="x")))
    for key, text in bad.items():
        (tmp_path/"results"/"cub"/key).mkdir()
        (tmp_path/"results"/"cub"/key/"run.json").write_text(text)
    (tmp_path/"results"/"cub"/"binary").mkdir()
    (tmp_path/"results"/"cub"/"binary"/"run.json").write_bytes(b"\xff\xfe\x00")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert found(read, tmp_path) == {"sweep/codebook_size=20/seed=40": "a"}
    said = [str(w.message) for w in caught if "was left out" in str(w.message)]
    assert len(said) == 7 and all(sum(f"/{k}/run.json" in s for s in said) == 1 for k in [*bad, "binary"])
    assert any("its schema is 0, this version reads 1; run it again" in s for s in said) and any("it has no date" in s for s in said)


def test_overview(read, leave, tmp_path):
    leave(**SWEEP)
    rows = read()
    o = mf.overview(rows, mf.found_runs(rows, tmp_path/"results")).set_index("artefact")
    assert len(o) == 30 and tuple(o.loc["table7", ["runs", "complete", "minutes"]]) == (4, 1, 7.) and tuple(o.loc["figure1", ["runs", "minutes"]]) == (0, 0.)


def test_the_manifest_of_the_package_has_what_every_artefact_needs():
    missing = {r["experiment"] for s in mf.SCALES for r in mf._load(mf.manifest_path())[s]["rows"]} - set(cli.experiments(cli.find_nbs()))
    if missing: pytest.skip(f"no notebook yet: {', '.join(sorted(missing))}")
    for scale in mf.SCALES:
        rows = mf.read_manifest(scale)
        assert not [a for a in mf.ARTEFACTS if not any(a in r.serves for r in rows)], scale
