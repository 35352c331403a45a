"""A chunk under way: windows of rows, each computed once, verified, and found again after any stop.

`DIR/progress_{k}/` holds the features of finished windows in one file of the final size, and one small JSON a window
with its checksum, norms and the records left out. The last step writes the chunk's files from it and removes it.
"""

from __future__ import annotations

import errno
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

from tive.features.chunks import COMMON_KEYS
from tive.util.errors import UserError
from tive.util.files import sha256_of, write_json

LeftOutRecord = dict[str, Any]
_FINAL_FILES = ("manifest_{}.json", "output_{}.pt", "output_norm_{}.json")


@dataclass
class Note:
    """What is known of a finished window beside its features.

    `norms` is float32 `[n]`, NaN for a record that was left out; `limits` are the batch limits in force at its end.
    """

    norms: np.ndarray
    left_out: list[LeftOutRecord]
    limits: tuple[int, int]


class Progress:
    """The windows of one chunk on disk. The caller holds the chunk (`hold_chunk`).

    Args:
        folder: the feature folder.
        run: everything that the features depend on; a folder of another run is refused.
        rows: the chunk's rows of the data file.
        overwrite: begin anew, also where another run's files are.

    Raises:
        UserError: the chunk, or another in the folder, was begun by a different run, or the disk is too small.
    """

    def __init__(self, folder: Path, run: dict[str, Any], rows: range, overwrite: bool) -> None:
        self.rows, self.window, self.proj_dim, chunk = rows, run["window"], run["proj_dim"], run["chunk_idx"]
        self.folder = progress_folder(folder, chunk)
        if overwrite:
            remove_progress(folder, chunk)
        else:
            refuse_other_runs(folder, run)
        # A chunk under way has no final files: those of an earlier run could be taken for its own.
        for name in _FINAL_FILES:
            (folder / name.format(chunk)).unlink(missing_ok=True)
        write_json(self.folder / "run.json", run)
        self.run_digest = hashlib.sha256(json.dumps(run, sort_keys=True).encode())
        self.file = self._open_features()

    def _open_features(self) -> IO[bytes]:
        path, size = self.folder / "features.f16", len(self.rows) * self.proj_dim * 2
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(descriptor).st_size != size:
                # The space is taken now, so that a full disk stops the run before it begins.
                os.ftruncate(descriptor, size)
                if hasattr(os, "posix_fallocate"):  # not on macOS
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
            whole = written["sha256"] == self._checksum(features, note) and len(norms) == len(rows)
        except (OSError, ArithmeticError, ValueError, KeyError, TypeError):
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
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; the same command continues") from error
        content = {
            "norms": [float(norm) if np.isfinite(norm) else None for norm in note.norms],
            "left_out": note.left_out,
            "limits": note.limits,
            "sha256": self._checksum(data, note),
        }
        write_json(self._note_path(rows), content, indent=None)

    def _checksum(self, features: bytes, note: Note) -> str:
        digest = self.run_digest.copy()
        digest.update(features)
        digest.update(np.ascontiguousarray(note.norms))
        digest.update(json.dumps([note.left_out, note.limits]).encode())
        return digest.hexdigest()

    def _place(self, rows: range) -> int:
        return (rows.start - self.rows.start) * self.proj_dim * 2

    def _note_path(self, rows: range) -> Path:
        return self.folder / f"window_{rows.start:09d}.json"

    def features(self) -> torch.Tensor:
        """The chunk's features, float16 `[n, d]`, memory-mapped."""
        shape = (len(self.rows), self.proj_dim)
        if not len(self.rows):
            return torch.empty(shape, dtype=torch.float16)
        return torch.from_numpy(np.memmap(self.file, np.float16, "r+", shape=shape))


def progress_folder(folder: Path, chunk: int) -> Path:
    return folder / f"progress_{chunk}"


def remove_progress(folder: Path, chunk: int) -> None:
    """Remove what a finished chunk does not need."""
    progress = progress_folder(folder, chunk)
    if progress.is_dir():
        shutil.rmtree(progress)


def hold_chunk(folder: Path, chunk: int) -> IO[str]:
    """Take the chunk for this process, for as long as the returned file is open, and sweep up after killed ones.

    Raises:
        UserError: another process holds it, or the folder cannot be made or written.
    """
    path = folder / f".lock_{chunk}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115 - held until the process ends, however it ends
    except OSError as error:
        raise UserError(f"cannot write to --output_file {folder}: {error.strerror}; name another folder") from error
    try:
        # Not flock: loader processes would inherit it, and outlive a killed parent by some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"another process is computing chunk {chunk} in {folder}; wait for it or take another chunk"
            ) from error
        print(f"{folder} is on a file system without locks: see that no other process computes chunk {chunk}")
    for name in _FINAL_FILES:
        for left_behind in folder.glob(f".{name.format(chunk)}.*.tmp"):
            left_behind.unlink(missing_ok=True)
    return file


def is_complete(folder: Path, run: dict[str, Any], projector: str) -> bool:
    """Whether the chunk's final files are there, whole, and made by the same run.

    Args:
        run: as for `Progress`, without what is known only when the model is loaded.
        projector: the kind that was asked for, or `auto`.

    Raises:
        UserError: they were made by a different run.
    """
    chunk = run["chunk_idx"]
    manifest_path, output = folder / f"manifest_{chunk}.json", folder / f"output_{chunk}.pt"
    if not manifest_path.is_file():
        return False
    try:
        manifest = json.loads(manifest_path.read_bytes())
        made_by, checksum = manifest["run"], manifest["sha256"]
        kind = {} if projector == "auto" else {"projector": projector}
        _refuse(made_by | {"projector": made_by["projector"].split("/")[0]}, run | kind, manifest_path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        print(f"{manifest_path} is damaged: computed again")
        return False
    if not output.is_file() or sha256_of(output) != checksum:
        print(f"{output} is missing or damaged: computed again")
        return False
    return True


def refuse_other_runs(folder: Path, run: dict[str, Any]) -> None:
    """Refuse to go on with a chunk that a different run began, and to put chunks of different runs in one folder.

    Raises:
        UserError: what differs.
    """
    own = progress_folder(folder, run["chunk_idx"]) / "run.json"
    common = {key: run[key] for key in COMMON_KEYS if key in run}
    for path in sorted([*folder.glob("progress_*/run.json"), *folder.glob("manifest_*.json")]):
        try:
            other = json.loads(path.read_bytes())
            other = other["run"] if path.name.startswith("manifest") else other
            _refuse(other, run if path == own else common, path)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # removed meanwhile, or damaged: the checksums of its windows tell what is still of use


def _refuse(old: dict[str, Any], new: dict[str, Any], where: Path) -> None:
    names = [name for name in new if old.get(name) != new[name]]
    if names:
        differences = ", ".join(f"{name} {_short(old.get(name))}, now {_short(new[name])}" for name in names)
        raise UserError(
            f"{where} is of a run that differs: {differences}; give the same arguments, another --output_file, or "
            "--overwrite to start afresh"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else text[:12] + "..."
