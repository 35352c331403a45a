"""Variety within a task: k-means on whitened features, and the records nearest to the centres.

Few of the directions that features have are strong; whitening over the mixture (`whitening`) lets the weak ones count.
Points and centres are whole numbers on a grid, so that every product is exact in float32 whatever the order of its
sums: the same clusters on every machine, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from tive.method.influence import CPU, Span, in_threads
from tive.method.value import uniform

# Numbers of a point: enough for inner products to a few percent, few enough for a full matrix of second moments.
DIMENSION = 512
SHRINKAGE = 0.1
# A standard deviation is 16 steps of the grid, which ends at 89: twice a product and a square stay below 2^24.
STEPS, LIMIT = 16, 89
# Centres of a task at most, which bounds memory and time a record; above, a cluster gives several records.
MAX_CLUSTERS = 8192
EPOCHS = 2
_BATCH = 4096
# Rows that stay in the processor's cache while they are summed.
_SKETCHED_ROWS = 64


def sketched(features: Tensor) -> Tensor:
    """Features `[n, d]` summed to `DIMENSION` numbers with fixed signs, float32 `[n, m]`; m = d where d is less.

    Inner products stay what they are on average, to about `1 / sqrt(m)` of the lengths. The sums are in one order.
    """
    count, size = features.shape
    if size <= DIMENSION:
        return features.float()
    bits = np.random.PCG64(0).random_raw(size) & np.uint64(1)
    signs = torch.nn.functional.pad(torch.from_numpy(1 - 2 * bits.astype(np.float32)), (0, -size % DIMENSION))
    small = torch.zeros(count, DIMENSION)
    for start in range(0, size, DIMENSION):
        part = features[:, start : start + DIMENSION].float()
        small[:, : part.shape[1]] += part * signs[start : start + part.shape[1]]
    return small


def _unit_sketches(span: Span, lengths: np.ndarray) -> tuple[np.ndarray, Tensor]:
    """The rows of a span that count, and their unit features, sketched, float64 `[k, m]`."""
    here = lengths[span.start : span.start + span.rows]
    rows = np.flatnonzero(np.isfinite(here) & (here > 0))
    blocks = span.load().split(_SKETCHED_ROWS)
    small = torch.cat([sketched(block) for block in blocks])[torch.from_numpy(rows)]
    return span.start + rows, small.double() / torch.from_numpy(here[rows])[:, None]


def second_moments(
    spans: Sequence[Span], lengths: np.ndarray, progress: Callable[[int], object] = lambda rows: None
) -> Tensor:
    """`mean of z z'` over the records that count, z their sketched unit features, float64 `[m, m]`: one pass.

    Args:
        spans: the features of the records `0 .. N - 1`, in order.
        lengths: float64 `[N]`, `||f_s||` as `group_means` returns it; a record counts where it is finite and above 0.
    """

    def add_up(span: Span) -> tuple[int, Tensor]:
        rows, z = _unit_sketches(span, lengths)
        return len(rows), z.T @ z

    count, total = 0, torch.zeros((), dtype=torch.float64)
    for rows, moments in in_threads(add_up, spans, CPU, progress):
        count, total = count + rows, total + moments
    return total / count


def whitening(moments: Tensor) -> Tensor:
    """`(C + s mean(diag C) I)^(-1/2)`, s = `SHRINKAGE`, float64 `[m, m]`; rounded, so that machines agree on it."""
    shrunk = moments + SHRINKAGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(shrunk)
    return torch.round(vectors @ torch.diag(values.rsqrt()) @ vectors.T, decimals=9)


def grid_points(
    spans: Sequence[Span],
    lengths: np.ndarray,
    matrix: Tensor,
    points: np.ndarray,
    progress: Callable[[int], object] = lambda rows: None,
) -> None:
    """Write the whitened records into `points`, int8 `[N, m]`, on the grid; the other rows stay as they are."""

    def place(span: Span) -> None:
        rows, z = _unit_sketches(span, lengths)
        points[rows] = torch.round(z @ matrix * STEPS).clamp_(-LIMIT, LIMIT).to(torch.int8).numpy()

    for _ in in_threads(place, spans, CPU, progress):
        pass


def k_means(points: np.ndarray, clusters: int, seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Mini-batch k-means (Sculley, 2010): the cluster of each point and the square of its distance, both int64 `[n]`.

    Centres begin at points drawn by seed and task. A centre is the mean of all points that batches brought it, rounded
    to the grid; `EPOCHS` passes over the points, int8 `[n, m]`, in random order, and one that assigns.
    """
    order = np.argsort(uniform(len(points), seed, f"{task}, clusters"), kind="stable")
    sums = torch.from_numpy(points[np.sort(order[:clusters])]).long()
    counts = torch.ones(clusters, dtype=torch.int64)
    centres = sums.float()
    for _ in range(EPOCHS):
        for start in range(0, len(points), _BATCH):
            batch = torch.from_numpy(points[np.sort(order[start : start + _BATCH])])
            labels, _ = _nearest(batch.float(), centres)
            sums.index_add_(0, labels, batch.long())
            counts += torch.bincount(labels, minlength=clusters)
            moved = labels.unique()
            centres[moved] = torch.round(sums[moved].double() / counts[moved, None]).float()
    starts = range(0, len(points), _BATCH)
    parts = [_nearest(torch.from_numpy(points[start : start + _BATCH]).float(), centres) for start in starts]
    labels, squares = map(torch.cat, zip(*parts, strict=True))
    return labels.numpy(), squares.long().numpy()


def _nearest(points: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The centre nearest to each point, the first of equal ones, and the square of its distance, `[b]` each."""
    closeness = torch.addmm(-(centres**2).sum(dim=1), points, centres.T, alpha=2)
    best, labels = closeness.max(dim=1)
    return labels, (points**2).sum(dim=1) - best


def draw_from_clusters(labels: np.ndarray, squares: np.ndarray, number: int) -> np.ndarray:
    """The indices of `number` records, sorted: from every cluster its nearest to the centre, then the second, ...

    Where a round takes some clusters only, the largest come first. Ties go to the earlier cluster and record.
    """
    sizes = np.bincount(labels)
    by_cluster = np.lexsort((squares, labels))  # stable: of equal distances the earlier record
    rounds = np.empty(len(labels), np.int64)
    rounds[by_cluster] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return np.sort(np.lexsort((labels, -sizes[labels], rounds))[:number])
