"""The steps of the selection between the data file, the feature files and the formulas of `tive.method.value`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tive.data.records import RecordFile, checked_task, open_records, rows_by_task, task_of
from tive.features.chunks import Chunk
from tive.method.value import (
    draw,
    draw_top,
    effective_sample_size,
    instance_weights,
    rounded_down,
    task_budgets,
    task_value,
)
from tive.util.errors import UserError

NO_TASK = "(no task)"


@dataclass
class Mixture:
    """A data file: the id and task of every record as text, and what is wrong with records by row."""

    records: RecordFile
    ids: list[str] = field(default_factory=list)
    tasks: list[str] = field(default_factory=list)
    problems: dict[int, str] = field(default_factory=dict)


@dataclass
class Task:
    """A task of the mixture: `rows` are its records, `counted` those that the method takes into account.

    `budget` is p * N * V_t / sum of V before rounding down, `selected` the records written (repeated ones each time).
    """

    name: str
    rows: np.ndarray
    excluded: bool
    counted: np.ndarray
    value: float | None = None
    budget: float | None = None
    selected: int = 0
    distinct: int = 0
    effective_sample_size: float | None = None


def read_mixture(path: str, task_key: str) -> Mixture:
    """Read a data file. A record that the gradient step may have left out is no error yet.

    Raises:
        UserError: the file cannot be read.
    """
    ids: list[str] = []
    tasks: list[str] = []
    problems: dict[int, str] = {}

    def visit(row: int, record: Any) -> None:
        try:
            task = checked_task(path, row, record, task_key)
        except UserError as error:
            problems[row] = str(error)
            task = (task_of(record, task_key) if isinstance(record, dict) else None) or NO_TASK
        tasks.append(task)
        ids.append(_text(record.get("id") if isinstance(record, dict) else None))

    return Mixture(open_records(path, visit), ids, tasks, problems)


def _text(value: Any) -> str:
    """An id or a reason as text that can be written and printed, half a surrogate pair too."""
    if not isinstance(value, str):
        return "" if value is None else json.dumps(value)
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def gradient_norms(chunks: list[Chunk]) -> np.ndarray:
    """`||g_s||` of every record, float64 `[N]`."""
    return np.concatenate([chunk.norms for chunk in chunks])


def reasons_left_out(mixture: Mixture, chunks: list[Chunk], norms: np.ndarray) -> dict[int, str]:
    """Why records cannot count, by row: the gradient step's reason, or a norm that is zero or not finite.

    Raises:
        UserError: a record has a problem or no task, and the gradient step did not leave it out.
    """
    reasons = {entry.row: _text(entry.reason) for chunk in chunks for entry in chunk.left_out}
    unexpected = mixture.problems.keys() - reasons.keys()
    if unexpected:
        raise UserError(mixture.problems[min(unexpected)])
    for row in np.flatnonzero(~(np.isfinite(norms) & (norms > 0))).tolist():
        reasons.setdefault(row, "zero gradient" if norms[row] == 0 else "gradient norm not a positive number")
    return reasons


def excluded_names(wanted: Sequence[str], mixture: Mixture) -> set[str]:
    """The tasks that `--exclude_tasks` names: one by one or with commas between; `none` is no task.

    A name that the data lacks is only noted: the default is LLaVA's captions, which other mixtures do not have.
    """
    known = dict.fromkeys(mixture.tasks)
    names = {name.strip() for text in wanted for name in ([text] if text in known else text.split(","))} - {""}
    if names == {"none"}:
        names = names & known.keys()
    for name in sorted(names - known.keys()):
        print(f"note: the data has no task {name} to exclude")
    return names & known.keys()


def group_by_task(mixture: Mixture, excluded: set[str], reasons: dict[int, str]) -> tuple[list[Task], np.ndarray]:
    """The tasks in order of their first record, and for each record the number of its task `[N]`.

    The number is -1 where the record counts in nothing: it was left out, or its task is excluded.

    Raises:
        UserError: every task is excluded.
    """
    counted = np.ones(len(mixture.tasks), bool)
    counted[list(reasons)] = False
    codes = np.full(len(mixture.tasks), -1)
    tasks = []
    for number, (name, rows) in enumerate(rows_by_task(mixture.tasks).items()):
        task = Task(name, rows, name in excluded or name == NO_TASK, rows[counted[rows]])
        tasks.append(task)
        if not task.excluded:
            codes[task.counted] = number
    if all(task.excluded for task in tasks):
        raise UserError(
            f"every task of {mixture.records.path} is excluded ({', '.join(task.name for task in tasks)}); "
            "name fewer with --exclude_tasks"
        )
    return tasks, codes


def leave_out_features(tasks: list[Task], codes: np.ndarray, lengths: np.ndarray, reasons: dict[int, str]) -> None:
    """Note the records whose features proved to be zero or not finite, and count them no more.

    Raises:
        UserError: a task that is not excluded has no record left.
    """
    useless = (codes >= 0) & ~(np.isfinite(lengths) & (lengths > 0))
    for row in np.flatnonzero(useless).tolist():
        reasons[row] = "features are zero" if lengths[row] == 0 else "features not finite"
    for task in tasks:
        task.counted = task.counted[~useless[task.counted]]
        if not task.excluded and not len(task.counted):
            raise UserError(
                f"all {len(task.rows)} records of task {task.name} are left out (record {task.rows[0]}: "
                f"{reasons[int(task.rows[0])]}); repair them and take their gradients again, or name the task "
                "with --exclude_tasks"
            )


def give_budgets(tasks: list[Task], norms: np.ndarray, p: float, task_budget: str) -> None:
    """Set every task's value and budget.

    Args:
        task_budget: `difficulty` (the paper's), by `size` or `equal`.

    Raises:
        UserError: no task gets a whole record.
    """
    included = [task for task in tasks if not task.excluded]
    records = sum(len(task.rows) for task in tasks)
    for task in included:
        task.value = task_value(norms[task.counted])
    basis = {
        "difficulty": [task.value for task in included],
        "size": [len(task.rows) for task in included],
        "equal": [1.0 for _ in included],
    }[task_budget]
    for task, budget in zip(included, task_budgets(np.array(basis), p, records).tolist(), strict=True):
        task.budget = budget
    if not any(rounded_down(budget) for budget in (task.budget for task in included)):
        raise UserError(f"--p {p} of {records} records is less than one record for every task; raise --p")


def draw_task(task: Task, scores: np.ndarray, q: float, seed: int, sampling: str) -> tuple[np.ndarray, np.ndarray]:
    """Instance weights and times selected, both `[n_t]`, of a task's counted records.

    A budget above the records takes each `budget // n_t` times and draws the remainder.

    Args:
        scores: `[n_t]`, the instance score of each counted record.
        sampling: `weighted` by softmax(q * score), or the `top` scores.
    """
    weights = instance_weights(scores, q)
    whole, rest = divmod(rounded_down(task.budget), len(scores))
    times = np.full(len(scores), whole)
    times[draw_top(scores, rest) if sampling == "top" else draw(scores, q, rest, seed, task.name)] += 1
    task.selected, task.distinct = int(times.sum()), int(np.count_nonzero(times))
    task.effective_sample_size = effective_sample_size(weights)
    return weights, times
