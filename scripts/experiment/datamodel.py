"""The linear datamodelling score of the sum of influences: do they predict which half of the records trains better?

Models are trained on random halves of a mixture, the same half of every task's number, and each half twice, in another
order. For each task, the sum of its half's influences is set against the held-out loss, as a rank correlation over the
halves. The two losses of a half, set against each other, say how much of the loss the choice of records decides at all.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.stats import spearmanr

from scripts.experiment.commands import Paths, evaluate, train
from scripts.experiment.plan import Plan
from scripts.experiment.results import first_selection, read_result
from scripts.experiment.statistics import difference
from tive.util.files import read_json, write_json

VARIANT = "varied_clean"
ORDERS = (0, 1)


@dataclass(frozen=True)
class Score:
    """Of one task: rank correlation of predicted and actual held-out loss over the halves, and of the loss with itself.

    Attributes:
        predicted: the mean of a half's two losses, against the sum of influences; positive where more influence is less
            loss.
        repeated: the first loss of a half against the second.
    """

    task: str
    predicted: float
    repeated: float


def half_of(plan: Plan, tasks: list[str], number: int) -> list[int]:
    """The rows of a half: half of each task's, drawn by its number."""
    drawn = random.Random(f"half {number}")
    rows = []
    for task in plan.records:
        own = [row for row, name in enumerate(tasks) if name == task]
        rows += drawn.sample(own, len(own) // 2)
    return sorted(rows)


def train_halves(paths: Paths, plan: Plan) -> list[Callable[[], None]]:
    """Jobs: each trains on one half in one order for one epoch, and evaluates."""
    records = read_json(paths.mixture(VARIANT))
    tasks = [record["dataset"] for record in records]

    def job(number: int, order: int) -> None:
        data = paths.folder / "halves" / "data" / f"{number}.json"
        model = paths.folder / "halves" / "models" / f"{number}_{order}"
        write_json(data, [records[row] for row in half_of(plan, tasks, number)])
        train(paths, "finetune.sh", data, model, "--seed", order, EPOCHS=1)
        evaluate(paths, model, f"half_{number}_{order}", _evaluation(paths.folder, number, order), 0)

    # Both orders of a half use one file of data, which is the same whoever writes it.
    return [functools.partial(job, number, order) for order in ORDERS for number in range(plan.halves)]


def _evaluation(folder: Path, number: int, order: int) -> Path:
    return folder / "halves" / "evaluated" / f"{number}_{order}"


def scores(folder: Path, plan: Plan, reference: int) -> list[Score]:
    """The score of each task, with the influences of one reference."""
    influence = first_selection(folder, VARIANT, reference).column("influence")
    names = [record["dataset"] for record in read_json(folder / "data" / f"{VARIANT}.json")]
    halves = [half_of(plan, names, number) for number in range(plan.halves)]
    results = [[read_result(_evaluation(folder, number, order)) for order in ORDERS] for number in range(plan.halves)]
    losses = np.array([[[task.loss for task in result.tasks] for result in both] for both in results], np.float64)
    found = []
    for index, task in enumerate(task.name for task in results[0][0].tasks):
        sums = [sum(influence[row] for row in half if names[row] == task) for half in halves]
        own = losses[:, :, index]
        score = Score(task, float(spearmanr(sums, -own.mean(1)).statistic), float(spearmanr(*own.T).statistic))
        if not math.isnan(score.predicted + score.repeated):
            found.append(score)
    return found


def score_rows(folder: Path, plan: Plan) -> list[tuple[str, ...]]:
    """A row a reference: the score, the mean over tasks with its interval over them, and by task."""
    rows: list[tuple[str, ...]] = [("reference", "score", "loss with itself", "by task")]
    for reference in range(plan.references):
        found = scores(folder, plan, reference)
        mean, repeated = (difference([getattr(score, name) for score in found]) for name in ("predicted", "repeated"))
        by_task = ", ".join(f"{score.task} {score.predicted:+.2f}" for score in found)
        both = [f"{cell.mean:+.2f} ± {cell.half_width():.2f}" for cell in (mean, repeated)]
        rows.append((str(reference), *both, by_task))
    return rows
