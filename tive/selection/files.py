"""The files of a selection: the subset, the scores of every record, and a summary. Written and read here."""

from __future__ import annotations

import array
import csv
import io
import json
import math
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from tqdm import tqdm

from tive.data.records import Records, copy_records, suffix_of
from tive.features.chunk import COMMON_KEYS
from tive.features.lookup import Features
from tive.selection.mixture import Mixture
from tive.selection.summary import (
    MAX_COUNT,
    SelectedFrom,
    Subset,
    Summary,
    Task,
    UncountedRecord,
    encode_summary,
    read_summary,
)
from tive.util.errors import UserError
from tive.util.files import sha256_of, whole_file
from tive.util.text import LABEL_LIMIT, shown_value

SUMMARY_END = "_summary.json"
ROWS_END = "_rows.npy"
SCORES_END = "_scores.csv"
# A scores file begins and ends with these; between them is a column for each score.
FIRST_COLUMNS = ["row", "id", "task"]
LAST_COLUMNS = ["times_selected", "left_out"]
AGAIN = "make the selection again"


@dataclass(frozen=True)
class Files:
    """The files of a selection, which have one stem; `rows` holds the row numbers of the subset's records, int64."""

    subset: Path
    rows: Path
    scores: Path
    summary: Path


@dataclass(frozen=True)
class Chosen:
    """What a method chose of a mixture's N records.

    Attributes:
        tasks: of the mixture, in its order.
        columns: of the scores file, `[N]` each: float or int, NaN where a record has none.
        times_selected: int64 `[N]`.
        reasons: why records cannot be drawn, by row; those of excluded tasks are not among them.
        details: what the method alone has to say in the summary.
    """

    tasks: tuple[Task, ...]
    columns: Mapping[str, np.ndarray]
    times_selected: np.ndarray
    reasons: Mapping[int, str]
    method: str = "TIVE"
    details: Mapping[str, Any] = field(default_factory=dict)


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


def files_of(folder: str | os.PathLike[str], stem: str, data_path: str | os.PathLike[str]) -> Files:
    """Where a selection goes.

    Raises:
        UserError: the data file is in its place.
    """
    ends = (suffix_of(data_path), ROWS_END, SCORES_END, SUMMARY_END)
    files = Files(*(Path(folder) / f"{stem}{end}" for end in ends))
    for file in (files.subset, files.rows, files.scores, files.summary):
        if os.path.realpath(file) == os.path.realpath(data_path):
            raise UserError(f"the data file {data_path} would be overwritten; name another folder for the selection")
    return files


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Try to write where a selection will go, before anything is computed; nothing stays behind.

    Raises:
        UserError: the folder, or the nearest one above it that is there, cannot be written.
    """
    path = Path(os.path.abspath(folder))
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder}: {nearest}: {error.strerror}; name another folder") from error


def write_selection(
    files: Files, mixture: Mixture, chosen: Chosen, arguments: Mapping[str, Any], features: Features
) -> None:
    """Write the four files; none takes its name before all are complete.

    The subset has the selected records in the data file's order, as they came; `rows` has their row numbers.

    Args:
        arguments: of the script.
        features: that it selected by; of several folders, the last.

    Raises:
        UserError: a file cannot be written.
    """
    rows = np.repeat(np.arange(len(mixture.ids)), chosen.times_selected)
    with (
        whole_file(files.summary) as summary_file,
        whole_file(files.scores) as scores_file,
        whole_file(files.rows) as rows_file,
        whole_file(files.subset) as subset_file,
    ):
        copy_records(subset_file, mixture.records, rows)
        subset_file.flush()
        np.save(rows_file, rows)
        _write_scores(scores_file, mixture, chosen)
        summary = Summary(
            dict(arguments),
            {"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            selected_from(mixture.records, features),
            list(chosen.tasks),
            [
                UncountedRecord(row, reason, mixture.ids[row], mixture.task_names[mixture.task[row]])
                for row, reason in sorted(chosen.reasons.items())
            ],
            Subset(
                files.subset.name, len(rows), sha256_of(subset_file.name), int(np.count_nonzero(chosen.times_selected))
            ),
            # Python writes and reads NaN, which is not JSON.
            json.loads(
                json.dumps([chunk.manifest for chunk in features.chunks if chunk.manifest]),
                parse_constant=lambda _: None,
            ),
            chosen.method,
            datetime.now(timezone.utc).isoformat(timespec="seconds"),
            dict(chosen.details),
        )
        summary_file.write(encode_summary(summary))
        for file in (subset_file, rows_file, scores_file, summary_file):
            file.flush()
            os.fsync(file.fileno())


def selected_from(records: Records, features: Features) -> SelectedFrom:
    """The data file and the features that a selection is made from."""
    match, chunks = features.match, features.chunks
    return SelectedFrom(
        data_path=os.path.abspath(records.path),
        data_sha256=records.fingerprint,
        data_records=len(records),
        gradient_path=os.path.abspath(features.folder),
        image_folder=next((folder for chunk in chunks if (folder := chunk.manifest.get("image_folder"))), None),
        chunks=[{"file": chunk.path.name, "start": chunk.start, "stop": chunk.stop} for chunk in chunks],
        match={key: getattr(match, key) for key in COMMON_KEYS} if match else None,
    )


def _write_scores(file: BinaryIO, mixture: Mixture, chosen: Chosen) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *chosen.columns, *LAST_COLUMNS])
    tasks = map(mixture.task_names.__getitem__, mixture.task.tolist())
    numbers = ([_cell(number) for number in column.tolist()] for column in chosen.columns.values())
    reasons = [chosen.reasons.get(row, "") for row in range(len(mixture.ids))]
    lines = zip(range(len(reasons)), mixture.ids, tasks, *numbers, chosen.times_selected.tolist(), reasons, strict=True)
    writer.writerows(lines)
    text.detach()


def _cell(number: float) -> float | str:
    return number if number - number == 0 else ""


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
