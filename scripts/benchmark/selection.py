"""Influence in two linear passes against the all-pairs way of the paper's release, on random features."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from tive.features.chunk import Chunk
from tive.features.lookup import spans_of
from tive.method.clusters import (
    MAX_CLUSTERS,
    draw_from_clusters,
    grid_points,
    k_means,
    second_moments,
    whitening,
)
from tive.method.influence import Span, group_means, products
from tive.method.value import draw
from tive.util.device import anonymous_memory
from tive.util.text import duration, print_table

Q, SHARE = 0.001, 0.15


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000, 300_000, 1_000_000], help="records")
    add("--proj_dim", type=int, default=256, help="numbers in a feature; the real ones have 8192")
    add("--tasks", type=int, default=10, help="tasks of equal size, shuffled")
    add("--clusters", action="store_true", help="also time the selection by clusters of as many as are drawn")
    add("--limit", type=float, default=30, metavar="SECONDS", help="all pairs are stopped where they would take longer")
    add("--folder", default=None, help="where the features are put while this runs; default: the system's place")


def run(arguments: argparse.Namespace) -> None:
    sizes = sorted(arguments.sizes)
    rows: list[tuple[str, ...]] = [
        ("records", "two passes and draw", "records/s", "own memory", "clusters", "all pairs", "difference")
    ]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        path = Path(folder) / "features.f16"
        features = random_features(path, sizes[-1], arguments.proj_dim)
        tasks = np.random.default_rng(0).integers(0, arguments.tasks, sizes[-1])
        few = min(sizes[0], 2000)  # what tells whether even the first size would take too long
        start = time.perf_counter()
        all_pairs_influence(features[:few], tasks[:few])
        seconds_a_pair = (time.perf_counter() - start) / few**2
        for size in sizes:
            groups = tasks[:size]
            spans = spans_of([Chunk(path, 0, size, [features[:size]], {"norms": np.ones(size)})])
            with peak_own_memory() as memory:
                start = time.perf_counter()
                means, lengths = group_means(spans, groups)
                influence = products(spans, means, groups, lengths)
                for task in range(arguments.tasks):
                    scores = influence[groups == task]
                    draw(scores, Q, int(SHARE * len(scores)), 0, str(task))
                seconds = time.perf_counter() - start
            row = [f"{size:,}", duration(seconds), f"{size / seconds:,.0f}", memory()]
            row.append(time_clusters(spans, lengths, groups, folder) if arguments.clusters else "")
            if seconds_a_pair * size**2 > arguments.limit:
                row += [f"stopped (about {duration(seconds_a_pair * size**2)})", ""]
            else:
                start = time.perf_counter()
                naive = all_pairs_influence(features[:size], groups)
                seconds_a_pair = (time.perf_counter() - start) / size**2
                row += [duration(seconds_a_pair * size**2), f"{np.abs(naive - influence).max():.0e}"]
            rows.append(tuple(row))
        del features, spans
    print(f"{arguments.proj_dim} numbers a feature, {arguments.tasks} tasks, {torch.get_num_threads()} threads")
    print_table(rows)


def time_clusters(spans: Sequence[Span], lengths: np.ndarray, groups: np.ndarray, folder: str) -> str:
    """What the draw by clusters takes on top of the two passes: time, the processors' time, and memory."""
    start, busy = time.perf_counter(), time.process_time()
    with peak_own_memory() as memory, tempfile.TemporaryFile(dir=folder) as file:
        matrix = whitening(second_moments(spans, lengths))
        points = np.memmap(file, np.int8, "w+", shape=(len(groups), len(matrix)))
        grid_points(spans, lengths, matrix, points)
        for task in np.unique(groups).tolist():
            rows = np.flatnonzero(groups == task)
            number = max(1, int(SHARE * len(rows)))
            draw_from_clusters(*k_means(points[rows], min(number, MAX_CLUSTERS), 0, str(task)), number)
    taken, busy = time.perf_counter() - start, time.process_time() - busy
    return f"{duration(taken)} ({duration(busy)} of CPU), {memory()}"


def random_features(path: Path, count: int, dimension: int) -> torch.Tensor:
    """Float16 features `[count, dimension]` in a memory-mapped file."""
    features = torch.from_file(str(path), shared=True, size=count * dimension, dtype=torch.float16)
    features = features.view(count, dimension)
    generator = torch.Generator().manual_seed(0)
    for block in features.split(1 << 14):
        block.copy_(torch.randn(block.shape, generator=generator) + 0.3)
    return features


def all_pairs_influence(features: torch.Tensor, tasks: np.ndarray) -> np.ndarray:
    """The mean over all pairs of a task, as the release does it, but in large blocks: kinder to the processor."""
    influence = np.empty(len(tasks))
    for task in np.unique(tasks):
        rows = np.flatnonzero(tasks == task)
        unit = torch.nn.functional.normalize(features[torch.from_numpy(rows)].float())
        influence[rows] = torch.cat([(block @ unit.T).mean(dim=1) for block in unit.split(512)]).numpy()
    return influence


@contextlib.contextmanager
def peak_own_memory() -> Iterator[Callable[[], str]]:
    """The most memory of this process's own within the block, mapped files apart; "-" where the system does not say."""
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], anonymous_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: f"{peak[0] / 2**30:.2f} GiB" if peak[0] else "-"
    finally:
        stop.set()
        watcher.join()
