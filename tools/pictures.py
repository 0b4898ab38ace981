"""The README's pictures of ToyBirds (make pictures): three explained images, and the widget as it looks in a browser. Exit status 3: no browser, so only the explained images."""
import argparse
import io
import os
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/"tools"))
import browser as B

LIMIT = 300_000                # bytes of a picture
EXPLAINED = "toybirds_explained_{}.png"
WIDGET = ("widget_codes.png", "widget_explain.png", "widget_edit.png")


def chosen(logits, labels, n=3):
    "Rows of n images: of classes spread evenly over those with a right answer, in each the one named rightly with the median confidence. By class."
    right = logits.argmax(1) == labels
    sure, there = logits.softmax(1).amax(1), labels[right].unique().tolist()
    classes = sorted({there[round(i * (len(there) - 1) / max(n - 1, 1))] for i in range(n)}) if there else []
    rows = [(right & (labels == c)).nonzero()[:, 0] for c in classes]
    return [int(r[sure[r].argsort(stable=True)[(len(r) - 1) // 2]]) for r in rows]


def save_png(image, path, limit=LIMIT):
    "Save a picture in at most `limit` bytes: fewer colours first, then fewer pixels. Returns the bytes."
    from PIL import Image
    from protoquant.core import atomic_path
    image = image.convert("RGB")
    while True:
        for colours in (None, 256, 128, 64):
            f = io.BytesIO()
            (image if colours is None else image.quantize(colours, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)).save(f, "PNG", optimize=True)
            if f.tell() <= limit or max(image.size) < 200:
                with atomic_path(path) as part:
                    Path(part).write_bytes(f.getvalue())
                return f.tell()
        image = image.resize((image.width * 9 // 10, image.height * 9 // 10), Image.Resampling.LANCZOS)


def explained(run, rows, out, dpi=110):
    "Draw the explanations of these test images; names of the files."
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image
    from protoquant import explain  # noqa: F401  gives models their explain methods
    from protoquant.plots import explanation_figure
    made = []
    for i, row in enumerate(rows, 1):
        e = run.model.explain((run.data.test, row), n=3, train=run.train)
        f = io.BytesIO()
        fig = explanation_figure(e, (run.data.test, row), run.train, n_patches=5, view=run.view)
        fig.savefig(f, dpi=dpi)
        plt.close(fig)
        made.append(EXPLAINED.format(i))
        save_png(Image.open(f), Path(out)/made[-1])
    return made


CELL = """
import warnings; warnings.simplefilter("ignore")
from protoquant.codebook import usage
from protoquant.features import extract
from protoquant.report import open_run
from protoquant.widgets import inspect
run = open_run({folder!r})
seen, new = (extract(run.model.backbone, s, run.model.transform, quiet=True) for s in (run.data.train, run.data.test))
""".strip()
SHOW = "view = inspect(run.model, run.data, new, usage(run.model.book, seen))\nview"


def photograph(page, path):
    "The widget alone, without the notebook around it."
    from PIL import Image
    page.mouse.move(1, 1)
    page.add_style_tag(content=".Toastify { display: none }")       # JupyterLab's own questions
    page.wait_for_timeout(800)
    box = page.locator(".jp-OutputArea-output .widget-vbox").first
    save_png(trimmed(Image.open(io.BytesIO(box.screenshot())).convert("RGB")), path)


def trimmed(image, rim=8):
    "A picture without the white at its right and its bottom, but for a rim."
    from PIL import Image, ImageChops
    box = ImageChops.difference(image, Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))).getbbox()
    return image.crop((0, 0, min(image.width, box[2] + rim), min(image.height, box[3] + rim))) if box else image


def clicked(page, name, row, code, out):
    "What a person does: look at the code among those of its class, explain an image, switch the code off. Three pictures."
    from protoquant.plots import short
    page.locator(".jp-OutputArea-output select").first.select_option(label=short(name, 30))
    page.get_by_role("button", name=f"code {code}", exact=True).first.click()
    page.get_by_text(f"code {code}: on", exact=True).wait_for()
    page.get_by_role("button", name=re.compile(r"^[01]\.\d\d$")).first.click()
    page.get_by_text(re.compile("similarity")).wait_for()
    photograph(page, Path(out)/WIDGET[0])
    page.get_by_role("tab", name="Explain").click()
    page.get_by_label("image", exact=True).fill(str(row))
    B.button(page, "explain").click()
    page.get_by_text(re.compile("Evidence for")).wait_for()
    page.get_by_role("button", name=re.compile(r"^1: code \d+$")).click()
    page.get_by_text(re.compile("Map of code")).wait_for()
    photograph(page, Path(out)/WIDGET[1])
    page.get_by_role("tab", name="Edit").click()
    page.get_by_placeholder("codes, e.g. 3, 17").fill(str(code))
    page.get_by_placeholder("codes, e.g. 3, 17").press("Enter")
    B.button(page, "off").click()
    B.wait_edits(page, 1)
    photograph(page, Path(out)/WIDGET[2])


def widget(run, row, code, out, browser):
    "Screenshots of the widget on this run's model."
    with tempfile.TemporaryDirectory() as root:
        work = Path(root)/"work"
        work.mkdir()
        (work/"widget.ipynb").write_text(B.notebook([CELL.format(folder=str(Path(run.folder).resolve())), SHOW]))
        with B.jupyterlab(root, work) as (url, token), B.chromium(browser, 1100, 1500) as page:
            B.open_and_run(page, url, token, "widget.ipynb", 2)
            clicked(page, run.model.class_names[int(run.model.weight[:, code].argmax())], row, code, out)


def looked_at(run):
    "The three images to explain; the code on which most right answers hang; the surest image that is lost without it, or the first of the three."
    from protoquant.editing import Editor
    from protoquant.features import extract
    editor = Editor(run.model, extract(run.model.backbone, run.data.test, run.model.transform), run.data.test)
    rows, found = chosen(editor.logits, editor.labels), editor.impact()
    code = int(found.code[found.became_wrong.argmax()])
    sure, lost = editor.logits.softmax(1).amax(1), editor.switch_off(code).flips().query("effect == 'became wrong'").row.tolist()
    return rows, max(lost, key=lambda i: float(sure[i]), default=rows[0]), code


def main(argv=None):
    "Exit status."
    p = argparse.ArgumentParser(prog="pictures", description=__doc__)
    p.add_argument("run", nargs="?", help="folder of a run on ToyBirds; that of `make demo` where left out, made first where there is none")
    p.add_argument("--out", default=str(ROOT/"paper_figures"), help="folder of the pictures")
    args = p.parse_args(argv)
    from protoquant.cli import require
    from protoquant.core import ProtoQuantError
    from protoquant.report import open_run
    os.chdir(ROOT)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    try:
        run = open_run(args.run or require("cub", dict(dataset="toybirds"), quiet=False))
        if run.data.name != "toybirds":
            raise SystemExit(f"pictures: {run.folder} is a run on {run.data.name}; photographs of data sets are not committed, ToyBirds is needed.")
        rows, row, code = looked_at(run)
        made = explained(run, rows, args.out)
    except ProtoQuantError as e:
        print(f"pictures: {e}", file=sys.stderr)
        return 1
    print(f"pictures: {', '.join(made)} in {args.out}", flush=True)
    browser = B.need_browser("pictures of the widget")
    if not browser:
        return B.MISSING
    widget(run, row, code, args.out, browser)
    print(f"pictures: {', '.join(WIDGET)} in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
