"""Read what select_data_TIVE.py wrote: the summary and the scores of every record."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.util.errors import UserError
from tive.util.files import read_json

SUMMARY_END = "_summary.json"
COLUMNS = ["row", "id", "task", "norm", "influence", "weight", "times_selected", "left_out"]
_MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Task:
    """One task's line of the summary. `value`, `budget` and `effective_sample_size` are None where not defined."""

    name: str
    records: int
    counted: int
    value: float | None
    budget: int | None
    selected: int
    distinct: int
    effective_sample_size: float | None
    excluded: bool


@dataclass(frozen=True)
class Selection:
    """A selection of n records.

    Attributes:
        tasks: the largest first.
        ids: `[n]`, as text.
        task: int32 `[n]`, index into `tasks`.
        norm, influence, weight: float64 `[n]`, NaN where not defined.
        times_selected: int64 `[n]`.
    """

    stem: str
    summary: dict[str, Any]
    tasks: list[Task]
    ids: list[str]
    task: np.ndarray
    norm: np.ndarray
    influence: np.ndarray
    weight: np.ndarray
    times_selected: np.ndarray

    @property
    def arguments(self) -> dict[str, Any]:
        return self.summary["arguments"]

    @property
    def drawn(self) -> np.ndarray:
        """Which records are in the subset, bool `[n]`."""
        return self.times_selected > 0

    def rows_of(self, task: int) -> np.ndarray:
        return np.flatnonzero(self.task == task)


def find_summary(out: Path, name: str | None) -> Path:
    """The summary file that `out` is, or holds; `name` (its stem) chooses among several.

    Raises:
        UserError: there is none, or there are several and none is chosen; they are named.
    """
    if out.is_file() and name is None:
        if out.name.endswith(SUMMARY_END):
            return out
        raise UserError(f"{out} is not a summary; name the folder, or a file that ends in {SUMMARY_END}")
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; name the --save_path of select_data_TIVE.py")
    stems = sorted(path.name.removesuffix(SUMMARY_END) for path in out.glob(f"*{SUMMARY_END}"))
    if not stems:
        raise UserError(f"{out} holds no selection (*{SUMMARY_END}); run select_data_TIVE.py --save_path {out} first")
    if name is not None and name not in stems:
        raise UserError(f"{out} holds no selection {name}; there are: {', '.join(stems)}")
    if name is None and len(stems) > 1:
        raise UserError(f"{out} holds {len(stems)} selections; choose one with --name: {', '.join(stems)}")
    return out / f"{name or stems[0]}{SUMMARY_END}"


def read_selection(summary_path: Path) -> Selection:
    """Read a summary and the scores beside it, and check that they belong together.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the line or key is named.
    """
    summary = read_json(summary_path)
    _check_summary(summary, summary_path)
    tasks = [_task(entry, summary_path) for entry in summary["tasks"]]
    tasks.sort(key=lambda task: (-task.records, task.name))
    stem = summary_path.name.removesuffix(SUMMARY_END)
    scores_path = summary_path.with_name(f"{stem}_scores.csv")
    columns = _read_scores(scores_path, [task.name for task in tasks])
    selection = Selection(stem, summary, tasks, *columns)
    records = np.bincount(selection.task, minlength=len(tasks))
    selected = np.bincount(selection.task, selection.times_selected, minlength=len(tasks))
    for index, task in enumerate(tasks):
        if (records[index], selected[index]) != (task.records, task.selected):
            raise UserError(
                f"{scores_path}: task {task.name[:60]!r} has {records[index]} records, {selected[index]:.0f} selected, "
                f"but {task.records} and {task.selected} in {summary_path.name}; run select_data_TIVE.py again"
            )
    return selection


