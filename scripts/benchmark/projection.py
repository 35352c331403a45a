"""What the projections keep of real gradients' inner products, over several seeds."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from scipy.stats import spearmanr

from tive.method.projection import make_projector, project
from tive.util.errors import UserError
from tive.util.text import print_table

from . import cases
from .whole import whole_gradients

KINDS = {"sparse": "sparse", "dense": "trak"}  # TRAK's BasicProjector stands for the dense
_MOST_BYTES = 4 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    add = parser.add_argument
    add("--proj_dims", type=int, nargs="+", default=[512, 2048, 8192], help="numbers in a feature")
    add("--seeds", type=int, default=5, help="projections of each kind and size, seeds 0, 1, ...")


def run(arguments: argparse.Namespace) -> None:
    """Print, for each kind and size, the error of cosines against the dense bound and of influence against none."""
    case = cases.make_case(arguments)
    size = 4 * case.parameters * len(case.records)
    if size > _MOST_BYTES:
        raise UserError(f"{len(case.records)} whole gradients take {size / 2**30:.0f} GiB; give fewer --records")
    _, gradients = whole_gradients(case.family, case.reference, case.records, arguments.batch_size)
    tasks, device = np.array(case.tasks), case.reference.device
    pairs = np.triu_indices(len(gradients), 1)
    cosines = (gradients @ gradients.T).double().numpy()[pairs]
    influence = influences(gradients.numpy(), tasks)
    sizes = [matrix.weight.numel() for matrix in case.matrices.values()]
    print(
        f"{len(gradients)} gradients of {gradients.shape[1]:,} entries in {len(sizes)} matrices, {len(cosines):,} "
        f"pairs, {arguments.seeds} seeds: median (least to most)"
    )
    rows = [
        ("kind", "features", "rms error of a cosine", "bound", "same, of the bound", "rank correlation of influence")
    ]
    for proj_dim in arguments.proj_dims:
        # Of unit vectors x, y: the variance (1 + <x, y>^2) / proj_dim.
        bound = float(np.sqrt(np.mean(1 + cosines**2) / proj_dim))
        for kind, projector_kind in KINDS.items():
            errors, same = [], []
            for seed in range(arguments.seeds):
                projector = make_projector(projector_kind, seed, proj_dim, device)
                sketch = torch.zeros(len(gradients), proj_dim)
                for name, part in zip(case.matrices, gradients.split(sizes, dim=1), strict=True):
                    sketch += project(projector, name, part.contiguous().to(device)).cpu()
                kept = (sketch @ sketch.T).double().numpy()[pairs] / proj_dim
                errors.append(float(np.sqrt(np.mean((kept - cosines) ** 2))))
                same.append(rank_correlation(influences(sketch.numpy(), tasks), influence, tasks))
            share = f"{np.median(errors) / bound:.2f}"
            rows.append((kind, str(proj_dim), spread(errors, 4), f"{bound:.4f}", share, spread(same, 3)))
    print_table(rows)


def spread(values: list[float], digits: int) -> str:
    return f"{np.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def influences(features: np.ndarray, tasks: np.ndarray) -> np.ndarray:
    """Influence `I_s` of each record on its task `[n]`."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    influence = np.empty(len(tasks))
    for task in np.unique(tasks):
        inside = tasks == task
        influence[inside] = unit[inside] @ unit[inside].mean(axis=0)
    return influence


def rank_correlation(first: np.ndarray, second: np.ndarray, tasks: np.ndarray) -> float:
    """Spearman's within each task, the mean of the tasks; in one of two records both have the same influence."""
    groups = [tasks == task for task in np.unique(tasks) if (tasks == task).sum() > 2]
    return float(np.mean([spearmanr(first[group], second[group]).statistic for group in groups]))
