"""Tables from records: arithmetic by hand, every row of the paper once, what may be compared, escaping, footnotes. All numbers in these records are invented."""
import functools
import re
import statistics
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from protoquant import cli, tables
from protoquant.core import ConfigError, write_json
from protoquant.manifest import Row, rows_for
from protoquant.results import FULL, SCHEMA, load_runs, paper_values
from protoquant.tables import CELLS, LAYOUTS, NOTES, TABLES, Table, pointed_at, render

PAPER = [str(i) for i in range(1, 9)]
BESIDE = dict(backbone="ConvNeXt-Tiny", dataset="CUB-200-2011")
SMALL = dict(train=1350, val=150, test=1389)
ALL = dict(train=5395, val=599, test=5794)


@functools.cache
def defaults(experiment): return {k: d for k, (d, _) in cli.parameters(cli.find_experiment(experiment)).items()}


def row(id, experiment="cub", serves=("table3",), stands=BESIDE, scale="small", files=(), **params): return Row(id, scale, experiment, params, serves, stands, files=files)


def record(folder, r, metrics, scale="small", n_images=None, weights="0f", **more):
    "Write a record that fits a row."
    at = Path(folder)/r.experiment/re.sub(r"\W+", "-", r.id)
    parameters = {**defaults(r.experiment), **r.params}
    write_json(at/"run.json", dict(dict(schema=SCHEMA, experiment=r.experiment, key=at.name, parameters=parameters, metrics=metrics, n_images=n_images or SMALL, scale=scale, hardware="a desk", seconds=1, weights=weights,
                                        git=dict(commit=None, dirty=None), date="2026-01-01T00:00:00+00:00", crop="bbox"), **more))
    for f in r.files: (at/f).write_text("")
    return at


def cub(seed, recipe="grounded", size=500, weights="packaged", **kw): return row(f"cub/{recipe}/{size}/{seed}/{weights}", codebook_size=size, recipe=recipe, seed=seed, weights=weights, **kw)


def paper_run(folder, serves=("table3",), n_images=ALL, **metrics):
    "A run at scale paper."
    r = row("big", stands=dict(row_method="ProtoQuant"), scale="paper", serves=serves, dataset="cub", backbone="convnext_tiny", weights="@box", codebook_size=2000, recipe="paper")
    record(folder, r, metrics, "paper", n_images)
    return r


def ours(t, **same):
    d = t.data[t.data.source == "ours"]
    for k, v in same.items(): d = d[d[k] == v]
    return d


def line(t, label): return t.frame[t.frame[t.columns[0]] == label]


# arithmetic

def test_mean_sd_and_number_by_hand(tmp_path):
    rows = [cub(s) for s in (40, 41, 42)]
    for r, v in zip(rows, (81., 82., 86.)): record(tmp_path, r, dict(top1=v))
    t = render("table3", "small", tmp_path, rows)
    d, = ours(t, variant="").itertuples()
    assert (d.ours, d.n) == (83., 3) and d.sd == pytest.approx(7 ** .5) and d.paper == 87.6 and (d.row_method, d.backbone, d.dataset) == ("ProtoQuant", "ConvNeXt-Tiny", "CUB-200-2011")
    assert line(t, "ours")["CUB-200"].tolist() == ["83.0 ± 2.6 (3)"]


def test_one_run_has_no_spread(tmp_path):
    record(tmp_path, cub(40), dict(top1=81.))
    t = render("table3", "small", tmp_path, [cub(40)])
    assert line(t, "ours")["CUB-200"].tolist() == ["81.0 (1)"] and pd.isna(ours(t).sd.iloc[0])


def test_recipes_are_lines_of_their_own(tmp_path):
    rows = [cub(s, r) for r in ("grounded", "paper") for s in (40, 41)]
    for r, v in zip(rows, (80., 82., 60., 62.)): record(tmp_path, r, dict(top1=v))
    t = render("table3", "small", tmp_path, rows)
    assert dict(zip(line(t, "ours").recipe, line(t, "ours")["CUB-200"])) == {"grounded": "81.0 ± 1.4 (2)", "paper": "61.0 ± 1.4 (2)"}


def test_what_differs_in_more_than_the_seed_is_not_averaged(tmp_path):
    rows = [cub(40), cub(41, size=1000)]
    for r, v in zip(rows, (80., 90.)): record(tmp_path, r, dict(top1=v))
    t = render("table3", "small", tmp_path, rows)
    assert sorted(line(t, "ours")["CUB-200"]) == ["80.0 (1)", "90.0 (1)"] and line(t, "ours").run.nunique() == 2


