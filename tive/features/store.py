"""Results of consecutive records on disk, window by window, read again after any stop; and a chunk that is begun.

`FOLDER/match.json` says what they depend on, `FOLDER/features.f16` holds the features of all rows, and
`FOLDER/window_{first row}_{end}` a checksum, a window's columns, and the records that it left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from tive.features.chunk import COLUMNS, COMMON_KEYS, Match, match_of_manifest, read_manifest
from tive.util.errors import UserError
from tive.util.files import sha256_of, whole_file, write_json
from tive.util.text import shown

FINAL_FILES = ("manifest_{}.json", "output_{}.pt", "output_norm_{}.json")
_UNTIL_LOADED = ("counted_parameters", "projector")


class Store:
    """The results of `rows` as far as they are on disk; the caller holds the lock.

    Attributes:
        windows: the rows of those on disk, in order; a damaged one is removed and missing.
        columns: of all rows, `[n]` by name; NaN or 0 where nothing is known.
        left_out: the rows that the windows have no results of, and why.

    Args:
        match: what the results depend on.
        types: the columns and their types.
        dimension: of the features, 0 where there are none.

    Raises:
        UserError: the disk is too small.
    """

    def __init__(
        self, folder: Path, rows: range, match: Mapping[str, Any], types: Mapping[str, type], dimension: int = 0
    ) -> None:
        self.folder, self.rows, self.types, self.dimension = folder, rows, types, dimension
        self.windows: list[range] = []
        self.left_out: dict[int, str] = {}
        self.columns = self.empty(rows)
        self.digest = hashlib.sha256(json.dumps([match, list(types)], sort_keys=True).encode())
        write_json(folder / "match.json", match)
        self.file = self._reserve() if dimension else None
        for path in sorted(folder.glob("window_*")):
            if not self._read(path):
                print(f"{path} is damaged or of another version: its records are computed again")
                path.unlink()

    def _reserve(self) -> IO[bytes]:
        """Take the space of all features now, so that a full disk stops the run before it begins."""
        path, size = self.folder / "features.f16", len(self.rows) * self.dimension * 2
        try:
            if not path.is_file() or path.stat().st_size != size:
                with open(path, "wb") as file:
                    if size and hasattr(os, "posix_fallocate"):  # not on macOS
                        os.posix_fallocate(file.fileno(), 0, size)
                    file.truncate(size)
            return open(path, "r+b", buffering=0)
        except OSError as error:
            raise UserError(
                f"cannot reserve {size / 1e9:.3g} GB in {self.folder}: {error.strerror}; free space or name another "
                "folder; the same command continues"
            ) from error

    def _read(self, path: Path) -> bool:
        """Take a window from disk, where its checksum is right and its rows are missing."""
        name = re.fullmatch(r"window_(\d{9})_(\d{9})", path.name)
        rows = range(int(name[1]), int(name[2])) if name else range(0)
        first = self.windows[-1].stop if self.windows else self.rows.start
        if not rows or rows.start < first or rows.stop > self.rows.stop:
            return False
        data = path.read_bytes()
        features = b"" if self.file is None else os.pread(self.file.fileno(), *self._place(rows))
        if data[:32] != self._checksum(rows, features, data[32:]):
            return False
        left_out, _, numbers = data[32:].partition(b"\n")
        columns: dict[str, np.ndarray] = {}
        for place, (column, kind) in enumerate(self.types.items()):
            columns[column] = np.frombuffer(numbers, kind, len(rows), 4 * len(rows) * place)
        self._take(rows, columns, dict(json.loads(left_out)))
        return True

    def _take(self, rows: range, columns: Mapping[str, np.ndarray], left_out: Mapping[int, str]) -> None:
        for name in self.types:
            self.columns[name][rows.start - self.rows.start : rows.stop - self.rows.start] = columns[name]
        self.windows = sorted([*self.windows, rows], key=lambda window: window.start)
        self.left_out |= left_out

    def missing(self, size: int) -> list[range]:
        """The rows that are not on disk, in windows of at most `size`."""
        ends = [*(window.start for window in self.windows), self.rows.stop]
        starts = [self.rows.start, *(window.stop for window in self.windows)]
        gaps = [range(start, end) for start, end in zip(starts, ends, strict=True)]
        return [gap[first : first + size] for gap in gaps for first in range(0, len(gap), size)]

    def empty(self, rows: range) -> dict[str, np.ndarray]:
        """The columns of rows that nothing is known of."""
        types = self.types.items()
        return {name: np.full(len(rows), np.nan if kind is np.float32 else 0, kind) for name, kind in types}

    def write(
        self,
        rows: range,
        columns: Mapping[str, np.ndarray],
        left_out: Mapping[int, str],
        features: np.ndarray | None = None,
    ) -> None:
        """Put a window on disk for good: its features (float16 `[n, d]`) first, then the file that says that they are.

        Raises:
            UserError: the disk is full.
        """
        data = b"" if features is None else features.tobytes()
        if self.file is not None:
            try:
                os.pwrite(self.file.fileno(), data, self._place(rows)[1])
                os.fsync(self.file.fileno())
            except OSError as error:
                raise UserError(
                    f"cannot write to {self.folder}: {error.strerror}; free space; the same command continues"
                ) from error
        numbers = [columns[name].astype(kind, copy=False).tobytes() for name, kind in self.types.items()]
        body = b"".join([json.dumps([*left_out.items()]).encode(), b"\n", *numbers])
        with whole_file(self.folder / f"window_{rows.start:09d}_{rows.stop:09d}") as file:
            file.write(self._checksum(rows, data, body) + body)
        self._take(rows, columns, left_out)

    def features(self) -> np.ndarray:
        """The features of all rows, float16 `[n, d]`, memory-mapped."""
        shape = (len(self.rows), self.dimension)
        if self.file is None or not len(self.rows):
            return np.empty(shape, np.float16)
        return np.memmap(self.file, np.float16, "r+", shape=shape)

    def _checksum(self, rows: range, features: bytes, body: bytes) -> bytes:
        digest = self.digest.copy()
        for part in (str(rows).encode(), features, body):
            digest.update(part)
        return digest.digest()

    def _place(self, rows: range) -> tuple[int, int]:
        """How many bytes the features of rows take in their file, and from where on."""
        bytes_a_row = self.dimension * 2
        return len(rows) * bytes_a_row, (rows.start - self.rows.start) * bytes_a_row


def is_complete(folder: Path, chunk_idx: int) -> bool:
    """Whether a chunk's final files are there and whole; then nothing else is left of it."""
    manifest, output = (folder / form.format(chunk_idx) for form in FINAL_FILES[:2])
    if not manifest.is_file():
        return False
    try:
        _, made = read_manifest(manifest, chunk_idx)
    except UserError:
        made = {}
    if not output.is_file() or sha256_of(output) != made.get("sha256"):
        print(f"{output} or its manifest is damaged or missing: computed again")
        return False
    if (progress := folder / f"progress_{chunk_idx}").is_dir():
        shutil.rmtree(progress)
    return True


