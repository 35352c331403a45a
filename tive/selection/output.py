"""The files of a selection, written and read: the subset, its rows, the scores of every record, and a summary."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import msgspec
import numpy as np
import torch
from msgspec import Meta, Struct

from tive.data.records import copy_records, suffix_of
from tive.features.chunk import COMMON_KEYS
from tive.features.lookup import Features
from tive.selection.mixture import Mixture
from tive.util.errors import UserError
from tive.util.files import read_json, sha256_of, whole_file
from tive.util.text import LABEL_LIMIT, shown, shown_value

SUMMARY_END = "_summary.json"
SCORES_END = "_scores.csv"
# A scores file begins and ends with these; between them is a column for each score.
FIRST_COLUMNS = ["row", "id", "task"]
LAST_COLUMNS = ["times_selected", "left_out"]
AGAIN = "make the selection again"
MAX_COUNT, MAX_SIZE = 1 << 40, 1e300
Count = Annotated[int, Meta(ge=0, lt=MAX_COUNT)]
Size = Annotated[float, Meta(ge=0, lt=MAX_SIZE)]


class Task(Struct, frozen=True, rename={"name": "task"}):
    """One task of a selection; what is not defined for it, or for the method, is None."""

    name: str
    records: Count  # of the data file
    counted: Count  # those of them that the method takes into account
    selected: Count  # records written, a repeated one each time
    distinct: Count  # a repeated one once
    excluded: bool = False
    value: Size | None = None  # V_t, its mean gradient norm
    basis: Size | None = None  # what its budget is in proportion to; None where several rules share the total
    budget: Count | None = None  # in records
    budget_before_rounding: Size | None = None  # p * N * basis / sum of basis
    budget_parts: dict[str, Size] | None = None  # where several rules share the total, what each gives it, in records
    effective_sample_size: Size | None = None  # of its instance weights, between 1 and `counted`
    # Of a selection from a sample: the records that the values are means of, the standard errors of value and budget,
    # and what holds the budget in 95% of samples.
    sampled: Count | None = None
    value_error: Size | None = None
    budget_error: Size | None = None
    budget_interval: tuple[Size, Size] | None = None


class UncountedRecord(Struct, frozen=True):
    """A record that counts in no mean and is never drawn."""

    row: Count
    reason: str
    id: str | None = None
    task: str | None = None


class SelectedFrom(Struct, frozen=True):
    """The data and the features."""

    data_path: str
    data_sha256: str
    data_records: Count
    gradient_path: str
    image_folder: str | None = None
    chunks: list[dict[str, Any]] = []
    match: dict[str, Any] | None = None  # what the chunks have in common; None for the release's files


class Subset(Struct, frozen=True):
    """The file of selected records, or of their row numbers alone."""

    file: str
    records: Count
    sha256: str
    distinct: Count | None = None  # a repeated record counts once


class Summary(Struct, frozen=True):
    """A selection's arguments, inputs and results: enough to make the subset again and to check it."""

    arguments: dict[str, Any]
    versions: dict[str, Any]
    inputs: SelectedFrom
    tasks: Annotated[list[Task], Meta(min_length=1)]
    left_out: list[UncountedRecord]
    subset: Subset
    gradient_pass: list[dict[str, Any]]  # the manifests of the feature files, without what stands elsewhere here
    method: str = "TIVE"  # or the name of another method that wrote it
    created: str = ""
    details: dict[str, Any] = {}  # what this method alone has to say


@dataclass(frozen=True)
class Chosen:
    """What a method chose of a mixture's N records."""

    tasks: Sequence[Task]  # of the mixture, in its order
    columns: Mapping[str, np.ndarray]  # of the scores file, `[N]` each: float or int, NaN where a record has none
    times_selected: np.ndarray  # int64 `[N]`
    reasons: Mapping[int, str]  # why records cannot be drawn, by row; those of excluded tasks are not among them
    method: str = "TIVE"
    details: Mapping[str, Any] = field(default_factory=dict)  # what the method alone has to say in the summary