def test_folds_are_averaged(tmp_path):
    rows = [row(f"f{k}", stands=dict(row_method="ProtoQuant", backbone="ConvNeXt-Tiny", dataset="Oxford-Flowers-102", note="folds"), dataset="flowers", protocol="crossval", folds=2, fold=k, recipe="grounded") for k in (0, 1)]
    for r, v in zip(rows, (70., 74.)): record(tmp_path, r, dict(top1=v), n_images=dict(train=900, val=100, test=1020))
    t = render("table3", "small", tmp_path, rows)
    assert line(t, "ours, folds")["Flowers [1]"].tolist() == ["72.0 ± 2.8 (2)"] and "folds 0, 1" in " ".join(t.legend.values()) and ours(t).status.iloc[0] == "another backbone, another split: an indication"


def test_a_probe_counts_once_a_seed_and_a_black_box_once(tmp_path):
    rows = [cub(s, r) for r in ("grounded", "paper") for s in (40, 41)]
    for r, v in zip(rows, (70., 72., 70., 72.)): record(tmp_path, r, dict(top1=50., top1_linear_probe=v, top1_blackbox=79.))
    t = render("table3", "small", tmp_path, rows)
    probe, box = ours(t, variant="linear probe"), ours(t, row_method="black-box")
    assert (len(probe), probe.ours.iloc[0], probe.n.iloc[0]) == (1, 71., 2) and (len(box), box.n.iloc[0], box.ours.iloc[0]) == (1, 1, 79.)


def test_a_black_box_made_by_the_manifest_is_not_shown_twice(tmp_path):
    box = row("box", "blackbox", weights="packaged", files=("model.safetensors",))
    user = row("user", weights="@box/model.safetensors", recipe="grounded")
    record(tmp_path, box, dict(top1_blackbox=80.))
    record(tmp_path, user, dict(top1=79., top1_blackbox=80.))
    assert len(ours(render("table3", "small", tmp_path, [box, user]), row_method="black-box")) == 1
    (tmp_path/"blackbox"/"box"/"run.json").unlink()
    assert len(ours(render("table3", "small", tmp_path, [box, user]), row_method="black-box")) == 1     # measured by its user


def test_differences_are_taken_inside_runs(tmp_path):
    rows = [cub(s, serves=("table7",)) for s in (40, 41)]
    for r, (a, b) in zip(rows, ((80., 78.), (90., 84.))): record(tmp_path, r, dict(top1=a, top1_quantised_head=b))
    t = render("table7", "small", tmp_path, rows)
    d, = ours(t, metric="delta_top1").itertuples()
    assert d.ours == 4. and d.sd == pytest.approx(statistics.stdev([2, 6])) and line(t, "500")["difference, ours"].tolist() == ["+4.00 ± 2.83 (2)"]


def test_sizes_that_the_paper_lacks_stand_in_order(tmp_path):
    rows = [cub(40, size=m, serves=("table7",), scale="smoke", dataset="toybirds") for m in (20, 700, 1000)]
    for r in rows: record(tmp_path, r, dict(top1=80., top1_quantised_head=78.), "smoke")
    t = render("table7", "smoke", tmp_path, rows)
    assert t.frame.codes.tolist() == ["20", "500", "700", "1000", "2000", "4000", "8000", "16000", "32000", "64000", "128000"]
    assert line(t, "20").status.item() == line(t, "700").status.item() == "not in the paper" and line(t, "1000").status.item() == "toy images: not comparable"


def test_purity_and_seconds_have_the_records_own_spread(tmp_path):
    p = row("p", "purity", ("table5",), dict(row_method="ProtoQuant", backbone="frozen backbone", dataset="CUB-200-2011"), reading="softmax")
    record(tmp_path, p, dict(purity_train_full=.4, purity_train_sd_full=.2, prototypes_full=321, purity_train_topk=.3), n_images=dict(train=1500, test=1389))
    t = render("table5", "small", tmp_path, [p])
    assert line(t, "ours")["purity, train"].item() == "0.40 ± 0.20 (321)" and line(t, "ours")["purity, test"].item() == "–" and line(t, "ours, 10 codes a class")["purity, train"].item() == "0.30"
    s = row("s", "timing", ("table6",), epochs=30, discard=2)
    record(tmp_path, s, dict(seconds_full=20., seconds_full_sd=.5, epochs_counted_full=28, seconds_frozen=12., seconds_frozen_sd=.25, epochs_counted_frozen=28, saved_frozen=40., seconds_store=1., batch_used=32))
    t = render("table6", "small", tmp_path, [s])
    assert t.frame.ours.tolist() == ["20.0 ± 0.5 (28)", "12.0 ± 0.2 (28)", "1.0", "8.0 (1)", "19.0 (1)", "40.0 (1)"] and "a desk" in t.legend["a"] and "batch 32" in t.legend["a"]


