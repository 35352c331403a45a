"""Which chunks this process computes: from its arguments, torchrun or SLURM. No process talks to another: a lock says
who computes a chunk, files how far it is. `python -m tive.features.launch DIR NUM_CHUNKS` prints that, without torch.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

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


class Held(UserError):
    """Another process has the lock."""


@contextlib.contextmanager
def hold(path: Path, what: str) -> Iterator[None]:
    """Lock a file of this name for this process while the block runs; `what` says in messages what others may not do.

    Raises:
        Held: another process holds it.
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"cannot write to the folder {path.parent}: {error.strerror}; name another one") from error
    with file:
        try:
            # Not flock: loader processes would inherit it, and outlive a killed parent by some seconds.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise Held(f"another process is {what} in {path.parent}; wait for it or take another one") from error
            print(f"warning: {path.parent} has no file locks; make sure that no other process is {what}")
        yield


def compute_open_chunks(num_chunks: int, compute: Callable[[int], None]) -> None:
    """Compute the lowest open chunk again and again, until each is complete, failed here, or held by another process.

    A chunk of a process that was lost is open again, and is taken like any other.

    Args:
        compute: computes a chunk, or sees that it is complete; raises `Held` where another process computes it.

    Raises:
        UserError: chunks failed; the error names each with its reason.
    """
    still_open, held = set(range(num_chunks)), set[int]()
    failed: dict[int, UserError] = {}
    while still_open - held:
        chunk = min(still_open - held)
        try:
            compute(chunk)
        except Held:
            held.add(chunk)
            continue
        except UserError as error:
            print(f"chunk {chunk} failed: {error}")
            failed[chunk] = error
        else:
            held.clear()  # it took a while: what was held may be open now
        still_open.remove(chunk)
    if held:
        print(f"other processes are computing {listed([f'chunk {chunk}' for chunk in sorted(held)])}")
    if failed:
        reasons = "; ".join(f"chunk {chunk}: {error}" for chunk, error in failed.items())
        raise UserError(f"{len(failed)} of {num_chunks} chunks failed: {reasons}")


def records_done(folder: Path, num_chunks: int) -> tuple[int, int]:
    """How many records of the chunks are done, and how many the data file has; 0 while no chunk has been begun."""

    def match_in(path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_bytes())
        except (OSError, ValueError):  # not there, or just being replaced
            return {}
        return content.get("match", content) if isinstance(content, dict) else {}

    done = total = 0
    for chunk in range(num_chunks):
        match = match_in(folder / f"manifest_{chunk}.json")
        if match:
            done += match["stop"] - match["start"]
        else:
            match = match_in(folder / f"progress_{chunk}" / "match.json")
            names = [re.findall(r"\d+", path.name) for path in (folder / f"progress_{chunk}").glob("window_*")]
            done += sum(int(name[1]) - int(name[0]) for name in names if len(name) == 2)
        total = max(total, match.get("data_records", 0))
    return done, total


if __name__ == "__main__":
    print(*records_done(Path(sys.argv[1]), int(sys.argv[2])))
