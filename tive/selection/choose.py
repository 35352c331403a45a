"""TIVE's selection as one function, from arrays and options to what was chosen and why (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import structs

from tive.method.clusters import MAX_CLUSTERS, draw_from_clusters, k_means
from tive.method.value import (
    capped,
    draw,
    draw_top,
    effective_sample_size,
    instance_weights,
    mean_budgets,
    rounded,
    task_budgets,
    task_value,
)
from tive.selection.mixture import NO_TASK
from tive.selection.options import BUDGET_COLUMNS, SCORE_COLUMNS, TiveOptions
from tive.selection.summary import Task
from tive.selection.writing import Chosen
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, command, listed, shown


def is_excluded(task_names: Sequence[str], options: TiveOptions) -> np.ndarray:
    """Which tasks nothing is drawn from, bool `[T]`."""
    return np.array([name in options.exclude_tasks or name == NO_TASK for name in task_names], bool)


def has_scores(scores: Mapping[str, np.ndarray]) -> np.ndarray:
    """Which records the gradient step computed, bool `[N]`: in a selection from a sample the others have no score."""
    return np.any([np.isfinite(values) for values in scores.values()], axis=0)


def choose(
    task_names: Sequence[str],
    task: np.ndarray,
    scores: Mapping[str, np.ndarray],
    reasons: Mapping[int, str],
    options: TiveOptions,
    points: np.ndarray | None = None,
) -> Chosen:
    """Task values, task budgets, instance weights, and the records drawn.

    Args:
        task_names: the T tasks.
        task: int `[N]`, index into `task_names` of each record's task.
        scores: float `[N]` each: those that the options name (`TiveOptions.columns`) and any others. A record without
            any, in a selection from a sample, counts in no mean.
        reasons: why records cannot be drawn, by row: they count in nothing but N.
        points: int8 `[N, m]`, of `whitened_points`, for sampling by clusters.

    Returns:
        The columns are the scores and `weight`, `softmax(q * score)` over the record's task.

    Raises:
        UserError: every task is excluded, one that is not has no record left, or none gets a whole record.
    """
    excluded = is_excluded(task_names, options)
    if excluded.all():
        raise UserError(f"every task is excluded ({listed(task_names)}); exclude fewer")
    included = np.flatnonzero(~excluded).tolist()
    rows_of = np.split(np.argsort(task, kind="stable"), np.cumsum(np.bincount(task, minlength=len(task_names)))[:-1])
    usable = np.ones(len(task), bool)
    usable[list(reasons)] = False
    counted = [rows[usable[rows]] for rows in rows_of]
    known = has_scores(scores)
    measured = [rows[known[rows]] for rows in counted]
    for index in included:
        _refuse_empty(shown(task_names[index], LABEL_LIMIT), rows_of[index], counted[index], measured[index], reasons)
    bases = {
        rule: np.array([rule_value(rule, scores, len(rows_of[index]), measured[index]) for index in included])
        for rule in options.budget_rules
    }
    sizes = np.array([len(counted[index]) for index in included])
    budgets, whole = _budgets(bases, sizes, len(task), options)
    parts = {rule: task_budgets(values, options.p, len(task)) for rule, values in bases.items()}
    basis = next(iter(bases.values())) if len(bases) == 1 else mean_budgets(list(bases.values()), 1.0, 1)
    weights, times = np.full(len(task), np.nan), np.zeros(len(task), np.int64)
    tasks = [
        Task(name, records=len(rows), counted=len(left), selected=0, distinct=0, excluded=True)
        for name, rows, left in zip(task_names, rows_of, counted, strict=True)
    ]
    for place, index in enumerate(included):
        rows, records = counted[index], int(whole[place])
        instance_scores = _instance_scores(options, scores, rows)
        weights[rows] = instance_weights(instance_scores, options.q)
        each, rest = divmod(records, len(rows))
        times[rows] = each  # a budget above the records takes each so often, and draws the rest
        times[rows[_drawn(instance_scores, rows, rest, task_names[index], options, points)]] += 1
        tasks[index] = structs.replace(
            tasks[index],
            excluded=False,
            value=task_value(scores["norm"][measured[index]]) if "norm" in scores else None,
            basis=float(basis[place]),
            budget=records,
            budget_before_rounding=float(budgets[place]),
            budget_parts={rule: float(part[place]) for rule, part in parts.items()} if len(parts) > 1 else None,
            selected=records,
            distinct=int(np.count_nonzero(times[rows])),
            effective_sample_size=effective_sample_size(weights[rows]),
        )
    return Chosen(tuple(tasks), {**scores, "weight": weights}, times, dict(reasons))


def _refuse_empty(
    name: str, rows: np.ndarray, counted: np.ndarray, measured: np.ndarray, reasons: Mapping[int, str]
) -> None:
    """Raise a `UserError` where no record of a task is left, or none has features."""
    if not len(counted):
        row = int(rows[0])
        raise UserError(
            f"all {len(rows)} records of task {name} are left out (record {row}: {reasons[row]}); repair them and take "
            "their gradients again, or exclude the task"
        )
    if not len(measured):
        raise UserError(
            f"no record of task {name} has features; take those of some of every task "
            f"({command('select_warm_up_data.py', per_task='1000')} draws them), or exclude the task"
        )


def _budgets(
    bases: Mapping[str, np.ndarray], sizes: np.ndarray, records: int, options: TiveOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Each task's budget before and after rounding, both `[T]`.

    Args:
        bases: `[T]` by rule.
        sizes: int `[T]`, the records that can be drawn.

    Raises:
        UserError: no task gets a whole record.
    """
    for rule, values in bases.items():
        if not values.sum() > 0:
            raise UserError(f"the mean {rule} of every task is 0; choose another task_budget")
    budgets = mean_budgets(list(bases.values()), options.p, records)
    if options.at_most_once:
        budgets = capped(budgets, sizes)
    whole = rounded(budgets, options.rounding)
    if not whole.any():
        raise UserError(
            f"p = {options.p} of {records:,} records in {len(sizes):,} tasks is less than one record for every task; "
            "give a larger p" + (", or rounding largest_remainder" if options.rounding == "down" else "")
        )
    return budgets, whole


def rule_value(rule: str, scores: Mapping[str, np.ndarray], records: int, measured: np.ndarray) -> float:
    """What a task's budget is in proportion to: its records, 1, or the mean of a score over its measured records."""
    if rule in BUDGET_COLUMNS:
        return task_value(scores[BUDGET_COLUMNS[rule]][measured])
    return {"size": float(records), "equal": 1.0}[rule]


def _instance_scores(options: TiveOptions, scores: Mapping[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
    if options.instance_score == "random" or options.from_sample:
        return np.zeros(len(rows))
    values = scores[SCORE_COLUMNS[options.instance_score]][rows].astype(np.float64)
    # Images that a record does not have take nothing off its loss.
    return np.nan_to_num(values, nan=0.0) if options.instance_score == "visual_gain" else values


def _drawn(
    scores: np.ndarray, rows: np.ndarray, number: int, task: str, options: TiveOptions, points: np.ndarray | None
) -> np.ndarray:
    """Which `number` of a task's records are drawn: indices into `rows`, sorted."""
    if options.sampling == "top":
        return draw_top(scores, number)
    if options.sampling == "weighted":
        return draw(scores, options.q, number, options.seed, task)
    assert points is not None
    if not number:
        return np.empty(0, np.int64)
    return draw_from_clusters(*k_means(points[rows], min(number, MAX_CLUSTERS), options.seed, task), number)