def files_of(
    folder: str | os.PathLike[str], stem: str, data_path: str | os.PathLike[str], rows_only: bool = False
) -> dict[str, Path]:
    """Where a selection's `subset`, `rows`, `scores` and `summary` go, without `subset` where the rows are all that is
    wanted of it; a `UserError` where the data file, or with `rows_only` an earlier subset, is there.
    """
    ends = {"subset": suffix_of(data_path), "rows": "_rows.npy", "scores": SCORES_END, "summary": SUMMARY_END}
    files = {kind: Path(folder) / f"{stem}{end}" for kind, end in ends.items()}
    if os.path.realpath(data_path) in map(os.path.realpath, files.values()):
        raise UserError(f"the data file {data_path} would be overwritten; name another folder for the selection")
    if rows_only and (subset := files.pop("subset")).exists():
        raise UserError(f"{subset} has the records of an earlier selection; remove it, or let it be written again")
    return files


def write_selection(
    files: Mapping[str, Path], mixture: Mixture, chosen: Chosen, arguments: Mapping[str, Any], features: Features
) -> None:
    """Write the files, of which none takes its name before all are complete; a `UserError` where one cannot be written.

    The subset has the selected records in the data file's order, as they came; `rows` has their row numbers, int64.

    Args:
        files: of `files_of`.
        arguments: of the script.
        features: that the method selected by; of several checkpoints, those of the last.
    """
    rows = np.repeat(np.arange(len(mixture.ids)), chosen.times_selected)
    with contextlib.ExitStack() as stack:
        # They are named in the order in which they leave the stack, the summary last.
        opened = {kind: stack.enter_context(whole_file(files[kind])) for kind in reversed([*files])}
        np.save(opened["rows"], rows)
        if "subset" in opened:
            copy_records(opened["subset"], mixture.records, rows)
        first = next(iter(files))
        opened[first].flush()
        subset = Subset(
            file=files[first].name,
            records=len(rows),
            sha256=sha256_of(opened[first].name),
            distinct=int(np.count_nonzero(chosen.times_selected)),
        )
        _write_scores(opened["scores"], mixture, chosen)
        summary = msgspec.to_builtins(_summary(mixture, chosen, arguments, features, subset))
        content = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
        # A path of bytes that are no UTF-8 has half a surrogate pair for each.
        opened["summary"].write(content.encode("utf-8", "backslashreplace") + b"\n")
        for file in opened.values():
            file.flush()
            os.fsync(file.fileno())


def _write_scores(file: BinaryIO, mixture: Mixture, chosen: Chosen) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*FIRST_COLUMNS, *chosen.columns, *LAST_COLUMNS])
    tasks = map(mixture.task_names.__getitem__, mixture.task.tolist())
    numbers = ([value if value - value == 0 else "" for value in one.tolist()] for one in chosen.columns.values())
    reasons = [chosen.reasons.get(row, "") for row in range(len(mixture.ids))]
    lines = zip(range(len(reasons)), mixture.ids, tasks, *numbers, chosen.times_selected.tolist(), reasons, strict=True)
    writer.writerows(lines)
    text.detach()


def _summary(
    mixture: Mixture, chosen: Chosen, arguments: Mapping[str, Any], features: Features, subset: Subset
) -> Summary:
    match, chunks, records = features.match, features.chunks, mixture.records
    return Summary(
        method=chosen.method,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        arguments=dict(arguments),
        versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
        inputs=SelectedFrom(
            data_path=os.path.abspath(records.path),
            data_sha256=records.fingerprint,
            data_records=len(records),
            gradient_path=os.path.abspath(features.folder),
            image_folder=next((folder for chunk in chunks if (folder := chunk.manifest.get("image_folder"))), None),
            chunks=[{"file": chunk.path.name, "start": chunk.start, "stop": chunk.stop} for chunk in chunks],
            match={key: getattr(match, key) for key in COMMON_KEYS} if match else None,
        ),
        tasks=list(chosen.tasks),
        left_out=[
            UncountedRecord(row, reason, mixture.ids[row], mixture.task_names[mixture.task[row]])
            for row, reason in sorted(chosen.reasons.items())
        ],
        subset=subset,
        # Python writes and reads NaN, which is not JSON.
        gradient_pass=json.loads(
            json.dumps([chunk.manifest for chunk in chunks if chunk.manifest]), parse_constant=lambda _: None
        ),
        details=dict(chosen.details),
    )


