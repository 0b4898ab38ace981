"""The committed outputs of nbs/run_cub.ipynb and the README's picture, made by one real run of the demo (make refresh)."""
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
FIGURES = {"explanation.png": "toybirds_explanation.png", "prototypes_0.png": "toybirds_prototypes.png"}


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


def main():
    "Run the demo in a temporary folder, take over its outputs and pictures."
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(tmp)/"executed.ipynb"
        command = [str(BIN/"protoquant"), "run", "cub", "-p", "dataset", "toybirds", "-p", "output_dir", tmp, "--output", str(out)]
        if status := subprocess.run(command, cwd=ROOT).returncode:
            return status
        keep_outputs(ROOT/"nbs"/"run_cub.ipynb", out)
        folder, = (p.parent for p in Path(tmp).glob("cub/*/run.json"))
        (ROOT/"paper_figures").mkdir(exist_ok=True)
        for name, to in FIGURES.items():
            shutil.copy(folder/"figures"/name, ROOT/"paper_figures"/to)
        shutil.copy(folder/"run.json", ROOT/"paper_figures"/"toybirds_run.json")
    return subprocess.run([str(BIN/"nbdev_clean"), "--fname", "nbs/run_cub.ipynb"], cwd=ROOT, env=dict(os.environ)).returncode


if __name__ == "__main__":
    sys.exit(main())
