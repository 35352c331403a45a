"""The records of a data file: how many, each by its row, the file's fingerprint, and some of them written again.

A data file is a JSON list of records, or JSON Lines. A record stays on disk, and memory holds where it lies: 665,298
records cost megabytes, and those that are selected are written byte for byte as they came. msgspec finds and parses the
records; Python's own reader takes a second look at what msgspec refuses: it reads what msgspec does not (NaN, half of a
surrogate pair, 1e999), and it tells what is wrong with the rest.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from tqdm import tqdm

from tive.data.containers import open_data_file
from tive.data.parquet import TableRecords, is_table, open_table, write_table
from tive.util.errors import UserError
from tive.util.files import whole_file
from tive.util.text import shown_value

MAX_RECORD_BYTES = 64 << 20
_START = re.compile(rb"(?:\xef\xbb\xbf)?[ \t\n\r]*")
_SPACE = re.compile(r"[ \t\n\r]*")
_GAP = re.compile(rb"[ \t\n\r]*,?[ \t\n\r]*")

_parse_strictly = msgspec.json.Decoder().decode
_parse_leniently = json.JSONDecoder().raw_decode
_split_list = msgspec.json.Decoder(list[msgspec.Raw]).decode
_split_lines = msgspec.json.Decoder(msgspec.Raw).decode_lines
# All that msgspec raises; a UnicodeDecodeError is a ValueError.
_REFUSED = (msgspec.MsgspecError, ValueError, RecursionError)


@dataclass(frozen=True)
class JsonRecords:
    """A JSON list or JSON Lines.

    Attributes:
        fingerprint: SHA-256 of the file.
        starts, lengths: where each record lies, int64 `[n]`, in bytes.
        is_lines: the file is JSON Lines.
    """

    path: Path
    fingerprint: str
    starts: np.ndarray
    lengths: np.ndarray
    is_lines: bool

    def __len__(self) -> int:
        return len(self.starts)

    def raw(self, row: int) -> bytes:
        """The record's text as it stands in the file."""
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), int(self.lengths[row]), int(self.starts[row]))

    def __getitem__(self, row: int) -> Any:
        return self._parsed(row, self.raw(row))

    def __iter__(self) -> Iterator[Any]:
        """Every record in turn, read once from front to back."""
        texts = tqdm(self.texts(), f"Reading {self.path.name}", len(self), unit=" records", delay=2)
        return (self._parsed(row, text) for row, text in enumerate(texts))

    def texts(self, rows: Iterable[int] | None = None) -> Iterator[memoryview]:
        """The text of every record in turn, or of those of `rows`, as it stands in the file."""
        with open_data_file(self.path) as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        starts, lengths = self.starts, self.lengths
        if rows is not None:
            rows = np.fromiter(rows, np.int64)
            starts, lengths = starts[rows], lengths[rows]
        for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
            yield content[start : start + length]

    def _parsed(self, row: int, raw: bytes | memoryview) -> Any:
        try:
            return parse_record(raw)
        except (RecursionError, ValueError) as error:
            raise _damaged(self.path, error, row, int(self.starts[row])) from error


# What every room reads: length, a record by row, all in turn, fingerprint, path; and `write_records`.
Records = JsonRecords | TableRecords


def parse_record(raw: bytes | memoryview) -> Any:
    """The value of a record's text; a `ValueError` where it is not JSON in UTF-8, a `RecursionError` where it nests too
    deep.
    """
    try:
        return _parse_strictly(raw)
    except _REFUSED:
        return json.loads(str(raw, "utf-8"))  # bytes could hold half of a surrogate pair, which is no UTF-8


def open_records(path: str | os.PathLike[str]) -> Records:
    """Find every record of a data file: a JSON list, JSON Lines, Parquet, Arrow, or a folder of Parquet or Arrow; a
    `UserError` where it is none of these, breaks off, or holds no record or one above 64 MiB."""
    path = Path(path)
    if is_table(path):
        return open_table(path)
    with open_data_file(path) as file:
        is_empty = not os.fstat(file.fileno()).st_size
        content = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    position = _START.match(content).end()  # type: ignore[union-attr]  # it matches nothing too
    first = content[position : position + 1]
    if first not in (b"[", b"{"):
        what = "neither a JSON list of records nor JSON Lines; name a data file, or convert this one"
        raise UserError(f"{path}: {what if first else 'the file is empty; download it again'}")
    is_lines = first == b"{"
    places = _places(content, position, is_lines)
    if places is None:
        places = _places_slowly(path, content, position, is_lines)
    if not len(places):
        raise UserError(f"{path} holds no records; name a data file with at least one")
    starts, lengths = np.ascontiguousarray(places.T)
    if lengths.max() > MAX_RECORD_BYTES:
        row = int(np.argmax(lengths > MAX_RECORD_BYTES))
        raise _damaged(path, f"one record above {MAX_RECORD_BYTES >> 20} MiB", row, int(starts[row]))
    return JsonRecords(path, hashlib.sha256(content).hexdigest(), starts, lengths, is_lines)


def _damaged(path: Path, what: str | Exception, row: int, position: int) -> UserError:
    if isinstance(what, UnicodeDecodeError):
        what = f"not UTF-8 text ({what.reason}; iconv turns another encoding into it)"
    elif isinstance(what, RecursionError):
        what = "a record is nested too deeply"
    elif isinstance(what, ValueError):
        what = f"not JSON: {getattr(what, 'msg', what)}, or the file breaks off"
    return UserError(f"{path}: {what} (record {row}, byte {position}); repair or download the file again")


