"""The committed outputs of nbs/run_*.ipynb and the README's pictures, made by real runs on ToyBirds (make refresh [ONLY=cub,purity])."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FIGURES = dict(cub={"explanation.png": "toybirds_explanation.png", "prototypes_0.png": "toybirds_prototypes.png"})   # of each experiment: figure -> name in paper_figures
FEWER = dict(misalignment=dict(n_images=100, n_images_pgd=8),      # where ToyBirds at the defaults would take an hour
             blackbox=dict(classes=8, n_train_per_class=12, n_test_per_class=6, epochs=8, warmup=2, mixup=0, cutmix=0, img_size=128))
RECORDS = dict(cub="toybirds_run.json")                     # records that the README's pictures come from


def keep_outputs(source, executed):
    "The source notebook with the outputs of the executed one, cell by cell; error streams and papermill's traces are dropped."
    done = {c["id"]: c for c in json.loads(executed.read_text())["cells"] if c["cell_type"] == "code"}
    nb = json.loads(source.read_text())
    for c in nb["cells"]:
        if c["cell_type"] == "code":
            got = done[c["id"]]
            c["outputs"] = [o for o in got["outputs"] if o.get("name") != "stderr"]
            c["execution_count"] = None
    source.write_text(json.dumps(nb, indent=1, ensure_ascii=False) + "\n")


def refresh(name, results, nbs):
    "Run one experiment on ToyBirds, take over its outputs, pictures and record; returns the exit status."
    out = results/f"{name}.ipynb"
    command = [str(BIN/"protoquant"), "run", name, "-p", "dataset", "toybirds", "-p", "output_dir", str(results), "--output", str(out)]
    command += [w for k, v in FEWER.get(name, {}).items() for w in ("-p", k, str(v))]
    if status := subprocess.run(command, cwd=ROOT).returncode:
        return status
    keep_outputs(nbs/f"run_{name}.ipynb", out)
    folder = max((p.parent for p in results.glob(f"{name}/*/run.json")), key=lambda p: p.stat().st_mtime)
    (ROOT/"paper_figures").mkdir(exist_ok=True)
    wanted = {folder/"figures"/f: to for f, to in FIGURES.get(name, {}).items()} | ({folder/"run.json": RECORDS[name]} if name in RECORDS else {})
    for path, to in wanted.items():
        shutil.copy(path, ROOT/"paper_figures"/to)
    return subprocess.run([str(BIN/"nbdev_clean"), "--fname", f"nbs/run_{name}.ipynb"], cwd=ROOT, env=dict(os.environ)).returncode


def main(argv):
    "Refresh the experiments named, or all; they share a temporary results folder, so that a model is trained once."
    nbs = ROOT/"nbs"
    every = sorted((p.stem[4:] for p in nbs.glob("run_*.ipynb")), key=lambda n: (n != "cub", n))
    names = [n for a in argv for n in a.split(",") if n] or every
    if unknown := set(names) - set(every):
        print(f"refresh: there is no experiment {', '.join(sorted(unknown))}; there are {', '.join(every)}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as tmp:
        return max(refresh(n, Path(tmp), nbs) for n in names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
