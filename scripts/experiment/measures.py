"""What is looked at of one training: the main measure, and beside it what a mean over tasks can hide."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from scripts.experiment.plan import KNOWN, NEW
from tive.evaluation.results import ModelResult, mean_over_tasks
from tive.util.errors import UserError

MEASURES = ("mean", "known", "new", "geometric", "weighted", "worst", "exact")


def measures(result: ModelResult, sizes: Mapping[str, int]) -> dict[str, float]:
    """Of a model's held-out losses: mean over tasks (the main measure), over known and over new tasks, geometric mean,
    mean weighted by the mixture's records, worst task; and the exact share.

    Raises:
        UserError: a task has no loss.
    """
    losses = {task.name: task.loss for task in result.tasks if task.loss is not None}
    mean = mean_over_tasks(result, "loss")
    if mean is None or set(losses) != set(sizes):
        raise UserError(f"{result.name}: not every task has a held-out loss; remove its result and run again")

    def over(tasks: Sequence[str]) -> float:
        return float(np.mean([losses[task] for task in tasks]))

    return {
        "mean": mean,
        "known": over(KNOWN),
        "new": over(NEW),
        "geometric": math.exp(float(np.mean([math.log(max(loss, 1e-12)) for loss in losses.values()]))),
        "weighted": sum(losses[task] * size for task, size in sizes.items()) / sum(sizes.values()),
        "worst": max(losses.values()),
        "exact": mean_over_tasks(result, "exact_share") or 0.0,
    }


def base_answers_tell(base: ModelResult) -> bool:
    """The first half of the protocol's gate for exact answers: the base produces 80% of vqa's."""
    return (next(task.exact_share for task in base.tasks if task.name == "vqa") or 0.0) >= 0.8


def exact_answers_tell(base: ModelResult, whole: Sequence[ModelResult]) -> bool:
    """The protocol's gate: the base produces 80% of vqa's answers, and `all_epochs` 30% over the tasks."""
    shares = [mean_over_tasks(result, "exact_share") or 0.0 for result in whole]
    return base_answers_tell(base) and bool(shares) and float(np.mean(shares)) >= 0.3
