"""The small variant of the experiment runs from packages to losses, and a second call trains nothing again. Minutes."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.experiment import run
from scripts.experiment.plan import BASE, SMALL, runs
from scripts.experiment.smollm2 import missing
from scripts.experiment.tables import read_csv, read_losses, write_csv
from tests.helpers.packages import write_packages
from tive.util.errors import UserError

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(missing()), reason=missing())]


def test_every_run_stands_in_the_csv_once_and_a_run_that_is_gone_comes_back_the_same(tmp_path: Path) -> None:
    write_packages(tmp_path / "data" / "packages")
    losses = tmp_path / "losses.csv"
    run.experiment(tmp_path, SMALL, losses)
    first = read_losses(losses)[run.VARIANT]
    assert set(first) == {BASE, *runs(SMALL)}
    names = [(row["arm"], row["seed"], row["task"]) for row in read_csv(losses)]
    assert len(names) == len(set(names))
    assert len({str(tasks) for tasks in first.values()}) > len(runs(SMALL)) / 2  # arms choose and train differently

    last = runs(SMALL)[-1]
    write_csv(losses, [row for row in read_csv(losses) if row["arm"] != last.arm])
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*.safetensors")}
    run.experiment(tmp_path, SMALL, losses)
    assert read_losses(losses)[run.VARIANT] == first
    assert before == {path: path.stat().st_mtime_ns for path in before}

    other = [{**row, "loss": float(row["loss"]) + 1} for row in read_csv(losses)]
    write_csv(losses, other)
    with pytest.raises(UserError, match="--result"):
        run.experiment(tmp_path, SMALL, losses)
