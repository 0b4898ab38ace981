"""README.md out of nbs/index.ipynb, without Quarto: cells marked `#| hide` are dropped, links are turned to the repository's root."""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIRST = "<!-- made from nbs/index.ipynb by tools/readme.py (make readme); edit the notebook -->\n\n"


def directives(source):
    "The `#| ...` words at the head of a cell."
    words = []
    for line in source.splitlines():
        if not line.strip().startswith("#|"):
            break
        words.append(line.strip()[2:].strip())
    return words


def relink(text):
    "Paths as seen from the root: ../x becomes x, a notebook beside index becomes nbs/x."
    text = re.sub(r"(\]\(|src=\")\.\./", r"\1", text)
    return re.sub(r"(\]\()(?![a-z]+:|nbs/|#)([\w.-]+\.ipynb)", r"\1nbs/\2", text)


def visible(nb):
    "The notebook without hidden cells, directives and error-stream output."
    cells = []
    for c in nb.cells:
        words = directives(c.source)
        if c.cell_type == "code":
            if any(w in ("hide", "include: false") or w.startswith("default_exp") for w in words):
                continue
            if any(w in ("echo: false", "hide_input") for w in words):
                c.source = ""
            c.source = "\n".join(l for l in c.source.splitlines() if not l.strip().startswith("#|")).strip("\n")
            c.outputs = [] if "output: false" in words or "hide_output" in words else [o for o in c.outputs if o.get("name") != "stderr"]
            for o in c.outputs:
                o.get("data", {}).pop("text/html", None)
                if "image/png" in o.get("data", {}):
                    raise SystemExit("tools/readme.py: index.ipynb has an embedded picture; save it in paper_figures/ and show it with "
                                     "a Markdown image, so that README.md can show it too.")
            if not c.source and not c.outputs:
                continue
        cells.append(c)
    nb.cells = cells
    nb.metadata["language_info"] = {"name": "python"}   # nbdev_clean removes it
    return nb


def readme(root=ROOT):
    "Text of README.md."
    import nbformat
    from nbconvert import MarkdownExporter
    from traitlets.config import Config
    nb = visible(nbformat.read(Path(root)/"nbs"/"index.ipynb", as_version=4))
    priority = Config({"NbConvertBase": {"display_data_priority": ["text/markdown", "text/plain"]}})
    body, _ = MarkdownExporter(config=priority).from_notebook_node(nb)
    body = re.sub(r"\x1b\[[0-9;]*m", "", body)
    body = re.sub(r"```python\n\n*```\n", "", body)
    body = "\n".join(l.rstrip() if not l.endswith("  ") else l.rstrip() + "  " for l in body.splitlines())
    return FIRST + relink(re.sub(r"\n{3,}", "\n\n", body).strip()) + "\n"


if __name__ == "__main__":
    (ROOT/"README.md").write_text(readme(), encoding="utf-8")
    print("README.md written", file=sys.stderr)
