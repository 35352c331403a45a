"""Which chunks this process computes: from its arguments, torchrun or SLURM; and how far all are. Imports no torch.

No process talks to another: each holds a lock on its chunk. `python -m tive.features.launch DIR NUM_CHUNKS` prints how
many records are done.
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

    rank, world, local, launcher = number("RANK"), number("WORLD_SIZE") or 1, number("LOCAL_RANK"), "torchrun"
    if world == 1 and (number("SLURM_STEP_NUM_TASKS") or 1) > 1:  # set by srun alone: a batch script is one process
        rank, world, local = number("SLURM_PROCID"), number("SLURM_STEP_NUM_TASKS") or 1, number("SLURM_LOCALID")
        launcher = "srun"
    array, number_here = number("SLURM_ARRAY_TASK_ID"), (rank or 0) if world > 1 else 0
    chunk: int | None = number_here
    if chunk_idx == "any":
        count, chunk, source = num_chunks or world, None, "the next that is open"
    elif chunk_idx is not None:
        count, chunk, source = num_chunks or 1, chunk_idx, "arguments"
        if world > 1:
            raise UserError(f"chunk_idx {chunk} gives all {world} processes of {launcher} the same chunk; leave it out")
    elif array is not None:
        if num_chunks is None:
            raise UserError("in a SLURM array give num_chunks: the array does not tell it where tasks are resubmitted")
        source = f"SLURM array task {array}" + (f", process {number_here} of {launcher}" if world > 1 else "")
        count, chunk = num_chunks, array * world + number_here
    else:
        count, source = world if num_chunks is None else num_chunks, launcher if world > 1 else "arguments"
        if world > 1 and count != world:
            raise UserError(f"num_chunks {count} under {world} processes; leave it out, each takes one chunk")
        if world == 1 and count > 1:
            raise UserError(f"num_chunks {count} without chunk_idx; say which of 0 .. {count - 1}")
    if chunk is not None and not 0 <= chunk < count:
        raise UserError(
            f"chunk {chunk} ({source}) is not one of 0 .. {count - 1}: check num_chunks, chunk_idx and the array, "
            "which start at 0"
        )
    return Place(count, chunk, local or 0, source)


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
