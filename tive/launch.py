"""Which chunk and device this process has: from its arguments, torchrun or SLURM. No process talks to another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tive.errors import UserError


@dataclass(frozen=True)
class Place:
    """Chunk `chunk_idx` of `num_chunks`, on the machine's GPU number `local_rank`; `source` says who decided."""

    num_chunks: int
    chunk_idx: int
    local_rank: int
    source: str


def place_of(num_chunks: int | None, chunk_idx: int | None, environment: Mapping[str, str]) -> Place:
    """The chunk of this process; arguments win over SLURM arrays, these over torchrun, this over srun.

    Raises:
        UserError: arguments and environment do not tell one chunk for each process.
    """

    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.lstrip("-").isdigit() else None

    rank, world, local = number("RANK"), number("WORLD_SIZE"), number("LOCAL_RANK") or 0
    array = number("SLURM_ARRAY_TASK_ID")
    if chunk_idx is not None:
        if world is not None and world > 1:
            raise UserError("--chunk_idx gives every torchrun process the same chunk; leave it out under torchrun")
        return Place(num_chunks or 1, chunk_idx, local, "arguments")
    if array is not None:
        if num_chunks is None:
            raise UserError(
                "in a SLURM array --num_chunks must be given: an array of resubmitted tasks does not tell it"
            )
        return Place(num_chunks, array, local, "SLURM array task")
    steps, process = number("SLURM_NTASKS"), number("SLURM_PROCID")
    if rank is None and process is not None and steps is not None and steps > 1:
        rank, world, local = process, steps, number("SLURM_LOCALID") or 0
        source = "SLURM step"
    else:
        source = "torchrun"
    if rank is not None and world is not None and world > 1:
        if num_chunks is not None and num_chunks != world:
            raise UserError(f"--num_chunks {num_chunks} under {world} processes; leave it out, each takes one chunk")
        return Place(world, rank, local, source)
    if num_chunks is not None and num_chunks > 1:
        raise UserError(f"--num_chunks {num_chunks} without --chunk_idx; say which of 0 .. {num_chunks - 1}")
    return Place(1, 0, local, "arguments")


def device_of(wanted: str, place: Place) -> torch.device:
    """The torch device for `--device`; `auto` is this process's GPU where there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UserError(f"--device {wanted} is not a device (auto, cpu, cuda, cuda:1)") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {wanted}: torch sees no GPU here; use --device cpu, or check the driver")
        if device.index is None:
            device = torch.device("cuda", place.local_rank % torch.cuda.device_count())
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {wanted}: there are {torch.cuda.device_count()} GPUs here")
        torch.cuda.set_device(device)
    elif device.type == "cpu":
        # Numbers below 1e-38 halved the speed of a small model on a CPU; set before torch starts its threads.
        torch.set_flush_denormal(True)
    return device


def dtype_of(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype for `--dtype`; `auto` is bfloat16 where the GPU has it, else float16, and float32 on a CPU."""
    if wanted != "auto":
        return getattr(torch, wanted)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
