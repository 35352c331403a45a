"""The checkpoints of a selection for a target (LESS): their features, which must belong together, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tive.features.chunk import Match
from tive.features.lookup import Features, joined, match_of, open_features, refuse_other_space
from tive.method.target import checkpoint_weights, mean_rates_since
from tive.selection.mixture import Mixture, refuse_missing
from tive.util.errors import UserError


@dataclass(frozen=True)
class CheckpointFeatures:
    """One checkpoint's features: of the records, and of the target."""

    train: Features
    target: Features

    @property
    def match(self) -> Match:
        """What the features of the records are."""
        return match_of(self.train)


def open_checkpoints(
    train: Sequence[str], target: Sequence[str], mixture: Mixture, target_data: Mixture, gradient: str, missing: Path
) -> list[CheckpointFeatures]:
    """The features of every checkpoint, in the order in which `train` first names them, verified to be of one space.

    Args:
        train, target: folders, each of one checkpoint; several of one checkpoint where each has a part of the records.
        missing: a folder for records without features.

    Raises:
        UserError: a checkpoint has folders of one side alone, folders are of other data or of another gradient, or one
            adds nothing.
    """
    of_records, of_target = _by_checkpoint(train, mixture), _by_checkpoint(target, target_data)
    for here, there, whose in ((of_records, of_target, "target's"), (of_target, of_records, "records'")):
        if alone := [features.folder for model, features in here.items() if model not in there]:
            raise UserError(
                f"{alone[0]}: no folder has the {whose} features of its checkpoint; give the records' and the target's "
                "of every checkpoint"
            )
    checkpoints = [CheckpointFeatures(features, of_target[model]) for model, features in of_records.items()]
    for checkpoint in checkpoints:
        _check_gradients(checkpoint, gradient)
        refuse_other_space(checkpoint.train, checkpoint.target)
        name = checkpoint.train.folder.name
        refuse_missing(checkpoint.train, mixture, missing / name / "records.json")
        refuse_missing(checkpoint.target, target_data, missing / f"target_{name}" / "records.json")
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


def _check_gradients(checkpoint: CheckpointFeatures, gradient: str) -> None:
    here, there = checkpoint.match.gradient, match_of(checkpoint.target).gradient
    if there != "sgd":
        raise UserError(
            f"{checkpoint.target.folder} holds {there} gradients, and a target's are taken as they are; take them "
            "again in another folder (gradient sgd)"
        )
    if here == "none" or (here == "sgd") != (gradient == "sgd"):
        remedy = "leave gradient sgd out"
        if here in ("sgd", "none"):
            remedy = "take Adam's in another folder (gradient adam), or select by plain ones (gradient sgd)"
        raise UserError(f"{checkpoint.train.folder} holds {here} gradients of the records; {remedy}")


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
                f"{checkpoint.train.folder}: the trainer logged no learning rate up to this checkpoint "
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
