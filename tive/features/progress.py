"""A chunk under way: windows of rows, each computed once, verified, and found again after any stop.

`DIR/progress_{k}/` holds the features of finished windows in one file of the final size, and one small JSON a window
with its checksum, its records' scores and those left out. The last step writes the chunk's files from it and removes
it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
import torch

from tive.features.manifest import LeftOutRecord, RecordScores, Run
from tive.util.errors import UserError
from tive.util.files import write_json

FINAL_FILES = ("manifest_{}.json", "output_{}.pt", "output_norm_{}.json")


@dataclass(frozen=True)
class WindowState:
    """What is known of a finished window beside its features; `limits` are the batch limits in force at its end."""

    scores: RecordScores
    left_out: list[LeftOutRecord]
    limits: tuple[int, int]


@dataclass(frozen=True)
class _Written:
    """A window's JSON."""

    scores: dict[str, list[float | None]]
    left_out: list[LeftOutRecord]
    limits: tuple[int, int]
    sha256: str


class Progress:
    """The windows of one chunk on disk. The caller holds the chunk, and has refused other runs in the folder.

    Raises:
        UserError: the disk is too small.
    """

    def __init__(self, folder: Path, run: Run, overwrite: bool) -> None:
        self.run, self.rows = run, run.rows
        self.folder = progress_folder(folder, run.chunk_idx)
        if overwrite:
            remove_progress(folder, run.chunk_idx)
        # A chunk under way has no final files: those of an earlier run could be taken for its own.
        for name in FINAL_FILES:
            (folder / name.format(run.chunk_idx)).unlink(missing_ok=True)
        write_json(self.folder / "run.json", run.known())
        self.run_digest = hashlib.sha256(json.dumps(run.known(), sort_keys=True).encode())
        self.file = self._open_features()

    def _open_features(self) -> IO[bytes]:
        path, size = self.folder / "features.f16", len(self.rows) * self.run.proj_dim * 2
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
                f"cannot reserve {size / 1e9:.3g} GB in {self.folder}: {error.strerror}; free space or name "
                "another folder"
            ) from error
        return os.fdopen(descriptor, "r+b", buffering=0)

    def windows(self) -> list[range]:
        """All the windows of the chunk, in order."""
        starts = range(self.rows.start, self.rows.stop, self.run.window)
        return [range(start, min(start + self.run.window, self.rows.stop)) for start in starts]

    def state(self, rows: range) -> WindowState | None:
        """The state of a finished window, or None where there is none or its features' checksum is wrong."""
        path = self._state_path(rows)
        if not path.is_file():
            return None
        try:
            written = msgspec.json.decode(path.read_bytes(), type=_Written)
            arrays = {name: _from_json(name, values) for name, values in written.scores.items()}
            scores = RecordScores(el2n=arrays.pop("el2n", None), **arrays)
            state = WindowState(scores, written.left_out, written.limits)
            features = os.pread(self.file.fileno(), len(rows) * self.run.proj_dim * 2, self._offset(rows))
            whole = written.sha256 == self._checksum(features, state)
            whole = whole and all(len(array) == len(rows) for array in scores.arrays().values())
        except (OSError, ArithmeticError, ValueError, TypeError):
            whole = False
        if not whole:
            print(f"records {rows.start} to {rows.stop - 1}: damaged on disk, computed again")
            return None
        return state

    def write(self, rows: range, features: np.ndarray, state: WindowState) -> None:
        """Put a window on disk for good: its features (float16 `[n, d]`) first, then the state that they are there."""
        data = features.tobytes()
        try:
            os.pwrite(self.file.fileno(), data, self._offset(rows))
            os.fsync(self.file.fileno())
        except OSError as error:
            raise UserError(f"cannot write to {self.folder}: {error.strerror}; the same command continues") from error
        scores = {
            name: [value if value - value == 0 else None for value in array.tolist()]
            for name, array in state.scores.arrays().items()
        }
        written = _Written(scores, state.left_out, state.limits, self._checksum(data, state))
        write_json(self._state_path(rows), asdict(written), indent=None)

    def _checksum(self, features: bytes, state: WindowState) -> str:
        digest = self.run_digest.copy()
        digest.update(features)
        for array in state.scores.arrays().values():
            digest.update(array.tobytes())
        digest.update(json.dumps([[asdict(entry) for entry in state.left_out], state.limits]).encode())
        return digest.hexdigest()

    def _offset(self, rows: range) -> int:
        return (rows.start - self.rows.start) * self.run.proj_dim * 2

    def _state_path(self, rows: range) -> Path:
        return self.folder / f"window_{rows.start:09d}.json"

    def features(self) -> torch.Tensor:
        """The chunk's features, float16 `[n, d]`, memory-mapped."""
        shape = (len(self.rows), self.run.proj_dim)
        if not len(self.rows):
            return torch.empty(shape, dtype=torch.float16)
        return torch.from_numpy(np.memmap(self.file, np.float16, "r+", shape=shape))


def _from_json(name: str, values: list[float | None]) -> np.ndarray:
    numbers = [np.nan if value is None else value for value in values]
    return np.array(numbers, np.int32 if name.endswith("tokens") else np.float32)


def progress_folder(folder: Path, chunk: int) -> Path:
    return folder / f"progress_{chunk}"


def remove_progress(folder: Path, chunk: int) -> None:
    """Remove what a finished chunk does not need."""
    progress = progress_folder(folder, chunk)
    if progress.is_dir():
        shutil.rmtree(progress)
