"""What counting fewer LoRA matrices saves in the gradient step, and what it costs in fidelity."""

from __future__ import annotations

import time
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr

from tive.method.gradients import gradient_features
from tive.method.projection import make_projector
from tive.models.common import target_modules

from .cases import Case


def compare_matrices(case: Case, proj_dim: int) -> None:
    """Print what counting fewer LoRA matrices saves, and the rank correlations with counting self_attn everywhere."""
    layers = len(case.reference.layers)
    variants = [
        ("self_attn", None),
        ("self_attn", layers // 2),
        ("self_attn", 1),
        ("q_proj,v_proj", None),
        ("all", None),
    ]
    base = None
    print(f"{'--grad_modules':<15} {'--last_layers':>13} {'ms/record':>9} {'influence':>9} {'task value':>10}")
    for grad_modules, last_layers in variants:
        matrices = target_modules(case.reference, grad_modules, last_layers)
        projector = make_projector("auto", 0, proj_dim, case.reference.device)
        features, norms = torch.zeros(len(case.records), proj_dim), torch.zeros(len(case.records))
        gradient_features(partial(case.losses, case.batches[0]), matrices, projector)  # draws what is drawn once
        begin = time.perf_counter()
        for batch in case.batches:
            found = gradient_features(partial(case.losses, batch), matrices, projector)
            features[batch], norms[batch] = found.features, found.norms
        cost = (time.perf_counter() - begin) / len(case.records) * 1000
        influence = influences(features.numpy(), case.tasks)
        values = np.array([norms.numpy()[case.tasks == task].mean() for task in np.unique(case.tasks)])
        base = base or (influence, values)
        print(
            f"{grad_modules:<15} {last_layers or 'all':>13} {cost:>9.1f} "
            f"{rank_correlation_within(influence, base[0], case.tasks):>9.3f} "
            f"{agreement(values, base[1]):>10.3f}"
        )


def influences(features: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Influence `I_s` of each record on its task `[n]`."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    influence = np.empty(len(tasks))
    for task in np.unique(tasks):
        inside = tasks == task
        influence[inside] = unit[inside] @ unit[inside].mean(axis=0)
    return influence


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; 1 where there is no order to keep."""
    return float(spearmanr(first, second).statistic) if np.ptp(first) and np.ptp(second) else 1.0


def rank_correlation_within(first: np.ndarray, second: np.ndarray, tasks: np.ndarray) -> float:
    """`agreement` within each task, the mean of the tasks."""
    return float(np.mean([agreement(first[tasks == task], second[tasks == task]) for task in np.unique(tasks)]))
