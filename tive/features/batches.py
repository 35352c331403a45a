"""The memory policy: which records share a batch, how many tokens fit, and what happens when memory runs out."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, wait
from dataclasses import is_dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from tive.models import Encoded, Reference
from tive.models.common import freeze
from tive.util.errors import UserError

# Padding eats the gain of a batch: less than this share of real tokens is not worth a larger one.
_LEAST_EFFICIENCY = 0.9
# Of the memory that is free; the rest is for one matrix's gradients and what the allocator wastes.
_SHARE_OF_FREE = 0.9
# Positions whose logits are there at one time, and bytes of each logit: float32, its gradient, softmax.
_LOSS_POSITIONS, _LOSS_BYTES = 2048, 14
# Of a batch on a CPU, where the memory does not decide: a run that is continued has the same batches.
_TOKENS_ON_A_CPU = 16384
# The longest record, where the model has no limit of its own: LLaVA's.
_LONGEST = 2048
# Records that wait for others of their length, in batches; fewer would make batches smaller, more fill the memory.
_BATCHES_WAITING = 8
_SECONDS_FOR_A_RECORD = 5
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
Item = TypeVar("Item")
Result = TypeVar("Result")
Batch = list[tuple[int, Encoded]]


def bytes_a_token(reference: Reference, gradient_checkpointing: bool) -> int:
    """What the backward pass needs of each token of a batch, with a frozen base and LoRA (an estimate).

    Of a layer of width h and inner width i it keeps five times h (the input of the attention's matrices, queries, keys,
    values, the attention's output) and three times i (gate, its activation, up) in the model's dtype, and the inputs
    of two norms in float32. With gradient checkpointing every layer keeps its input alone, and one layer keeps all. A
    vision tower keeps nothing: no gradient goes through it, and its memory is free again before the first layer.
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
        largest: bytes of the largest record so far.
        waited: seconds that were spent on waiting for a batch.

    Args:
        relief: is called once, when one record alone does not fit: it makes room, and gives the new limit of tokens.
    """

    def __init__(self, records: int, tokens: int, relief: Callable[[], int] | None = None) -> None:
        self.records, self.tokens, self.relief = records, tokens, relief
        self.computed = self.padded = self.largest = 0
        self.waited = 0.0

    @property
    def padding_efficiency(self) -> float:
        """Share of the padded tokens that were a record's."""
        return self.computed / self.padded if self.padded else 1.0

    @property
    def most_records(self) -> int:
        """Records that are in host memory at most: in batches that are not full, and twice in the two that are."""
        return (_BATCHES_WAITING + 4) * self.records

    def compute(
        self,
        compute: Callable[[Any], Result],
        records: Iterable[tuple[int, Encoded]],
        make: Callable[[list[Encoded]], Any] = list,
        in_thread: bool = False,
    ) -> Iterator[tuple[Batch, Result]]:
        """Each batch with its result, as soon as its records are there; a `UserError` where one alone does not fit.

        Args:
            compute: the result of what `make` made.
            records: with a number that the caller knows each by.
            make: what `compute` takes, of a batch of one group.
            in_thread: read records and make a batch in another thread, while the batch before is computed.
        """

        def made(batch: Batch) -> tuple[Batch, Any]:
            return batch, make([record for _, record in batch])

        coming: Iterator[tuple[Batch, Any]] = map(made, self.filled(records))
        if in_thread:
            coming = ahead(coming)
        waiting: list[tuple[Batch, Any]] = []
        while True:
            if not waiting:
                start = time.perf_counter()
                following = next(coming, None)
                self.waited += time.perf_counter() - start
                if following is None:
                    return
                waiting.append(following)
            batch, ready = waiting.pop(0)
            if len(batch) > 1 and padded_tokens(batch) > self.tokens:
                waiting[:0] = map(made, self.cut(batch))
                continue
            try:
                result, fits = compute(ready), True
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not any(part in str(error) for part in _OUT_OF_MEMORY):
                    raise
                fits = False
            if fits:
                self.computed += sum(record.length for _, record in batch)
                self.padded += padded_tokens(batch)
                yield batch, result
            else:  # outside of the handler, which keeps the failed pass's tensors alive
                self._halve(batch)
                waiting.insert(0, (batch, ready))

    def _halve(self, batch: Batch) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        if len(batch) > 1:
            self.tokens = min(self.tokens, padded_tokens(batch) // 2)
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
        """Batches, each as soon as it is full; the fullest where too many wait; the rest when the records end."""
        waiting: dict[tuple[str, int], Batch] = {}
        for item in records:
            record = item[1]
            self.largest = max(self.largest, bytes_of(record))
            like = (record.group, int(math.log(max(record.length, 1)) / -math.log(_LEAST_EFFICIENCY)))
            if like in waiting and padded_tokens([*waiting[like], item]) > self.tokens:
                yield waiting.pop(like)
            batch = waiting.setdefault(like, [])
            batch.append(item)
            if len(batch) == self.records or padded_tokens([*batch, item]) > self.tokens:
                yield waiting.pop(like)
            elif sum(map(len, waiting.values())) == _BATCHES_WAITING * self.records:
                yield waiting.pop(max(waiting, key=lambda like: len(waiting[like])))
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


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items, each made in another thread while the one before is used."""

    def following() -> Future[Item | None]:
        made: Future[Item | None] = Future()

        def make() -> None:
            try:
                made.set_result(next(items, None))
            except BaseException as error:
                made.set_exception(error)

        threading.Thread(target=make, daemon=True).start()  # the program's end would wait for an executor's
        return made

    coming = following()
    try:
        while (item := coming.result()) is not None:
            coming = following()
            yield item
    finally:
        wait([coming], _SECONDS_FOR_A_RECORD)  # not for ever: what reads may be stuck


def bytes_of(part: Any) -> int:
    """The bytes of all arrays in a record, or in a part of one."""
    if isinstance(part, np.ndarray):
        return part.nbytes
    values = part.values() if isinstance(part, dict) else vars(part).values() if is_dataclass(part) else ()
    return sum(map(bytes_of, values))


def padded_tokens(batch: Batch) -> int:
    """The tokens of a batch with padding."""
    return len(batch) * max(record.length for _, record in batch)


def checkpointed(reference: Reference) -> int:
    """Turn gradient checkpointing on; the tokens that fit in a batch then."""
    freeze(reference.model, gradient_checkpointing=True)
    print("gradient checkpointing is on from here: less memory, about a third more time, the same gradients")
    if reference.device.type != "cuda":
        return _TOKENS_ON_A_CPU
    return tokens_that_fit(reference, torch.cuda.mem_get_info(reference.device)[0], True)


def batches_for(reference: Reference, records: int, tokens: int | None, gradient_checkpointing: bool) -> Batches:
    """The memory policy for a model; prints how many tokens a batch may have, and why.

    Where nobody chose, a GPU's free memory gives the limit. Gradient checkpointing is turned on where the longest
    record would not fit without it, or where one does not.

    Args:
        records, tokens: most of a batch; None for as many tokens as fit.
        gradient_checkpointing: whether it is on already.
    """
    device, fitting = reference.device, _TOKENS_ON_A_CPU
    relief = None if gradient_checkpointing else partial(checkpointed, reference)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        longest = getattr(reference.processor, "max_length", None) or _LONGEST
        if relief is not None and tokens_that_fit(reference, free, False) < longest:
            print(f"a record of {longest} tokens would not fit in memory without gradient checkpointing")
            checkpointed(reference)
            relief = None
        fitting = tokens_that_fit(reference, free, relief is None)
        print(
            f"memory: {free / 1e9:.1f} GB free, about {bytes_a_token(reference, relief is None) / 1e6:.2f} MB of "
            f"activations a token, so about {fitting} tokens fit in a batch"
            + (f"; {tokens} were asked for" if tokens else "")
        )
    return Batches(records, tokens or fitting, relief)
