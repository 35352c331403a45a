"""How much memory this process and this machine use, in bytes."""

from __future__ import annotations

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """The most memory that this process has used at one time, since it started or since `forget_peak`."""
    peak = _read("/proc/self/status", "VmHWM")
    if peak is None:  # not Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return peak


def forget_peak() -> None:
    """Start `peak_memory` afresh (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def anonymous_memory() -> int:
    """What this process holds now, without the files that it has mapped (Linux)."""
    return _read("/proc/self/status", "RssAnon") or 0


def available_memory() -> int | None:
    """What the machine can still give without swapping; None where it does not say."""
    return _read("/proc/meminfo", "MemAvailable")


def _read(path: str, name: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
