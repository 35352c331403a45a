"""The features of a data file's records: found by row, or in data that changed by what a record holds."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from tive.data.records import Records, open_records
from tive.data.trained import record_hashes, rows_with
from tive.features.chunk import Chunk, Match, open_chunks
from tive.method.influence import Span
from tive.util.device import available_memory
from tive.util.errors import UserError
from tive.util.text import shown

SPAN_ROWS = 4096
_READ_BYTES = 8 << 20
# What features must have in common to be of one space.
SPACE_KEYS = ("model", "grad_modules", "counted_parameters", "projector", "proj_seed", "proj_dim")


def spans_of(chunks: Sequence[Chunk]) -> list[Span]:
    """Every row of the chunks, in order, in spans of at most `SPAN_ROWS`, for the linear passes over them."""
    spans = []
    for chunk in chunks:
        groups: list[list[torch.Tensor]] = []
        room = 0
        for piece in (piece for block in chunk.blocks for piece in block.split(SPAN_ROWS) if len(piece)):
            # The release's tensors of 16 rows are gathered until a span is full.
            if len(piece) > room:
                groups.append([])
                room = SPAN_ROWS
            groups[-1].append(piece)
            room -= len(piece)
        row = chunk.start
        for pieces in groups:
            spans.append(Span(row, sum(map(len, pieces)), partial(_whole, pieces)))
            row += spans[-1].rows
    return spans


def _whole(pieces: list[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)  # one alone is not copied


def _gathered(chunks: list[Chunk], index: np.ndarray) -> torch.Tensor:
    """The features `[n, d]` of rows anywhere among the chunks', zero where the row is -1."""
    first = chunks[0].blocks[0]
    features = torch.zeros(len(index), first.shape[1], dtype=first.dtype)
    for chunk in chunks:
        here = np.flatnonzero((index >= chunk.start) & (index < chunk.stop))
        if len(here):
            rows = torch.from_numpy(index[here] - chunk.start)
            features[torch.from_numpy(here)] = torch.index_select(chunk.blocks[0], 0, rows)
    return features


@dataclass(frozen=True)
class Features:
    """The features of N records.

    Attributes:
        rows: int64 `[N]`, the row of each record's feature among all rows of the chunks; -1 for a record without one.
            Records of equal content share one.
        is_by_row: `rows` is 0 .. N - 1: the features are those of this very file.
    """

    folder: Path
    chunks: list[Chunk]
    rows: np.ndarray
    is_by_row: bool

    @property
    def match(self) -> Match | None:
        """What the chunks have in common; None for the release's files."""
        return self.chunks[0].match

    def column(self, name: str) -> np.ndarray | None:
        """A column of every record, float64 `[N]`, NaN for one without features; None if a chunk lacks it."""
        if any(name not in chunk.scores for chunk in self.chunks):
            return None
        values = np.concatenate([chunk.scores[name] for chunk in self.chunks])
        return values if self.is_by_row else np.where(self.rows < 0, np.nan, values[self.rows])

    def left_out(self) -> dict[int, str]:
        """Why the gradient step left records out, by the record's row."""
        reasons = {entry.row: entry.reason for chunk in self.chunks for entry in chunk.left_out}
        rows = np.flatnonzero(np.isin(self.rows, list(reasons))).tolist()
        return {row: reasons[int(self.rows[row])] for row in rows}

    def spans(self) -> list[Span]:
        """The features in the records' order, for the linear passes over them; zero for a record without."""
        if self.is_by_row:
            return spans_of(self.chunks)
        parts = [self.rows[start : start + SPAN_ROWS] for start in range(0, len(self.rows), SPAN_ROWS)]
        return [Span(n * SPAN_ROWS, len(part), partial(_gathered, self.chunks, part)) for n, part in enumerate(parts)]


