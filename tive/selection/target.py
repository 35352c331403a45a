"""LESS between its files and the formulas of `tive.method.target`: subtasks, and the best records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from tive.features.spans import spans_of
from tive.method.influence import group_means
from tive.method.target import best_subtask, mean_subtask, ranking, votes
from tive.method.value import rounded_down
from tive.selection.checkpoints import Checkpoint
from tive.selection.files import name_part
from tive.selection.mixture import Mixture, reasons_left_out, record_scores
from tive.selection.summary import Task
from tive.selection.target_options import Options
from tive.util.errors import UserError


@dataclass(frozen=True)
class TargetChoice:
    """What was chosen from N records.

    Attributes:
        scores: float64 `[N]`, over all subtasks; NaN for a record that was left out.
        ranks: object `[N]`, 1 for the best; NaN for a record that was left out.
        times_selected: int64 `[N]`, 0 or 1.
        reasons: why records were left out, by row.
    """

    scores: np.ndarray
    ranks: np.ndarray
    times_selected: np.ndarray
    reasons: dict[int, str]


@dataclass(frozen=True)
class Subtask:
    """A subtask of the target.

    Attributes:
        records: of the target, in its mean.
        mean_score: over all records of the mixture that have a score; `mean_score_of_selected` over the chosen ones.
        selected: how many of the chosen records serve this subtask best.
    """

    name: str
    records: int
    mean_score: float
    mean_score_of_selected: float
    selected: int


def target_groups(target: Mixture, checkpoints: Sequence[Checkpoint]) -> tuple[np.ndarray, dict[int, str]]:
    """The subtask of each target record, int `[M]`, -1 where the gradient pass left it out, and the reasons by row.

    Raises:
        UserError: a record has no subtask, a gradient is zero or not finite, or a subtask has no record left.
    """
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:
        left_out = {entry.row: entry.reason for chunk in checkpoint.target for entry in chunk.left_out}
        found = reasons_left_out(target, checkpoint.target, record_scores(checkpoint.target))
        for row, reason in sorted(found.items()):
            if row not in left_out or reason == "not finite":
                raise UserError(
                    f"{checkpoint.target_path}: the gradient of target record {row} (id {target.ids[row]!r}) is zero "
                    f"or not finite ({reason}), so it has no direction; remove the record from the target, or take "
                    "another checkpoint"
                )
        reasons |= found
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


def subtask_means(checkpoint: Checkpoint, groups: np.ndarray, within: str, device: torch.device) -> torch.Tensor:
    """`m_ij` of every subtask at one checkpoint, float64 `[J, d]`.

    Args:
        groups: int `[M]`, the subtask of each target record, negative for none.
        within: `mean` of the unit gradients, or the direction of the `mean_gradient`.

    Raises:
        UserError: a subtask's gradients cancel out.
    """
    spans = spans_of(checkpoint.target)
    if within == "mean":
        return group_means(spans, groups, device=device).means
    norms = np.concatenate([chunk.norms for chunk in checkpoint.target])
    means = group_means(spans, groups, norms, device).means
    lengths = torch.linalg.vector_norm(means, dim=1, keepdim=True)
    if not (lengths > 0).all():
        raise UserError(f"{checkpoint.target_path}: a subtask's gradients cancel out; take within mean")
    return means / lengths


def records_left_out(mixture: Mixture, checkpoints: Sequence[Checkpoint]) -> dict[int, str]:
    """Why records of the mixture have no score, by row: at some checkpoint they have no gradient."""
    without_problems = replace(mixture, problems={})  # a task is of no use here, and its lack no fault
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:
        reasons = reasons_left_out(without_problems, checkpoint.train, record_scores(checkpoint.train)) | reasons
    return reasons


def repeated_in(target: Mixture, mixture: Mixture) -> list[int]:
    """Rows of the target whose turns and images are those of a record of the mixture of the same id."""

    def content(record: Any) -> str:
        return json.dumps([record.get(key) for key in ("conversations", "image", "images")], sort_keys=True)

    rows_of: dict[str, list[int]] = {}
    for row, name in enumerate(target.ids):
        rows_of.setdefault(name, []).append(row)
    repeated: set[int] = set()
    for row, name in enumerate(mixture.ids):
        if name in rows_of and isinstance(record := mixture.records[row], dict):
            own = content(record)
            repeated |= {other for other in rows_of[name] if content(target.records[other]) == own}
    return sorted(repeated)


def choose(scores: np.ndarray, reasons: dict[int, str], options: Options) -> TargetChoice:
    """The best `p` of the records.

    Args:
        scores: `[N, J]`, each record's score for each subtask; NaN where its features are zero or not finite.
        reasons: why records were left out, by row.

    Raises:
        UserError: `p` of the records is none.
    """
    records = len(scores)
    number = rounded_down(options.p * records)
    if not number:
        raise UserError(f"p = {options.p} of {records} records is less than one; raise it")
    useless = np.flatnonzero(np.isnan(scores).any(axis=1)).tolist()
    reasons = dict.fromkeys(useless, "features are zero or not finite") | reasons
    scores = scores.copy()
    scores[list(reasons)] = np.nan
    tie_break = None
    if options.over_targets == "vote":
        score, tie_break = votes(scores, number), mean_subtask(scores)
    else:
        score = {"max": best_subtask, "mean": mean_subtask}[options.over_targets](scores)
    order = ranking(score, tie_break)
    ranks = np.full(records, np.nan, object)
    ranks[order] = np.arange(1, len(order) + 1)
    times = np.zeros(records, np.int64)
    times[order[:number]] = 1
    return TargetChoice(score, ranks, times, reasons)


def tasks_of(mixture: Mixture, choice: TargetChoice) -> list[Task]:
    """The mixture's tasks, in order of their first record, and how many records of each were chosen."""
    counted = np.ones(len(mixture.task), bool)
    counted[list(choice.reasons)] = False

    def by_task(values: np.ndarray) -> list[int]:
        return np.bincount(mixture.task, values, len(mixture.task_names)).astype(int).tolist()

    numbers = (by_task(np.ones(len(counted))), by_task(counted), by_task(choice.times_selected))
    return [
        Task(name, records, usable, selected, selected)
        for name, records, usable, selected in zip(mixture.task_names, *numbers, strict=True)
    ]


def subtasks_of(target: Mixture, groups: np.ndarray, scores: np.ndarray, choice: TargetChoice) -> list[Subtask]:
    """What the choice is for each subtask.

    Args:
        groups: int `[M]`, the subtask of each target record, negative for none.
        scores: `[N, J]`.
    """
    scored = np.ones(len(scores), bool)
    scored[list(choice.reasons)] = False
    chosen = choice.times_selected > 0
    best = scores[chosen].argmax(axis=1)
    return [
        Subtask(
            name,
            int((groups == number).sum()),
            float(scores[scored, number].mean()),
            float(scores[chosen, number].mean()),
            int((best == number).sum()),
        )
        for number, name in enumerate(target.task_names)
    ]


def less_stem(options: Options, task_key: str) -> str:
    """`Less_p_{p}`, and every choice that differs from the default."""
    parts = [f"Less_p_{float(options.p)}"]
    for name in ("within", "over_targets", "gradient"):
        if getattr(options, name) != getattr(Options, name):
            parts.append(f"{name}-{getattr(options, name)}")
    if options.weights is not None:
        parts.append(f"weights-{'+'.join(map(str, options.weights))}")
    if task_key != "dataset":
        parts.append(f"task_key-{name_part([task_key])}")
    return "_".join(parts)
