"""`benchmark.py memory`: what the gradient step needs beside the model and its activations, at LLaVA-7B's shape."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import torch

from tive.gradient_pass.batches import GradientEngine
from tive.method.gradients import RecordGradients
from tive.method.projection import make_projector
from tive.util.device import device_of

from .gradients import peak, reset_peak

HIDDEN, RANK, COUNTED = 4096, 128, 134_217_728


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--batch_size", type=int, default=16, help="records")
    add("--tokens", type=int, default=700, help="tokens of each")
    add("--proj_dim", type=int, default=8192, help="numbers in a feature")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K")


def run(arguments: argparse.Namespace) -> None:
    """One of the 256 counted matrices goes through the engine; each of the others uses the same memory after it."""
    device = device_of(arguments.device)
    matrix = torch.nn.Linear(HIDDEN, RANK, bias=False, device=device).requires_grad_(False)
    projector = make_projector("auto", 0, arguments.proj_dim, device, COUNTED, 2**30)
    reference = SimpleNamespace(device=device, dtype=torch.float32)
    engine = GradientEngine(None, reference, {"layers.0.self_attn.q_proj.A": matrix}, projector)
    engine.sketch = torch.zeros(arguments.batch_size, arguments.proj_dim, device=device)
    engine.squared_norms = torch.zeros(arguments.batch_size, device=device)
    inputs = torch.randn(arguments.batch_size, arguments.tokens, HIDDEN, device=device)
    matrix(inputs[:1, :1])  # what torch sets up once
    reset_peak(device)
    before = peak(device)
    with RecordGradients(engine.matrices, engine._consume) as gradients:
        gradients.backward(matrix(inputs).square().mean((1, 2)))
    print(f"projector {projector.kind}: {projector.about}")
    print(
        f"{arguments.batch_size} records of {arguments.tokens} tokens, rank {RANK}, {COUNTED:,} counted parameters: "
        f"{(peak(device) - before) / 2**30:.2f} GiB beside the model and its activations"
    )