def test_table8_shows_codes_and_what_the_paper_lacks(tmp_path):
    rows = [row(f"s{s}", "sparsity", ("table8",), seed=s, recipe="grounded") for s in (40, 41)]
    for r, n in zip(rows, (100, 103)): record(tmp_path, r, dict(top1_frozen_K10=70., codes_frozen_K10=n, top1_tuned_K50=80., codes_tuned_K50=90, top1_frozen_Kfull=81., codes_frozen_Kfull=500))
    t = render("table8", "small", tmp_path, rows)
    assert line(t, "10")["frozen, codes, ours"].item() == "101.5 ± 2.1 (2)" and line(t, "full")["frozen, codes, ours"].item() == "500 ± 0 (2)"
    assert line(t, "50")["tuned, acc., paper"].item() == "–" and line(t, "50")["tuned, acc., ours"].item() == "80.00 ± 0.00 (2)" and line(t, "1").status.item() == "not run"


def test_a_real_attack_stands_apart(tmp_path):
    r = row("m", "misalignment", ("table2",), recipe="grounded")
    record(tmp_path, r, {f"{m}_{a}_softmax_top_proto_full": v for m in tables.SCORES for a, v in (("noise", 5.), ("pgd", 99.))}, n_images=dict(test=300, pgd=16))
    t = render("table2", "small", tmp_path, [r])
    assert set(t.frame[t.frame["PAC ↓"].str.startswith("99")].backbone) == {tables.PGD} and t.frame.backbone.iloc[-1] == tables.PGD
    assert line(t, "ours").backbone.tolist() == ["CNN"] and line(t, "ours")["PAC ↓"].tolist() == ["5.00 (1)"] and "16 under pgd" in t.legend["a"]


# the paper's rows

@pytest.mark.parametrize("n", PAPER)
def test_every_row_of_the_paper_once_and_in_its_order(n, tmp_path):
    rows = [cub(40, r, serves=(f"table{n}",)) for r in ("grounded", "paper")]
    for r in rows: record(tmp_path, r, dict(top1=81., top1_quantised_head=80., top1_topk=70., grounding_cosine_min=1.))
    for t in (render(f"table{n}", "small", tmp_path, rows), render(f"table{n}", "small", tmp_path/"none", [])):
        got, want = t.data[t.data.source == "paper"], paper_values(n)
        assert got[["row_method", "metric", "paper"]].values.tolist() == want[["row_method", "metric", "value"]].values.tolist()
        text = " ".join(c for _, cells in t.lines() if cells and not cells[0].startswith("ours") for c in cells)
        if n not in "1": assert all(f"{abs(v):g}" in text for v in want.value)


@pytest.mark.parametrize("n", ["2", "3", "5"])
def test_stacked_tables_have_one_line_a_method(n):
    t = render(f"table{n}", "small", "none", [])
    want = paper_values(n).drop_duplicates(["row_method", "backbone"])
    assert [re.sub(r" \[\d+\]", "", x) for x in t.frame[t.columns[0]]] == [tables._label(m) for m in want.row_method]


def test_blocks_are_the_papers():
    heads = [b for b, cells in render("table3", "small", "none", []).lines() if b]
    assert heads == ["ResNet-50", "ConvNeXt-Tiny", "DeiT-Small [3]"]


def test_every_cell_is_a_row_of_the_paper_or_a_variant():
    for t, cells in CELLS.items():
        known = {(re.sub(r"codebook=\d+", "codebook={codebook_size}", m), c) for m, c in zip(paper_values(t).row_method, paper_values(t).metric)}
        assert {(c.row, c.column) for c in cells if not c.variant} >= {k for k in known if "ProtoQuant" in k[0] or t in "678"}
        assert all((c.row, c.column) in known or "tuned" in c.row for c in cells if not c.variant)


