"""The inspector in a real browser: JupyterLab on the loopback address, Chromium driven by Playwright. Run by `make test-browser` (tools/browser.py), not by pytest alone."""
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
CHROMIUM = os.environ.get("PROTOQUANT_CHROMIUM")
SHOTS = Path(os.environ.get("PROTOQUANT_SHOTS", "/nonexistent"))
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="PROTOQUANT_CHROMIUM names no browser; run `make test-browser`")
WAIT = 240_000   # milliseconds; a kernel that imports torch on a busy machine is slow

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


def notebook(cells):
    return dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")),
                cells=[dict(cell_type="code", id=f"c{i}", source=c, metadata={}, outputs=[], execution_count=None) for i, c in enumerate(cells)])


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "Address, token and folder of a JupyterLab of our own: its settings and its work are in a temporary folder."
    root = tmp_path_factory.mktemp("lab")
    work = root/"work"
    work.mkdir()
    (work/"widget.ipynb").write_text(json.dumps(notebook([MODEL, SHOW, CHECK])))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    token = secrets.token_hex(16)
    env = dict(os.environ, OMP_NUM_THREADS="1", JUPYTER_CONFIG_DIR=str(root/"config"), JUPYTER_DATA_DIR=str(root/"data"), JUPYTER_RUNTIME_DIR=str(root/"runtime"), IPYTHONDIR=str(root/"ipython"))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}",
               f"--ServerApp.root_dir={work}", "--allow-root", "--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    with open(root/"lab.log", "w") as log:
        server = subprocess.Popen(command, cwd=work, env=env, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    try:
        for _ in range(240):
            if server.poll() is not None: break
            try: urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).read(); break
            except OSError: time.sleep(.5)
        else: server.terminate()
        assert server.poll() is None, (root/"lab.log").read_text()[-3000:]
        yield f"http://127.0.0.1:{port}", token, work
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()


@pytest.fixture(scope="module")
def page(lab):
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=1400, height=1500))
        page.set_default_timeout(WAIT)
        yield page
        browser.close()


def shot(page, name):
    if SHOTS.is_dir(): page.screenshot(path=str(SHOTS/f"{name}.png"))


def open_and_run(page, lab, times=3):
    "Open the notebook and run all cells; the first request after a cold start can be lost, so it is made again until the cells are counted."
    url, token, _ = lab
    page.goto(f"{url}/doc/tree/widget.ipynb?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    counted = lambda: [t for t in page.locator(".jp-CodeCell .jp-InputPrompt").all_inner_texts() if re.search(r"\[\s*(\d+|\*)\s*\]", t)]
    for _ in range(times):
        page.wait_for_timeout(3000)
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try: page.wait_for_function("() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].some(e => /\\[\\s*(\\d+|\\*)\\s*\\]/.test(e.innerText))", timeout=20_000)
        except playwright.TimeoutError: continue
        break
    page.wait_for_function("() => { const t = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.innerText); return t.length == 3 && t.every(x => /\\[\\d+\\]/.test(x)); }", timeout=WAIT)
    assert len(counted()) == 3


def status(page): return page.locator(".jp-OutputArea-output .widget-html-content", has_text=re.compile("accuracy|Accuracy")).first


def numbers(page):
    "(accuracy before, accuracy now, edits) in the status line."
    m = re.search(r"accuracy ([\d.]+) % → ([\d.]+) % on \d+ images; (\d+) edits", status(page).inner_text())
    return (float(m[1]), float(m[2]), int(m[3])) if m else None


def wait_edits(page, n):
    page.wait_for_function("n => [...document.querySelectorAll('.widget-html-content')].some(e => new RegExp('; ' + n + ' edits').test(e.innerText))", arg=n)
    return numbers(page)


def button(page, name): return page.get_by_role("button", name=name, exact=True).first


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
