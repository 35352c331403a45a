"""`benchmark.py projection`: what the projections keep of real gradients' inner products, over several seeds."""

from __future__ import annotations

import argparse
from functools import partial

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from tive.method.gradients import gradient_features
from tive.method.projection import make_projector, project
from tive.util.errors import UserError

from . import cases
from .cases import Case

KINDS = {"sparse": "sparse", "dense": "trak"}
_MOST_BYTES = 4 * 2**30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    add = parser.add_argument
    add("--proj_dims", type=int, nargs="+", default=[512, 2048, 8192], help="numbers in a feature")
    add("--seeds", type=int, default=5, help="projections of each kind and size, seeds 0, 1, ...")
    add("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="sparse, and TRAK's BasicProjector as the dense")


def run(arguments: argparse.Namespace) -> None:
    """Print, for each kind and size, the error of cosines against the dense bound and of influence against none."""
    case = cases.make_case(arguments)
    size = 4 * case.parameters * len(case.records)
    if size > _MOST_BYTES:
        raise UserError(f"{len(case.records)} whole gradients take {size / 2**30:.0f} GiB; give fewer --records")
    gradients = whole_gradients(case)
    sizes = [matrix.weight.numel() for matrix in case.matrices.values()]
    pairs = np.triu_indices(len(gradients), 1)
    cosines = products(gradients)[pairs]
    influence = influences(gradients.numpy(), case.tasks)
    print(
        f"{len(gradients)} gradients of {gradients.shape[1]:,} entries in {len(sizes)} matrices, "
        f"{len(cosines):,} pairs, {arguments.seeds} seeds: median (least to most)\n"
        f"{'kind':<7} {'features':>8}  {'rms error of a cosine':<26} {'bound':>6}  {'same, of the bound':<19}  "
        "rank correlation of influence"
    )
    for proj_dim in arguments.proj_dims:
        # Of unit vectors x, y: the variance (1 + <x, y>^2) / proj_dim.
        bound = float(np.sqrt(np.mean(1 + cosines**2) / proj_dim))
        for kind in arguments.kinds:
            errors, same = [], []
            for seed in range(arguments.seeds):
                sketch = projected(gradients, case, KINDS[kind], seed, proj_dim)
                errors.append(float(np.sqrt(np.mean((products(sketch)[pairs] / proj_dim - cosines) ** 2))))
                same.append(rank_correlation_within(influences(sketch.numpy(), case.tasks), influence, case.tasks))
            print(
                f"{kind:<7} {proj_dim:>8}  {spread(errors, 4):<26} {bound:>6.4f}  {np.median(errors) / bound:<19.2f}  "
                f"{spread(same, 3)}"
            )


def whole_gradients(case: Case) -> Tensor:
    """The records' gradients over their norms, unprojected, float32 `[n, P]`."""

    class InTheirColumns:
        kind = about = "none"
        proj_dim = case.parameters

        def __init__(self) -> None:
            ends = np.cumsum([matrix.weight.numel() for matrix in case.matrices.values()])
            self.stop = dict(zip(case.matrices, ends.tolist(), strict=True))

        def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
            stop = self.stop[matrix_name]
            sketch[:, stop - gradients.shape[1] : stop] = gradients

    found = torch.empty(len(case.records), case.parameters)
    projector = InTheirColumns()
    for batch in case.batches:
        found[batch] = gradient_features(partial(case.losses, batch), case.matrices, projector).features.cpu()
    return found


def projected(gradients: Tensor, case: Case, kind: str, seed: int, proj_dim: int) -> Tensor:
    """The sum of the matrices' projections, `[n, proj_dim]`."""
    projector = make_projector(kind, seed, proj_dim, case.reference.device)
    sizes = [matrix.weight.numel() for matrix in case.matrices.values()]
    sketch = torch.zeros(len(gradients), proj_dim)
    for name, part in zip(case.matrices, gradients.split(sizes, dim=1), strict=True):
        sketch += project(projector, name, part.contiguous().to(case.reference.device)).cpu()
    return sketch


def products(vectors: Tensor) -> np.ndarray:
    """Inner products of all pairs, float64 `[n, n]`."""
    return (vectors @ vectors.T).double().numpy()


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


def agreement(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation; 1 where there is no order to keep."""
    return float(spearmanr(first, second).statistic) if np.ptp(first) and np.ptp(second) else 1.0


def rank_correlation_within(first: np.ndarray, second: np.ndarray, tasks: np.ndarray) -> float:
    """`agreement` within each task, the mean of the tasks."""
    return float(np.mean([agreement(first[tasks == task], second[tasks == task]) for task in np.unique(tasks)]))
