"""Which gradient a pass takes: as it is, or as the checkpoint's Adam would apply it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

import torch
from torch import nn

from tive.method.adam import adam_step, release_step
from tive.method.gradients import Transform
from tive.models import Reference
from tive.models.optimizer_files import StoredState, read_optimizer_state
from tive.models.optimizer_state import (
    TrainerState,
    find_optimizer_state,
    moments_of_matrices,
    optimizer_state_identity,
    read_trainer_state,
)
from tive.util.errors import UserError

# The names that feature files give to what the gradient is.
FORMS = {"adam": "adam", "release": "adam_release"}


@dataclass(frozen=True)
class GradientKind:
    """What is known of the gradient before the model is loaded.

    Attributes:
        name: `sgd`, `adam` or `adam_release`.
        trainer: the checkpoint's step and learning rates, None for a model without a trainer's state.
        state: Adam's as it is on disk, None for `sgd`; `state_sha256` tells it from another one.
    """

    name: str
    trainer: TrainerState | None
    state: StoredState | None = None
    state_sha256: str | None = None

    @property
    def step(self) -> int | None:
        return self.trainer.step if self.trainer else None

    @property
    def learning_rates(self) -> dict[str, float] | None:
        """How many rates the trainer logged up to the checkpoint, and their sum, for the manifest."""
        return {"logged": self.trainer.logged, "sum": self.trainer.learning_rate_sum} if self.trainer else None


def gradient_kind(model_path: str, form: str | None = None, optimizer_state: str | None = None) -> GradientKind:
    """Find and check what the gradient needs beside the model.

    Args:
        form: of Adam's step, `adam` or `release`; None for the gradient as it is.
        optimizer_state: where Adam's state is, if not beside the model.

    Raises:
        UserError: there is no state, it is not Adam's, or not of this checkpoint.
    """
    trainer = read_trainer_state(model_path)
    if form is None:
        return GradientKind("sgd", trainer)
    path = find_optimizer_state(model_path, optimizer_state)
    if trainer is None:
        raise UserError(
            f"{model_path} holds no trainer_state.json, so the step that {path} belongs to is not known; take a "
            "checkpoint-N folder as the model, whole"
        )
    return GradientKind(FORMS[form], trainer, read_optimizer_state(path, trainer.step), optimizer_state_identity(path))


def transform_of(
    kind: GradientKind, reference: Reference, matrices: Mapping[str, nn.Linear], model_path: str
) -> Transform | None:
    """What each matrix's gradients become before norm and projection; None where they stay as they are.

    Two moments a target module, in float32, stay on the device.

    Raises:
        UserError: the state does not fit the model.
    """
    if kind.state is None:
        return None
    moments = moments_of_matrices(kind.state, reference.model, matrices, model_path)
    t, b1, b2, eps = astuple(kind.state.constants)
    print(f"optimizer's state {kind.state.path}: Adam after step {t}, betas {b1:g} and {b2:g}, eps {eps:g}")
    dtype = next(iter(moments.values())).m.dtype
    if dtype != torch.float32:
        print(
            f"warning: Adam's moments were kept in {str(dtype).removeprefix('torch.')}, in which v cannot decay with "
            f"b2 = {b2:g} and stays too large; DeepSpeed keeps them in float32"
        )
    m = {name: of.m.to(reference.device, torch.float32) for name, of in moments.items()}
    v = {name: of.v.to(reference.device, torch.float32) for name, of in moments.items()}
    if kind.name == "adam_release":
        return lambda name, g: release_step(g, m[name], v[name])
    return lambda name, g: adam_step(g, m[name], v[name], t, (b1, b2), eps)
