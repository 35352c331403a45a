"""Gradients as they are, unprojected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tive.features.batches import Batches
from tive.method.gradients import gradient_features
from tive.models import Encoded, Reference
from tive.models.common import target_modules


class WholeGradients:
    """A projector that projects nothing: it keeps each matrix's gradients in their own columns."""

    kind, about = "none", "no projection"

    def __init__(self, matrices: Mapping[str, nn.Linear]) -> None:
        self.start, self.proj_dim = {}, 0
        for name, matrix in matrices.items():
            self.start[name] = self.proj_dim
            self.proj_dim += matrix.weight.numel()

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        start = self.start[matrix_name]
        sketch[:, start : start + gradients.shape[1]] = gradients.float()


def whole_gradients(
    family: Any, reference: Reference, records: Sequence[Encoded], size: int, loss_scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Norms `[n]`, and gradients of length 1 `[n, P]`, on the CPU, computed in batches of `size` records."""
    matrices = target_modules(reference)
    projector = WholeGradients(matrices)
    norms, gradients = torch.zeros(len(records)), torch.zeros(len(records), projector.proj_dim)

    def losses(batch: Sequence[Encoded]) -> Any:
        return family.record_losses(reference, batch).losses

    for batch in Batches(size, 1 << 14).cut(list(enumerate(records))):
        forward = partial(losses, [record for _, record in batch])
        computed = gradient_features(forward, matrices, projector, loss_scale=loss_scale)
        rows = [row for row, _ in batch]
        norms[rows], gradients[rows] = computed.norms.cpu(), computed.features.cpu()
    return norms, gradients
