"""The losses of a batch: cross-entropy over each record's supervised tokens, logits at those positions alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tive.models import RecordLosses, Supervised

IGNORE = -100
# Supervised tokens whose logits are in memory at one time: with what is computed of them some 14 bytes a token and
# word of the vocabulary, 0.9 GB of 32,000 words and 4.4 GB of 152,000.
PIECE = 2048


def packed(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers as they travel from a worker: rounded to what the model computes in, of bfloat16 the bits as int16."""
    tensor = torch.from_numpy(numbers).to(dtype)
    return (tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor).numpy()


def unpacked(numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What `packed` packed, or other numbers, in `dtype`; whole numbers (of 32 or 64 bits) as they are."""
    tensor = torch.from_numpy(numbers)
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def supervised_tokens(labels: Sequence[np.ndarray], width: int) -> Supervised:
    """The supervised tokens of records whose labels are int64 `[t]`, `IGNORE` where nothing is supervised.

    Args:
        width: positions of a row of the batch.
    """
    places = [np.flatnonzero(row[1:] != IGNORE) for row in labels]
    return Supervised(
        positions=torch.from_numpy(np.concatenate([place + row * width for row, place in enumerate(places)])),
        targets=torch.from_numpy(np.concatenate([row[place + 1] for row, place in zip(labels, places, strict=True)])),
        owners=torch.from_numpy(np.repeat(np.arange(len(labels)), [len(place) for place in places])),
        counts=torch.tensor([float(len(place)) for place in places]),
    )


def supervised_runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """First position and end of each answer: the runs of supervised labels `[t]`, between which something is asked."""
    supervised = np.concatenate([[False], labels != IGNORE, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def losses_at_supervised(
    hidden: Tensor, head: Callable[[Tensor], Tensor], supervised: Supervised, el2n: bool = False
) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, and EL2N.

    Args:
        hidden: the last hidden states `[B, T, H]`.
        head: maps hidden states `[s, H]` to the vocabulary's logits `[s, V]`; is called for a piece of all supervised
            tokens at a time, and once more in the backward pass where there is more than one piece.
    """
    kept = hidden.flatten(0, 1).index_select(0, supervised.positions)
    states, targets = kept.split(PIECE), supervised.targets.split(PIECE)
    compute = partial(_losses_of_tokens, head, el2n=el2n)
    if len(states) > 1 and kept.requires_grad:  # else the logits of every piece would stay for the backward pass
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return _of_records([compute(*piece) for piece in zip(states, targets, strict=True)], supervised, el2n)


def losses_of_logits(logits: Tensor, supervised: Supervised, el2n: bool = False) -> RecordLosses:
    """`losses_at_supervised` from the logits `[S, V]` of all supervised tokens."""
    return _of_records([_losses_of_tokens(lambda same: same, logits, supervised.targets, el2n)], supervised, el2n)


def _losses_of_tokens(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, el2n: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and EL2N of tokens, each `[s]`; of EL2N zeros where it is not asked for."""
    logits = head(states).float()
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    if not el2n:
        return losses, torch.zeros_like(losses)
    with torch.no_grad():
        difference = logits.softmax(dim=1)
        difference[torch.arange(len(targets), device=targets.device), targets] -= 1
        return losses, difference.norm(dim=1)


def _of_records(pieces: list[tuple[Tensor, Tensor]], supervised: Supervised, el2n: bool) -> RecordLosses:
    """Each record's means, from the losses and EL2N of pieces of all tokens."""
    losses, errors = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    def mean_by_record(values: Tensor) -> Tensor:
        return torch.zeros_like(supervised.counts).index_add(0, supervised.owners, values) / supervised.counts

    return RecordLosses(mean_by_record(losses), mean_by_record(errors) if el2n else None)