# what may be compared

def test_a_difference_only_at_scale_paper(tmp_path):
    r = paper_run(tmp_path, top1=87.)
    t = render("table3", "paper", tmp_path, [r])
    assert ours(t).difference.item() == pytest.approx(-.6) and ours(t).status.item() == "measured" and line(t, "ours")["CUB-200"].item() == "87.0 (1), Δ −0.6"
    small = cub(40)
    record(tmp_path, small, dict(top1=87.))
    t = render("table3", "small", tmp_path, [small])
    assert ours(t).difference.isna().all() and not any("Δ" in v for v in t.frame.values.ravel())


@pytest.mark.parametrize("params,n,stands,scale,status", [
    (dict(dataset="toybirds"), SMALL, BESIDE, "smoke", "toy images: not comparable"),
    (dict(dataset="cub"), SMALL, BESIDE, "small", "another backbone, part of the data: an indication"),
    (dict(dataset="cub"), ALL, BESIDE, "small", "another backbone: an indication"),
    (dict(dataset="cub", backbone="convnext_tiny"), SMALL, {}, "small", "part of the data: an indication"),
    (dict(dataset="cub", backbone="convnext_tiny"), ALL, {}, "paper", "measured"),
    (dict(dataset="cub", backbone="resnet50"), ALL, BESIDE, "paper", "another backbone: an indication"),
    (dict(dataset="dogs", backbone="convnext_tiny"), dict(train=12000, test=8580), BESIDE, "paper", "another data set: an indication"),
    (dict(dataset="cub", backbone="convnext_tiny", img_size=160), ALL, {}, "small", "not the setting of the paper: an indication")])
def test_status_says_what_a_number_is(tmp_path, params, n, stands, scale, status):
    r = row("r", stands=stands, scale=scale, recipe="grounded", **params)
    record(tmp_path, r, dict(top1=80.), scale, n)
    d = ours(render("table3", scale, tmp_path, [r]))
    assert d.status.item() == status and d.difference.notna().item() == (status == "measured")


def test_statuses_of_the_papers_lines(tmp_path):
    record(tmp_path, cub(40), dict(top1=80.))
    t = render("table3", "small", tmp_path, [cub(40)])
    status = {(r.backbone.split(" [")[0], r.method): r.status for r in t.frame.itertuples() if not r.method.startswith("ours")}
    assert status["ConvNeXt-Tiny", "ProtoQuant"] == "the paper's" and status["DeiT-Small", "ProtoQuant"] == status["ResNet-50", "black box"] == "not run" and status["ResNet-50", "PIP-Net"] == "the paper's"


def test_what_belongs_to_no_row_of_the_paper_is_apart(tmp_path):
    r = cub(40, serves=("table4",), scale="smoke", dataset="toybirds")
    record(tmp_path, r, dict(top1=80.), "smoke")
    t = render("table4", "smoke", tmp_path, [r])
    assert line(t, "ours, ProtoQuant").backbone.item() == "toybirds, tf_efficientnet_lite0: not in the paper" and line(t, "ours, ProtoQuant").paper.item() == "–"


def test_part_of_imagenet_says_so(tmp_path):
    r = row("i", serves=("table4",), stands=dict(row_method="ProtoQuant", backbone="ConvNeXt-Large", dataset="ImageNet-1k"), dataset="imagenet10", recipe="grounded")
    record(tmp_path, r, dict(top1=95.))
    t = render("table4", "small", tmp_path, [r])
    assert ours(t).status.item() == "another backbone, part of the data: an indication" and t.frame[t.frame.ours != "–"].paper.item() == "82.87 ± 0.3"


# Table 1

def test_properties_are_computed(tmp_path):
    rows = [cub(40, serves=("table1",)), cub(41, serves=("table1",), backbone="test_vit"), cub(40, "paper", serves=("table1",)), cub(40, "released", serves=("table1",), dataset="imagenet10")]
    for r, (g, changed) in zip(rows, ((1 - 5e-5, 0), (1., 0), (.4, 1), (1 - 2e-4, None))): record(tmp_path, r, dict(top1=80., grounding_cosine_min=g, backbone_changed=changed))
    t = render("table1", "small", tmp_path, rows)
    got = {r.recipe: r for r in line(t, "ours").itertuples(index=False)}
    cols = list(t.frame).index("grounded prototypes")
    assert list(got["grounded"])[cols:cols + 4] == ["✓ (2 of 2 runs)", "✓ (2 of 2 runs)", "✓ (CNN, ViT)", "not run"]
    assert list(got["paper"])[cols:cols + 4] == ["✗ (0 of 1 runs)", "✗ (0 of 1 runs)", "CNN only", "not run"]
    assert list(got["released"])[cols:cols + 4] == ["✗ (0 of 1 runs)", "not recorded", "CNN only", "✓ (imagenet10, scale small)"]


