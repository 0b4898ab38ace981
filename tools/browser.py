"""The tests in a real browser (`make test-browser`): find or install Chromium and Playwright, run tests/browser. Exit status 3: the browser cannot be had here."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MISSING = 3


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


def main():
    "Exit status of the tests; 3 where something is missing, said in one line."
    browser, why = find_browser(), None
    if not browser:
        print("test-browser: no Chromium here, installing Debian's", flush=True)
        why = install_browser()
        browser = find_browser()
    if not browser:
        print(f"test-browser: NOT RUN, Chromium is missing and {why or 'could not be installed'}. Install it, or name one in PROTOQUANT_CHROMIUM.", file=sys.stderr)
        return MISSING
    try:
        import playwright  # noqa: F401
    except ImportError:
        print("test-browser: NOT RUN, the Python package playwright is missing: python3 tools/bootstrap.py dev demo browser", file=sys.stderr)
        return MISSING
    shots = Path(os.environ.get("PROTOQUANT_SHOTS") or tempfile.mkdtemp(prefix="protoquant-screenshots-"))
    shots.mkdir(parents=True, exist_ok=True)
    print(f"test-browser: {browser}; screenshots in {shots}", flush=True)
    env = dict(os.environ, PROTOQUANT_CHROMIUM=browser, PROTOQUANT_SHOTS=str(shots))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(ROOT/"tests"/"browser"), *sys.argv[1:]], cwd=ROOT, env=env, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
