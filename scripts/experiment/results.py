"""The experiments' results as data: CSV files with a row a run and task, from which the tables and plots are made.

Of the first experiment only the arms' means are kept, in a file without the columns seed, answers and exact.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.experiment.plan import KNOWN, SHORT, Run
from tive.util.files import whole_file

MEASURES = ("mean", "known", "new", "weighted", "worst", "exact")
BASE = Run("base", 0)
# variant -> run -> task -> number of the CSV
Losses = Mapping[str, Mapping[Run, Mapping[str, Mapping[str, float]]]]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows under their keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_losses(path: Path) -> Losses:
    """The numbers of every run."""
    losses: dict[str, dict[Run, dict[str, dict[str, float]]]] = {}
    for row in read_csv(path):
        run = Run(row["arm"], int(row.get("seed", 0)))
        numbers = {key: float(row.get(key, 0)) for key in ("mixture_records", "loss", "answers", "exact")}
        losses.setdefault(row["variant"], {}).setdefault(run, {})[row["task"]] = numbers
    return losses


def measures(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of a run's losses by task: the mean over tasks (the main measure), over known and over new ones, weighted by the
    mixture's records, the worst; and the exact share of the short tasks (NaN where no answer was asked for)."""
    losses = {task: numbers["loss"] for task, numbers in tasks.items()}
    weights = [numbers["mixture_records"] for numbers in tasks.values()]
    asked = [numbers for task, numbers in tasks.items() if task in SHORT and numbers["answers"]]
    return {
        "mean": float(np.mean([*losses.values()])),
        "known": float(np.mean([loss for task, loss in losses.items() if task in KNOWN])),
        "new": float(np.mean([loss for task, loss in losses.items() if task not in KNOWN])),
        "weighted": float(np.average([*losses.values()], weights=weights)),
        "worst": max(losses.values()),
        "exact": float(np.mean([numbers["exact"] / numbers["answers"] for numbers in asked])) if asked else math.nan,
    }
