"""Batches of encoded records: which records share one, how large it may be, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from tive.models import Encoded
from tive.util.errors import UserError

# Padding eats the gain of a batch: less than this share of real tokens is not worth a larger one.
_LEAST_EFFICIENCY = 0.9
_Result = TypeVar("_Result")
_Key = TypeVar("_Key", int, str)


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
class Computed(Generic[_Key, _Result]):
    """Results of records by row, the batch limits that went well, and the batches' tokens without and with padding."""

    results: dict[_Key, _Result]
    limits: BatchLimits
    tokens: int
    padded_tokens: int


def compute_in_batches(
    compute: Callable[[list[Encoded]], list[_Result]],
    records: dict[_Key, Encoded],
    limits: BatchLimits,
    device: torch.device,
    done: Callable[[int], object] = int,
) -> Computed[_Key, _Result]:
    """The result of each record by its row, or by what else names it; records of like length share a batch.

    Args:
        compute: the results of a batch of one group, in its order.
        done: is told the number of records of each batch when it is computed.

    Raises:
        UserError: one record alone does not fit in memory.
    """
    results: dict[_Key, _Result] = {}
    tokens = padded_tokens = 0
    # A group's longest first: what takes the most memory fails at the start.
    waiting = sorted(records, key=lambda row: (records[row].group, -records[row].length, row))
    while waiting:
        rows = next_batch(waiting, records, limits)
        batch = [records[row] for row in rows]
        try:
            computed = compute(batch)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            computed = []
        if not computed:  # outside of the handler, which keeps the failed pass's tensors alive
            if len(batch) == 1:
                raise UserError(
                    f"record {rows[0]} ({batch[0].length} tokens) alone does not fit in memory; "
                    "take a device with more, or in the gradient step gradient_checkpointing"
                )
            if device.type == "cuda":
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


def next_batch(waiting: list[_Key], records: dict[_Key, Encoded], limits: BatchLimits) -> list[_Key]:
    """The longest waiting records that fit in one batch: all of one group, and little padding.

    Args:
        waiting: rows, by group, then by falling length.
    """
    first = records[waiting[0]]
    rows: list[_Key] = []
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
