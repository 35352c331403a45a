"""The checkpoints of a selection for a target (LESS): their features, what must agree, and their weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tive.data.records import Records
from tive.features.chunks import Chunk, open_chunks
from tive.features.manifest import Match
from tive.method.target import checkpoint_weights, mean_rates_since
from tive.util.errors import UserError
from tive.util.text import shown

# What the features of the records and of the target must have in common, to be of one space.
_PAIRED = {
    "model": "model",
    "grad_modules": "target modules",
    "last_layers": "layers",
    "counted_parameters": "counted parameters",
    "projector": "projector",
    "proj_seed": "projection's seed",
    "proj_dim": "dimension",
}


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's features: of the records, and of the target."""

    train_path: str
    target_path: str
    train: list[Chunk]
    target: list[Chunk]

    @property
    def match(self) -> Match:
        """What the features of the records are."""
        return _match(self.train_path, self.train)


def open_checkpoints(
    train: Sequence[str], target: Sequence[str], records: Records, target_records: Records, gradient: str
) -> list[Checkpoint]:
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
        Checkpoint(of_records, of_target, open_chunks(of_records, records), open_chunks(of_target, target_records))
        for of_records, of_target in zip(train, target, strict=True)
    ]
    for checkpoint in checkpoints:
        _check_pair(checkpoint)
        _check_gradients(checkpoint, gradient)
    forms = {checkpoint.match.gradient: checkpoint.train_path for checkpoint in checkpoints}
    if len(forms) > 1:
        listed = ", ".join(f"{path} {form}" for form, path in forms.items())
        raise UserError(f"the checkpoints' gradients are of different forms ({listed}); take them all in one form")
    first: dict[str, str] = {}
    for checkpoint in checkpoints:
        other = first.setdefault(checkpoint.match.model, checkpoint.train_path)
        if other != checkpoint.train_path or train.count(other) > 1:
            raise UserError(f"{other} and {checkpoint.train_path} are of the same checkpoint; give each one once")
    return checkpoints


def _match(path: str, chunks: Sequence[Chunk]) -> Match:
    match = chunks[0].match
    if match is None:
        raise UserError(
            f"{path} holds feature files of the release, which do not say what model they are of; take the gradients "
            "again with compute_gradient_features.py"
        )
    return match


def _check_pair(checkpoint: Checkpoint) -> None:
    records, target = checkpoint.match, _match(checkpoint.target_path, checkpoint.target)
    for key, name in _PAIRED.items():
        ours, theirs = getattr(records, key), getattr(target, key)
        if ours != theirs:
            raise UserError(
                f"{checkpoint.train_path} and {checkpoint.target_path} differ in {name} ({shown(str(ours), 24)} and "
                f"{shown(str(theirs), 24)}); give the folders in the same order, and take both with the same options"
            )


def _check_gradients(checkpoint: Checkpoint, gradient: str) -> None:
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


def weights_of(checkpoints: Sequence[Checkpoint], given: Sequence[float] | None) -> np.ndarray:
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
        logged = checkpoint.train[0].manifest.get("learning_rates")
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


def described(checkpoints: Sequence[Checkpoint], weights: np.ndarray) -> list[dict[str, Any]]:
    """The checkpoints for the summary: where their features are, what they are of, and `w_i`."""
    return [
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
    ]