@dataclass(frozen=True)
class Selection:
    """A selection of N records as its files have it, of this version or an earlier one."""

    stem: str
    summary: Summary
    tasks: list[Task]  # the largest first
    ids: Sequence[str]
    task: np.ndarray  # int32 `[N]`, index into `tasks`
    columns: Mapping[str, np.ndarray]  # of the scores file, float64 `[N]` each, NaN where not defined
    times_selected: np.ndarray  # int64 `[N]`

    def column(self, name: str) -> np.ndarray:
        """A column of the scores file; all NaN where there is none of that name."""
        return self.columns.get(name, np.full(len(self.ids), np.nan))

    @property
    def drawn(self) -> np.ndarray:
        """Which records are in the subset, bool `[N]`."""
        return self.times_selected > 0


def find_summaries(out: Path) -> list[Path]:
    """The summary that `out` is, or all that the folder holds, by name; a `UserError` where there is none."""
    if out.is_file():
        if out.name.endswith(SUMMARY_END):
            return [out]
        raise UserError(f"{out} is not a summary; name the folder, or a file that ends in {SUMMARY_END}")
    if not out.is_dir():
        raise UserError(f"{out} is not a folder; name the one that a selection was saved to")
    if summaries := sorted(out.glob(f"*{SUMMARY_END}")):
        return summaries
    raise UserError(f"{out} holds no selection (*{SUMMARY_END}); run select_data_TIVE.py first, with this save_path")


class _Drawn(Struct):
    """Of TIVE's arguments, the one that is computed with when a summary is read."""

    q: Size


def read_selection(summary_path: Path) -> Selection:
    """Read a summary and the scores beside it; a `UserError` names the row (the header is 1) or key that is wrong."""
    try:
        summary = msgspec.convert(read_json(summary_path), Summary)
        if summary.method == "TIVE":
            msgspec.convert(summary.arguments, _Drawn)
    except msgspec.ValidationError as error:
        raise UserError(f"{summary_path} is not a selection's summary: {error}; {AGAIN}") from error
    tasks = sorted(summary.tasks, key=lambda task: (-task.records, task.name))
    index = {task.name: position for position, task in enumerate(tasks)}
    if len(index) < len(tasks):
        raise UserError(f"{summary_path} names a task twice; {AGAIN}")
    stem = summary_path.name.removesuffix(SUMMARY_END)
    path = summary_path.with_name(f"{stem}{SCORES_END}")
    scores = _read_scores(path)
    names, times = scores["task"].to_pylist(), scores["times_selected"].to_numpy()
    task = np.array([index.get(name, -1) for name in names], np.int32)
    columns = {name: scores[name].to_numpy() for name in scores.column_names[len(FIRST_COLUMNS) : -len(LAST_COLUMNS)]}
    wrong = (scores["row"].to_numpy() != np.arange(len(task))) | (times < 0) | (times >= MAX_COUNT)
    for name, values in columns.items():
        wrong |= ~(np.abs(values) < MAX_SIZE) & ~scores[name].is_null().to_numpy()
    for rows, what in ((wrong, "a record's scores"), (task < 0, "a task of the summary")):
        if rows.any():
            row = int(rows.argmax())
            label = shown_value(names[row], LABEL_LIMIT)
            raise UserError(f"{path}: row #{row + 2} (task {label}) does not hold {what}; {AGAIN}")
    records, selected = (np.bincount(task, weights, len(tasks)).astype(int) for weights in (None, times))
    for entry, here, drawn in zip(tasks, records.tolist(), selected.tolist(), strict=True):
        if (here, drawn) != (entry.records, entry.selected):
            raise UserError(
                f"{path}: task {shown_value(entry.name, LABEL_LIMIT)} has {here} records, {drawn} selected, but "
                f"{entry.records} and {entry.selected} in {summary_path.name}; {AGAIN}"
            )
    return Selection(stem, summary, tasks, scores["id"].to_pylist(), task, columns, times)


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
