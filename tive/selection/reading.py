"""A selection, read: its summary and the scores of every record, of this version or an earlier one."""

from __future__ import annotations

import array
import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tive.selection.summary import (
    FIRST_COLUMNS,
    LAST_COLUMNS,
    MAX_COUNT,
    SCORES_END,
    SUMMARY_END,
    Summary,
    Task,
    read_summary,
)
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, shown_value

AGAIN = "make the selection again"


@dataclass(frozen=True)
class Selection:
    """A selection of N records, as it was read.

    Attributes:
        tasks: the largest first.
        task: int32 `[N]`, index into `tasks`.
        numbers: float64 `[N]` each, by column of the scores file, NaN where not defined.
        times_selected: int64 `[N]`.
        left_out: why records were left out, by row.
    """

    stem: str
    summary: Summary
    tasks: list[Task]
    ids: Sequence[str]
    task: np.ndarray
    numbers: Mapping[str, np.ndarray]
    times_selected: np.ndarray
    left_out: Mapping[int, str]

    def column(self, name: str) -> np.ndarray:
        """A score of every record, float64 `[N]`; NaN where the selection has none of that name."""
        return self.numbers.get(name, np.full(len(self.ids), np.nan))

    @property
    def drawn(self) -> np.ndarray:
        """Which records are in the subset, bool `[N]`."""
        return self.times_selected > 0

    def rows_of(self, task: int) -> np.ndarray:
        return np.flatnonzero(self.task == task)


def find_summaries(out: Path) -> list[Path]:
    """The summary file that `out` is, or all that it holds, by name.

    Raises:
        UserError: there is none.
    """
    if out.is_file():
        if out.name.endswith(SUMMARY_END):
            return [out]
        raise UserError(f"{out} is not a summary; name the folder, or a file that ends in {SUMMARY_END}")
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; name the one that a selection was saved to")
    summaries = sorted(out.glob(f"*{SUMMARY_END}"))
    if not summaries:
        raise UserError(
            f"{out} holds no selection (*{SUMMARY_END}); run select_data_TIVE.py first, with this save_path"
        )
    return summaries


def find_summary(out: Path) -> Path:
    """The only summary of `out`.

    Raises:
        UserError: there is none, or there are several.
    """
    first, *others = find_summaries(out)
    if others:
        raise UserError(
            f"{out} holds {len(others) + 1} selections; name the summary of one ({first.name}, for example)"
        )
    return first


def read_selection(summary_path: Path) -> Selection:
    """Read a summary and the scores beside it, of this version or an earlier one; they must belong together.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the line or key is named.
    """
    summary = read_summary(summary_path)
    tasks = sorted(summary.tasks, key=lambda task: (-task.records, task.name))
    stem = summary_path.name.removesuffix(SUMMARY_END)
    path = summary_path.with_name(f"{stem}{SCORES_END}")
    lines = _lines(path)
    columns = next(lines)[1]
    first, last = len(FIRST_COLUMNS), len(columns) - len(LAST_COLUMNS)
    if columns[:first] != FIRST_COLUMNS or columns[last:] != LAST_COLUMNS or len(set(columns)) != len(columns):
        raise UserError(
            f"{path}, line 1: the columns are not {','.join(FIRST_COLUMNS)}, scores, {','.join(LAST_COLUMNS)}; {AGAIN}"
        )
    index = {task.name: position for position, task in enumerate(tasks)}
    ids: list[str] = []
    task_of, times, numbers = array.array("i"), array.array("q"), array.array("d")
    left_out: dict[int, str] = {}
    for line, cells in lines:
        try:
            row, identity, name, *values, selected, reason = cells
            if int(row) != len(ids) or not 0 <= int(selected) < MAX_COUNT or len(values) != last - first:
                raise ValueError
            numbers.extend([_number_or_nan(value) for value in values])
        except ValueError:
            raise UserError(f"{path}, line {line}: not a record's scores ({','.join(columns)}); {AGAIN}") from None
        if name not in index:
            label = shown_value(name, LABEL_LIMIT)
            raise UserError(f"{path}, line {line}: task {label} is not in the summary; {AGAIN}")
        if reason:
            left_out[len(ids)] = reason
        ids.append(identity)
        task_of.append(index[name])
        times.append(int(selected))
    task, times_selected = np.array(task_of, np.int32), np.array(times, np.int64)
    _check_counts(path, summary_path, tasks, task, times_selected)
    table = np.ascontiguousarray(np.array(numbers).reshape(len(ids), last - first).T)
    by_column = dict(zip(columns[first:last], table, strict=True))
    return Selection(stem, summary, tasks, ids, task, by_column, times_selected, left_out)


def _check_counts(path: Path, summary_path: Path, tasks: list[Task], task: np.ndarray, times: np.ndarray) -> None:
    records = np.bincount(task, minlength=len(tasks))
    selected = np.bincount(task, times, minlength=len(tasks))
    for position, entry in enumerate(tasks):
        if (records[position], selected[position]) != (entry.records, entry.selected):
            raise UserError(
                f"{path}: task {shown_value(entry.name, LABEL_LIMIT)} has {records[position]} records, "
                f"{selected[position]:.0f} selected, but {entry.records} and {entry.selected} in {summary_path.name}; "
                f"{AGAIN}"
            )


def _number_or_nan(cell: str) -> float:
    """An empty cell is a score that is not defined; anything else must be a finite number."""
    if cell == "":
        return math.nan
    value = float(cell)
    if not abs(value) < 1e300:
        raise ValueError
    return value


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Line number and cells of the header, empty if there is none, and of each record of a scores file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            yield 1, next(reader, [])
            for cells in tqdm(reader, desc=f"Reading {path.name}", unit=" records", delay=2):
                yield reader.line_num, cells
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it belongs beside the summary") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); {AGAIN}") from error
