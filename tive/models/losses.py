"""The losses of a batch: cross-entropy over each record's supervised tokens, logits at those positions alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tive.models import RecordLosses

IGNORE = -100


@dataclass(frozen=True)
class Supervised:
    """The S supervised tokens of a batch `[B, T]`, known before anything is sent to the device.

    Attributes:
        positions: int64 `[S]`: where each is predicted, one before it, counted through the flattened batch.
        targets: int64 `[S]`: their ids.
        owners: int64 `[S]`: their records.
        counts: float32 `[B]`: how many each record has.
    """

    positions: Tensor
    targets: Tensor
    owners: Tensor
    counts: Tensor

    def to(self, device: torch.device) -> Supervised:
        """The same on a device."""
        return Supervised(*(part.to(device, non_blocking=True) for part in vars(self).values()))


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


def losses_at_supervised(hidden: Tensor, head: nn.Module, supervised: Supervised, el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, and EL2N.

    Args:
        hidden: the last hidden states `[B, T, H]`.
        head: the map to the vocabulary's logits.
    """
    return losses_of_logits(head(hidden.flatten(0, 1)[supervised.positions]), supervised, el2n)


def losses_of_logits(logits: Tensor, supervised: Supervised, el2n: bool = False) -> RecordLosses:
    """`losses_at_supervised` from the logits `[S, V]` of all supervised tokens."""
    logits, targets = logits.float(), supervised.targets

    def mean_by_record(values: Tensor) -> Tensor:
        return torch.zeros_like(supervised.counts).index_add(0, supervised.owners, values) / supervised.counts

    losses = mean_by_record(nn.functional.cross_entropy(logits, targets, reduction="none"))
    if not el2n:
        return RecordLosses(losses, None)
    with torch.no_grad():
        difference = logits.softmax(dim=1)
        difference[torch.arange(len(targets), device=targets.device), targets] -= 1
        return RecordLosses(losses, mean_by_record(difference.norm(dim=1)))
