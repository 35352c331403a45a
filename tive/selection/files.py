"""The files of a selection: the subset, the scores of every record, and a summary. Written and read here."""

from __future__ import annotations

import array
import csv
import hashlib
import io
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from tive.data.records import Records, copy_records
from tive.selection.options import Options
from tive.selection.summary import Subset, Summary, Task, encode_summary, read_summary
from tive.util.errors import UserError
from tive.util.files import HashingFile, whole_file
from tive.util.text import LABEL_LIMIT, listed, shown_value

SUMMARY_END = "_summary.json"
SCORES_END = "_scores.csv"
# A scores file begins and ends with these; between them is a column for each score.
FIRST_COLUMNS = ["row", "id", "task"]
LAST_COLUMNS = ["times_selected", "left_out"]
_MAX_COUNT = 1 << 40


@dataclass(frozen=True)
class Files:
    """The three files of a selection, which have one stem."""

    subset: Path
    scores: Path
    summary: Path


@dataclass(frozen=True)
class Scores:
    """What a scores file holds of N records.

    Attributes:
        ids: `[N]`, as text.
        tasks: `[N]`, each record's task by name.
        numbers: float or int `[N]` each, by column: `norm`, `influence`, `loss`, `supervised_tokens`, `tokens`, `el2n`
            and `weight` of TIVE's, where they are known. NaN where a record has none.
        times_selected: int64 `[N]`.
        left_out: why records were left out, by row.
    """

    ids: Sequence[str]
    tasks: Sequence[str]
    numbers: Mapping[str, np.ndarray]
    times_selected: np.ndarray
    left_out: Mapping[int, str]


