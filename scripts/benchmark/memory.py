"""What the gradient step needs beside the model and its activations, at LLaVA-7B's shape; and what its losses need."""

from __future__ import annotations

import argparse

import numpy as np
import torch

from tive.method.gradients import gradient_features
from tive.method.projection import make_projector, project
from tive.models.common import PIECE, collated, losses_at_supervised
from tive.util.device import device_of, forget_peak, peak_memory

HIDDEN, RANK, MATRICES, VOCABULARY = 4096, 128, 256, 32000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="records")
    add("--tokens", type=int, default=700, help="tokens of each")
    add("--proj_dim", type=int, default=8192, help="numbers in a feature")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K")


def run(arguments: argparse.Namespace) -> None:
    """One matrix goes through the step; before it, what the projector keeps of each of the 256 is drawn."""
    device, count, tokens = device_of(arguments.device), arguments.batch_size, arguments.tokens
    matrix = torch.nn.Linear(HIDDEN, RANK, bias=False, device=device).requires_grad_(False)
    projector = make_projector("auto", 0, arguments.proj_dim, device)
    inputs = torch.randn(count, tokens, HIDDEN, device=device)
    matrix(inputs[:1, :1])  # what torch sets up once
    before = memory_before(device)
    for number in range(MATRICES):
        project(projector, f"matrix {number}", torch.zeros(1, HIDDEN * RANK, device=device))
    gradient_features(lambda: matrix(inputs).square().mean((1, 2)), {"matrix 0": matrix}, projector)
    print(f"projector {projector.kind}: {projector.about}")
    print(
        f"{count} records of {tokens} tokens, {MATRICES} matrices of rank {RANK}, {MATRICES * HIDDEN * RANK:,} "
        f"parameters: {(peak_memory(device) - before) / 2**30:.2f} GiB beside the model and its activations"
    )
    labels = [np.ones(tokens + 1, np.int64)] * count
    batch = collated({}, labels, tokens + 1).to(device)
    head = torch.nn.Linear(256, VOCABULARY, bias=False, device=device).requires_grad_(False)
    gib = []
    for pieces in (False, True):
        hidden = torch.randn(count, tokens + 1, 256, device=device).requires_grad_()  # narrow: it is not measured
        before = memory_before(device)
        states = hidden.flatten(0, 1)[batch.positions]
        if pieces:
            losses = losses_at_supervised(states, head, batch).losses
        else:
            losses = torch.nn.functional.cross_entropy(head(states).float(), batch.targets, reduction="none")
        losses.sum().backward()
        del losses, states
        gib.append((peak_memory(device) - before) / 2**30)
    print(f"losses of {count * tokens:,} tokens: {gib[0]:.2f} GiB at once, {gib[1]:.2f} GiB in pieces of {PIECE:,}")


def memory_before(device: torch.device) -> int:
    forget_peak(device)
    return peak_memory(device)
