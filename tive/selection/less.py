"""LESS (arXiv 2402.04333) between its files and `tive.method.target`: subtasks, and the best records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tive.data.content import record_hash
from tive.method.target import (
    best_subtask,
    mean_subtask,
    ranking,
    round_robin,
    votes,
)
from tive.method.value import rounded_down
from tive.selection.checkpoints import CheckpointFeatures
from tive.selection.mixture import Mixture, reasons_left_out, record_scores
from tive.selection.options import LessOptions
from tive.selection.summary import Task
from tive.selection.writing import Chosen
from tive.util.errors import UserError


@dataclass(frozen=True)
class Subtask:
    """A subtask of the target.

    Attributes:
        records: of the target, in its mean.
        mean_score: over all records of the mixture that have a score; `mean_score_of_selected` over the chosen ones.
        selected: how many of the chosen records serve this subtask best, or were taken in its turn (`round_robin`).
    """

    name: str
    records: int
    mean_score: float
    mean_score_of_selected: float
    selected: int


def target_groups(target: Mixture, checkpoints: Sequence[CheckpointFeatures]) -> tuple[np.ndarray, dict[int, str]]:
    """The subtask of each target record, int `[M]`, -1 where the gradient pass left it out, and the reasons by row.

    Raises:
        UserError: a record has no subtask, a gradient is zero or not finite, or a subtask has no record left.
    """
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:
        left_out = checkpoint.target.left_out()
        here = reasons_left_out(target, checkpoint.target, record_scores(checkpoint.target))
        for row, reason in sorted(here.items()):
            if row not in left_out or reason == "not finite":
                raise UserError(
                    f"{checkpoint.target.folder}: the gradient of target record {row} (id {target.ids[row]!r}) is zero "
                    f"or not finite ({reason}), so it has no direction; remove the record from the target, or take "
                    "another checkpoint"
                )
        reasons |= here
    groups = target.task.copy()
    groups[list(reasons)] = -1
    for number, name in enumerate(target.task_names):
        if not (groups == number).any():
            row = int(np.flatnonzero(target.task == number)[0])
            raise UserError(
                f"no record of the target's subtask {name} has a gradient (record {row}: {reasons[row]}); repair them, "
                "or remove the subtask from the target"
            )
    return groups, reasons


def records_left_out(mixture: Mixture, checkpoints: Sequence[CheckpointFeatures]) -> dict[int, str]:
    """Why records of the mixture have no score, by row: at some checkpoint they have no gradient."""
    without_problems = replace(mixture, problems={})  # a task is of no use here, and its lack no fault
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:
        reasons = reasons_left_out(without_problems, checkpoint.train, record_scores(checkpoint.train)) | reasons
    return reasons


def repeated_in(target: Mixture, mixture: Mixture) -> list[int]:
    """Rows of the target whose system prompt, turns and images are those of a record of the mixture."""
    rows_of: dict[bytes, list[int]] = {}
    for row, record in enumerate(target.records):
        rows_of.setdefault(record_hash(record), []).append(row)
    return sorted({row for record in mixture.records for row in rows_of.get(record_hash(record), ())})


def choose_for_target(
    mixture: Mixture, scores: np.ndarray, subtask_names: Sequence[str], reasons: Mapping[int, str], options: LessOptions
) -> Chosen:
    """The best `p` of the records.

    Args:
        scores: `[N, J]`, each record's score for each subtask; NaN where its features are zero or not finite.
        reasons: why records were left out, by row.

    Returns:
        The columns are `score` over all subtasks, `rank` (1 for the best), and `score_{name}` of each subtask; NaN for
        a record that was left out.

    Raises:
        UserError: `p` of the records is none.
    """
    records = len(scores)
    number = rounded_down(options.p * records)
    if not number:
        raise UserError(f"p = {options.p} of {records} records is less than one; raise it")
    useless = np.flatnonzero(np.isnan(scores).any(axis=1)).tolist()
    reasons = dict.fromkeys(useless, "features are zero or not finite") | dict(reasons)
    columns = {f"score_{name}": scores[:, place] for place, name in enumerate(subtask_names)}
    scores = scores.copy()
    scores[list(reasons)] = np.nan
    tie_break = None
    if options.over_targets == "vote":
        score, tie_break = votes(scores, number), mean_subtask(scores)
    else:
        score = mean_subtask(scores) if options.over_targets == "mean" else best_subtask(scores)
    order = round_robin(scores) if options.over_targets == "round_robin" else ranking(score, tie_break)
    ranks = np.full(records, np.nan, object)
    ranks[order] = np.arange(1, len(order) + 1)
    times = np.zeros(records, np.int64)
    times[order[:number]] = 1
    tasks = _tasks(mixture, times, reasons)
    return Chosen(tasks, {"score": score, "rank": ranks, **columns}, times, reasons, "LESS")


def _tasks(mixture: Mixture, times: np.ndarray, reasons: Mapping[int, str]) -> tuple[Task, ...]:
    """The mixture's tasks, in order of their first record, and how many records of each were chosen."""
    counted = np.ones(len(times), bool)
    counted[list(reasons)] = False
    numbers = [
        np.bincount(mixture.task, values, len(mixture.task_names)).astype(int).tolist()
        for values in (np.ones(len(times)), counted, times)
    ]
    return tuple(
        Task(name, records, usable, selected, selected)
        for name, records, usable, selected in zip(mixture.task_names, *numbers, strict=True)
    )


def subtasks_of(
    target: Mixture, groups: np.ndarray, scores: np.ndarray, chosen: Chosen, options: LessOptions
) -> list[Subtask]:
    """What the choice is for each subtask.

    Args:
        groups: int `[M]`, the subtask of each target record, negative for none.
        scores: `[N, J]`.
    """
    scored = np.ones(len(scores), bool)
    scored[list(chosen.reasons)] = False
    taken = chosen.times_selected > 0
    best = scores[taken].argmax(axis=1)
    if options.over_targets == "round_robin":
        best = (chosen.columns["rank"][taken].astype(np.int64) - 1) % scores.shape[1]
    return [
        Subtask(
            name,
            int((groups == number).sum()),
            float(scores[scored, number].mean()),
            float(scores[taken, number].mean()),
            int((best == number).sum()),
        )
        for number, name in enumerate(target.task_names)
    ]


def target_details(
    target: Mixture,
    checkpoints: Sequence[CheckpointFeatures],
    weights: np.ndarray,
    subtasks: Sequence[Subtask],
    target_left_out: Mapping[int, str],
) -> dict[str, Any]:
    """What the summary says of the target, its subtasks, and the checkpoints with their weights `w_i`."""
    return {
        "target_data": str(target.records.path),
        "target_sha256": target.records.fingerprint,
        "checkpoints": [
            {
                "train": os.path.abspath(checkpoint.train.folder),
                "target": os.path.abspath(checkpoint.target.folder),
                "weight": weight,
                "step": checkpoint.match.checkpoint,
                "gradient": checkpoint.match.gradient,
                "model": checkpoint.match.model,
                "optimizer_state": checkpoint.match.optimizer_state,
            }
            for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True)
        ],
        "subtasks": [asdict(subtask) for subtask in subtasks],
        "target_left_out": [{"row": row, "reason": reason} for row, reason in sorted(target_left_out.items())],
    }
