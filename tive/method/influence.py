"""Instance influence in two streaming passes, linear in the records (paper, section 3.3).

`I_s = mean over s' in t of cos(f_s, f_s')` over record s's own task t needs no pairs: with `u = f / ||f||` and
`m_t = mean of u over t`, it is `<u_s, m_t>`. The first pass sums up `m_t`, the second takes the products.

Sums are float64, because then neither chunking, block size nor machine changes a result beyond 1e-12; each thread
works on its own rows and the sums are added in the rows' order, so the number of threads changes no bit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from tqdm import tqdm

from tive.features.chunks import Chunk

CPU = torch.device("cpu")
SPAN_ROWS = 4096
BLOCK_ROWS = 64
_ADVICE_BYTES = 1 << 20
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one chunk, which one thread works on: `pieces` are memory-mapped `[k, d]` tensors.

    `place` is where the span starts in its file and where the next one ends, as shares of the file.
    """

    path: Path
    start: int
    pieces: list[torch.Tensor]
    place: tuple[float, float]


def influences(chunks: list[Chunk], tasks: np.ndarray, device: torch.device = CPU) -> tuple[np.ndarray, np.ndarray]:
    """Influence of every record on its task, and the length of its features, both float64 `[N]`.

    A record whose length is zero or not finite counts in no mean; its influence is NaN. So are both numbers of a
    record that is not asked for.

    Args:
        chunks: features of the records `0 .. N - 1`, in order.
        tasks: int `[N]`, the task of each record; negative for a record that must count in nothing.
    """
    spans = _spans(chunks)
    lengths, values = np.full(len(tasks), np.nan), np.full(len(tasks), np.nan)

    def add_up(span: Span) -> dict[int, torch.Tensor]:
        sums: dict[int, torch.Tensor] = {}
        for rows, task, features in _by_task(span, tasks, device):
            length = torch.linalg.vector_norm(features, dim=1)
            lengths[rows] = length.cpu().numpy()
            counted = torch.isfinite(length) & (length > 0)
            if not counted.all():
                features, length = features[counted], length[counted]
            total = features.T @ (1 / length)
            sums[task] = sums[task] + total if task in sums else total
        return sums

    means: dict[int, torch.Tensor] = {}
    for sums in _in_threads(add_up, spans, device, "Task means"):
        for task, total in sums.items():
            means[task] = means[task] + total if task in means else total
    counted = np.isfinite(lengths) & (lengths > 0)
    sizes = np.bincount(tasks[counted], minlength=max(means, default=0) + 1)
    for task, total in means.items():
        means[task] = total / max(1, int(sizes[task]))

    def multiply(span: Span) -> None:
        for rows, task, features in _by_task(span, tasks, device):
            values[rows] = (features @ means[task]).cpu().numpy()

    # Backwards: where memory does not hold all files, it holds what the first pass read last.
    for _ in _in_threads(multiply, spans[::-1], device, "Influence"):
        pass
    # What differs between machines below 1e-12 must not break a tie between equal records.
    values[counted] = np.round(values[counted] / lengths[counted], 12)
    values[~counted] = np.nan
    return values, lengths


def _spans(chunks: list[Chunk]) -> list[Span]:
    spans = []
    for chunk in chunks:
        groups: list[list[torch.Tensor]] = []
        room = 0
        for piece in (piece for block in chunk.blocks for piece in block.split(SPAN_ROWS) if len(piece)):
            # The release's tensors of 16 rows are gathered until a span is full.
            if len(piece) > room:
                groups.append([])
                room = SPAN_ROWS
            groups[-1].append(piece)
            room -= len(piece)
        row = chunk.start
        for number, pieces in enumerate(groups):
            spans.append(Span(chunk.path, row, pieces, (number / len(groups), (number + 2) / len(groups))))
            row += sum(len(piece) for piece in pieces)
    return spans


def _in_threads(
    function: Callable[[Span], _Result], spans: list[Span], device: torch.device, title: str
) -> Iterator[_Result]:
    """`function` of every span, in order. A thread has a span to itself: small shared operations would only wait."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        with tqdm(total=sum(map(_rows_of, spans)), desc=title, unit=" records", unit_scale=True, delay=1) as bar:
            for span, result in zip(spans, pool.map(function, spans), strict=True):
                yield result
                bar.update(_rows_of(span))
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _rows_of(span: Span) -> int:
    return sum(len(piece) for piece in span.pieces)


def _by_task(span: Span, tasks: np.ndarray, device: torch.device) -> Iterator[tuple[np.ndarray, int, torch.Tensor]]:
    """Yield `(rows [k], their task, their features float64 [k, d])`: the span's rows, gathered by task.

    The features are overwritten by the next ones: a block stays in the processor's cache.
    """
    _read_ahead(span)
    block = span.pieces[0] if len(span.pieces) == 1 else torch.cat(span.pieces)
    block = block.to(device)
    codes = tasks[span.start : span.start + len(block)]
    order = np.argsort(codes, kind="stable")
    order = order[np.searchsorted(codes[order], 0) :]
    codes = codes[order]
    gathered = torch.empty(BLOCK_ROWS, block.shape[1], dtype=block.dtype, device=device)
    converted = torch.empty(BLOCK_ROWS, block.shape[1], dtype=torch.float64, device=device)
    for start in range(0, len(order), BLOCK_ROWS):
        rows, found = order[start : start + BLOCK_ROWS], codes[start : start + BLOCK_ROWS]
        part = torch.index_select(block, 0, torch.from_numpy(rows).to(device), out=gathered[: len(rows)])
        # By way of float32, which is exact, the conversion takes two thirds of the time.
        features = converted[: len(rows)].copy_(part.float())
        edges = [0, *(np.flatnonzero(np.diff(found)) + 1).tolist(), len(found)]
        for first, last in pairwise(edges):
            yield span.start + rows[first:last], int(found[first]), features[first:last]


def _read_ahead(span: Span) -> None:
    """Ask the system for this span and the next: mapped rows out of order read a cold disk in small steps."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(span.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for offset in range(int(size * span.place[0]), int(size * span.place[1]), _ADVICE_BYTES):
            os.posix_fadvise(file.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
