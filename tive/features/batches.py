"""The memory policy: which records share a batch, how many tokens fit, and what happens when memory runs out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from tive.models import Encoded, Reference
from tive.util.errors import UserError

# Padding eats the gain of a batch: less than this share of real tokens is not worth a larger one.
_LEAST_EFFICIENCY = 0.9
# Of the memory that is free; the rest is for the vision tower, one matrix's gradients and what the allocator wastes.
_SHARE_OF_FREE = 0.8
# Positions whose logits are there at one time, and bytes of each logit: float32, its gradient, softmax.
_LOSS_POSITIONS, _LOSS_BYTES = 2048, 14
Result = TypeVar("Result")
Batch = list[tuple[int, Encoded]]


def bytes_a_token(reference: Reference, gradient_checkpointing: bool) -> int:
    """What the backward pass needs of each token of a batch, with a frozen base and LoRA (an estimate).

    Of a layer of width h and inner width i it keeps five times h (the input of the attention's matrices, queries, keys,
    values, the attention's output) and three times i (gate, its activation, up) in the model's dtype, and the inputs
    of two norms in float32. With gradient checkpointing every layer keeps its input alone, and one layer keeps all.
    """
    config = reference.model.config
    config = getattr(config, "text_config", None) or config
    h = config.hidden_size
    i = getattr(config, "intermediate_size", None) or 4 * h
    size, layers = reference.dtype.itemsize, len(reference.layers)
    layer = size * (5 * h + 3 * i) + 4 * 2 * h
    return layers * size * h + layer if gradient_checkpointing else layers * layer


def tokens_that_fit(reference: Reference, free: int, gradient_checkpointing: bool) -> int:
    """The most tokens of a batch that fit in `free` bytes beside the logits, in whole thousands above one."""
    config = reference.model.config
    vocabulary = (getattr(config, "text_config", None) or config).vocab_size
    room = _SHARE_OF_FREE * free - _LOSS_POSITIONS * _LOSS_BYTES * vocabulary
    tokens = max(1, int(room / bytes_a_token(reference, gradient_checkpointing)))
    return tokens // 1000 * 1000 or tokens


class Batches:
    """Batches of one group and of like length, of at most so many records and tokens.

    Attributes:
        tokens: with padding; halved when a batch does not fit in memory, so that short records still fill theirs.
        computed, padded: tokens of all batches so far, without and with padding.

    Args:
        relief: is called once, when one record alone does not fit: it makes room, and gives the new limit of tokens.
    """

    def __init__(self, records: int, tokens: int, relief: Callable[[], int] | None = None) -> None:
        self.records, self.tokens, self.relief = records, tokens, relief
        self.computed = self.padded = 0

    @property
    def padding_efficiency(self) -> float:
        """Share of the padded tokens that were a record's."""
        return self.computed / self.padded if self.padded else 1.0

    def compute(
        self, compute: Callable[[Sequence[Encoded]], Result], records: Iterable[tuple[int, Encoded]]
    ) -> Iterator[tuple[Batch, Result]]:
        """Each batch with its result, as soon as its records are there.

        Args:
            compute: the result of a batch of one group.
            records: with a number that the caller knows each by.

        Raises:
            UserError: one record alone does not fit in memory.
        """
        for batch in self.filled(records):
            waiting = [batch]
            while waiting:
                batch = waiting.pop(0)
                try:
                    result, fits = compute([record for _, record in batch]), True
                except (RuntimeError, MemoryError) as error:
                    if not _is_out_of_memory(error):
                        raise
                    fits = False
                if fits:
                    self.computed += sum(record.length for _, record in batch)
                    self.padded += padded_tokens(batch)
                    yield batch, result
                else:  # outside of the handler, which keeps the failed pass's tensors alive
                    self._halve(batch)
                    waiting[:0] = self.cut(batch)

    def _halve(self, batch: Batch) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            self.tokens = padded_tokens(batch) // 2
            print(f"out of memory: batches are now of {self.tokens} tokens at most")
        elif self.relief is not None:
            self.tokens, self.relief = self.relief(), None
        else:
            number, record = batch[0]
            raise UserError(
                f"record {number} ({record.length} tokens) alone does not fit in memory; take a device with more, or "
                "leave it out"
            )

    def filled(self, records: Iterable[tuple[int, Encoded]]) -> Iterator[Batch]:
        """Batches, each as soon as it is full; those that are not follow when the records are at their end."""
        waiting: dict[tuple[str, int], Batch] = {}
        for number, record in records:
            like = (record.group, int(math.log(max(record.length, 1)) / -math.log(_LEAST_EFFICIENCY)))
            batch = waiting.setdefault(like, [])
            if batch and padded_tokens([*batch, (number, record)]) > self.tokens:
                yield waiting.pop(like)
                batch = waiting.setdefault(like, [])
            batch.append((number, record))
            one_more = padded_tokens([*batch, (number, record)])
            if len(batch) == self.records or one_more > self.tokens:
                yield waiting.pop(like)
        yield from self.cut([item for batch in waiting.values() for item in batch])

    def cut(self, records: Batch) -> Iterator[Batch]:
        """Records as batches within the limits, of little padding, the longest of a group first."""
        batch: Batch = []
        for item in sorted(records, key=lambda item: (item[1].group, -item[1].length, item[0])):
            larger = [*batch, item]
            padded, tokens = padded_tokens(larger), sum(record.length for _, record in larger)
            fits = len(larger) <= self.records and padded <= self.tokens and tokens >= _LEAST_EFFICIENCY * padded
            if batch and not (fits and item[1].group == batch[0][1].group):
                yield batch
                larger = [item]
            batch = larger
        if batch:
            yield batch


def padded_tokens(batch: Batch) -> int:
    """The tokens of a batch with padding."""
    return len(batch) * max(record.length for _, record in batch)


def _is_out_of_memory(error: Exception) -> bool:
    known = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(part in str(error) for part in known)
