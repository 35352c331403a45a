"""Batches of encoded records: which records share one, how large it may be, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tive.method.gradients import Measure, Transform, gradient_features, unmeasured
from tive.method.projection import Projector
from tive.models import Encoded, Family, RecordLosses, Reference
from tive.util.errors import UserError

# Small gradients vanish in float16 below 6e-8; this lifts them, and an overflow is met with a smaller scale.
_FLOAT16_LOSS_SCALE = 2.0**12
# Padding eats the gain of a batch: less than this share of real tokens is not worth a larger one.
_LEAST_EFFICIENCY = 0.9


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
class BatchLimits:
    """How large a batch may be: records, and tokens with padding."""

    records: int
    tokens: int

    def halved(self, batch: list[Encoded]) -> BatchLimits:
        """Limits of half the size of a batch that did not fit in memory."""
        records = max(1, len(batch) // 2)
        return BatchLimits(records, min(self.tokens, records * max(record.length for record in batch)))


@dataclass(frozen=True)
class RecordResult:
    """Of one record: its feature, float16 `[proj_dim]`, the norm of its gradient, its loss, and EL2N if asked for."""

    feature: Tensor
    norm: float
    loss: float
    el2n: float | None


@dataclass(frozen=True)
class Computed:
    """Results of records by row, the batch limits that went well, and the batches' tokens without and with padding."""

    results: dict[int, RecordResult]
    limits: BatchLimits
    tokens: int
    padded_tokens: int


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
) -> Computed:
    """The result of each record by its row; records of like length share a batch.

    Args:
        done: is told the number of records of each batch when it is computed.

    Raises:
        UserError: one record alone does not fit in memory.
    """
    results: dict[int, RecordResult] = {}
    tokens = padded_tokens = 0
    # A group's longest first: what takes the most memory fails at the start.
    waiting = sorted(records, key=lambda row: (records[row].group, -records[row].length, row))
    while waiting:
        rows = next_batch(waiting, records, limits)
        batch = [records[row] for row in rows]
        try:
            computed = compute_batch(step, batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            computed = []
        if not computed:  # outside of the handler, which keeps the failed pass's tensors alive
            if len(batch) == 1:
                raise UserError(
                    f"record {rows[0]} ({batch[0].length} tokens) alone does not fit in memory; "
                    "try --gradient_checkpointing or a device with more"
                )
            if step.reference.device.type == "cuda":
                torch.cuda.empty_cache()
            limits = limits.halved(batch)
            print(f"out of memory: batches are now {limits.records} records or {limits.tokens} tokens at most")
            continue
        results.update(zip(rows, computed, strict=True))
        tokens += sum(record.length for record in batch)
        padded_tokens += len(batch) * max(record.length for record in batch)
        done(len(rows))
        waiting = waiting[len(rows) :]
    return Computed(results, limits, tokens, padded_tokens)


def next_batch(waiting: list[int], records: dict[int, Encoded], limits: BatchLimits) -> list[int]:
    """The longest waiting records that fit in one batch: all of one group, and little padding.

    Args:
        waiting: rows, by group, then by falling length.
    """
    first = records[waiting[0]]
    rows: list[int] = []
    tokens = 0
    for row in waiting[: limits.records]:
        record = records[row]
        if record.group != first.group:
            break
        padded = (len(rows) + 1) * first.length
        if rows and (padded > limits.tokens or tokens + record.length < _LEAST_EFFICIENCY * padded):
            break
        rows.append(row)
        tokens += record.length
    return rows


def _is_out_of_memory(error: Exception) -> bool:
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(part in str(error) for part in known)
