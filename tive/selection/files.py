"""What the selection writes and prints: the subset, every record's scores, and a summary that others can check."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from tive.data.records import copy_records
from tive.features.chunks import Chunk
from tive.features.manifest import COMMON_KEYS
from tive.method.value import rounded_down
from tive.selection.choice import Mixture, Task
from tive.util.errors import UserError
from tive.util.files import HashingFile, whole_file
from tive.util.text import print_table

COLUMNS = ("row", "id", "task", "norm", "influence", "weight", "times_selected", "left_out")


@dataclass(frozen=True)
class Files:
    """The three files of a selection, which bear its arguments in their names."""

    subset: Path
    scores: Path
    summary: Path


@dataclass(frozen=True)
class Scores:
    """Of every record, `[N]`: float64 norm, influence and weight (NaN where not defined), int times selected."""

    norms: np.ndarray
    influence: np.ndarray
    weights: np.ndarray
    times: np.ndarray


def files_of(arguments: Any) -> Files:
    """Where a selection goes.

    Raises:
        UserError: the data file is in its place.
    """
    stem = f"Tive_q_{arguments.q}_p_{arguments.p}"
    for name, default in (("budget", "difficulty"), ("score", "influence"), ("sampling", "weighted")):
        choice = vars(arguments)[{"budget": "task_budget", "score": "instance_score"}.get(name, name)]
        stem += f"_{name}-{choice}" if choice != default else ""
    files = Files(*(Path(arguments.save_path) / f"{stem}{end}" for end in (".json", "_scores.csv", "_summary.json")))
    for file in (files.subset, files.scores, files.summary):
        if os.path.realpath(file) == os.path.realpath(arguments.data_path):
            raise UserError(f"--data_path {arguments.data_path} would be overwritten; name another --save_path")
    return files


def write_selection(
    files: Files,
    arguments: Any,
    mixture: Mixture,
    chunks: list[Chunk],
    tasks: list[Task],
    scores: Scores,
    reasons: dict[int, str],
) -> None:
    """Write the three files; none takes its name before all are complete.

    Raises:
        UserError: a file cannot be written.
    """
    rows = np.repeat(np.arange(len(mixture.tasks)), scores.times)
    with (
        whole_file(files.summary) as summary_file,
        whole_file(files.scores) as scores_file,
        whole_file(files.subset) as subset_file,
    ):
        hashing = HashingFile(subset_file)
        copy_records(hashing, mixture.records, rows)
        _write_scores(scores_file, mixture, scores, reasons)
        summary = _summary(arguments, mixture, chunks, tasks, reasons)
        summary["subset"] = {
            "file": files.subset.name,
            "records": len(rows),
            "distinct": int(np.count_nonzero(scores.times)),
            "sha256": hashing.sha256,
        }
        summary_file.write(
            json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")
            + b"\n"
        )
        for file in (subset_file, scores_file, summary_file):
            file.flush()
            os.fsync(file.fileno())


def _write_scores(file: BinaryIO, mixture: Mixture, scores: Scores, reasons: dict[int, str]) -> None:
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    numbers = (
        [_cell(number) for number in array.tolist()] for array in (scores.norms, scores.influence, scores.weights)
    )
    left_out = [reasons.get(row, "") for row in range(len(mixture.tasks))]
    writer.writerows(
        zip(range(len(left_out)), mixture.ids, mixture.tasks, *numbers, scores.times.tolist(), left_out, strict=True)
    )
    text.detach()


def _cell(number: float) -> float | str:
    return number if number - number == 0 else ""


def _summary(
    arguments: Any, mixture: Mixture, chunks: list[Chunk], tasks: list[Task], reasons: dict[int, str]
) -> dict[str, Any]:
    passes = [_plain(chunk.manifest) for chunk in chunks if chunk.manifest]
    match = chunks[0].match
    return {
        "arguments": vars(arguments),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "inputs": {
            "data_path": os.path.abspath(arguments.data_path),
            "data_sha256": mixture.records.sha256,
            "data_records": len(mixture.records),
            "gradient_path": os.path.abspath(arguments.gradient_path),
            "image_folder": next((made["image_folder"] for made in passes if made.get("image_folder")), None),
            "chunks": [{"file": chunk.path.name, "start": chunk.start, "stop": chunk.stop} for chunk in chunks],
            "match": {key: getattr(match, key) for key in COMMON_KEYS} if match else None,
        },
        "tasks": [
            {
                "task": task.name,
                "records": len(task.rows),
                "counted": len(task.counted),
                "value": task.value,
                "budget": None if task.budget is None else rounded_down(task.budget),
                "budget_before_rounding": task.budget,
                "selected": task.selected,
                "distinct": task.distinct,
                "effective_sample_size": task.effective_sample_size,
                "excluded": task.excluded,
            }
            for task in tasks
        ],
        "left_out": [
            {"row": row, "id": mixture.ids[row], "task": mixture.tasks[row], "reason": reason}
            for row, reason in sorted(reasons.items())
        ],
        "gradient_pass": passes,
    }


def _plain(manifest: dict[str, Any]) -> dict[str, Any]:
    """A manifest as strict JSON: Python's reader accepts NaN, which nobody else's does."""
    return json.loads(json.dumps(manifest), parse_constant=lambda _: None)


def report(
    files: Files, arguments: Any, mixture: Mixture, tasks: list[Task], scores: Scores, reasons: dict[int, str]
) -> None:
    """Print the tasks' table, how much the weights decide, what was left out and which files there are."""
    rows = [("task", "records", "mean gradient norm", "budget", "selected", "effective sample size")]
    for task in tasks:
        if task.excluded:
            rows.append((task.name, f"{len(task.rows):,}", "", "", "0", "excluded"))
        else:
            rows.append(
                (
                    task.name,
                    f"{len(task.rows):,}",
                    f"{task.value:.4g}",
                    f"{task.budget:,.1f}",
                    f"{task.selected:,}",
                    f"{task.effective_sample_size:,.1f} of {len(task.counted):,}",
                )
            )
    included = [task for task in tasks if not task.excluded]
    total, selected = len(mixture.tasks), sum(task.selected for task in tasks)
    budget = sum(task.budget for task in included)
    rows.append(("total", f"{total:,}", "", f"{budget:,.1f}", f"{selected:,}", ""))
    print_table(rows)
    print()
    for sentence in _sentences(arguments, included, scores, reasons):
        print(sentence)
    print(f"written: {files.subset}  ({selected:,} records, {selected / total:.2%} of {total:,})")
    print(f"         {files.scores}  (the scores of every record)")
    print(f"         {files.summary}  (arguments, hashes, tasks)")


