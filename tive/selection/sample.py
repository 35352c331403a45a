"""Budgets from a sample: what the records that have features tell of those that have none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from msgspec import structs

from tive.method.value import budget_errors, records_for_error
from tive.selection.choose import has_scores, rule_value
from tive.selection.options import BUDGET_COLUMNS, TiveOptions
from tive.selection.writing import Chosen
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, shown

# The error of the largest budget that the program plans for, and the records below which it names a task.
AIM = 0.02
FEW = 30


def with_errors(chosen: Chosen, task: np.ndarray, scores: Mapping[str, np.ndarray], options: TiveOptions) -> Chosen:
    """The tasks with the errors of their values and budgets; the details have `records_per_task`, which would bring all
    errors of budgets under `AIM`.

    Args:
        task: int `[N]`, each record's task.
        scores: float `[N]` each, NaN for a record without features.

    Raises:
        UserError: a task has one record with features, which tells no error, and more without.
    """
    included = [index for index, entry in enumerate(chosen.tasks) if not entry.excluded]
    usable = has_scores(scores)
    usable[list(chosen.reasons)] = False
    measured = [np.flatnonzero(usable & (task == index)) for index in included]
    sizes = np.array([chosen.tasks[index].counted for index in included])
    counts = np.array([len(rows) for rows in measured])
    for index, count, size in zip(included, counts.tolist(), sizes.tolist(), strict=True):
        if count < 2 and count < size:
            name = shown(chosen.tasks[index].name, LABEL_LIMIT)
            raise UserError(f"task {name} has one record with features; take those of two at least, better of {FEW}")
    rules = options.budget_rules
    means = np.zeros((len(rules), len(included)))
    for place, index in enumerate(included):
        for number, rule in enumerate(rules):
            means[number, place] = rule_value(rule, scores, chosen.tasks[index].records, measured[place])
    covariances = np.array([_covariance(rules, scores, rows) for rows in measured])
    total = options.p * len(task)
    errors, intervals = budget_errors(means, covariances, counts, sizes, total)
    tasks = list(chosen.tasks)
    for place, index in enumerate(included):
        value_error = None
        if "norm" in scores:
            spread = float(scores["norm"][measured[place]].std(ddof=1)) if counts[place] > 1 else 0.0
            value_error = spread * float(np.sqrt((1 - counts[place] / sizes[place]) / counts[place]))
        tasks[index] = structs.replace(
            tasks[index],
            sampled=int(counts[place]),
            value_error=value_error,
            budget_error=float(errors[place]),
            budget_interval=(float(intervals[place, 0]), float(intervals[place, 1])),
        )
    per_task = records_for_error(means, covariances, sizes, AIM)
    return replace(chosen, tasks=tuple(tasks), details={"records_per_task": per_task})


def _covariance(rules: tuple[str, ...], scores: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """`[K, K]`, of the values that the rules take the mean of over a task's records; a rule without has zeros."""
    values = np.zeros((len(rules), len(rows)))
    for place, rule in enumerate(rules):
        if rule in BUDGET_COLUMNS:
            values[place] = scores[BUDGET_COLUMNS[rule]][rows]
    if len(rows) < 2:
        return np.zeros((len(rules), len(rules)))
    return np.atleast_2d(np.cov(values, ddof=1))
