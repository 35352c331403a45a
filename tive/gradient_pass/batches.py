"""Projected gradients and gradient norms of records, batch by batch (paper section 3.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tive.method.gradients import RecordGradients
from tive.method.projection import Projector
from tive.models import Encoded
from tive.util.errors import UserError
from tive.util.stopwatch import Stopwatch

# Small gradients vanish in float16 below 6e-8; this lifts them, and an overflow is met with a smaller scale.
_FLOAT16_LOSS_SCALE = 2.0**12
# Padding eats the gain of a batch: less than this share of real tokens is not worth a larger one.
_LEAST_EFFICIENCY = 0.9


@dataclass
class BatchLimits:
    """How large a batch may be: records, and tokens with padding. Halved for good when memory runs out."""

    records: int
    tokens: int

    def halve(self, batch: list[Encoded]) -> None:
        self.records = max(1, len(batch) // 2)
        self.tokens = min(self.tokens, max(1, len(batch) // 2) * max(record.length for record in batch))


class GradientEngine:
    """Turns batches of encoded records into features and norms.

    Args:
        family: the model family's module (`tive.models`).
        matrices: canonical name -> counted LoRA matrix.
    """

    def __init__(
        self,
        family: ModuleType,
        reference: Any,
        matrices: dict[str, nn.Linear],
        projector: Projector,
    ) -> None:
        self.family, self.reference, self.matrices, self.projector = family, reference, matrices, projector
        self.stopwatch = Stopwatch()
        self.real_tokens = self.padded_tokens = 0

    def _consume(self, matrix: str, gradients: Tensor) -> None:
        """Add one matrix's gradients `[B, out, in]` to the batch's sketch and squared norms, in float32."""
        flat = gradients.flatten(1)
        with self.stopwatch.measure("norms"):
            self.squared_norms += torch.linalg.vector_norm(flat, dim=1, dtype=torch.float32).square()
        with self.stopwatch.measure("projection"):
            self.sketch += self.projector.project(matrix, flat)

    def compute(self, records: list[Encoded]) -> tuple[Tensor, Tensor]:
        """Features and norms of one batch; the records all have an image, or none has one.

        Returns:
            features: float32 `[B, proj_dim]` on the CPU, the projected gradient over the gradient's norm, so its
                entries are of size 1 and lose nothing in half precision; zero where the norm is zero or not finite.
            norms: float32 `[B]` on the CPU, of the whole gradient before projection; may hold inf and NaN.
        """
        scale = _FLOAT16_LOSS_SCALE if self.reference.dtype == torch.float16 else 1.0
        while True:
            device = self.reference.device
            self.sketch = torch.zeros(len(records), self.projector.proj_dim, device=device)
            self.squared_norms = torch.zeros(len(records), device=device)
            with RecordGradients(self.matrices, self._consume, self.stopwatch) as gradients:
                with self.stopwatch.measure("forward"):
                    losses = self.family.record_losses(self.reference, records)
                with self.stopwatch.measure("backward"):
                    gradients.backward(losses * scale)
            overflow = torch.isfinite(losses.detach()) & ~torch.isfinite(self.squared_norms)
            if scale == 1.0 or not overflow.any():
                break
            scale = max(1.0, scale / 64)
        norms = self.squared_norms.sqrt()
        good = torch.isfinite(norms) & (norms > 0) & torch.isfinite(self.sketch).all(dim=1)
        unit = self.sketch / norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        features = torch.where(good[:, None], unit, torch.zeros_like(unit))
        self.real_tokens += sum(record.length for record in records)
        self.padded_tokens += len(records) * max(record.length for record in records)
        return features.cpu(), (norms / scale).cpu()

    def compute_all(
        self, records: dict[int, Encoded], limits: BatchLimits, done: Callable[[int], object] = int
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Features `[proj_dim]` (float16) and norm of each record, by its row; records of like length share a batch.

        Args:
            done: is told the number of records of each batch when it is computed.

        Raises:
            UserError: one record alone does not fit in memory.
        """
        results: dict[int, tuple[Tensor, Tensor]] = {}
        waiting = sorted(records, key=lambda row: (records[row].pixels is None, -records[row].length, row))
        while waiting:
            rows = next_batch(waiting, records, limits)
            batch = [records[row] for row in rows]
            try:
                features, norms = self.compute(batch)
            except (RuntimeError, MemoryError) as error:
                if not _is_out_of_memory(error):
                    raise
                features = None
            if features is None:  # outside of the handler, which keeps the failed pass's tensors alive
                if len(batch) == 1:
                    raise UserError(
                        f"record {rows[0]} ({batch[0].length} tokens) alone does not fit in memory; "
                        "try --gradient_checkpointing or a device with more"
                    )
                if self.reference.device.type == "cuda":
                    torch.cuda.empty_cache()
                limits.halve(batch)
                print(f"out of memory: batches are now {limits.records} records or {limits.tokens} tokens at most")
                continue
            for row, feature, norm in zip(rows, features.half(), norms, strict=True):
                results[row] = (feature, norm)
            done(len(rows))
            waiting = waiting[len(rows) :]
        return results


def next_batch(waiting: list[int], records: dict[int, Encoded], limits: BatchLimits) -> list[int]:
    """The longest waiting records that fit in one batch: all with an image or none, and little padding.

    Args:
        waiting: rows, those with an image first, then by falling length.
    """
    first = records[waiting[0]]
    rows: list[int] = []
    tokens = 0
    for row in waiting[: limits.records]:
        record = records[row]
        if (record.pixels is None) != (first.pixels is None):
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