def _sentences(arguments: Any, included: list[Task], scores: Scores, reasons: dict[int, str]) -> Iterator[str]:
    if arguments.sampling == "top":
        yield f"sampling: the highest {arguments.instance_score} of each task; --q and --seed play no part"
    elif arguments.instance_score == "random":
        yield "sampling: every record of a task is as likely as any other; --q plays no part"
    else:
        yield _choice(arguments, included, scores)
    repeated = [
        f"{task.name} ({task.selected:,} of {task.distinct:,} records)"
        for task in included
        if task.selected > task.distinct
    ]
    if repeated:
        yield f"taken more than once, because the budget is above the records: {', '.join(repeated)}"
    if reasons:
        common = Counter(reasons.values()).most_common(4)
        shown = ", ".join(f"{count:,} {reason}" for reason, count in common[:3]) + (", ..." if len(common) > 3 else "")
        yield f"left out: {len(reasons):,} records that count in no mean and are never drawn ({shown})"


def _choice(arguments: Any, included: list[Task], scores: Scores) -> str:
    """How near to uniform the draw is, in words and numbers."""
    weights = [scores.weights[task.counted] for task in included]
    with np.errstate(divide="ignore"):
        ratio = max(float(weight.max() / weight.min()) for weight in weights)
    share = min(task.effective_sample_size / len(task.counted) for task in included)
    digits = 6 if ratio < 2 else 2
    numbers = (
        f"within a task the largest weight is at most {ratio:.{digits}g} times the smallest, and the effective sample "
        f"size at least {share:.2%} of its records"
    )
    if share > 0.99:
        return (
            f"sampling: all but uniform at q = {arguments.q}: {numbers}. Raise --q to let "
            f"{arguments.instance_score} decide (README, Choosing q)"
        )
    kind = "leans towards" if share > 0.5 else "is decided by"
    return f"sampling: the draw {kind} high {arguments.instance_score} at q = {arguments.q}: {numbers}"
