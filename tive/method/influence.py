"""Influence in linear passes over the features: the means of groups of records, and products with given means.

`I_s = mean over s' in t of cos(f_s, f_s')` over record s's own task t (TIVE, section 3.3) needs no pairs: with
`u = f / ||f||` and `m_t = mean of u over t`, it is `<u_s, m_t>`. `group_means` is one pass, `products` the other.
LESS (arXiv 2402.04333) takes the means of its target's subtasks, and the products of the training records with each.

Sums are float64, because then neither chunking, block size nor machine changes a result beyond 1e-12; each thread
works on its own rows and the sums are added in the rows' order, so the number of threads changes no bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch

CPU = torch.device("cpu")
BLOCK_ROWS = 64
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Span:
    """Consecutive records from `start` on, which one thread works on; `load` gives their features, `[rows, d]`."""

    start: int
    rows: int
    load: Callable[[], torch.Tensor]


def group_means(
    spans: Sequence[Span],
    groups: np.ndarray,
    device: torch.device = CPU,
    progress: Callable[[int], object] = lambda rows: None,
) -> tuple[torch.Tensor, np.ndarray]:
    """The mean of the unit features of every group, and the features' lengths, in one pass.

    Args:
        spans: the features of the records `0 .. N - 1`, in order.
        groups: int `[N]`, the group of each record, from 0 up; negative for a record in none.
        progress: called with the number of rows that are done.

    Returns:
        `m_t = mean over s in t of u_s`, float64 `[G, d]`, zero for a group without records, and `||f_s||`, float64
        `[N]`, NaN for a record in no group. Features that are zero or not finite count in no mean.
    """
    lengths = np.full(len(groups), np.nan)

    def add_up(span: Span) -> dict[int, torch.Tensor]:
        sums: dict[int, torch.Tensor] = {}
        for rows, group, features in _by_group(span, groups, device):
            length = torch.linalg.vector_norm(features, dim=1)
            lengths[rows] = length.cpu().numpy()
            usable = torch.isfinite(length) & (length > 0)
            if not usable.all():
                features, length, rows = features[usable], length[usable], rows[usable.cpu().numpy()]
            total = features.T @ (1 / length)
            sums[group] = sums[group] + total if group in sums else total
        return sums

    means = torch.zeros(int(groups.max(initial=-1)) + 1, 0, dtype=torch.float64, device=device)
    for sums in in_threads(add_up, spans, device, progress):
        for group, total in sums.items():
            if not means.shape[1]:
                means = means.new_zeros(len(means), len(total))
            means[group] += total
    usable = np.isfinite(lengths) & (lengths > 0)
    counts = np.bincount(groups[usable], minlength=len(means))
    means /= torch.from_numpy(np.maximum(counts, 1)).to(device)[:, None]
    return means, lengths


def products(
    spans: Sequence[Span],
    means: torch.Tensor,
    groups: np.ndarray | None = None,
    lengths: np.ndarray | None = None,
    device: torch.device = CPU,
    progress: Callable[[int], object] = lambda rows: None,
) -> np.ndarray:
    """`<u_s, m>` of every record with the mean of its own group, or with every mean, in one pass.

    Args:
        means: float64 `[G, d]`.
        groups: int `[N]`, the mean that each record is multiplied with, negative for none; None for all the means.
        lengths: float64 `[N]`, `||f_s||` where `group_means` of the same records has them already.

    Returns:
        float64 `[N]` or `[N, G]`, rounded to 12 decimals; NaN for a record that was not asked for, or whose features
        are zero or not finite.
    """
    count = sum(span.rows for span in spans)
    means = means.to(device)
    values = np.full(count if groups is not None else (count, len(means)), np.nan)
    known = lengths is not None
    lengths = np.full(count, np.nan) if lengths is None else lengths
    wanted = np.zeros(count, np.int64) if groups is None else groups

    def multiply(span: Span) -> None:
        for rows, group, features in _by_group(span, wanted, device):
            if not known:
                lengths[rows] = torch.linalg.vector_norm(features, dim=1).cpu().numpy()
            values[rows] = (features @ (means.T if groups is None else means[group])).cpu().numpy()

    # Backwards: where memory does not hold all files, it holds what a pass before this one read last.
    for _ in in_threads(multiply, spans[::-1], device, progress):
        pass
    usable = np.isfinite(lengths) & (lengths > 0)
    # What differs between machines below 1e-12 must not break a tie between equal records.
    values[usable] = np.round((values[usable].T / lengths[usable]).T, 12)
    values[~usable] = np.nan
    return values


def in_threads(
    function: Callable[[Span], _Result], spans: Sequence[Span], device: torch.device, progress: Callable[[int], object]
) -> Iterator[_Result]:
    """`function` of every span, in order. A thread has a span to itself: small shared operations would only wait."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for span, result in zip(spans, pool.map(function, spans), strict=True):
            yield result
            progress(span.rows)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _by_group(span: Span, groups: np.ndarray, device: torch.device) -> Iterator[tuple[np.ndarray, int, torch.Tensor]]:
    """Yield `(rows [k], their group, their features float64 [k, d])`: the span's rows, gathered by group.

    The features are overwritten by the next ones: a block stays in the processor's cache.
    """
    codes = groups[span.start : span.start + span.rows]
    order = np.argsort(codes, kind="stable")
    order = order[np.searchsorted(codes[order], 0) :]
    codes = codes[order]
    if not len(order):
        return
    block = span.load().to(device)
    gathered = torch.empty(BLOCK_ROWS, block.shape[1], dtype=block.dtype, device=device)
    converted = torch.empty(BLOCK_ROWS, block.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(order), BLOCK_ROWS):
        rows, labels = order[start : start + BLOCK_ROWS], codes[start : start + BLOCK_ROWS]
        part = torch.index_select(block, 0, torch.from_numpy(rows).to(device), out=gathered[: len(rows)])
        # By way of float32, which is exact, the conversion takes two thirds of the time.
        features = converted[: len(rows)].copy_(part.float())
        edges = [0, *(np.flatnonzero(np.diff(labels)) + 1).tolist(), len(labels)]
        for first, last in pairwise(edges):
            yield span.start + rows[first:last], int(labels[first]), features[first:last]
