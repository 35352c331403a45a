"""A selection, read: its summary and the scores of every record, of this version or an earlier one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tive.selection.summary import (
    FIRST_COLUMNS,
    LAST_COLUMNS,
    MAX_COUNT,
    MAX_SIZE,
    SCORES_END,
    SUMMARY_END,
    Summary,
    Task,
    read_summary,
)
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, shown, shown_value

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
        UserError: a file is missing, damaged, or does not fit the other; the row (the header is 1) or key is named.
    """
    summary = read_summary(summary_path)
    tasks = sorted(summary.tasks, key=lambda task: (-task.records, task.name))
    stem = summary_path.name.removesuffix(SUMMARY_END)
    path = summary_path.with_name(f"{stem}{SCORES_END}")
    scores = _read_scores(path)
    index = {task.name: position for position, task in enumerate(tasks)}
    names, times = scores["task"].to_pylist(), scores["times_selected"].to_numpy()
    task = np.array([index.get(name, -1) for name in names], np.int32)
    numbers = {name: scores[name].to_numpy() for name in scores.column_names[len(FIRST_COLUMNS) : -len(LAST_COLUMNS)]}
    wrong = (scores["row"].to_numpy() != np.arange(len(task))) | (times < 0) | (times >= MAX_COUNT)
    for name, values in numbers.items():
        wrong |= ~(np.abs(values) < MAX_SIZE) & ~scores[name].is_null().to_numpy()
    if wrong.any():
        raise UserError(f"{path}: row #{wrong.argmax() + 2} does not hold a record's scores; {AGAIN}")
    if (task < 0).any():
        row = int((task < 0).argmax())
        label = shown_value(names[row], LABEL_LIMIT)
        raise UserError(f"{path}: row #{row + 2}: task {label} is not in the summary; {AGAIN}")
    records, selected = (np.bincount(task, weights, len(tasks)).astype(int) for weights in (None, times))
    for entry, here, drawn in zip(tasks, records.tolist(), selected.tolist(), strict=True):
        if (here, drawn) != (entry.records, entry.selected):
            raise UserError(
                f"{path}: task {shown_value(entry.name, LABEL_LIMIT)} has {here} records, {drawn} selected, but "
                f"{entry.records} and {entry.selected} in {summary_path.name}; {AGAIN}"
            )
    left_out = {row: reason for row, reason in enumerate(scores["left_out"].to_pylist()) if reason}
    return Selection(stem, summary, tasks, scores["id"].to_pylist(), task, numbers, times, left_out)


def _read_scores(path: Path) -> Any:
    """A scores file as an Arrow table: a score that is not defined is null."""
    import pyarrow
    from pyarrow import csv as arrow_csv

    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            columns = next(csv.reader(file), [])
        if columns[:3] != FIRST_COLUMNS or columns[-2:] != LAST_COLUMNS or len(set(columns)) != len(columns):
            raise UserError(
                f"{path}: the columns are not {','.join(FIRST_COLUMNS)}, scores, {','.join(LAST_COLUMNS)}; {AGAIN}"
            )
        types = dict.fromkeys(columns, pyarrow.float64())
        types |= {"row": pyarrow.int64(), "times_selected": pyarrow.int64()}
        types |= dict.fromkeys(("id", "task", "left_out"), pyarrow.string())
        return arrow_csv.read_csv(
            path,
            arrow_csv.ReadOptions(use_threads=False, block_size=1 << 26),  # threads would not number the rows
            arrow_csv.ParseOptions(newlines_in_values=True),
            arrow_csv.ConvertOptions(column_types=types, null_values=[""]),
        )
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; it belongs beside the summary") from error
    except (csv.Error, UnicodeDecodeError, pyarrow.ArrowException) as error:
        raise UserError(f"{path} is not a CSV file of scores ({shown(str(error), 200)}); {AGAIN}") from error
