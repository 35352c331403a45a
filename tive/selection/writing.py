"""The files of a selection, written: the subset and its rows, the scores of every record, and a summary."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import platform
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tive.data.records import Records, copy_records, suffix_of
from tive.features.chunk import COMMON_KEYS
from tive.features.lookup import Features
from tive.selection.mixture import Mixture
from tive.selection.summary import (
    FIRST_COLUMNS,
    LAST_COLUMNS,
    ROWS_END,
    SCORES_END,
    SUMMARY_END,
    SelectedFrom,
    Subset,
    Summary,
    Task,
    UncountedRecord,
    encode_summary,
)
from tive.util.errors import UserError
from tive.util.files import sha256_of, whole_file


@dataclass(frozen=True)
class Files:
    """The files of a selection, which have one stem; `rows` holds the row numbers of the subset's records, int64.

    `subset` is None where the row numbers are all that is wanted of it.
    """

    subset: Path | None
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


def files_of(
    folder: str | os.PathLike[str], stem: str, data_path: str | os.PathLike[str], rows_only: bool = False
) -> Files:
    """Where a selection goes.

    Raises:
        UserError: the data file is in its place; or, with `rows_only`, the records of an earlier selection.
    """
    ends = (suffix_of(data_path), ROWS_END, SCORES_END, SUMMARY_END)
    subset, *others = (Path(folder) / f"{stem}{end}" for end in ends)
    for file in (subset, *others):
        if os.path.realpath(file) == os.path.realpath(data_path):
            raise UserError(f"the data file {data_path} would be overwritten; name another folder for the selection")
    if rows_only and subset.exists():
        raise UserError(f"{subset} has the records of an earlier selection; remove it, or let it be written again")
    return Files(None if rows_only else subset, *others)


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
        features: that the method selected by; of several checkpoints, those of the last.

    Raises:
        UserError: a file cannot be written.
    """
    rows = np.repeat(np.arange(len(mixture.ids)), chosen.times_selected)
    with (
        whole_file(files.summary) as summary_file,
        whole_file(files.scores) as scores_file,
        whole_file(files.rows) as rows_file,
        whole_file(files.subset) if files.subset else contextlib.nullcontext() as subset_file,
    ):
        np.save(rows_file, rows)
        rows_file.flush()
        if subset_file:
            copy_records(subset_file, mixture.records, rows)
            subset_file.flush()
        _write_scores(scores_file, mixture, chosen)
        summary = Summary(
            method=chosen.method,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            arguments=dict(arguments),
            versions={"python": platform.python_version(), "torch": str(torch.__version__), "numpy": np.__version__},
            inputs=selected_from(mixture.records, features),
            tasks=list(chosen.tasks),
            left_out=[
                UncountedRecord(row, reason, mixture.ids[row], mixture.task_names[mixture.task[row]])
                for row, reason in sorted(chosen.reasons.items())
            ],
            subset=Subset(
                file=(files.subset or files.rows).name,
                records=len(rows),
                sha256=sha256_of((subset_file or rows_file).name),
                distinct=int(np.count_nonzero(chosen.times_selected)),
            ),
            # Python writes and reads NaN, which is not JSON.
            gradient_pass=json.loads(
                json.dumps([chunk.manifest for chunk in features.chunks if chunk.manifest]),
                parse_constant=lambda _: None,
            ),
            details=dict(chosen.details),
        )
        summary_file.write(encode_summary(summary))
        for file in filter(None, (subset_file, rows_file, scores_file, summary_file)):
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