@dataclass(frozen=True)
class Selection:
    """A selection of N records, as it was read.

    Attributes:
        tasks: the largest first.
        task: int32 `[N]`, index into `tasks`.
        numbers: float64 `[N]` each, by column of the scores file, NaN where not defined.
        times_selected: int64 `[N]`.
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


def tive_stem(options: Options, task_names: Sequence[str], task_key: str) -> str:
    """`Tive_q_{q}_p_{p}`, as the release names it, and every choice that differs from the default.

    Two selections of the same data and features have the same name only where every choice is the same. Tasks and keys
    whose letters do not suit a file name are replaced by eight digits of their SHA-256.
    """
    parts = [f"Tive_q_{float(options.q)}_p_{float(options.p)}"]
    names = {"task_budget": "budget", "instance_score": "score"}
    for field in ("task_budget", "instance_score", "sampling", "rounding", "seed"):
        value = getattr(options, field)
        if value != getattr(Options, field):
            parts.append(f"{names.get(field, field)}-{value}")
    if set(options.exclude_tasks) != set(Options.exclude_tasks) & set(task_names):
        parts.append(f"exclude-{name_part(sorted(options.exclude_tasks)) if options.exclude_tasks else 'none'}")
    if task_key != "dataset":
        parts.append(f"task_key-{name_part([task_key])}")
    return "_".join(parts)


def name_part(texts: list[str]) -> str:
    """Texts as part of a file name; eight digits of their SHA-256 where their letters do not suit one."""
    joined = "+".join(texts)
    if len(joined) <= 40 and texts != ["none"] and all(re.fullmatch(r"[A-Za-z0-9._-]+", text) for text in texts):
        return joined
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:8]


def files_of(folder: str | os.PathLike[str], stem: str, data_path: str | os.PathLike[str]) -> Files:
    """Where a selection goes.

    Raises:
        UserError: the data file is in its place.
    """
    files = Files(*(Path(folder) / f"{stem}{end}" for end in (".json", SCORES_END, SUMMARY_END)))
    for file in (files.subset, files.scores, files.summary):
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


def write_selection(files: Files, records: Records, scores: Scores, summary: Callable[[Subset], Summary]) -> None:
    """Write the three files; none takes its name before all are complete.

    The subset has the selected records in the data file's order, byte for byte.

    Args:
        summary: the summary, given what was written (`summary_of`).

    Raises:
        UserError: a file cannot be written.
    """
    rows = np.repeat(np.arange(len(scores.ids)), scores.times_selected)
    with (
        whole_file(files.summary) as summary_file,
        whole_file(files.scores) as scores_file,
        whole_file(files.subset) as subset_file,
    ):
        hashing = HashingFile(subset_file)
        copy_records(hashing, records, rows)  # type: ignore[arg-type]  # `write` is all that it asks for
        _write_scores(scores_file, scores)
        distinct = int(np.count_nonzero(scores.times_selected))
        subset = Subset(file=files.subset.name, records=len(rows), distinct=distinct, sha256=hashing.sha256)
        summary_file.write(encode_summary(summary(subset)))
        for file in (subset_file, scores_file, summary_file):
            file.flush()
            os.fsync(file.fileno())


def _write_scores(file: BinaryIO, scores: Scores) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *scores.numbers, *LAST_COLUMNS])
    numbers = ([_cell(number) for number in column.tolist()] for column in scores.numbers.values())
    left_out = [scores.left_out.get(row, "") for row in range(len(scores.ids))]
    writer.writerows(
        zip(
            range(len(left_out)),
            scores.ids,
            scores.tasks,
            *numbers,
            scores.times_selected.tolist(),
            left_out,
            strict=True,
        )
    )
    text.detach()


def _cell(number: float) -> float | str:
    return number if number - number == 0 else ""


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
        raise UserError(f"{out} is not a folder; name the one that a selection was saved to")
    stems = sorted(path.name.removesuffix(SUMMARY_END) for path in out.glob(f"*{SUMMARY_END}"))
    if not stems:
        raise UserError(
            f"{out} holds no selection (*{SUMMARY_END}); run select_data_TIVE.py first, with this save_path"
        )
    if name is not None and name not in stems:
        raise UserError(f"{out} holds no selection {name}; there are: {listed(stems)}")
    if name is None and len(stems) > 1:
        raise UserError(f"{out} holds {len(stems)} selections; choose one by its name: {listed(stems)}")
    return out / f"{name or stems[0]}{SUMMARY_END}"


def read_selection(summary_path: Path) -> Selection:
    """Read a summary and the scores beside it, and check that they belong together.

    Raises:
        UserError: a file is missing, damaged, or does not fit the other; the line or key is named.
    """
    summary = read_summary(summary_path)
    tasks = sorted(summary.tasks, key=lambda task: (-task.records, task.name))
    stem = summary_path.name.removesuffix(SUMMARY_END)
    path = summary_path.with_name(f"{stem}{SCORES_END}")
    scores = read_scores(path, {task.name for task in tasks})
    index = {task.name: position for position, task in enumerate(tasks)}
    task = np.array([index[name] for name in scores.tasks], np.int32)
    records = np.bincount(task, minlength=len(tasks))
    selected = np.bincount(task, scores.times_selected, minlength=len(tasks))
    for position, entry in enumerate(tasks):
        if (records[position], selected[position]) != (entry.records, entry.selected):
            raise UserError(
                f"{path}: task {shown_value(entry.name, LABEL_LIMIT)} has {records[position]} records, "
                f"{selected[position]:.0f} selected, but {entry.records} and {entry.selected} in {summary_path.name}; "
                "make the selection again"
            )
    numbers, times = scores.numbers, scores.times_selected
    return Selection(stem, summary, tasks, scores.ids, task, numbers, times, scores.left_out)


def read_scores(path: Path, tasks: set[str]) -> Scores:
    """Read a scores file, of this version or an earlier one.

    Args:
        tasks: the names that its records may have.

    Raises:
        UserError: the file is missing or damaged; the line is named.
    """
    lines = _lines(path)
    columns = next(lines)[1]
    first, last = len(FIRST_COLUMNS), len(columns) - len(LAST_COLUMNS)
    if columns[:first] != FIRST_COLUMNS or columns[last:] != LAST_COLUMNS or len(set(columns)) != len(columns):
        raise UserError(
            f"{path}, line 1: the columns are not {','.join(FIRST_COLUMNS)}, scores, {','.join(LAST_COLUMNS)}; "
            "make the selection again"
        )
    ids: list[str] = []
    names: list[str] = []
    times: list[int] = []
    numbers = array.array("d")
    left_out: dict[int, str] = {}
    for line, cells in lines:
        try:
            row, identity, name, *values, selected, reason = cells
            if int(row) != len(ids) or not 0 <= int(selected) < _MAX_COUNT or len(values) != last - first:
                raise ValueError
            numbers.extend([_number_or_nan(value) for value in values])
        except ValueError:
            raise UserError(
                f"{path}, line {line}: not a record's scores ({','.join(columns)}); make the selection again"
            ) from None
        if name not in tasks:
            raise UserError(
                f"{path}, line {line}: task {shown_value(name, LABEL_LIMIT)} is not in the summary; "
                "make the selection again"
            )
        if reason:
            left_out[len(ids)] = reason
        ids.append(identity)
        names.append(name)
        times.append(int(selected))
    table = np.ascontiguousarray(np.array(numbers).reshape(len(ids), last - first).T)
    return Scores(ids, names, dict(zip(columns[first:last], table, strict=True)), np.array(times, np.int64), left_out)


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
        raise UserError(f"{path} is not a CSV file in UTF-8 ({error}); make the selection again") from error
