"""Where the time of a gradient pass goes."""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Stopwatch:
    """Seconds by name, each without what was measured inside it.

    Args:
        device: a GPU is waited for at every boundary, which costs speed: measure in benchmarks and dry runs alone.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else None
        self.on = device is not None
        self.seconds: dict[str, float] = defaultdict(float)
        self.inside = [0.0]

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        start = self._now()
        self.inside.append(0.0)
        try:
            yield
        finally:
            elapsed = self._now() - start
            self.seconds[name] += elapsed - self.inside.pop()
            self.inside[-1] += elapsed

    def _now(self) -> float:
        if self.wait is not None:
            self.wait()
        return time.perf_counter()
