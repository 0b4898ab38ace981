"""nbs/run_timing.ipynb through the command line, on a tiny ToyBirds."""
import pandas as pd
import pytest

from pieces import TINY, records, run_experiment

pytest.importorskip("papermill")
PLAIN = {k: v for k, v in TINY.items() if k not in ("epochs_stage1", "epochs_stage2", "val_fraction")}


def test_three_kinds_of_epochs_are_timed(tmp_path):
    r = run_experiment("timing", tmp_path, tiny=PLAIN, epochs=3, discard=1, batch=8)      # at least five steps an epoch: six images each
    assert r.returncode == 0, r.stderr[-3000:]
    (folder, rec), = records(tmp_path, "timing").items()
    m, epochs = rec["metrics"], pd.read_csv(folder/"epochs.csv")
    assert m["batch_used"] == 6 and m["steps_epoch"] == 5 and m["images_extracted"] == 32 and rec["scale"] == "smoke"
    for kind, e in epochs.groupby("kind"):
        assert m[f"epochs_counted_{kind}"] == len(e) == 2 and set(e.epoch) == {1, 2}      # the first is not counted
        assert m[f"seconds_{kind}"] == pytest.approx(e.seconds.mean()) and m[f"seconds_{kind}_sd"] == pytest.approx(e.seconds.std(ddof=1))
    for kind in ("frozen", "store"):
        assert m[f"saved_{kind}"] == pytest.approx(100 * (1 - m[f"seconds_{kind}"] / m["seconds_full"]))
    assert "| seconds_full " in r.stdout and (folder/"figures/epochs.png").exists()


def test_all_epochs_thrown_away_is_refused(tmp_path):
    r = run_experiment("timing", tmp_path, tiny=PLAIN, epochs=2, discard=2)
    assert r.returncode and "at least one epoch must be left" in r.stderr and not records(tmp_path, "timing")
