"""Who computes a chunk: one process at a time, and whether the folder's files are of its run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tive.features.manifest import Run
from tive.features.progress import FINAL_FILES, progress_folder
from tive.util.errors import UserError
from tive.util.files import sha256_of, take_lock
from tive.util.text import listed, shown


class ChunkIsHeld(UserError):
    """Another process is computing the chunk."""


@contextlib.contextmanager
def hold_chunk(folder: Path, chunk: int) -> Iterator[None]:
    """Take a chunk for this process while the block runs, and sweep up after killed ones.

    Raises:
        ChunkIsHeld: another process holds it.
        UserError: the folder cannot be made or written.
    """
    path = folder / f".lock_{chunk}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - closed below
    except OSError as error:
        raise UserError(f"cannot write to the feature folder {folder}: {error.strerror}; name another one") from error
    with file:
        try:
            locked = take_lock(file)
        except BlockingIOError as error:
            raise ChunkIsHeld(
                f"another process is computing chunk {chunk} in {folder}; wait for it or take another chunk"
            ) from error
        if not locked:
            print(f"{folder} is on a file system without locks: see that no other process computes chunk {chunk}")
        for name in FINAL_FILES:
            for left_behind in folder.glob(f".{name.format(chunk)}.*.tmp"):
                left_behind.unlink(missing_ok=True)
        yield


def compute_open_chunks(num_chunks: int, compute: Callable[[int], None]) -> None:
    """Compute the lowest open chunk again and again, until each is complete, failed here, or held by another process.

    A chunk of a process that was lost is open again, and is taken like any other.

    Args:
        compute: computes a chunk, or finds it complete; raises `ChunkIsHeld` where another process does.

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
        except ChunkIsHeld:
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


def is_complete(folder: Path, run: Run, projector: str) -> bool:
    """Whether the chunk's final files are there, whole, and made by the same run.

    Args:
        run: what is known before the model is loaded.
        projector: the kind that was asked for, or `auto`.

    Raises:
        UserError: they were made by a different run.
    """
    manifest_path, output = folder / f"manifest_{run.chunk_idx}.json", folder / f"output_{run.chunk_idx}.pt"
    if not manifest_path.is_file():
        return False
    try:
        manifest = json.loads(manifest_path.read_bytes())
        made_by, checksum = manifest["run"], manifest["sha256"]
        kind = {} if projector == "auto" else {"projector": projector}
        _refuse(made_by | {"projector": made_by["projector"].split("/")[0]}, run.known() | kind, manifest_path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        print(f"{manifest_path} is damaged: computed again")
        return False
    if not output.is_file() or sha256_of(output) != checksum:
        print(f"{output} is missing or damaged: computed again")
        return False
    return True


def refuse_other_runs(folder: Path, run: Run) -> None:
    """Refuse to go on with a chunk that a different run began, and to put chunks of different runs in one folder.

    Raises:
        UserError: what differs.
    """
    own = progress_folder(folder, run.chunk_idx) / "run.json"
    for path in sorted([*folder.glob("progress_*/run.json"), *folder.glob("manifest_*.json")]):
        try:
            other = json.loads(path.read_bytes())
            other = other["run"] if path.name.startswith("manifest") else other
            _refuse(other, run.known(common=path != own), path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # removed meanwhile, or damaged: the checksums of its windows tell what is still of use


def _refuse(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        differences = ", ".join(
            f"{name} {shown(str(old.get(name)), 24)}, now {shown(str(new[name]), 24)}" for name in names
        )
        raise UserError(
            f"{where} is of a run that differs: {differences}; give the same arguments, name another "
            "folder, or start afresh (overwrite)"
        )
