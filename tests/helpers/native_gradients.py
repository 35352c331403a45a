"""Gradients of transformers' own models, in batches and by a plain loop."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from scripts.benchmark.whole import WholeGradients
from tive.method.gradients import gradient_features
from tive.models import Encoded, Reference, native
from tive.models.common import target_modules


def gradients_of(
    reference: Reference, records: Sequence[Encoded], batch_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses `[n]`, norms `[n]` and cosines `[n, n]`, computed in batches of neighbours."""
    matrices = target_modules(reference, "self_attn")
    projector = WholeGradients(matrices)
    parts = []
    for start in range(0, len(records), batch_size):
        batch = records[start : start + batch_size]
        parts.append(
            gradient_features(lambda batch=batch: native.record_losses(reference, batch).losses, matrices, projector)
        )
    features = torch.cat([part.features for part in parts]).double()
    unit = features / features.norm(dim=1, keepdim=True)
    losses, norms = (torch.cat([getattr(part, name) for part in parts]).numpy() for name in ("losses", "norms"))
    return losses, norms, (unit @ unit.T).numpy()


def plain_loop(reference: Reference, records: Sequence[Encoded]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses `[n]`, norms `[n]` and gradients of length 1 `[n, parameters]`, one record at a time, from all logits."""
    weights = [matrix.weight.requires_grad_() for matrix in target_modules(reference, "self_attn").values()]
    losses, rows = [], []
    for item in records:
        inputs = {key: torch.from_numpy(array.copy()) for key, array in item.inputs.arrays.items()}
        logits = reference.model(**inputs, use_cache=False).logits[0].float()
        loss = torch.nn.functional.cross_entropy(logits[:-1], torch.from_numpy(item.inputs.labels)[1:])
        losses.append(loss.item())
        rows.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]).double())
    reference.model.requires_grad_(False)
    gradients = torch.stack(rows)
    norms = gradients.norm(dim=1)
    return np.array(losses), norms.numpy(), (gradients / norms[:, None]).numpy()
