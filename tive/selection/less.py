"""LESS (arXiv 2402.04333) between its files and `tive.method.target`: checkpoints, subtasks, the best records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tive.data.content import record_hash
from tive.features.chunk import Match
from tive.features.lookup import Features, open_features
from tive.method.target import (
    best_subtask,
    checkpoint_weights,
    mean_rates_since,
    mean_subtask,
    ranking,
    round_robin,
    votes,
)
from tive.method.value import rounded_down
from tive.selection.mixture import Mixture, reasons_left_out, record_scores, refuse_missing
from tive.selection.options import LessOptions
from tive.selection.summary import Task
from tive.selection.writing import Chosen
from tive.util.errors import UserError
from tive.util.text import shown

# What the features of the records and of the target must have in common, to be of one space.
_PAIRED = {
    "model": "model",
    "grad_modules": "target modules",
    "counted_parameters": "counted parameters",
    "projector": "projector",
    "proj_seed": "projection's seed",
    "proj_dim": "dimension",
}


@dataclass(frozen=True)
class CheckpointFeatures:
    """One checkpoint's features: of the records, and of the target."""

    train_path: str
    target_path: str
    train: Features
    target: Features

    @property
    def match(self) -> Match:
        """What the features of the records are."""
        return _match(self.train_path, self.train)


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


def open_checkpoints(
    train: Sequence[str], target: Sequence[str], mixture: Mixture, target_data: Mixture, gradient: str
) -> list[CheckpointFeatures]:
    """The features of every checkpoint, verified to be of one space by pairs.

    Raises:
        UserError: folders do not pair, are of other data or of another gradient, or name a checkpoint twice.
    """
    if len(train) != len(target):
        raise UserError(
            f"{len(train)} folders of the records' features and {len(target)} of the target's; give one of each for "
            "every checkpoint, in the same order"
        )
    checkpoints = [
        CheckpointFeatures(
            records, goal, open_features(records, mixture.records), open_features(goal, target_data.records)
        )
        for records, goal in zip(train, target, strict=True)
    ]
    for checkpoint in checkpoints:
        refuse_missing(checkpoint.train, mixture)
        refuse_missing(checkpoint.target, target_data)
    forms: dict[str, str] = {}
    first: dict[str, str] = {}
    for checkpoint in checkpoints:
        _check_pair(checkpoint)
        _check_gradients(checkpoint, gradient)
        forms[checkpoint.match.gradient] = checkpoint.train_path
        other = first.setdefault(checkpoint.match.model, checkpoint.train_path)
        if other != checkpoint.train_path or train.count(other) > 1:
            raise UserError(f"{other} and {checkpoint.train_path} are of the same checkpoint; give each one once")
    if len(forms) > 1:
        listed = ", ".join(f"{path} {form}" for form, path in forms.items())
        raise UserError(f"the checkpoints' gradients are of different forms ({listed}); take them all in one form")
    return checkpoints


def _match(path: str, features: Features) -> Match:
    match = features.match
    if match is None:
        raise UserError(
            f"{path} holds feature files of the release, which do not say what model they are of; take the gradients "
            "again with compute_gradient_features.py"
        )
    return match


def _check_pair(checkpoint: CheckpointFeatures) -> None:
    records, target = checkpoint.match, _match(checkpoint.target_path, checkpoint.target)
    for key, name in _PAIRED.items():
        ours, theirs = getattr(records, key), getattr(target, key)
        if ours != theirs:
            raise UserError(
                f"{checkpoint.train_path} and {checkpoint.target_path} differ in {name} ({shown(str(ours), 24)} and "
                f"{shown(str(theirs), 24)}); give the folders in the same order, and take both with the same options"
            )


def _check_gradients(checkpoint: CheckpointFeatures, gradient: str) -> None:
    ours, theirs = checkpoint.match.gradient, _match(checkpoint.target_path, checkpoint.target).gradient
    if theirs != "sgd":
        raise UserError(
            f"{checkpoint.target_path} holds {theirs} gradients, and a target's are taken as they are; take them again "
            "in another folder (gradient sgd)"
        )
    if (ours == "sgd") != (gradient == "sgd"):
        remedy = (
            "take Adam's in another folder (gradient adam), or select by plain ones (gradient sgd)"
            if ours == "sgd"
            else "leave gradient sgd out"
        )
        raise UserError(f"{checkpoint.train_path} holds {ours} gradients of the records; {remedy}")


def weights_of(checkpoints: Sequence[CheckpointFeatures], given: Sequence[float] | None) -> np.ndarray:
    """`w_i` of every checkpoint, `[C]`, in their order; they sum to 1.

    Args:
        given: in place of the mean learning rates that the trainer logged.

    Raises:
        UserError: there are not as many as checkpoints, or no learning rates were logged.
    """
    if given is not None:
        if len(given) != len(checkpoints):
            raise UserError(
                f"{len(given)} weights for {len(checkpoints)} checkpoints; give one for each, in their order"
            )
        return checkpoint_weights(np.array(given))
    steps = []
    for checkpoint in checkpoints:
        logged = checkpoint.train.chunks[0].manifest.get("learning_rates")
        if checkpoint.match.checkpoint is None or not isinstance(logged, dict) or not logged["logged"]:
            raise UserError(
                f"{checkpoint.train_path}: the trainer logged no learning rate up to this checkpoint "
                "(trainer_state.json beside the model); give the checkpoints' weights"
            )
        steps.append((checkpoint.match.checkpoint, logged["logged"], logged["sum"]))
    order = sorted(range(len(steps)), key=lambda place: steps[place])
    _, counts, sums = (np.array(column) for column in zip(*(steps[place] for place in order), strict=True))
    if (np.diff(counts) <= 0).any() or (np.diff(sums, prepend=0.0) < 0).any():
        raise UserError(
            "the checkpoints' logs do not continue each other, so they are of different trainings or were logged too "
            "seldom; give their weights"
        )
    rates = np.empty(len(steps))
    rates[order] = mean_rates_since(sums, counts)
    if not rates.any():
        raise UserError("the learning rates that the trainer logged are all zero; give the checkpoints' weights")
    return checkpoint_weights(rates)


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
                    f"{checkpoint.target_path}: the gradient of target record {row} (id {target.ids[row]!r}) is zero "
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
                "train": os.path.abspath(checkpoint.train_path),
                "target": os.path.abspath(checkpoint.target_path),
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
