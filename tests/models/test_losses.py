"""Losses in pieces: bounded memory, the same losses and gradients; positions are known before anything is computed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from tive.models import Collated, RecordLosses, common
from tive.models.common import IGNORE, collated, losses_at_supervised

WIDTH, WORDS = 8, 50


def batch(seed: int = 0) -> tuple[torch.Tensor, list[np.ndarray], Collated]:
    """Hidden states of three records of unlike length, and their labels."""
    random = np.random.default_rng(seed)
    labels = [np.where(random.random(size) < 0.6, random.integers(0, WORDS, size), IGNORE) for size in (17, 30, 9)]
    hidden = torch.randn(3, 30, WIDTH, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return hidden, labels, collated({}, labels, 30)


def losses_of(hidden: torch.Tensor, head: Callable[[torch.Tensor], torch.Tensor], of: Collated, **more) -> RecordLosses:
    return losses_at_supervised(hidden.flatten(0, 1)[of.positions], head, of, **more)


def test_each_record_has_the_mean_of_its_supervised_tokens() -> None:
    hidden, labels, supervised = batch()
    head = nn.Linear(WIDTH, WORDS)
    computed = losses_of(hidden, head, supervised, el2n=True)
    for row, record in enumerate(labels):
        logits, targets = head(hidden[row, : len(record) - 1]), torch.from_numpy(record[1:])
        kept = targets != IGNORE
        torch.testing.assert_close(computed.losses[row], nn.functional.cross_entropy(logits, targets))
        errors = logits[kept].softmax(1) - nn.functional.one_hot(targets[kept], WORDS)
        torch.testing.assert_close(computed.el2n[row], errors.norm(dim=1).mean())


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_pieces_give_the_same_losses_and_gradients(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, _, supervised = batch()
    head = nn.Linear(WIDTH, WORDS)
    whole = losses_of(hidden, head, supervised, el2n=True)
    (wanted,) = torch.autograd.grad(whole.losses.sum(), hidden)
    monkeypatch.setattr(common, "PIECE", piece)
    pieces = losses_of(hidden, head, supervised, el2n=True)
    torch.testing.assert_close(pieces.losses, whole.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(pieces.el2n, whole.el2n, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(pieces.losses.sum(), hidden)
    assert (gradient - wanted).norm() <= 1e-6 * wanted.norm()


def test_no_more_logits_than_a_piece_are_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "PIECE", 7)
    hidden, _, supervised = batch()
    head, made, kept = nn.Linear(WIDTH, WORDS), [], []

    def watched(states: torch.Tensor) -> torch.Tensor:
        logits = head(states)
        made.append(len(logits))
        return logits

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        computed = losses_of(hidden, watched, supervised)
    assert max(made) <= 7 < len(supervised.targets) == sum(made)
    assert not [shape for shape in kept if WORDS in shape and shape != head.weight.T.shape]
    computed.losses.sum().backward()
    assert max(made) <= 7 and sum(made) == 2 * len(supervised.targets)
