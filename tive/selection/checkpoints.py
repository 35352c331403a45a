"""The checkpoints of a selection for a target (LESS): their features, which must belong together, and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tive.features.chunk import Match
from tive.features.lookup import Features, open_features, refuse_other_space
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
        assert self.train.match is not None  # seen to when they were opened
        return self.train.match


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
    checkpoints = []
    kinds: dict[str, str] = {}
    folders: dict[str, str] = {}
    for path, target_path in zip(train, target, strict=True):
        features, goal = open_features(path, mixture.records), open_features(target_path, target_data.records)
        refuse_missing(features, mixture)
        refuse_missing(goal, target_data)
        refuse_other_space(features, goal)
        checkpoint = CheckpointFeatures(features, goal)
        _check_gradients(checkpoint, gradient)
        kinds[checkpoint.match.gradient] = path
        if checkpoint.match.model in folders:
            raise UserError(
                f"{folders[checkpoint.match.model]} and {path} are of the same checkpoint; give each one once"
            )
        folders[checkpoint.match.model] = path
        checkpoints.append(checkpoint)
    if len(kinds) > 1:
        listed = ", ".join(f"{path} {kind}" for kind, path in kinds.items())
        raise UserError(f"the checkpoints' gradients are of different forms ({listed}); take them all in one form")
    return checkpoints


def _check_gradients(checkpoint: CheckpointFeatures, gradient: str) -> None:
    here, there = checkpoint.match.gradient, checkpoint.target.match and checkpoint.target.match.gradient
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