def test_ticks_are_the_papers():
    f = render("table1", "small", "none", []).frame
    want = paper_values(1).pivot(index="row_method", columns="metric", values="value")
    for r in f.itertuples(index=False):
        assert [c.startswith("✓") for c in list(r)[1:5]] == [bool(want.loc[r.method, m]) for m in LAYOUTS["1"].columns]


# footnotes

def test_every_footnote_points_at_a_row_of_the_paper_and_names_its_source():
    assert all(len(pointed_at(a)) for n in NOTES for a in n["at"]) and all(re.fullmatch(r"PROTOCOLS 0, row \d+", n["source"]) and n["text"].endswith(".") for n in NOTES)
    assert {15, 16, 17, 18, 19, 20, 21, 22, 23, 25, 27, 28, 33, 34} <= {int(n["source"].split()[-1]) for n in NOTES}


@pytest.mark.parametrize("n", PAPER)
def test_every_footnote_of_a_table_is_marked_and_said(n):
    t = render(f"table{n}", "small", "none", [])
    text = " ".join([*t.frame.columns, *t.frame.values.ravel()])
    marks = {int(m) for m in re.findall(r"\[(\d+)\]", text)}
    assert marks == set(range(1, len(marks) + 1)) and len([x for x in t.notes if x.startswith("[")]) == len(marks)
    assert {x["text"] for x in NOTES if any(a["table"] == n for a in x["at"])} == {re.sub(r"^\[\d+\] | \(PROTOCOLS.*\)$", "", x) for x in t.notes}


def test_marks_stand_at_their_numbers():
    t = render("table2", "small", "none", [])
    tree, = [r for r in t.frame.itertuples(index=False) if r.method.startswith("ProtoTree")]
    assert re.search(r"\[\d+\]$", tree.method) and "ProtoPNet" in t.notes[int(tree.method[-2])]
    t = render("table7", "small", "none", [])
    assert t.frame[t.frame["difference, paper"].str.contains(r"\[")].codes.tolist() == ["500", "1000"] and t.frame[t.frame["pretrained head, paper"].str.contains(r"\[")].codes.tolist() == ["64000"]


# forms

def nasty(): return Table("table3", "small", "Table 3. A & B", pd.DataFrame([["50 % of a_b & c | d [1]", "±1 × 2, Δ −0.2"], ["ours <b>", "*x* ~ $5 #1 {y} \\z ^"]], columns=["m_x", "↓ & ↑"]), pd.DataFrame(), "Is a < b & c?", ["[1] note_1 is 5 %."], {"a": "w_1 & <v>"}, missing=["x"])


def test_latex_is_escaped():
    s = nasty().to_latex()
    for want in (r"50 \% of a\_b \& c $|$ d\textsuperscript{1} & $\pm$1 $\times$ 2, $\Delta$ $-$0.2 \\", r"\textbf{ours $<$b$>$} & *x* \textasciitilde{} \$5 \#1 \{y\} \textbackslash{}z \textasciicircum{} \\", r"m\_x & $\downarrow$ \& $\uparrow$ \\",
                 r"\toprule", r"\midrule", r"\bottomrule", r"\caption{A \& B (runs of the scale small)}", r"w\_1 \& $<$v$>$.", r"\texttt{protoquant reproduce --scale small --only table3}"): assert want in s, want
    body = s.split("\n", 1)[1]
    assert not re.search(r"(?<!\\)[%#_]", body) and all(ord(c) < 128 for c in s)


@pytest.mark.parametrize("n", PAPER)
def test_latex_of_real_tables_is_ascii_with_equal_columns(n, tmp_path):
    record(tmp_path, cub(40), dict(top1=80., top1_linear_probe=70.))
    s = render(f"table{n}", "small", tmp_path, [cub(40, serves=(f"table{n}",))]).to_latex()
    assert all(ord(c) < 128 for c in s), {c for c in s if ord(c) >= 128}
    cols = len(re.search(r"\\begin\{tabular\}\{(l+)\}", s).group(1))
    body = s.split(r"\toprule")[1].split(r"\bottomrule")[0]
    assert all(len(re.findall(r"(?<!\\)&", x)) == cols - 1 for x in body.split("\n") if x.endswith(r"\\") and "multicolumn" not in x)


