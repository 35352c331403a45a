"""Results of consecutive records on disk, window by window, found again after any stop.

`FOLDER/match.json` says what they depend on, `FOLDER/window_{first row}.json` holds a window's columns and the records
that it left out, with a checksum, and `FOLDER/features.f16` the features of all rows.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import torch

from tive.util.errors import UserError
from tive.util.files import write_json


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


@dataclass(frozen=True)
class LeftOutRecord:
    """A record without results: its row in the data file, its id if that is a text or a number, and the reason."""

    row: int
    id: str | int | None
    reason: str


@dataclass(frozen=True)
class Window:
    """Rows whose results are written together.

    Attributes:
        columns: what is known of each record, `[n]` by name; NaN or 0 for a record that is left out.
    """

    rows: range
    columns: dict[str, np.ndarray]
    left_out: list[LeftOutRecord]


@dataclass(frozen=True)
class _WindowFile:
    columns: dict[str, list[float | None]]
    left_out: list[LeftOutRecord]
    sha256: str


class Store:
    """The results of `rows` as far as they are on disk; the caller holds the lock.

    Attributes:
        windows: those on disk, in order; a damaged one is removed and missing.

    Args:
        match: what the results depend on.
        types: the columns of a window and their types.
        dimension: of the features, 0 where there are none.

    Raises:
        UserError: the disk is too small.
    """

    def __init__(
        self, folder: Path, rows: range, match: Mapping[str, Any], types: Mapping[str, type], dimension: int = 0
    ) -> None:
        self.folder, self.rows, self.types, self.dimension = folder, rows, types, dimension
        self.digest = hashlib.sha256(json.dumps(match, sort_keys=True).encode())
        write_json(folder / "match.json", match)
        self.file = self._reserve() if dimension else None
        self.windows = self._read()

    def _reserve(self) -> IO[bytes]:
        """Take the space of all features now, so that a full disk stops the run before it begins."""
        path, size = self.folder / "features.f16", len(self.rows) * self.dimension * 2
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(descriptor).st_size != size:
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

    def _read(self) -> list[Window]:
        windows: list[Window] = []
        for path in sorted(self.folder.glob("window_*.json")):
            window = self._window(path)
            if window is None or (windows and windows[-1].rows.stop > window.rows.start):
                print(f"{path} is damaged or of another version: its records are computed again")
                path.unlink()
            else:
                windows.append(window)
        return windows

    def _window(self, path: Path) -> Window | None:
        """A window on disk, or None where its checksum is wrong."""
        try:
            content = msgspec.json.decode(path.read_bytes(), type=_WindowFile)
            start, count = int(path.stem.removeprefix("window_")), len(next(iter(content.columns.values())))
            columns = {name: _from_json(content.columns[name], kind) for name, kind in self.types.items()}
            window = Window(range(start, start + count), columns, content.left_out)
            features = self._read_features(window.rows)
            inside = self.rows.start <= start and window.rows.stop <= self.rows.stop
            whole = inside and count > 0 and all(len(values) == count for values in columns.values())
            return window if whole and content.sha256 == self._checksum(window, features) else None
        except (OSError, ArithmeticError, ValueError, TypeError, LookupError, StopIteration):
            return None

    def missing(self, size: int) -> list[range]:
        """The rows that are not on disk, in windows of at most `size`."""
        ends = [*(window.rows for window in self.windows), range(self.rows.stop, self.rows.stop)]
        starts = [self.rows.start, *(window.rows.stop for window in self.windows)]
        gaps = [range(start, end.start) for start, end in zip(starts, ends, strict=True)]
        return [gap[first : first + size] for gap in gaps for first in range(0, len(gap), size)]

    def empty(self, rows: range) -> dict[str, np.ndarray]:
        """The columns of rows that nothing is known of, and their `features`, float16 `[n, d]`."""
        columns: dict[str, np.ndarray] = {
            name: np.full(len(rows), np.nan if kind is np.float32 else 0, kind) for name, kind in self.types.items()
        }
        return columns | {"features": np.zeros((len(rows), self.dimension), np.float16)}

    def write(self, window: Window, features: np.ndarray | None = None) -> None:
        """Put a window on disk for good: its features (float16 `[n, d]`) first, then the file that says that they are.

        Raises:
            UserError: the disk is full.
        """
        data = b"" if features is None else features.tobytes()
        if self.file is not None:
            try:
                os.pwrite(self.file.fileno(), data, self._offset(window.rows))
                os.fsync(self.file.fileno())
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder}: {error.strerror}; free space; the same command continues"
                ) from error
        columns = {
            name: [value if value - value == 0 else None for value in values.tolist()]
            for name, values in window.columns.items()
        }
        content = asdict(_WindowFile(columns, window.left_out, self._checksum(window, data)))
        write_json(self.folder / f"window_{window.rows.start:09d}.json", content, indent=None)
        self.windows = sorted([*self.windows, window], key=lambda window: window.rows.start)

    def columns(self) -> dict[str, np.ndarray]:
        """The columns of all windows on disk, one after the other."""
        return {
            name: np.concatenate([np.empty(0, kind), *(window.columns[name] for window in self.windows)])
            for name, kind in self.types.items()
        }

    def left_out(self) -> list[LeftOutRecord]:
        """The records that the windows on disk left out."""
        return [entry for window in self.windows for entry in window.left_out]

    def features(self) -> torch.Tensor:
        """The features of all rows, float16 `[n, d]`, memory-mapped."""
        shape = (len(self.rows), self.dimension)
        if self.file is None or not len(self.rows):
            return torch.empty(shape, dtype=torch.float16)
        return torch.from_numpy(np.memmap(self.file, np.float16, "r+", shape=shape))

    def remove(self) -> None:
        """Remove everything from disk."""
        shutil.rmtree(self.folder)

    def _read_features(self, rows: range) -> bytes:
        size = len(rows) * self.dimension * 2
        return b"" if self.file is None else os.pread(self.file.fileno(), size, self._offset(rows))

    def _checksum(self, window: Window, features: bytes) -> str:
        digest = self.digest.copy()
        digest.update(features)
        for name in self.types:
            digest.update(window.columns[name].tobytes())
        digest.update(json.dumps([window.rows.start, [asdict(entry) for entry in window.left_out]]).encode())
        return digest.hexdigest()

    def _offset(self, rows: range) -> int:
        return (rows.start - self.rows.start) * self.dimension * 2


def _from_json(values: list[float | None], kind: type) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], kind)
