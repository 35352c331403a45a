"""LESS (arXiv 2402.04333) between its files and `tive.method.target`: checkpoints, subtasks, and the best records."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tive.data.trained import record_hash
from tive.features.chunk import Match
from tive.features.lookup import Features, joined, match_of, open_features, refuse_other_space
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
from tive.selection.mixture import (
    Mixture,
    reasons_left_out,
    record_scores,
    refuse_gradients,
    refuse_missing,
    refuse_problems,
)
from tive.selection.options import LessOptions
from tive.selection.output import Chosen, Task
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, shown, shown_value


@dataclass(frozen=True)
class CheckpointFeatures:
    """One checkpoint's features, of the records and of the target; `match` is what those of the records are."""

    train: Features
    target: Features
    match: Match


@dataclass(frozen=True)
class Subtask:
    """A subtask of the target."""

    name: str
    records: int  # of the target, in its mean
    mean_score: float  # over all records of the mixture that have a score
    mean_score_of_selected: float
    selected: int  # how many of the chosen records serve it best, or were taken in its turn (`round_robin`)


def open_checkpoints(
    train: Sequence[str], target: Sequence[str], mixture: Mixture, target_data: Mixture, gradient: str, missing: Path
) -> list[CheckpointFeatures]:
    """The features of every checkpoint, in the order in which `train` first names them; a `UserError` where a
    checkpoint has folders of one side alone, or folders are of other data, another space or gradient, or add nothing.

    Args:
        train, target: folders, each of one checkpoint; several of one checkpoint where each has a part of the records.
        missing: gets the records without features, a folder for each checkpoint and side.
    """
    of_records, of_target = _by_checkpoint(train, mixture), _by_checkpoint(target, target_data)
    for here, there, whose in ((of_records, of_target, "target's"), (of_target, of_records, "records'")):
        if alone := [features.folder for model, features in here.items() if model not in there]:
            raise UserError(
                f"{alone[0]}: no folder has the {whose} features of its checkpoint; give the records' and the target's "
                "of every checkpoint"
            )
    checkpoints = [CheckpointFeatures(one, of_target[model], match_of(one)) for model, one in of_records.items()]
    wanted: tuple[str, ...] = ("sgd",)
    why = "plain ones were asked for (without gradient sgd, Adam's are taken)"
    if gradient == "adam":
        wanted, why = ("adam", "adam_release"), "LESS selects by Adam's (gradient sgd takes plain ones)"
    for number, checkpoint in enumerate(checkpoints):
        refuse_gradients(checkpoint.target, ("sgd",), "a target's are taken as they are")
        refuse_gradients(checkpoint.train, wanted, why)
        refuse_other_space(checkpoint.train, checkpoint.target)
        refuse_missing(checkpoint.train, mixture, missing / f"train_{number}" / "records.json")
        refuse_missing(checkpoint.target, target_data, missing / f"target_{number}" / "records.json")
    if len(kinds := {checkpoint.match.gradient: str(checkpoint.train.folder) for checkpoint in checkpoints}) > 1:
        listed = ", ".join(f"{folder} {kind}" for kind, folder in kinds.items())
        raise UserError(f"the checkpoints' gradients are of different forms ({listed}); take them all in one form")
    return checkpoints


def _by_checkpoint(folders: Sequence[str], of: Mixture) -> dict[str, Features]:
    """The features of each checkpoint, by its model."""
    parts: dict[str, list[Features]] = {}
    for folder in folders:
        features = open_features(folder, of.records)
        parts.setdefault(match_of(features).model, []).append(features)
    return {model: joined(features) for model, features in parts.items()}


def weights_of(checkpoints: Sequence[CheckpointFeatures], given: Sequence[float] | None) -> np.ndarray:
    """`w_i` of every checkpoint, `[C]`, in their order; they sum to 1. A `UserError` where there are not as many as
    checkpoints, or no learning rates were logged.

    Args:
        given: in place of the mean learning rates that the trainer logged.
    """
    if given is not None:
        if len(given) != len(checkpoints):
            raise UserError(f"{len(given)} weights for {len(checkpoints)} checkpoints; give one for each, in order")
        return checkpoint_weights(np.array(given))
    logged = [checkpoint.train.chunks[0].manifest.get("learning_rates") or {} for checkpoint in checkpoints]
    order = np.argsort([checkpoint.match.checkpoint or 0 for checkpoint in checkpoints], kind="stable")
    counts, sums = (np.array([rates.get(key, 0) for rates in logged])[order] for key in ("logged", "sum"))
    if (np.diff(counts, prepend=0) <= 0).any() or (np.diff(sums, prepend=0) < 0).any() or not sums.any():
        raise UserError(
            f"{', '.join(str(checkpoint.train.folder) for checkpoint in checkpoints)}: the learning rates that the "
            "trainer logged up to these checkpoints (trainer_state.json) tell no weights: there are none, they are "
            "zero, or of different trainings; give the checkpoints' weights"
        )
    rates = np.empty(len(checkpoints))
    rates[order] = mean_rates_since(sums, counts)
    return checkpoint_weights(rates)


