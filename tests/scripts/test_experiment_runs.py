"""The small variant of the experiment runs from data to words, and a second call does nothing again. Takes minutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.experiment.plan import HYPOTHESES, SMALL, P, Run, runs, variants
from scripts.experiment.results import read_csv, read_losses
from scripts.experiment.tables import measured_of

ROOT = Path(__file__).resolve().parents[2]


def call(*command: object, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, **environment},
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
    answers = json.loads((folder / "results" / "results.json").read_text())
    assert set(answers) == {f"{lower} below {upper}" for lower, upper in HYPOTHESES}
    assert set(answers.values()) <= {"yes", "no", "undecided"}
    assert all(word in said for word in answers.values())
    measured = measured_of(read_losses(folder / "results" / "losses.csv"))
    assert set(measured) == set(variants(SMALL))
    for variant, by_run in measured.items():
        assert set(by_run) == set(runs(SMALL, variant))
        whole, drawn = (by_run[Run(arm, P, 0, None)]["mean"] for arm in ("all_epochs", "random"))
        assert 0 < whole < drawn  # seven times as many steps on the same records
    assert (folder / "results" / "arms.png").read_bytes().startswith(b"\x89PNG")
    tables = (folder / "results" / "tables.md").read_text()
    assert "## Linear datamodelling score" in tables
    for name in ("tables.md", "results.json"):
        (folder / "results" / name).unlink()
    call(sys.executable, "-m", "scripts.experiment.tables", folder)
    assert (folder / "results" / "tables.md").read_text() == tables

    models = sorted(folder.glob("*/models/*/training_args.bin"))
    before = {path: path.stat().st_mtime_ns for path in models}
    call("bash", "scripts/experiment.sh", "--small", folder)
    assert before == {path: path.stat().st_mtime_ns for path in models}
    halves = 2 * SMALL.halves
    assert len(models) == halves + sum(len(runs(SMALL, variant)) for variant in variants(SMALL))

    assert {step["task"] for step in read_csv(folder / "results" / "steps.csv")} == set(SMALL.records)

    # `finetune.sh` in a Python that starts anew trains the same model as the fork, byte for byte.
    (name,) = [run.name for run in runs(SMALL, "varied_clean") if (run.arm, run.seed) == ("tive", 0)]
    (summary,) = (folder / "varied_clean" / "selected" / name).glob("*_summary.json")
    subset = summary.with_name(summary.name.replace("_summary", ""))
    again = folder / "again"
    settings = {"MODEL": folder / "base", "VISION_TOWER": folder / "model" / "clip", "DATA_PATH": subset}
    settings |= {"IMAGE_FOLDER": folder / "data" / "images", "OUTPUT_DIR": again, "GPUS": "none", "WORKERS": 0}
    settings |= {"BATCH_SIZE": 8, "LEARNING_RATE": 1e-3, "EPOCHS": SMALL.epochs, "OMP_NUM_THREADS": 1}
    more = ("--logging_steps", 10, "--gradient_checkpointing", False, "--seed", 0)
    call("bash", "finetune.sh", *more, **{key: str(value) for key, value in settings.items()})
    weights = "model.safetensors"
    assert (again / weights).read_bytes() == (folder / "varied_clean" / "models" / name / weights).read_bytes()