def refuse_other_runs(folder: Path, match: Match) -> None:
    """Refuse to go on with a chunk of a run that differs, and to put chunks of different runs in one folder.

    Raises:
        UserError: what differs.
    """
    for path in sorted([*folder.glob("progress_*/match.json"), *folder.glob("manifest_*.json")]):
        try:
            content = json.loads(path.read_bytes())
            other = match_of_manifest(content if path.name.startswith("manifest") else {"match": content})
        except (OSError, ValueError, TypeError, AttributeError):
            continue  # removed meanwhile, or damaged: the checksums of its windows tell what is still of use
        differences = []
        for name in COMMON_KEYS if other.chunk_idx != match.chunk_idx else [key.name for key in fields(Match)]:
            there, here = getattr(other, name), getattr(match, name)
            unknown = here is None and name in _UNTIL_LOADED
            if there != here and not unknown and not (name == "projector" and there.startswith(here)):
                differences.append(f"{name} {shown(str(there), 24)}, now {shown(str(here), 24)}")
        if differences:
            raise UserError(
                f"{path} is of a run that differs: {', '.join(differences)}; give the same arguments, name another "
                "folder, or start afresh (overwrite)"
            )


def refuse_full_disk(folder: Path, match: Match) -> None:
    """Raise a `UserError` where a chunk's features have no room twice, as finishing them takes."""
    # Space that is taken already: by those of the windows, and by files that make room for the new ones.
    there = [folder / f"progress_{match.chunk_idx}" / "features.f16", *folder.glob(f"*output_{match.chunk_idx}.pt*")]
    taken = sum(path.stat().st_blocks * 512 for path in there if path.is_file())
    needed, free = 4 * len(match.rows) * match.proj_dim - taken, shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"{folder} has {free / 1e9:.3g} GB free, and this chunk needs {needed / 1e9:.3g} GB more while it is made "
            "(its features twice); free space or name another folder; the same command continues"
        )


def begin_chunk(folder: Path, match: Match, overwrite: bool) -> Store:
    """The windows of a chunk that are on disk, to go on with; without final files, and what killed runs left of them.

    Raises:
        UserError: the folder's files are of another run, or the disk is too small.
    """
    progress = folder / f"progress_{match.chunk_idx}"
    if overwrite:
        shutil.rmtree(progress, ignore_errors=True)
    else:
        refuse_other_runs(folder, match)
    for name in [form.format(match.chunk_idx) for form in FINAL_FILES]:
        for path in [folder / name, *folder.glob(f".{name}.*.tmp")]:
            path.unlink(missing_ok=True)
    types = {name: kind for name, kind in COLUMNS.items() if match.has(name)}
    return Store(progress, match.rows, asdict(match), types, match.proj_dim)