def target_groups(
    target: Mixture, checkpoints: Sequence[CheckpointFeatures], listing: Path
) -> tuple[np.ndarray, dict[int, str]]:
    """The subtask of each target record, int `[M]`, -1 where the gradient pass left it out, and the reasons by row; a
    `UserError` where a record has no subtask, a gradient is zero or not finite, or a subtask has no record left.

    Args:
        listing: where target records that cannot be used are listed.
    """
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:
        left_out = checkpoint.target.left_out()
        here = reasons_left_out(checkpoint.target, record_scores(checkpoint.target))
        refuse_problems(target, here, listing)
        for row, reason in sorted(here.items()):
            if row not in left_out or reason == "not finite":
                raise UserError(
                    f"{checkpoint.target.folder}: the gradient of target record {row} "
                    f"(id {shown_value(target.ids[row])}) is zero or not finite ({reason}), so it has no "
                    "direction; remove the record from the target, or take another checkpoint"
                )
        reasons |= here
    groups = target.task.copy()
    groups[list(reasons)] = -1
    for number, name in enumerate(target.task_names):
        if not (groups == number).any():
            row = int(np.flatnonzero(target.task == number)[0])
            raise UserError(
                f"no record of the target's subtask {shown(name, LABEL_LIMIT)} has a gradient "
                f"(record {row}: {reasons[row]}); repair them, or remove the subtask from the target"
            )
    return groups, reasons


def repeated_in(target: Mixture, mixture: Mixture) -> list[int]:
    """Rows of the target whose system prompt, turns and images are those of a record of the mixture."""
    rows_of: dict[bytes, list[int]] = {}
    for row, record in enumerate(target.records):
        rows_of.setdefault(record_hash(record), []).append(row)
    return sorted({row for record in mixture.records for row in rows_of.get(record_hash(record), ())})


def choose_for_target(
    mixture: Mixture,
    scores: np.ndarray,
    target: Mixture,
    groups: np.ndarray,
    reasons: Mapping[int, str],
    options: LessOptions,
) -> Chosen:
    """The best `p` of the records; a `UserError` where that is none.

    Args:
        scores: `[N, J]`, each record's score for each subtask; NaN where its features are zero or not finite.
        groups: int `[M]`, the subtask of each target record, negative for none.
        reasons: why records were left out, by row.

    Returns:
        The columns are `score` over all subtasks, `rank` (1 for the best), and `score_{name}` of each subtask; NaN for
        a record that was left out. The details are the `subtasks`.
    """
    records = len(scores)
    number = rounded_down(options.p * records)
    if not number:
        raise UserError(f"p = {options.p} of {records} records is less than one; raise it")
    useless = np.flatnonzero(np.isnan(scores).any(axis=1)).tolist()
    reasons = dict.fromkeys(useless, "features are zero or not finite") | dict(reasons)
    columns = {f"score_{name}": scores[:, place] for place, name in enumerate(target.task_names)}
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

    usable, drawn = np.isfinite(score), times > 0
    sizes, counted, selected = (
        np.bincount(mixture.task[rows], minlength=len(mixture.task_names)).tolist()
        for rows in (slice(None), usable, drawn)
    )
    tasks = map(Task, mixture.task_names, sizes, counted, selected, selected)
    best = scores[drawn].argmax(axis=1)
    if options.over_targets == "round_robin":
        best = (ranks[drawn].astype(np.int64) - 1) % scores.shape[1]
    of_target, of_best = (np.bincount(places, minlength=scores.shape[1]) for places in (groups[groups >= 0], best))
    means = (scores[rows].mean(axis=0).tolist() for rows in (usable, drawn))
    subtasks = [*map(Subtask, target.task_names, of_target.tolist(), *means, of_best.tolist())]
    return Chosen([*tasks], {"score": score, "rank": ranks, **columns}, times, reasons, "LESS", {"subtasks": subtasks})


def target_details(
    target: Mixture, checkpoints: Sequence[CheckpointFeatures], weights: np.ndarray, left_out: Mapping[int, str]
) -> dict[str, Any]:
    """What the summary says of the target, of its records that count in no mean, and of the checkpoints."""
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
        "target_left_out": [{"row": row, "reason": reason} for row, reason in sorted(left_out.items())],
    }
