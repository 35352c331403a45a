"""TIVE's selection as one function, from arrays and options to what was chosen and why (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tive.data.tasks import NO_TASK
from tive.method.clusters import MAX_CLUSTERS, draw_from_clusters, k_means
from tive.method.value import (
    budget_errors,
    capped,
    draw,
    draw_top,
    effective_sample_size,
    instance_weights,
    mean_budgets,
    records_for_error,
    rounded,
    task_budgets,
    task_value,
    value_error,
)
from tive.selection.options import WITHOUT_SCORES, TiveOptions, column_of
from tive.selection.output import Chosen, Task
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, command, listed, shown

# From a sample: the error of the largest budget that is planned for, and the records below which a task is named.
AIM = 0.02
FEW = 30


def is_excluded(task_names: Sequence[str], options: TiveOptions) -> np.ndarray:
    """Which tasks nothing is drawn from, bool `[T]`."""
    return np.array([name in options.exclude_tasks or name == NO_TASK for name in task_names], bool)


def choose(
    task_names: Sequence[str],
    task: np.ndarray,
    scores: Mapping[str, np.ndarray],
    reasons: Mapping[int, str],
    options: TiveOptions,
    points: np.ndarray | None = None,
) -> Chosen:
    """Task values, task budgets, instance weights, and the records drawn; a `UserError` where every task is excluded,
    one that is not has no record left or too few in the sample, or none gets a whole record.

    Args:
        task_names: the T tasks.
        task: int `[N]`, index into `task_names` of each record's task.
        scores: float `[N]` each: those that the options name (`TiveOptions.columns`) and any others. A record without
            any, in a selection from a sample, counts in no mean.
        reasons: why records cannot be drawn, by row: of all numbers they count in N alone.
        points: int8 `[N, m]`, of `whitened_points`, for sampling by clusters.

    Returns:
        The columns are the scores and `weight`, `softmax(q * score)` over the record's task. From a sample, the tasks
        have errors, and the details `records_per_task`, which would bring all errors of budgets under `AIM`.
    """
    assert (points is not None) == (options.sampling == "clusters")
    excluded = is_excluded(task_names, options)
    if excluded.all():
        raise UserError(f"every task is excluded ({listed(task_names)}); exclude fewer")
    usable = np.ones(len(task), bool)
    usable[list(reasons)] = False
    known = usable & np.any([np.isfinite(values) for values in scores.values()], axis=0)
    rows_of = np.split(np.argsort(task, kind="stable"), np.cumsum(np.bincount(task, minlength=len(task_names)))[:-1])
    counted = [rows[usable[rows]] for rows in rows_of]
    included = np.flatnonzero(~excluded).tolist()
    measured = [rows_of[index][known[rows_of[index]]] for index in included]
    for index, rows in zip(included, measured, strict=True):
        _check_task(task_names[index], rows_of[index], counted[index], len(rows), reasons)

    values: dict[str, np.ndarray] = {}  # of each rule, what the budgets are in proportion to
    for rule in options.budget_rules:
        if rule in WITHOUT_SCORES:
            values[rule] = np.array([len(rows_of[index]) if rule == "size" else 1.0 for index in included], np.float64)
        else:
            values[rule] = np.array([task_value(scores[column_of(rule)][rows]) for rows in measured])
            if not values[rule].sum() > 0:
                raise UserError(f"the mean {rule} of every task is 0; choose another task_budget")
    parts = {rule: task_budgets(of_rule, options.p, len(task)) for rule, of_rule in values.items()}
    sizes = np.array([len(counted[index]) for index in included])
    budgets = mean_budgets(list(values.values()), options.p, len(task))
    if options.at_most_once:
        budgets = capped(budgets, sizes)
    whole = rounded(budgets, options.rounding)
    if not whole.any():
        raise UserError(
            f"p = {options.p} of {len(task):,} records in {len(sizes):,} tasks is less than one record for every task; "
            "give a larger p" + (", or rounding largest_remainder" if options.rounding == "down" else "")
        )
    errors: list[dict[str, Any]] = [{} for _ in included]
    details = {}
    if options.from_sample:
        errors, details["records_per_task"] = _errors(values, scores, measured, sizes, options.p * len(task))

    deciding = scores[options.score_column] if options.score_column else np.zeros(len(task))
    weights, times = np.full(len(task), np.nan), np.zeros(len(task), np.int64)
    tasks = [
        Task(name, records=len(rows), counted=len(left), selected=0, distinct=0, excluded=True)
        for name, rows, left in zip(task_names, rows_of, counted, strict=True)
    ]
    for place, index in enumerate(included):
        name, rows, records = task_names[index], counted[index], int(whole[place])
        of_rows = deciding[rows].astype(np.float64)
        if options.score_column == "visual_gain":
            of_rows = np.nan_to_num(of_rows, nan=0.0)  # images that a record does not have take nothing off its loss
        weights[rows] = instance_weights(of_rows, options.q)
        each, rest = divmod(records, len(rows))
        times[rows] = each  # a budget above the records takes each so often, and draws the rest
        if options.sampling == "top":
            drawn = draw_top(of_rows, rest)
        elif points is None or not rest:
            drawn = draw(of_rows, options.q, rest, options.seed, name)
        else:
            drawn = draw_from_clusters(*k_means(points[rows], min(rest, MAX_CLUSTERS), options.seed, name), rest)
        times[rows[drawn]] += 1
        tasks[index] = Task(
            name,
            records=len(rows_of[index]),
            counted=len(rows),
            value=task_value(scores["norm"][measured[place]]) if "norm" in scores else None,
            basis=float(values[options.budget_rules[0]][place]) if len(parts) == 1 else None,
            budget=records,
            budget_before_rounding=float(budgets[place]),
            budget_parts={rule: float(part[place]) for rule, part in parts.items()} if len(parts) > 1 else None,
            selected=records,
            distinct=int(np.count_nonzero(times[rows])),
            effective_sample_size=effective_sample_size(weights[rows]),
            **errors[place],
        )
    return Chosen(tasks, {**scores, "weight": weights}, times, dict(reasons), details=details)


def _check_task(task: str, rows: np.ndarray, counted: np.ndarray, measured: int, reasons: Mapping[int, str]) -> None:
    """A `UserError` where no record of a task is left, none has scores, or one alone, which tells no error."""
    name = shown(task, LABEL_LIMIT)
    if not len(counted):
        row = int(rows[0])
        raise UserError(
            f"all {len(rows)} records of task {name} are left out (record {row}: {reasons[row]}); repair them and take "
            "their gradients again, or exclude the task"
        )
    if measured < min(2, len(counted)):
        raise UserError(
            f"{measured} of {len(counted):,} records of task {name} have features; take those of {FEW} of every "
            f"task ({command('select_warm_up_data.py', per_task='1000')} draws more), or exclude the task"
        )


def _errors(
    values: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    measured: Sequence[np.ndarray],
    sizes: np.ndarray,
    total: float,
) -> tuple[list[dict[str, Any]], int]:
    """What a sample leaves open: the errors of each task, as fields of `Task`, and the records a task to plan for."""
    means, covariances = np.array(list(values.values())), np.zeros((len(sizes), len(values), len(values)))
    for place, rows in enumerate(measured):
        if len(rows) > 1:
            looked_at = [
                np.zeros(len(rows)) if rule in WITHOUT_SCORES else scores[column_of(rule)][rows] for rule in values
            ]
            covariances[place] = np.cov(looked_at, ddof=1)
    errors, intervals = budget_errors(means, covariances, np.array([*map(len, measured)]), sizes, total)
    of_tasks = [
        {
            "sampled": len(rows),
            "value_error": value_error(scores["norm"][rows], int(size)) if "norm" in scores else None,
            "budget_error": float(error),
            "budget_interval": tuple(interval.tolist()),
        }
        for rows, size, error, interval in zip(measured, sizes, errors, intervals, strict=True)
    ]
    return of_tasks, records_for_error(means, covariances, sizes, AIM)