def test_markdown_is_escaped():
    s = nasty().to_markdown()
    assert r"| 50 % of a_b & c \| d<sup>1</sup> | ±1 × 2, Δ −0.2 |" in s and r"| **ours \<b\>** | \*x\* \~ \$5 #1 {y} \\z ^ |" in s and "`protoquant reproduce --scale small --only table3`" in s
    assert {len(re.findall(r"(?<!\\)\|", x)) for x in s.split("\n") if x.startswith("|")} == {3}


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.seen = [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        if tag not in ("meta", "br"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag
    def handle_data(self, data): self.text.append(data)


def test_html_is_escaped_and_closed():
    s = nasty().to_html()
    page = Tags(s)
    assert not page.open and page.seen.count("td") == 4 and "ours <b>" in page.text and "Table 3. A & B" in page.text and "&lt;v&gt;" in s and "src=" not in s and "href=" not in s


@pytest.mark.parametrize("name", TABLES)
def test_a_table_without_runs_renders_in_all_forms(name):
    rows = [] if name not in ("table1", "table3") else [cub(40, serves=(name,))]
    t = render(name, "small", "none", rows)
    assert not t.runs and t.missing == [r.id for r in rows] and t.command == f"protoquant reproduce --scale small --only {name}" and len(t.frame)
    assert "not run" in t.to_markdown() and not Tags(t.to_html()).open and r"\end{table}" in t.to_latex() and t._repr_markdown_() == t.to_markdown() and t.short()
    if rows: assert all(x in f for f in (t.to_markdown(), t.to_html()) for x in (t.command, "Not run at scale small"))


def test_the_short_form_has_our_lines_and_those_beside_them(tmp_path):
    record(tmp_path, cub(40), dict(top1=80., top1_topk=75.))
    s = render("table3", "small", tmp_path, [cub(40)]).short()
    assert [x.split("|")[1].strip() for x in s.split("\n") if x.startswith("|")][2:] == ["**ConvNeXt-Tiny**", "ProtoQuant", "**ours**", "**ours, 10 codes a class**"] and "<sup>a</sup> cub" in s and "<sup>1</sup>" not in s and "small" in s


# beyond the paper

@pytest.fixture
def experiments(tmp_path):
    "A folder of experiments of our own."
    nbs = tmp_path/"clone"/"nbs"
    for name, more in (("disagreements", "seed = 40\n"), ("seeds", 'recipes = "a,b_c"\n')):
        cell = dict(cell_type="code", id="a", metadata=dict(tags=["parameters"]), source=f'dataset = "cub"\nbackbone = "x"\nweights = "packaged"\n{more}', outputs=[], execution_count=None)
        write_json(nbs/f"run_{name}.ipynb", dict(cells=[cell], metadata={}, nbformat=4, nbformat_minor=5))
    write_json(nbs.parent/"settings.ini", {})
    return nbs.parent


def own_record(folder, experiment, id, metrics, **params):
    parameters = dict(dataset="cub", backbone="x", weights="packaged", **params)
    write_json(folder/experiment/id/"run.json", dict(schema=SCHEMA, experiment=experiment, key=id, parameters=parameters, n_images=SMALL, scale="small", metrics=metrics, hardware="", seconds=1, weights="0f", date="2026-01-01",
                                                     crop="", git=dict(commit=None)))


def test_a_table_of_our_own_has_a_line_a_variant(tmp_path, experiments):
    rows = [Row(f"d{s}", "small", "disagreements", dict(seed=s), ("disagreements",)) for s in (40, 41)]
    for r, v in zip(rows, (80., 84.)): own_record(tmp_path/"r", "disagreements", r.id, dict(top1_task_loss=v, codes_task_loss=10, top1_paper=70., best=3, top1_lost=None), **r.params)
    t = render("disagreements", "small", tmp_path/"r", rows, experiments)
    assert t.frame.values.tolist() == [["task loss", "82.00 ± 2.83 (2)", "10 ± 0 (2)", "", "small"], ["paper", "70.00 ± 0.00 (2)", "", "", "small"], ["best", "", "", "3.00 ± 0.00 (2)", "small"]]
    assert list(t.frame) == ["variant", "top-1", "codes", "value", "scale"] and "seeds 40, 41" in t.legend["a"] and set(t.data.status) == {"not in the paper"}


def test_differences_of_two_recipes_have_intervals(tmp_path, experiments):
    r = Row("s", "small", "seeds", {}, ("seeds",))
    own_record(tmp_path/"r", "seeds", "s", {"top1_a": 81., "difference_a_b_c": 1.5, "difference_a_b_c_low": -.25, "difference_a_b_c_high": 3., "difference_a_b_c_s40": 2., "seeds_needed_a_b_c": 7, "seeds_needed_a_b_c_0.5": 60}, recipes="a,b_c")
    t = render("seeds", "small", tmp_path/"r", [r], experiments)
    assert dict(zip(t.frame.variant, t.frame.difference)) == {"a": "", "a − b_c": "+1.50 [−0.25, +3.00]", "a − b_c, seed 40": "+2.00", "a − b_c, if it were 0.5 points": ""}
    assert t.frame["seeds needed"].tolist() == ["", "7", "", "60"] and t.frame["top-1"].tolist()[0] == "81.00" and t.data.low.dropna().tolist() == [-.25]


# bad input

def test_damaged_and_older_records_count_as_missing(tmp_path):
    rows = [cub(s) for s in (40, 41, 42)]
    at = [record(tmp_path, r, dict(top1=80. + i)) for i, r in enumerate(rows)]
    (at[0]/"run.json").write_text("{")
    write_json(at[1]/"run.json", dict(schema=0))
    with pytest.warns(UserWarning, match="was left out"): t = render("table3", "small", tmp_path, rows)
    assert t.missing == [rows[0].id, rows[1].id] and t.runs == [rows[2].id] and line(t, "ours")["CUB-200"].item() == "82.0 (1)" and "2 of 3 runs are missing" in t.to_markdown()


def test_a_metric_that_is_missing_is_a_dash(tmp_path):
    rows = [cub(s) for s in (40, 41)]
    record(tmp_path, rows[0], dict(top1=None, top1_topk=70.))
    record(tmp_path, rows[1], dict(top1_topk=72.))
    t = render("table3", "small", tmp_path, rows)
    assert set(ours(t).variant) == {"10 codes a class"} and ours(t).ours.item() == 71. and not t.missing


def test_names_that_are_no_tables():
    with pytest.raises(ConfigError, match="Did you mean"): render("tabel3", "small", "none", [])
    with pytest.raises(ConfigError, match="is a figure"): render("figure6", "small", "none", [])
    assert render("Table 3", "small", "none", []).name == "table3"


def test_only_rows_that_serve_the_table_are_in_it(tmp_path):
    rows = [cub(40), cub(41, serves=("table7",))]
    for r in rows: record(tmp_path, r, dict(top1=80.))
    t = render("table3", "small", tmp_path, rows)
    assert t.runs == [rows[0].id] == [r.id for r in rows_for(rows, ["table3"], needs=False)] and ours(t).n.item() == 1


def test_the_same_run_named_twice_counts_once(tmp_path):
    rows = [cub(40), Row("again", "small", "cub", cub(40).params, ("table3",), BESIDE)]
    record(tmp_path, rows[0], dict(top1=80.))
    t = render("table3", "small", tmp_path, rows)
    assert ours(t).n.item() == 1 and t.runs == [r.id for r in rows]


def test_the_committed_records_agree_with_load_runs():
    "Table 3 on the records of this repository: the same means as `results.load_runs`."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runs = load_runs("results", "cub")
    if "top1" not in runs: pytest.skip("no records of cub in results/")
    runs = runs[(runs.recipe == "grounded") & (runs.codebook_size == 500) & (runs.weights == "packaged") & (runs.views == 1)]
    if runs.seed.nunique() < 2: pytest.skip("fewer than two such records")
    t = render("table3", "small", "results", [cub(s) for s in (40, 41, 42)])
    newest = runs.sort_values("date").groupby("seed").last()
    assert ours(t, variant="").ours.item() == pytest.approx(newest.top1.mean()) and ours(t, variant="").n.item() == len(newest)


def test_full_sizes_are_known_for_the_papers_data_sets():
    assert {"cub", "cars", "dogs", "flowers", "imagenet"} <= set(FULL)
