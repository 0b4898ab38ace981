"""The committed outputs of nbs/run_*.ipynb and the README's pictures, made by real runs on ToyBirds (make refresh [ONLY=cub,purity] [RESULTS=folder]).

run_cub is run as in `make demo`. All others have the outputs of their first row at the scale `smoke` of the manifest, so that they are those of `make paper`;
with RESULTS a folder of such runs is used, and only what is missing there is run."""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FIGURES = {"explanation.png": "toybirds_explanation.png", "prototypes_0.png": "toybirds_prototypes.png"}   # of run_cub: figure -> name in paper_figures


def keep_outputs(source, executed):
    "The source notebook with the outputs of the executed one, cell by cell; error streams and papermill's traces are dropped."
    done = {c["id"]: c for c in json.loads(executed.read_text())["cells"] if c["cell_type"] == "code"}
    nb = json.loads(source.read_text())
    for c in nb["cells"]:
        if c["cell_type"] == "code":
            got = done[c["id"]]
            if "".join(got["source"]) != "".join(c["source"]) and "parameters" not in c["metadata"].get("tags", []):
                raise SystemExit(f"refresh: {source.name} has changed since it was run (cell {c['id']}); run it again")
            c["outputs"] = [o for o in got["outputs"] if o.get("name") != "stderr"]
            c["execution_count"] = None
    source.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


def clean(name):
    "nbdev_clean of one experiment; returns the exit status."
    return subprocess.run([str(BIN/"nbdev_clean"), "--fname", f"nbs/run_{name}.ipynb"], cwd=ROOT, env=dict(os.environ)).returncode


def demo(results, nbs):
    "run_cub on all of ToyBirds: outputs, README's pictures and the record behind them; returns the exit status."
    out = results/"cub.ipynb"
    if status := subprocess.run([str(BIN/"protoquant"), "run", "cub", "-p", "dataset", "toybirds", "-p", "output_dir", str(results), "--output", str(out)], cwd=ROOT).returncode:
        return status
    keep_outputs(nbs/"run_cub.ipynb", out)
    out.unlink()
    folder = max((p.parent for p in results.glob("cub/*/run.json")), key=lambda p: p.stat().st_mtime)
    (ROOT/"paper_figures").mkdir(exist_ok=True)
    for path, to in {**{folder/"figures"/f: to for f, to in FIGURES.items()}, folder/"run.json": "toybirds_run.json"}.items():
        shutil.copy(path, ROOT/"paper_figures"/to)
    return clean("cub")


def smoke(names, results, nbs):
    "Outputs of the other experiments, from the manifest's smoke rows; returns the exit status."
    from protoquant.manifest import found_runs, read_manifest
    rows = {r.experiment: r for r in reversed(read_manifest("smoke"))}          # the first of each
    if unknown := set(names) - set(rows):
        print(f"refresh: the manifest has no smoke row of {', '.join(sorted(unknown))}", file=sys.stderr)
        return 2
    only = sorted({a for n in names for a in rows[n].serves})
    if status := subprocess.run([str(BIN/"protoquant"), "reproduce", "--scale", "smoke", "--no-draw", "--only", ",".join(only), "--output-dir", str(results)], cwd=ROOT).returncode:
        return status
    found = found_runs([rows[n] for n in names], results)
    for n in names:
        executed = found[rows[n].id]["folder"]/"executed.ipynb"
        if not executed.exists():
            print(f"refresh: {executed} is missing: the record came without its notebook; delete the record, or give another RESULTS", file=sys.stderr)
            return 2
        keep_outputs(nbs/f"run_{n}.ipynb", executed)
    return max(map(clean, names))


def main(argv):
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("only", nargs="*", help="experiments, separated by commas or spaces (all)")
    p.add_argument("--results", help="folder of smoke runs to use and to complete (a temporary one)")
    args = p.parse_args(argv)
    nbs = ROOT/"nbs"
    every = sorted(q.stem[4:] for q in nbs.glob("run_*.ipynb"))
    names = [n for a in args.only for n in a.split(",") if n] or every
    if unknown := set(names) - set(every):
        print(f"refresh: there is no experiment {', '.join(sorted(unknown))}; there are {', '.join(every)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as tmp:
        status = demo(Path(tmp), nbs) if "cub" in names else 0
        others = [n for n in names if n != "cub"]
        return max(status, smoke(others, Path(args.results or tmp).resolve(), nbs) if others else 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
