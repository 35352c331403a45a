"""The golden reference model, loaded, and the gradients that a plain loop gives."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor

from scripts.benchmark.whole import WholeGradients
from tests.helpers.golden_model import GOLDEN, RECORDS
from tive.features.step import GradientStep
from tive.method.gradients import GradientFeatures, gradient_features
from tive.method.projection import Projector
from tive.models import Encoded, ModelFiles, Reference, llava
from tive.models.common import target_modules
from tive.models.spliced import IMAGE_ID, SplicedRecord

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


def load_golden(dtype: torch.dtype = torch.float32, **options: bool) -> Reference:
    torch.set_flush_denormal(True)
    with working_in(GOLDEN):
        return llava.load(ModelFiles("llava-lora", "vicuna"), CPU, dtype, **options)


def encode_golden(reference: Reference) -> list[Encoded]:
    return [llava.encode(reference.processor, record, str(GOLDEN / "images")) for record in RECORDS]


def step_of(reference: Reference, projector: Projector | None = None, grad_modules: str = "self_attn") -> GradientStep:
    matrices = target_modules(reference, grad_modules)
    return GradientStep(llava, reference, matrices, projector or WholeGradients(matrices))


def gradients_of(step: GradientStep, batch: list[Encoded], loss_scale: float | None = None) -> GradientFeatures:
    """Features in float32, norms and losses of one batch."""
    scale = loss_scale or (2.0**12 if step.reference.dtype == torch.float16 else 1.0)

    def forward() -> Tensor:
        return step.family.record_losses(step.reference, batch).losses

    return gradient_features(forward, step.matrices, step.projector, step.transform, scale)


def in_batches(step: GradientStep, records: list[Encoded], size: int) -> SimpleNamespace:
    """Features `[n, d]`, norms and losses `[n]`, cosines `[n, n]`, in record order, from batches of `size`."""
    features = torch.zeros(len(records), step.projector.proj_dim)
    norms, losses = torch.zeros(2, len(records))
    for group in sorted({record.group for record in records}):
        rows = [row for row, record in enumerate(records) if record.group == group]
        for start in range(0, len(rows), size):
            batch = rows[start : start + size]
            found = gradients_of(step, [records[row] for row in batch])
            features[batch], norms[batch], losses[batch] = found.features, found.norms, found.losses
    unit = torch.nn.functional.normalize(features, dim=1)
    return SimpleNamespace(features=features, norms=norms, losses=losses, cosines=unit @ unit.T)


def llavas_inputs(inputs: SplicedRecord) -> dict[str, Tensor | None]:
    """A record as LLaVA's own forward pass takes it: an image stands as one token."""
    image = inputs.ids == IMAGE_ID
    kept = ~image | np.concatenate([[True], ~image[:-1]])
    return {
        "input_ids": torch.from_numpy(inputs.ids[kept])[None],
        "labels": torch.from_numpy(inputs.labels[kept])[None],
        "images": None if inputs.pixels is None else torch.from_numpy(inputs.pixels)[None],
    }


def own_loss(reference: Reference, record: Encoded) -> Tensor:
    """The loss of one record as LLaVA's own forward pass gives it."""
    loss: Tensor = reference.model(**llavas_inputs(record.inputs)).loss
    return loss


@torch.no_grad()
def plain_losses(reference: Reference, records: list[Encoded]) -> Tensor:
    """LLaVA's own losses `[n]`, one record at a time."""
    return torch.stack([own_loss(reference, record) for record in records])


def plain_loop(reference: Reference, records: list[Encoded]) -> Tensor:
    """Gradients `[n, P]` of LLaVA's own loss, one record at a time, by autograd."""
    matrices = target_modules(reference, "self_attn")
    weights = [matrix.weight for matrix in matrices.values()]
    for weight in weights:
        weight.requires_grad_(True)
    losses = (own_loss(reference, record) for record in records)
    rows = [torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]) for loss in losses]
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(rows)
