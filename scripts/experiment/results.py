"""The experiment's results as data: CSV files, from which the tables and plots are made.

`losses.csv` has a row for each run and task, `halves.csv` for each random half, order and task, `steps.csv` for each
step along a record's gradient.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from scripts.experiment.plan import KNOWN, NEW, P, Plan, Run, runs, variants
from tive.evaluation.results import Evaluation, ModelResult, mean_over_tasks, read_stored
from tive.selection.reading import Selection, find_summary, read_selection
from tive.util.errors import UserError
from tive.util.files import whole_file

MEASURES = ("mean", "known", "new", "geometric", "weighted", "worst", "exact")
BASE = Run("base", 1.0, 0, None)
# variant -> run -> task -> column of `losses.csv`; the base stands under every variant.
Losses = Mapping[str, Mapping[Run, Mapping[str, Mapping[str, float]]]]


def evaluation_of(folder: Path, variant: str, run: Run, answered: bool) -> Path:
    """The folder of a run's held-out losses, with or without generated answers."""
    return folder / variant / ("answered" if answered else "evaluated") / run.name


def read_result(save_path: Path) -> ModelResult:
    """The one model of an evaluation."""
    return read_stored(save_path, Evaluation).models[0]


def first_selection(folder: Path, variant: str, reference: int) -> Selection:
    """TIVE's selection with a reference and seed 0: it has the influence of every record of the mixture."""
    return read_selection(find_summary(folder / variant / "selected" / Run("tive", P, 0, reference).name))


def collect_losses(folder: Path, plan: Plan, answered: bool) -> None:
    """Write `results/losses.csv`: every run's held-out losses by task, and the base's."""
    rows = []
    for variant in variants(plan):
        places = {run: evaluation_of(folder, variant, run, answered) for run in runs(plan, variant)}
        for run, place in ({BASE: folder / "base_evaluation"} | places).items():
            for task in read_result(place).tasks:
                if task.loss is None:
                    raise UserError(f"{place}: no loss in {task.name}; remove this folder and run again")
                identity = {"variant": variant, "arm": run.arm, "share": run.share, "seed": run.seed}
                identity |= {"reference": "" if run.reference is None else run.reference, "task": task.name}
                numbers = {"loss": task.loss, "answers": task.answers, "exact": task.exact}
                rows.append(identity | numbers | {"mixture_records": plan.records[task.name]})
    write_csv(folder / "results" / "losses.csv", rows)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows under their keys."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with whole_file(path) as file:
        file.write(text.getvalue().encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_losses(path: Path) -> Losses:
    """The losses of `losses.csv`."""
    losses: dict[str, dict[Run, dict[str, dict[str, float]]]] = {}
    for row in read_csv(path):
        reference = int(row["reference"]) if row["reference"] else None
        run = Run(row["arm"], float(row["share"]), int(row["seed"]), reference)
        numbers = {key: float(row[key]) for key in ("loss", "answers", "exact", "mixture_records")}
        losses.setdefault(row["variant"], {}).setdefault(run, {})[row["task"]] = numbers
    return losses


def measures(tasks: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of a run's losses by task: mean over tasks (the main measure), over known and over new ones, geometric mean, mean
    weighted by the mixture's records, worst task; and the exact share (NaN where no answer was asked for)."""
    losses = {task: numbers["loss"] for task, numbers in tasks.items()}
    weights = [numbers["mixture_records"] for numbers in tasks.values()]
    exact = [numbers["exact"] / numbers["answers"] if numbers["answers"] else math.nan for numbers in tasks.values()]
    values = list(losses.values())
    return {
        "mean": float(np.mean(values)),
        "known": float(np.mean([losses[task] for task in KNOWN])),
        "new": float(np.mean([losses[task] for task in NEW])),
        "geometric": math.exp(float(np.mean([math.log(max(loss, 1e-12)) for loss in values]))),
        "weighted": float(np.average(values, weights=weights)),
        "worst": max(values),
        "exact": float(np.mean(exact)),
    }


def base_answers_tell(base: ModelResult) -> bool:
    """The first half of the protocol's gate for exact answers: the base produces 80% of vqa's."""
    return (next(task.exact_share for task in base.tasks if task.name == "vqa") or 0.0) >= 0.8


def exact_answers_tell(base: ModelResult, whole: Sequence[ModelResult]) -> bool:
    """The protocol's gate: the base produces 80% of vqa's answers, and `all_epochs` 30% over the tasks."""
    shares = [mean_over_tasks(result, "exact_share") or 0.0 for result in whole]
    return base_answers_tell(base) and bool(shares) and float(np.mean(shares)) >= 0.3
