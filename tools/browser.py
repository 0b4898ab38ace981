"""A real browser: find or install Chromium, serve notebooks with JupyterLab on the loopback address, run them as a person would. `make test-browser` runs tests/browser with it,
`make pictures` makes the README's screenshots. Exit status 3: the browser cannot be had here."""
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = 3
WAIT = 240_000   # milliseconds; a kernel that imports torch on a busy machine is slow


def find_browser():
    "Path of an installed Chromium; None where there is none."
    given = os.environ.get("PROTOQUANT_CHROMIUM")
    return given if given and os.access(given, os.X_OK) else next(filter(None, map(shutil.which, NAMES)), None)


def install_browser():
    "Install Debian's chromium where that is possible without asking; returns why it is not, or None."
    if not shutil.which("apt-get"):
        return "there is no apt-get to install it with"
    if os.geteuid() != 0:
        return "installing it needs root (sudo apt-get install chromium)"
    for command in (["apt-get", "update", "-q"], ["apt-get", "install", "-q", "-y", "--no-install-recommends", "chromium", "fonts-dejavu-core"]):
        r = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=dict(os.environ, DEBIAN_FRONTEND="noninteractive"))
        if r.returncode:
            lines = [l for l in r.stdout.splitlines() if l.startswith("E:")]
            return f"{' '.join(command[:2])} failed: {lines[0][2:].strip() if lines else f'status {r.returncode}'}"
    return None


def need_browser(who):
    "Path of a Chromium that Playwright can drive; None where it cannot be had, which is then said in one line. `who`: the command that asks."
    browser, why = find_browser(), None
    if not browser:
        print(f"{who}: no Chromium here, installing Debian's", flush=True)
        why = install_browser()
        browser = find_browser()
    if not browser:
        print(f"{who}: NOT RUN, Chromium is missing and {why or 'could not be installed'}. Install it, or name one in PROTOQUANT_CHROMIUM.", file=sys.stderr)
        return None
    try:
        import playwright  # noqa: F401
    except ImportError:
        print(f"{who}: NOT RUN, the Python package playwright is missing: python3 tools/bootstrap.py dev demo browser", file=sys.stderr)
        return None
    return browser


def notebook(cells):
    "A notebook of code cells, as JSON text."
    cells = [dict(cell_type="code", id=f"c{i}", source=c, metadata={}, outputs=[], execution_count=None) for i, c in enumerate(cells)]
    return json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")), cells=cells))


@contextlib.contextmanager
def jupyterlab(root, work):
    "Address and token of a JupyterLab of our own that serves the folder `work`; its settings and its log are in the folder `root`."
    root, work = Path(root), Path(work)
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
            if server.poll() is not None:
                break
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={token}", timeout=2).read()
                break
            except OSError:
                time.sleep(.5)
        else:
            server.terminate()
        if server.poll() is not None:
            raise RuntimeError("JupyterLab did not start: " + (root/"lab.log").read_text()[-3000:])
        yield f"http://127.0.0.1:{port}", token
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()


@contextlib.contextmanager
def chromium(path, width=1400, height=1500):
    "A page of a headless Chromium."
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport=dict(width=width, height=height))
        page.set_default_timeout(WAIT)
        try:
            yield page
        finally:
            browser.close()


PROMPTS = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].map(e => e.innerText)"


def open_and_run(page, url, token, name, cells, times=3):
    "Open a notebook and run all of its cells; the first request after a cold start can be lost, so it is made again until the cells are counted."
    from playwright.sync_api import TimeoutError
    page.goto(f"{url}/doc/tree/{name}?token={token}&reset")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    for _ in range(times):
        page.wait_for_timeout(3000)
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        try:
            page.wait_for_function(f"() => {PROMPTS}.some(t => /\\[\\s*(\\d+|\\*)\\s*\\]/.test(t))", timeout=20_000)
        except TimeoutError:
            continue
        break
    page.wait_for_function(f"n => {{ const t = {PROMPTS}; return t.length == n && t.every(x => /\\[\\d+\\]/.test(x)); }}", arg=cells)


def button(page, name):
    "The first button of this name."
    return page.get_by_role("button", name=name, exact=True).first


def status(page):
    "The line above the widget's views."
    return page.locator(".jp-OutputArea-output .widget-html-content", has_text=re.compile("accuracy|Accuracy")).first


def wait_edits(page, n):
    "Wait until n edits are said to be in force; the accuracy before and now, and n again."
    page.wait_for_function("n => [...document.querySelectorAll('.widget-html-content')].some(e => new RegExp('; ' + n + ' edits?,').test(e.innerText))", arg=n)
    m = re.search(r"accuracy ([\d.]+) % → ([\d.]+) % on \d+ images; (\d+) edits?,", status(page).inner_text())
    return (float(m[1]), float(m[2]), int(m[3])) if m else None


def main():
    "Exit status of the tests; 3 where something is missing, said in one line."
    browser = need_browser("test-browser")
    if not browser:
        return MISSING
    shots = Path(os.environ.get("PROTOQUANT_SHOTS") or tempfile.mkdtemp(prefix="protoquant-screenshots-"))
    shots.mkdir(parents=True, exist_ok=True)
    print(f"test-browser: {browser}; screenshots in {shots}", flush=True)
    env = dict(os.environ, PROTOQUANT_CHROMIUM=browser, PROTOQUANT_SHOTS=str(shots))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT/"tests"/"browser"), *sys.argv[1:]], cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
