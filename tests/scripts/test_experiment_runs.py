"""The small variant of the experiment runs from data to words, and a second call does nothing again. Takes minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.experiment.commands import Paths, train
from scripts.experiment.plan import HYPOTHESES, SMALL, runs, variants

ROOT = Path(__file__).resolve().parents[2]


def call(*command: object) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.mark.slow
def test_the_small_variant_gives_words_tables_and_plots_and_is_not_computed_twice(tmp_path):
    folder = tmp_path / "experiment"
    said = call("bash", "scripts/experiment.sh", "--small", folder)
    results = json.loads((folder / "results" / "results.json").read_text())
    assert set(results["answers"]) == {f"{lower} below {upper}" for lower, upper in HYPOTHESES}
    assert set(results["answers"].values()) <= {"yes", "no", "undecided"}
    assert all(word in said for word in results["answers"].values())
    assert set(results["measures"]) == set(variants(SMALL))
    for variant, measured in results["measures"].items():
        assert set(measured) == {run.name for run in runs(SMALL, variant)}
        whole, drawn = (measured[f"{arm}_s0"]["mean"] for arm in ("all_epochs_p15", "random_p15"))
        assert 0 < whole < drawn  # seven times as many steps on the same records
    assert (folder / "results" / "arms.png").read_bytes().startswith(b"\x89PNG")
    tables = (folder / "results" / "tables.md").read_text()
    assert "Exact answers are left out" in tables and "## Linear datamodelling score" in tables

    models = sorted(folder.glob("*/models/*/training_args.bin"))
    before = {path: path.stat().st_mtime_ns for path in models}
    call("bash", "scripts/experiment.sh", "--small", folder)
    assert before == {path: path.stat().st_mtime_ns for path in models}
    halves = 2 * SMALL.halves
    assert len(models) == halves + sum(len(runs(SMALL, variant)) for variant in variants(SMALL))

    check = json.loads((folder / "steps" / "0" / "influence_check.json").read_text())
    assert set(check["tasks"]) == set(SMALL.records)

    # A Python that starts anew trains the same model as the warm one, byte for byte.
    (name,) = [run.name for run in runs(SMALL, "varied_clean") if (run.arm, run.seed) == ("tive", 0)]
    (summary,) = (folder / "varied_clean" / "selected" / name).glob("*_summary.json")
    subset = summary.with_name(summary.name.replace("_summary", ""))
    again = folder / "again"
    train(Paths(folder, Path(sys.executable)), "finetune.sh", subset, again, "--seed", 0, EPOCHS=SMALL.epochs)
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (folder / "varied_clean" / "models" / name / weights).read_bytes()
