"""The inspector in a real browser: JupyterLab on the loopback address, Chromium driven by Playwright. Run by `make test-browser` (tools/browser.py), not by pytest alone."""
import os
import re
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]/"tools"))
import browser as B
from browser import button, status, wait_edits

pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = os.environ.get("PROTOQUANT_CHROMIUM")
SHOTS = Path(os.environ.get("PROTOQUANT_SHOTS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="PROTOQUANT_CHROMIUM names no browser; run `make test-browser`")

MODEL = """
import warnings; warnings.simplefilter("ignore")
import os, torch
from protoquant import backbones, datasets, features
from protoquant.codebook import Codebook, Space, mean_token, nearest_patches, project, usage
from protoquant.core import generator
from protoquant.head import NonNegLinear, presence_of
from protoquant.model import ProtoQuant
from protoquant.widgets import inspect
torch.manual_seed(0)
net = backbones.create("test_resnet", "random", img_size=64)
data = datasets.load("toybirds", n_train_per_class=6, n_test_per_class=4, classes=4)
transform = datasets.eval_transform(net.size, net.mean, net.std, data.resize)
train, test = (features.extract(net, s, transform, cache="stores", quiet=True) for s in (data.train, data.test))
space = Space(train.d, mean_token(train))
first = Codebook(train.read(slice(None)).flatten(0, 1)[torch.randperm(train.n_tokens, generator=generator(0, "codes"))[:16]], space)
book = Codebook(project(first, train).codes, space)
s, head = presence_of(train, book, .1), NonNegLinear(4, 16, generator(0, "head"))
opt = torch.optim.AdamW(head.parameters(), lr=.05)
for _ in range(60): opt.zero_grad(); torch.nn.functional.cross_entropy(head(s), train.labels).backward(); opt.step()
model = ProtoQuant(net, book, head, .1, data.class_names, transform, index=nearest_patches(book, train, 4))
""".strip()
SHOW = "view = inspect(model, data, test, usage(book, train))\nview"
CHECK = """
from protoquant.model import ProtoQuant
from protoquant.metrics import top1
if os.path.exists("edited.safetensors"):
    back = ProtoQuant.load("edited.safetensors", net)
    print("edits:", [e["op"] for e in back.edits["edits"]], f"accuracy: {top1(test, back.book, back.weight.detach(), .1):.2f}")
else: print("edits: no file yet")
""".strip()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address, token and folder of a JupyterLab of our own: its settings and its work are in a temporary folder."
    root = tmp_path_factory.mktemp("lab")
    work = root/"work"
    work.mkdir()
    (work/"widget.ipynb").write_text(B.notebook([MODEL, SHOW, CHECK]))
    with B.jupyterlab(root, work) as (url, token): yield url, token, work


@pytest.fixture(scope="module")
def page(lab):
    with B.chromium(CHROMIUM) as page: yield page


def shot(page, name):
    if SHOTS.is_dir(): page.screenshot(path=str(SHOTS/f"{name}.png"))


def open_and_run(page, lab): B.open_and_run(page, *lab[:2], "widget.ipynb", 3)


def test_a_code_is_switched_off_taken_back_saved_and_found_again(page, lab):
    open_and_run(page, lab)
    assert "Accuracy is computed with the first edit" in status(page).inner_text()
    assert page.locator("img[src^=blob]").count() >= 12 or page.locator(".widget-image").count() >= 12
    shot(page, "1-codes")
    # the code on which most hangs, so that the accuracy must move: each card in turn, until it does
    for i in range(8):
        page.get_by_role("button", name=re.compile(r"^code \d+$")).nth(i).click()
        page.get_by_role("button", name="switch off (weight)").wait_for()
        button(page, "switch off (weight)").click()
        start, now, _ = wait_edits(page, i + 1)
        if now != start: break
    assert now != start, "no code of the first page changes the accuracy"
    shot(page, "2-switched-off")
    page.get_by_role("tab", name="Edit").click()
    button(page, "undo").click()
    _, back, _ = wait_edits(page, i)
    assert back == start
    button(page, "redo").click()
    assert wait_edits(page, i + 1) == (start, now, i + 1)
    shot(page, "3-edit")
    for name, file in (("save", "edited.safetensors"), ("export", "edits.json")):
        button(page, name).click()
        page.get_by_text(file, exact=False).first.wait_for()
        deadline = time.time() + 60
        while not (lab[2]/file).exists() and time.time() < deadline: page.wait_for_timeout(200)
        assert (lab[2]/file).exists()
    page.get_by_role("tab", name="Explain").click()
    button(page, "explain").click()
    page.get_by_text(re.compile("Evidence for")).wait_for()
    page.get_by_role("button", name=re.compile(r"^1: code \d+$")).click()
    page.get_by_text(re.compile("Map of code")).wait_for()
    shot(page, "4-explain")
    # a new page, a new run of all cells: the saved model says what the editor said, and the list is replayed
    open_and_run(page, lab)
    text = page.locator(".jp-OutputArea-output", has_text="edits:").last.inner_text()
    assert f"accuracy: {now:.2f}" in text and text.count("off") == i + 1
    page.get_by_role("tab", name="Edit").click()
    button(page, "replay").click()
    assert wait_edits(page, i + 1) == (start, now, i + 1)
    shot(page, "5-replayed")


def test_uploads_are_explained_or_refused_with_a_sentence(page, lab, tmp_path):
    from PIL import Image
    page.get_by_role("tab", name="Explain").click()
    def give(path):
        with page.expect_file_chooser() as chooser: page.get_by_role("button", name=re.compile("your picture")).click()
        chooser.value.set_files(str(path))
    Image.new("L", (80, 60), 120).save(tmp_path/"grey.png")
    (tmp_path/"notes.txt").write_text("hello")
    give(tmp_path/"grey.png")
    page.get_by_text(re.compile("grey.png: ")).wait_for()
    give(tmp_path/"notes.txt")
    page.get_by_text(re.compile("notes.txt is not a picture")).wait_for()
    shot(page, "6-upload")
