"""The features of a batch of encoded records: one backward pass on the reference model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tive.method.gradients import Measure, Transform, gradient_features, unmeasured
from tive.method.projection import Projector
from tive.models import Encoded, Family, RecordLosses, Reference
from tive.models.batches import BatchLimits, Computed, compute_in_batches

# Small gradients vanish in float16 below 6e-8; this lifts them, and an overflow is met with a smaller scale.
_FLOAT16_LOSS_SCALE = 2.0**12


@dataclass(frozen=True)
class GradientStep:
    """What turns a batch of records into features: a reference model, its target modules, a projector.

    Attributes:
        matrices: canonical name -> target module.
        transform: of each matrix's per-record gradients; None for the gradients as they are.
        el2n: whether EL2N is computed too.
    """

    family: Family
    reference: Reference
    matrices: Mapping[str, nn.Linear]
    projector: Projector
    transform: Transform | None = None
    el2n: bool = False
    measure: Measure = unmeasured


@dataclass(frozen=True)
class RecordResult:
    """Of one record: its feature, float16 `[proj_dim]`, the norm of its gradient, its loss, and EL2N if asked for."""

    feature: Tensor
    norm: float
    loss: float
    el2n: float | None


def compute_batch(step: GradientStep, batch: list[Encoded]) -> list[RecordResult]:
    """The results of a batch of one group, in its order."""
    found: list[RecordLosses] = []

    def forward() -> Tensor:
        found[:] = [step.family.record_losses(step.reference, batch, step.el2n)]
        return found[0].losses

    scale = _FLOAT16_LOSS_SCALE if step.reference.dtype == torch.float16 else 1.0
    computed = gradient_features(forward, step.matrices, step.projector, step.transform, scale, step.measure)
    el2n = found[0].el2n
    values = [computed.norms.tolist(), computed.losses.tolist(), [None] * len(batch) if el2n is None else el2n.tolist()]
    rows = zip(computed.features.half(), *values, strict=True)
    return [RecordResult(feature, norm, loss, error) for feature, norm, loss, error in rows]


def compute_records(
    step: GradientStep, records: dict[int, Encoded], limits: BatchLimits, done: Callable[[int], object] = int
) -> Computed[int, RecordResult]:
    """`compute_batch` for each record by its row, in batches of records of like length.

    Raises:
        UserError: one record alone does not fit in memory.
    """
    return compute_in_batches(partial(compute_batch, step), records, limits, step.reference.device, done)
