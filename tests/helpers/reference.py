"""The golden reference model, loaded, and the gradients that a plain loop gives."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.helpers.golden_model import GOLDEN, RECORDS
from tive.gradient_pass.batches import GradientEngine
from tive.method.projection import Projector
from tive.models import Encoded, llava

EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
CPU = torch.device("cpu")


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The golden model's config names its vision tower relative to its own folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def load_golden(dtype: torch.dtype = torch.float32, **options: bool) -> llava.Reference:
    torch.set_flush_denormal(True)
    with working_in(GOLDEN):
        return llava.load("llava-lora", "vicuna", CPU, dtype, **options)


def encode_golden(reference: llava.Reference) -> list[Encoded]:
    return [llava.encode(reference.processor, record, str(GOLDEN / "images")) for record in RECORDS]


class WholeGradients:
    """A projector that projects nothing: it keeps each matrix's gradients in their own columns."""

    kind, about = "none", "no projection"

    def __init__(self, matrices: dict[str, torch.nn.Linear]) -> None:
        self.start, self.proj_dim = {}, 0
        for name, matrix in matrices.items():
            self.start[name] = self.proj_dim
            self.proj_dim += matrix.weight.numel()

    def project(self, matrix: str, gradients: Tensor) -> Tensor:
        whole = torch.zeros(len(gradients), self.proj_dim)
        whole[:, self.start[matrix] : self.start[matrix] + gradients.shape[1]] = gradients.float()
        return whole


def engine_of(
    reference: llava.Reference,
    projector: Projector | None = None,
    grad_modules: str = "self_attn",
    last_layers: int | None = None,
) -> GradientEngine:
    matrices = llava.counted_matrices(reference, grad_modules, last_layers)
    return GradientEngine(llava, reference, matrices, projector or WholeGradients(matrices))


def in_batches(engine: GradientEngine, records: list[Encoded], size: int) -> SimpleNamespace:
    """Features `[n, d]`, norms `[n]` and cosines `[n, n]`, in record order, from batches of `size`."""
    features = torch.zeros(len(records), engine.projector.proj_dim)
    norms = torch.zeros(len(records))
    for with_image in (True, False):
        rows = [row for row, record in enumerate(records) if (record.pixels is not None) == with_image]
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            features[batch], norms[batch] = engine.compute([records[row] for row in batch])
    unit = torch.nn.functional.normalize(features, dim=1)
    return SimpleNamespace(features=features, norms=norms, cosines=unit @ unit.T)


def plain_loop(reference: llava.Reference, records: list[Encoded]) -> Tensor:
    """Gradients `[n, P]` of LLaVA's own loss, one record at a time, by autograd's parameter gradients."""
    matrices = llava.counted_matrices(reference, "self_attn")
    weights = [matrix.weight for matrix in matrices.values()]
    for weight in weights:
        weight.requires_grad_(True)
    rows = []
    for record in records:
        images = None if record.pixels is None else torch.from_numpy(record.pixels)[None]
        output = reference.model(
            torch.from_numpy(record.input_ids)[None], images=images, labels=torch.from_numpy(record.labels)[None]
        )
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(output.loss, weights)]))
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(rows)