def open_features(
    folders: str | os.PathLike[str] | Sequence[str], records: Records, chunk_num: int | None = None
) -> Features:
    """The features of these records: by row where they were taken of this very file, else by content.

    Args:
        folders: one, or several whose features are of one space.
        chunk_num: how many chunks a folder should have, if the caller knows.

    Raises:
        UserError: as `open_chunks`, or the features are of another data file and nothing tells of which records.
    """
    if not isinstance(folders, str | os.PathLike):
        return joined([open_features(folder, records, chunk_num) for folder in folders])
    folder = Path(folders)
    chunks = open_chunks(folder, chunk_num)
    match, total = chunks[0].match, chunks[-1].stop
    if match is None and total != len(records):
        raise UserError(
            f"{folder} holds features of {total} records, {records.path} has {len(records)}; a chunk is missing, or "
            "this is another data file"
        )
    if match is not None and (match.data_sha256, match.data_records) != (records.fingerprint, len(records)):
        return Features(folder, chunks, rows_with(_content_of(folder, chunks, records), record_hashes(records)), False)
    return Features(folder, chunks, np.arange(total), True)


def read_ahead(*folders: str | os.PathLike[str]) -> None:
    """Start to read feature files into the page cache, in order and at most half of the available memory: rows out of
    order, which the passes take, would read a cold disk in small steps (docs/benchmarks.md).
    """

    def read_whole() -> None:
        room = (available_memory() or 0) // 2
        with contextlib.suppress(OSError):  # what cannot be read is left to the one who opens it
            for path in [path for folder in folders for path in sorted(Path(folder).glob("output_*"))]:
                room -= path.stat().st_size
                with open(path, "rb", buffering=0) as file:
                    while room >= 0 and file.read(_READ_BYTES):
                        pass

    threading.Thread(target=read_whole, daemon=True).start()


def joined(parts: list[Features]) -> Features:
    """The features of several folders as one; a `UserError` where they are not of one space, or one adds no record.

    Of a record that several have it is the first folder's.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    rows = np.full(len(first.rows), -1, np.int64)
    chunks: list[Chunk] = []
    for part in parts:
        if not ((rows < 0) & (part.rows >= 0)).any():
            raise UserError(f"{part.folder} holds no record that the folders before it lack; leave it out")
        refuse_other_space(first, part, (*SPACE_KEYS, "gradient", "optimizer_state", "dtype"))
        offset = chunks[-1].stop if chunks else 0
        rows = np.where((rows < 0) & (part.rows >= 0), part.rows + offset, rows)
        for chunk in part.chunks:
            left_out = [replace(entry, row=entry.row + offset) for entry in chunk.left_out]
            start, stop = chunk.start + offset, chunk.stop + offset
            chunks.append(replace(chunk, start=start, stop=stop, left_out=left_out))
    return Features(first.folder, chunks, rows, False)


def match_of(features: Features) -> Match:
    """What the features are; a `UserError` where they are the release's, which do not say it."""
    if features.match is None:
        raise UserError(
            f"{features.folder} holds feature files of the release, which do not say what model they are of; take the "
            "gradients again with compute_gradient_features.py"
        )
    return features.match


def refuse_other_space(first: Features, second: Features, keys: Sequence[str] = SPACE_KEYS) -> None:
    """Raise a `UserError` where two folders' features differ in one of the keys, or do not say what they are of."""
    for key in keys:
        here, there = getattr(match_of(first), key), getattr(match_of(second), key)
        if here != there:
            raise UserError(
                f"{first.folder} and {second.folder} differ in `{key}` ({shown(str(here), 24)} and "
                f"{shown(str(there), 24)}); give folders that belong together, and take both with the same arguments"
            )


def _content_of(folder: Path, chunks: list[Chunk], records: Records) -> np.ndarray:
    """The hashes of a folder's records, uint8 `[M, 16]`: from the chunks, or their data file."""
    contents = [chunk.content for chunk in chunks if chunk.content is not None]
    if len(contents) == len(chunks):
        return np.concatenate(contents)
    match, path = chunks[0].match, chunks[0].manifest.get("data_path")
    if match is not None and isinstance(path, str) and os.path.isfile(path):
        source = open_records(path)
        if source.fingerprint == match.data_sha256:
            return record_hashes(source)
    raise UserError(
        f"{folder} holds features of another data file than {records.path}, of a version that did not store which "
        f"records they are of; keep that file where it was ({shown(str(path), 200)}), name it, or take them again"
    )
