"""The device that a step computes on, the dtype for it, and how much memory is used and left, in bytes."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path

import torch

from tive.util.errors import UserError

_WIDE = 1024


def device_of(wanted: str, local_rank: int = 0) -> torch.device:
    """`usable_device`, made ready to run a model."""
    device = usable_device(wanted, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # Numbers below 1e-38 halved the speed of a small model on a CPU; set before torch starts its threads.
        torch.set_flush_denormal(True)
    return device


def leave_a_core(width: int) -> None:
    """Give torch one thread fewer than there are cores, where a model of this width runs on a CPU and nobody chose.

    An operation ends with its slowest thread. Where another process, such as the one that reads, holds a thread's core,
    each of thousands of short operations waits for it: milliseconds instead of microseconds. A wide model's operations
    are long enough to take every core. The choice depends on nothing but model and machine, as the last bits do on it.
    """
    if width < _WIDE and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, torch.get_num_threads() - 1))


def usable_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The CPU or a GPU of CUDA or ROCm by its name; `auto` is this process's GPU where there is one, else the CPU. A
    `UserError` where there is no such device here.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", wanted):
        raise UserError(f"{wanted!r} is not a device; give auto, cpu, cuda or cuda:K")
    if wanted == "cpu":
        return torch.device(wanted)
    if not torch.cuda.is_available():
        raise UserError(f"the device {wanted}: torch sees no GPU here; use cpu, or check the driver")
    count, number = torch.cuda.device_count(), torch.device(wanted).index
    number = local_rank % count if number is None else number
    if number >= count:
        raise UserError(f"the device {wanted} is not there: there are {count} GPUs here, counted from 0")
    return torch.device("cuda", number)


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of a name; `auto` is bfloat16 where the GPU has it, else float16, and float32 on a CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device)[0] >= 8 else torch.float16


def device_name(device: torch.device) -> str:
    """The device as a result names it: the GPU's kind, or the CPU's threads."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at one time, since the start or `forget_peak`: of a GPU's memory, else of this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if (peak := _kernel_says("/proc/self/status", "VmHWM")) is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(device: torch.device) -> None:
    """Start `peak_memory` afresh (of a process: on Linux)."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")


def anonymous_memory() -> int:
    """The bytes that this process holds now, without the files that it has mapped (Linux)."""
    return _kernel_says("/proc/self/status", "RssAnon") or 0


def available_memory() -> int | None:
    """The bytes that the machine can still give without swapping; None where it does not say."""
    return _kernel_says("/proc/meminfo", "MemAvailable")


def _kernel_says(path: str, name: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)