def _check_summary(summary: Any, path: Path) -> None:
    shape = {"arguments": dict, "versions": dict, "inputs": dict, "tasks": list, "left_out": list, "subset": dict}
    for key, kind in {**shape, "gradient_pass": list}.items():
        if not isinstance(summary, dict) or not isinstance(summary.get(key), kind):
            raise _broken(path, f"`{key}`")
    for key in ("tasks", "left_out", "gradient_pass"):
        if not all(isinstance(entry, dict) for entry in summary[key]):
            raise _broken(path, f"`{key}`")
    inputs = summary["inputs"]
    if not isinstance(inputs.get("data_path"), str) or not isinstance(inputs.get("data_sha256"), str):
        raise _broken(path, "`inputs.data_path` or `inputs.data_sha256`")
    if not isinstance(inputs.get("image_folder", ""), (str, type(None))):
        raise _broken(path, "`inputs.image_folder`")
    if not summary["tasks"]:
        raise _broken(path, "`tasks`")
    q = number(summary["arguments"].get("q"))
    if q is None or q < 0:
        raise _broken(path, "`arguments.q`")


def _broken(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what} is missing or not what select_data_TIVE.py writes; run it again")


def number(value: Any) -> float | None:
    """A finite number of reasonable size as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None
    return float(value)


def _task(entry: dict[str, Any], path: Path) -> Task:
    name, excluded = entry.get("task"), entry.get("excluded")
    if not isinstance(name, str) or not isinstance(excluded, bool):
        raise _broken(path, "a task's `task` or `excluded`")

    def field(key: str, kinds: type | tuple[type, ...]) -> Any:
        value = entry.get(key)
        if value is None and key in ("value", "budget", "effective_sample_size"):
            return None
        if number(value) is None or not isinstance(value, kinds) or not 0 <= value < _MAX_COUNT:
            raise _broken(path, f"`{key}` of task {name[:60]!r}")
        return value

    return Task(
        name=name,
        records=field("records", int),
        counted=field("counted", int),
        value=field("value", (int, float)),
        budget=field("budget", int),
        selected=field("selected", int),
        distinct=field("distinct", int),
        effective_sample_size=field("effective_sample_size", (int, float)),
        excluded=excluded,
    )


def _read_scores(path: Path, names: list[str]) -> tuple[list[str], np.ndarray, ...]:
    """Columns `id, task, norm, influence, weight, times_selected` of a scores file."""
    index = {name: position for position, name in enumerate(names)}
    if len(index) != len(names):
        raise UserError(f"the summary beside {path} names a task twice; run select_data_TIVE.py again")
    ids: list[str] = []
    tasks, times = [], []
    scores: list[tuple[float, float, float]] = []
    for line, cells in _lines(path):
        try:
            row, identity, task, *values, selected, _ = cells
            if int(row) != len(ids) or not 0 <= int(selected) < _MAX_COUNT:
                raise ValueError
            norm, influence, weight = (_number_or_nan(value) for value in values)
            tasks.append(index[task])
        except (ValueError, KeyError):
            raise UserError(
                f"{path}, line {line}: not a record's scores ({','.join(COLUMNS)}), or a task that the summary lacks; "
                "run select_data_TIVE.py again"
            ) from None
        ids.append(identity)
        times.append(int(selected))
        scores.append((norm, influence, weight))
    columns = np.array(scores, np.float64).reshape(-1, 3).T
    return ids, np.array(tasks, np.int32), *np.ascontiguousarray(columns), np.array(times, np.int64)


def _number_or_nan(cell: str) -> float:
    """An empty cell is a score that is not defined; anything else must be a finite number."""
    if cell == "":
        return math.nan
    value = float(cell)
    if not abs(value) < 1e300:
        raise ValueError
    return value


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of each record of a scores file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            if next(reader, None) != COLUMNS:
                raise UserError(
                    f"{path}, line 1: the columns are not {','.join(COLUMNS)}; run select_data_TIVE.py again"
                )
            for cells in tqdm(reader, desc=f"Reading {path.name}", unit=" records", delay=2):
                yield reader.line_num, cells
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it belongs beside the summary") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); run select_data_TIVE.py again") from error
