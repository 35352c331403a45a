"""What a check gives: passed, failed or left out, its figures, and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch


class NotHere(Exception):
    """Why a check cannot run on this machine."""


@dataclass
class Result:
    """One check: `passed`, `failed` or `left out`, its figures, and why."""

    name: str
    outcome: str
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    why: str = ""

    def __str__(self) -> str:
        figures = ", ".join(f"{key} {value:.3g}" for key, value in self.figures.items())
        details = "; ".join(filter(None, (figures, self.why)))
        return f"{self.outcome:<8}  {self.seconds:6.1f} s  {self.name}: {details}"


# A check gives its figures, and what is wrong, empty where nothing is.
Check = Callable[[torch.device], tuple[dict[str, float], str]]


def within(figures: dict[str, float], **limits: float) -> tuple[dict[str, float], str]:
    """The figures, and which of them lie above their limits."""
    above = [f"{name} is above {limit:g}" for name, limit in limits.items() if not figures[name] <= limit]
    return figures, "; ".join(above)


def run_check(name: str, check: Check, device: torch.device) -> Result:
    """Run one check; whatever it raises is a failure of its own."""
    begin = time.perf_counter()
    try:
        figures, wrong = check(device)
        outcome = "failed" if wrong else "passed"
    except (NotHere, ImportError) as reason:
        figures, outcome, wrong = {}, "left out", str(reason)
    except Exception as error:  # the others are to run all the same
        figures, outcome, wrong = {}, "failed", f"{type(error).__name__}: {error}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Result(name, outcome, time.perf_counter() - begin, figures, " ".join(wrong.split())[:300])