def _places(content: mmap.mmap | bytes, position: int, is_lines: bool) -> np.ndarray | None:
    """Start and length of each record, int64 `[n, 2]`; None where msgspec refuses the file."""
    try:
        raws = (_split_lines if is_lines else _split_list)(memoryview(content)[position:])
    except _REFUSED:
        return None
    lengths = np.fromiter((len(memoryview(raw)) for raw in raws), np.int64, len(raws))
    starts = np.empty_like(lengths)
    position += not is_lines
    for row, length in enumerate(lengths.tolist()):
        starts[row] = position = _GAP.match(content, position).end()  # type: ignore[union-attr]  # it matches nothing too
        position += length
    return np.stack([starts, lengths], axis=1)


def _places_slowly(path: Path, content: mmap.mmap | bytes, position: int, is_lines: bool) -> np.ndarray:
    """`_places` by Python's reader; a `UserError` says what is wrong with the file, and where."""
    text = str(memoryview(content), "latin-1")  # a letter a byte; UTF-8 is asked for when a record is parsed
    places: list[tuple[int, int]] = []

    def after_space(at: int) -> int:
        return _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it matches nothing too

    at = after_space(position + (not is_lines))
    is_closed = not is_lines and text[at : at + 1] == "]"
    at = after_space(at + is_closed)
    while at < len(text) if is_lines else not is_closed:
        try:
            end = _parse_leniently(text, at)[1]
        except (RecursionError, ValueError) as error:
            raise _damaged(path, error, len(places), at) from error
        places.append((at, end - at))
        at = after_space(end)
        if not is_lines:
            is_closed = text[at : at + 1] == "]"
            if not is_closed and text[at : at + 1] != ",":
                what = "not JSON: a comma or the closing bracket is missing, or the file breaks off"
                raise _damaged(path, what, len(places), at)
            at = after_space(at + 1)
    if at < len(text):
        raise _damaged(path, "text stands after the end of the list", len(places), at)
    return np.array(places, np.int64).reshape(-1, 2)


def whole_records(records: Records, rows: Sequence[int] | None = None) -> Iterator[Any]:
    """Some records in turn, or all, with the bytes of the images in their rows."""
    if rows is None and not (isinstance(records, TableRecords) and records.image_columns):
        return iter(records)  # read from front to back
    rows = range(len(records)) if rows is None else rows
    return (records[row] for row in tqdm(rows, f"Reading {records.path.name}", unit=" records", delay=2))


def suffix_of(path: str | os.PathLike[str]) -> str:
    """How the name of a file ends that `write_records` writes from the records at a path."""
    return ".parquet" if is_table(Path(path)) else ".json"


def check_suffix(path: str | os.PathLike[str], records: Records) -> None:
    """Raise a `UserError` where a file's name is not of the kind that records are written as."""
    if (Path(path).suffix == ".parquet") != isinstance(records, TableRecords):
        raise UserError(
            f"{path} is to hold records of {records.path}: name a file that ends in {suffix_of(records.path)}"
        )


def write_records(
    path: str | os.PathLike[str],
    records: Records,
    rows: Iterable[int],
    columns: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write the records of `rows`, in that order: of JSON as a JSON list, each byte for byte as it came; of a table as
    Parquet, with its schema and metadata. A `UserError` where the file cannot be written, or its name is of the other
    kind.

    Args:
        columns: of a table's columns, those that get other values, or are new; a text for each of `rows`.
    """
    check_suffix(path, records)
    with whole_file(path) as file:
        copy_records(file, records, rows, columns)


def copy_records(
    file: BinaryIO, records: Records, rows: Iterable[int], columns: Mapping[str, Sequence[str]] | None = None
) -> None:
    """`write_records` into an open file."""
    if isinstance(records, TableRecords):
        write_table(file, records, rows, columns or {})
    else:
        _write_texts(file, records.texts(rows), lines=False)


def write_texts(path: str | os.PathLike[str], texts: Iterable[bytes | memoryview], lines: bool = False) -> None:
    """Write the text of records as a JSON list, or as JSON Lines; whole or not at all."""
    with whole_file(path) as file:
        _write_texts(file, texts, lines)


def _write_texts(file: BinaryIO, texts: Iterable[bytes | memoryview], lines: bool) -> None:
    empty = True
    for text in texts:
        if lines:
            # JSON strings hold no bare line break: those that stand here are white space between tokens.
            file.write(bytes(text).replace(b"\r", b" ").replace(b"\n", b" ") + b"\n")
        else:
            file.write(b"[\n" if empty else b",\n")
            file.write(text)
        empty = False
    if not lines:
        file.write(b"[]\n" if empty else b"\n]\n")


def name_of(row: int, record: Any) -> str:
    """How a message names a record of a file: its row, and the id where there is one."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"record {row}" + (f" (id {shown_value(identity)})" if identity is not None else "")


def chunk_range(count: int, num_chunks: int, chunk_idx: int) -> range:
    """Rows of chunk K of N: `[K*c, (K+1)*c)` with `c = ceil(count/N)`, empty past the end; a `UserError` where K is not
    one of 0 to N - 1."""
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise UserError(f"chunk_idx {chunk_idx} is not one of 0 .. {num_chunks - 1} (num_chunks {num_chunks})")
    size = math.ceil(count / num_chunks)
    return range(min(chunk_idx * size, count), min((chunk_idx + 1) * size, count))
