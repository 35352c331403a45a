"""A chunk under way: windows of rows, each computed once, verified, and found again after any stop.

`DIR/progress_{k}/` holds the features of finished windows in one file of the final size, and one small JSON a window
with its checksum, norms and the records left out. The last step writes the chunk's files from it and removes it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch

from tive.errors import UserError
from tive.files import read_json, sha256_of, write_json

LeftOutRecord = dict[str, Any]


@dataclass
class Note:
    """What is known of a finished window beside its features.

    `norms` is float32 `[n]`, NaN for a record that was left out; `limits` are the batch limits in force at its end.
    """

    norms: np.ndarray
    left_out: list[LeftOutRecord]
    limits: tuple[int, int]


class Progress:
    """The windows of one chunk on disk. Hold it open while working: a second process on the chunk is refused.

    Args:
        folder: the feature folder.
        run: everything that the features depend on; a folder of another run is refused.
        rows: the chunk's rows of the data file.

    Raises:
        UserError: another process works on the chunk, it was begun by a different run, or the disk is too small.
    """

    def __init__(self, folder: Path, run: dict[str, Any], rows: range, overwrite: bool) -> None:
        self.rows, self.window, self.proj_dim = rows, run["window"], run["proj_dim"]
        chunk = run["chunk_idx"]
        self.folder = folder / f"progress_{chunk}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = _lock(self.folder / "lock", chunk)
        begun = self.folder / "run.json"
        if overwrite or not begun.is_file():
            self.clear()
            write_json(begun, run)
        else:
            refuse_other_run(read_json(begun), run, self.folder)
        self.file = self._open_features()

    def _open_features(self) -> IO[bytes]:
        path, size = self.folder / "features.f16", len(self.rows) * self.proj_dim * 2
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if size and os.fstat(descriptor).st_size != size:
                # The space is taken now, so that a full disk stops the run before it begins.
                os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            os.close(descriptor)
            path.unlink()
            raise UserError(
                f"cannot reserve {size / 1e9:.3g} GB in {self.folder}: {error.strerror}; free space or name another "
                "--output_file"
            ) from error
        return os.fdopen(descriptor, "r+b", buffering=0)

    def windows(self) -> list[range]:
        """All the windows of the chunk, in order."""
        stop = self.rows.stop
        return [range(start, min(start + self.window, stop)) for start in range(self.rows.start, stop, self.window)]

    def note(self, rows: range) -> Note | None:
        """The note of a finished window, or None where there is none or its features' checksum is wrong."""
        path = self._note_path(rows)
        if not path.is_file():
            return None
        try:
            written = json.loads(path.read_bytes())
            norms = np.array([np.nan if norm is None else norm for norm in written["norms"]], np.float32)
            note = Note(norms, written["left_out"], tuple(written["limits"]))
            features = os.pread(self.file.fileno(), len(rows) * self.proj_dim * 2, self._place(rows))
            whole = written["sha256"] == _checksum(features, note) and len(norms) == len(rows)
        except (OSError, ValueError, KeyError, TypeError):
            whole = False
        if not whole:
            print(f"records {rows.start} to {rows.stop - 1}: damaged on disk, computed again")
            return None
        return note

    def write(self, rows: range, features: np.ndarray, note: Note) -> None:
        """Put a window on disk for good: its features (float16 `[n, d]`) first, then the note that they are there."""
        data = features.tobytes()
        try:
            os.pwrite(self.file.fileno(), data, self._place(rows))
            os.fdatasync(self.file.fileno())
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; the same command continues") from error
        content = {
            "norms": [float(norm) if np.isfinite(norm) else None for norm in note.norms],
            "left_out": note.left_out,
            "limits": note.limits,
            "sha256": _checksum(data, note),
        }
        write_json(self._note_path(rows), content, indent=None)

    def _place(self, rows: range) -> int:
        return (rows.start - self.rows.start) * self.proj_dim * 2

    def features(self) -> torch.Tensor:
        """The chunk's features, float16 `[n, d]`, memory-mapped."""
        shape = (len(self.rows), self.proj_dim)
        if not len(self.rows):
            return torch.empty(shape, dtype=torch.float16)
        return torch.from_numpy(np.memmap(self.file, np.float16, "r+", shape=shape))

    def _note_path(self, rows: range) -> Path:
        return self.folder / f"window_{rows.start:09d}.json"

    def clear(self) -> None:
        for path in self.folder.iterdir():
            if path.name != "lock":
                path.unlink()

    def close(self) -> None:
        self.file.close()
        self.lock.close()

    def remove(self) -> None:
        """Remove what the finished chunk no longer needs."""
        shutil.rmtree(self.folder)
        self.close()


def _lock(path: Path, chunk: int) -> IO[str]:
    """Hold the chunk: the system lets go of it when the process ends, however it ends."""
    file = open(path, "w")  # noqa: SIM115 - held as long as the process works
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(
            f"another process is computing chunk {chunk} in {path.parent.parent}; wait for it or take another chunk"
        ) from error
    return file


def _checksum(features: bytes, note: Note) -> str:
    digest = hashlib.sha256(features)
    digest.update(np.ascontiguousarray(note.norms))
    digest.update(json.dumps([note.left_out, note.limits]).encode())
    return digest.hexdigest()


def refuse_other_run(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    """Raise a `UserError` that says what differs between a run on disk and this one."""
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        differences = ", ".join(f"{name} {_short(old.get(name))}, now {_short(new[name])}" for name in names)
        raise UserError(
            f"{where} was begun by a run that differs: {differences}; give the same arguments, another --output_file, "
            "or --overwrite to start afresh"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."


def is_complete(folder: Path, run: dict[str, Any], overwrite: bool) -> bool:
    """Whether the chunk's final files are there, whole, and made by the same run.

    Raises:
        UserError: they were made by a different run, and `overwrite` is not set.
    """
    manifest_path, output = folder / f"manifest_{run['chunk_idx']}.json", folder / f"output_{run['chunk_idx']}.pt"
    if overwrite or not manifest_path.is_file():
        return False
    manifest = read_json(manifest_path)
    refuse_other_run(manifest.get("run", {}), run, manifest_path)
    if not output.is_file() or sha256_of(output) != manifest.get("sha256"):
        print(f"{output} is missing or damaged: computed again")
        return False
    return True
