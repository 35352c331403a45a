"""What LESS's selection prints: the checkpoints, the tasks and subtasks, and what a reader of it should know."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tive.selection.checkpoints import Checkpoint
from tive.selection.files import Files
from tive.selection.printed import most_common, print_files
from tive.selection.summary import Task
from tive.selection.target import Subtask, TargetChoice
from tive.util.text import listed, print_table


def print_target_choice(
    choice: TargetChoice,
    checkpoints: Sequence[Checkpoint],
    weights: np.ndarray,
    tasks: Sequence[Task],
    subtasks: Sequence[Subtask],
    files: Files,
) -> None:
    """Print three tables (checkpoints, tasks, subtasks), what was left out, and which files there are."""
    rows: list[tuple[str, ...]] = [("checkpoint", "step", "gradient", "weight")]
    for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True):
        step = checkpoint.match.checkpoint
        rows.append(
            (checkpoint.train_path, "" if step is None else str(step), checkpoint.match.gradient, f"{weight:.4f}")
        )
    print_table(rows)
    print()
    rows = [("task", "records", "selected", "share of the task")]
    for task in tasks:
        rows.append((task.name, f"{task.records:,}", f"{task.selected:,}", f"{task.selected / task.records:.1%}"))
    selected, records = int(choice.times_selected.sum()), len(choice.scores)
    rows.append(("total", f"{records:,}", f"{selected:,}", f"{selected / records:.1%}"))
    print_table(rows)
    print()
    rows = [("subtask", "target records", "mean score", "mean score of the selected", "best served by it")]
    for subtask in subtasks:
        means = (f"{subtask.mean_score:.4f}", f"{subtask.mean_score_of_selected:.4f}")
        rows.append((subtask.name, f"{subtask.records:,}", *means, f"{subtask.selected:,}"))
    print_table(rows)
    print()
    if without := [subtask.name for subtask in subtasks if not subtask.selected]:
        print(
            f"{len(without):,} of {len(subtasks):,} subtasks have no selected record that serves them best: "
            f"{listed(without)} (docs/less.md, Over the subtasks)"
        )
    if choice.reasons:
        print(
            f"left out: {len(choice.reasons):,} records that have no score and are never selected "
            f"({most_common(choice.reasons)})"
        )
    print_files(files, selected, records)


def print_warnings(checkpoints: Sequence[Checkpoint], repeated: Sequence[int], target_left_out: dict[int, str]) -> None:
    """What is no fault and may still not be meant."""
    if len(checkpoints) == 1:
        print("warning: one checkpoint only; LESS adds up several, which tell more than the last one alone")
    if repeated:
        print(
            f"warning: {len(repeated):,} target records are also records of the mixture (the first: target record "
            f"{repeated[0]}); they rank high by themselves, and what is measured on them later is not held out"
        )
    if target_left_out:
        row, reason = min(target_left_out.items())
        print(
            f"warning: {len(target_left_out):,} target records have no gradient and count in no mean (the first: "
            f"target record {row}, {reason})"
        )
