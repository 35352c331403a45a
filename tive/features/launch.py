"""Which chunks this process computes: from its arguments, torchrun or SLURM. No process talks to another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from tive.features.store import Held
from tive.util.errors import UserError
from tive.util.text import listed


@dataclass(frozen=True)
class Place:
    """Chunk `chunk_idx` of `num_chunks`, on the machine's GPU number `local_rank`; `source` says who decided.

    `chunk_idx` is None for a process that takes one open chunk after the other.
    """

    num_chunks: int
    chunk_idx: int | None
    local_rank: int
    source: str


def place_of(num_chunks: int | None, chunk_idx: int | Literal["any"] | None, environment: Mapping[str, str]) -> Place:
    """The chunk of this process: from the arguments, or from its number under torchrun, srun or in a SLURM array.

    In an array whose tasks run several processes each, task A's process R of W has chunk `A * W + R`.

    Raises:
        UserError: arguments and environment do not tell one chunk for each process.
    """

    def number(name: str) -> int | None:
        text = environment.get(name, "")
        return int(text) if text.isdecimal() else None

    if (number("WORLD_SIZE") or 0) > 1:
        rank, world, local, launcher = number("RANK") or 0, number("WORLD_SIZE") or 1, number("LOCAL_RANK"), "torchrun"
    elif (number("SLURM_STEP_NUM_TASKS") or 0) > 1:  # set by srun alone: a batch script is one process
        rank, world, local = number("SLURM_PROCID") or 0, number("SLURM_STEP_NUM_TASKS") or 1, number("SLURM_LOCALID")
        launcher = "srun"
    else:
        rank, world, local, launcher = 0, 1, number("LOCAL_RANK"), ""
    array = number("SLURM_ARRAY_TASK_ID")

    if chunk_idx == "any":
        return Place(num_chunks or world, None, local or 0, "the next that is open")
    if chunk_idx is not None:
        if world > 1:
            raise UserError(
                f"chunk_idx {chunk_idx} gives all {world} processes of {launcher} the same chunk; leave it out"
            )
        place = Place(num_chunks or 1, chunk_idx, local or 0, "arguments")
    elif array is not None:
        if num_chunks is None:
            raise UserError("in a SLURM array give num_chunks: the array does not tell it where tasks are resubmitted")
        source = f"SLURM array task {array}" + (f", process {rank} of {launcher}" if world > 1 else "")
        place = Place(num_chunks, array * world + rank, local or 0, source)
    elif world > 1:
        if num_chunks is not None and num_chunks != world:
            raise UserError(f"num_chunks {num_chunks} under {world} processes; leave it out, each takes one chunk")
        place = Place(world, rank, local or 0, launcher)
    else:
        if num_chunks is not None and num_chunks > 1:
            raise UserError(f"num_chunks {num_chunks} without chunk_idx; say which of 0 .. {num_chunks - 1}")
        place = Place(1 if num_chunks is None else num_chunks, 0, local or 0, "arguments")
    assert place.chunk_idx is not None
    if not 0 <= place.chunk_idx < place.num_chunks:
        raise UserError(
            f"chunk {place.chunk_idx} ({place.source}) is not one of 0 .. {place.num_chunks - 1}: check num_chunks, "
            "chunk_idx and the array, which start at 0"
        )
    return place


def compute_open_chunks(num_chunks: int, compute: Callable[[int], None]) -> None:
    """Compute the lowest open chunk again and again, until each is complete, failed here, or held by another process.

    A chunk of a process that was lost is open again, and is taken like any other.

    Args:
        compute: computes a chunk, or finds it complete; raises `Held` where another process computes it.

    Raises:
        UserError: chunks failed; each is named with its reason.
    """
    done: set[int] = set()
    held: set[int] = set()
    failed: dict[int, UserError] = {}
    while open_chunks := sorted(set(range(num_chunks)) - done - held - failed.keys()):
        chunk = open_chunks[0]
        try:
            compute(chunk)
        except Held:
            held.add(chunk)
        except UserError as error:
            print(f"chunk {chunk} failed: {error}")
            failed[chunk] = error
        else:
            done.add(chunk)
            held.clear()  # it took a while: what was held may be open now
    if held:
        print(f"other processes are computing {listed([f'chunk {chunk}' for chunk in sorted(held)])}")
    if failed:
        reasons = "; ".join(f"chunk {chunk}: {error}" for chunk, error in failed.items())
        raise UserError(f"{len(failed)} of {num_chunks} chunks failed: {reasons}")
