"""The checks of `make test`: notebooks clean, modules exported, tags there, README in step, notebooks run, tests pass."""
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT/"tools"))


def copy_tree(root, to):
    "Notebooks, modules and settings in another folder, so that a check changes nothing here."
    for name in ("settings.ini", "pyproject.toml", "README.md"):
        if (root/name).exists():
            shutil.copy(root/name, to/name)
    for name in ("nbs", "protoquant"):
        shutil.copytree(root/name, to/name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", ".*.ipynb", "results"))


def differing(a, b, pattern):
    "Names of files that are not the same in both folders."
    names = {p.name for d in (a, b) for p in d.glob(pattern)}
    same = lambda n: (a/n).exists() and (b/n).exists() and (a/n).read_bytes() == (b/n).read_bytes()
    return sorted(n for n in names if not same(n))


def _after(root, command, folder, pattern):
    "Files in `folder` that `command` changes; an error of the command is a finding too."
    with tempfile.TemporaryDirectory() as d:
        copy_tree(root, Path(d))
        r = subprocess.run([str(BIN/command)], cwd=d, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if r.returncode:
            return [f"{command} ended with status {r.returncode}: {r.stderr.strip()[-500:]}"]
        return differing(root/folder, Path(d)/folder, pattern)


def check_clean(root=ROOT):
    "Notebooks that nbdev_clean would change."
    return [f"nbs/{n} is not clean: run `make clean-notebooks`" if n.endswith(".ipynb") else n
            for n in _after(root, "nbdev_clean", "nbs", "*.ipynb")]


def check_export(root=ROOT):
    "Modules that nbdev_export would change."
    return [f"protoquant/{n} is not what its notebook exports: edit the notebook, then run nbdev_export" if n.endswith(".py") else n
            for n in _after(root, "nbdev_export", "protoquant", "*.py")]


def check_tags(root=ROOT):
    "Experiments that have not exactly one cell tagged `parameters`, and settings that would remove the tag."
    found = []
    if not re.search(r"(?m)^allowed_cell_metadata_keys\s*=.*\btags\b", (root/"settings.ini").read_text()):
        found.append("settings.ini must have `allowed_cell_metadata_keys = tags`, or nbdev_clean removes papermill's tag")
    for p in sorted((root/"nbs").glob("run_*.ipynb")):
        n = sum("parameters" in c["metadata"].get("tags", []) for c in json.loads(p.read_text())["cells"])
        if n != 1:
            found.append(f"nbs/{p.name} has {n} cells tagged `parameters`; papermill needs exactly one")
    return found


def check_readme(root=ROOT):
    "Is README.md made from index.ipynb, and are the files there that it shows?"
    from readme import readme
    if not (root/"nbs"/"index.ipynb").exists():
        return ["nbs/index.ipynb is missing; README.md is made from it"]
    want = readme(root)
    have = (root/"README.md").read_text(encoding="utf-8") if (root/"README.md").exists() else ""
    found = [] if want == have else ["README.md is not what nbs/index.ipynb gives: run `make readme`"]
    for link in re.findall(r"\]\((?![a-z]+:|#)([^)\s#]+)", want):
        if not (root/link).exists():
            found.append(f"README.md links to {link}, which is not there")
    return found


def check_paths(root=ROOT):
    "Outputs and code that name folders of the machine they were made on."
    found, mine = [], {str(Path.home()), str(root)} - {"/"}
    for p in [*(root/"nbs").glob("*.ipynb"), *(root/"protoquant").glob("*.py"), root/"README.md", *(root/"results").glob("*/*/run.json")]:
        text = p.read_text(encoding="utf-8") if p.exists() else ""
        hit = next((m for m in mine if re.search(r"(?<![\w./-])" + re.escape(m) + r"(?![\w.-])", text)), None)
        if hit:
            found.append(f"{p.relative_to(root)} names a folder of this machine ({hit})")
    return found


CHECKS = {"notebooks are clean": check_clean, "modules are exported": check_export, "parameters are tagged": check_tags,
          "README.md is in step": check_readme, "no paths of this machine": check_paths}


def run_checks(root=ROOT):
    "All quick checks, one line each; returns the number that failed."
    bad = 0
    for name, check in CHECKS.items():
        began, found = time.time(), check(root)
        print(f"{'FAIL' if found else 'ok':<5}{name} ({time.time() - began:.1f} s)", *[f"\n     {f}" for f in found], flush=True)
        bad += bool(found)
    return bad


def environment(workers):
    "Environment of a test run: as many threads as leave each worker its share of the cores."
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    env = dict(os.environ, PYTHONWARNINGS="ignore", MPLBACKEND="Agg", TQDM_MININTERVAL="30")
    for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        env[k] = os.environ.get(k, threads)
    env["PATH"] = f"{BIN}{os.pathsep}{env['PATH']}"
    return env


def step(name, command, workers=1):
    "Run a command, say how long it took; returns its exit status."
    print(f"\n== {name}", flush=True)
    began = time.time()
    status = subprocess.run(command, cwd=ROOT, env=environment(workers), stdin=subprocess.DEVNULL).returncode
    print(f"== {name}: {'ok' if status == 0 else f'FAILED (status {status})'} in {time.time() - began:.0f} s", flush=True)
    return status


def main(argv):
    "Exit status 0 only if everything passed. `quick` stops after the checks that take seconds."
    began = time.time()
    print("== checks", flush=True)
    bad = run_checks()
    if "quick" in argv:
        return bool(bad)
    workers = min(2, os.cpu_count() or 1)
    notebooks = [str(BIN/"nbdev_test"), "--n_workers", str(workers), "--timing", "--skip_file_re", r"^(_|\.|run_)"]
    failed = ["checks"] * bool(bad)
    failed += ["nbdev_test"] * bool(step("notebooks (nbdev_test)", notebooks, workers))
    failed += ["pytest"] * bool(step("pytest", [sys.executable, "-m", "pytest", "-q", "-n", str(workers), "--dist", "loadfile", "--durations=10", "-p", "no:cacheprovider"], workers))
    print(f"== make test: {'FAILED: ' + ', '.join(failed) if failed else 'all passed'} in {time.time() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
