"""The records of a data file as a stream of raw JSON text: a JSON list or JSON Lines, read and written.

msgspec parses; Python's own reader takes a second look at what msgspec refuses: it reads what msgspec does not (NaN,
half of a surrogate pair, 1e999), and it says what is wrong with the rest.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from tqdm import tqdm

from tive.data.containers import open_data_file
from tive.util.errors import UserError
from tive.util.files import whole_file

MAX_RECORD_BYTES = 64 << 20
READ_BYTES = 4 << 20
# How far the end of a record is looked for by what stood between the records before it.
_REACH = 64 << 10
_SPACE = re.compile(rb"[ \t\n\r]*")
_FIRST_KEY = re.compile(rb'\{[ \t\n\r]*"[^"\\]{1,100}"')

_parse_strictly = msgspec.json.Decoder().decode
_parse_leniently = json.JSONDecoder().raw_decode
# All that msgspec raises; a UnicodeDecodeError is a ValueError.
_REFUSED = (msgspec.MsgspecError, ValueError, RecursionError)


def parse_record(raw: bytes) -> Any:
    """The value of a record's raw text, as `stream_records` yields it."""
    try:
        return _parse_strictly(raw)
    except _REFUSED:
        return json.loads(raw)


def stream_records(
    path: str | os.PathLike[str], digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, bytes, Any]]:
    """Yield `(byte offset, raw bytes, parsed record)` of each record of a JSON list or of JSON Lines.

    Args:
        digest: is fed with every byte of the file.

    Raises:
        UserError: the file is not there, is neither format (what it is instead, and the command that turns it into
            records, where that can be told), breaks off, or holds a record above 64 MiB.
    """
    path = Path(path)
    with open_data_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        with tqdm(total=size, desc=f"Reading {path.name}", unit="B", unit_scale=True, delay=2) as bar:
            yield from _Stream(path, file, digest, bar).records()


class _Stream:
    """What is read but not parsed yet: `buffer[position:]`, which starts at byte `offset + position` of the file."""

    def __init__(self, path: Path, file: BinaryIO, digest: hashlib._Hash | None, bar: tqdm) -> None:
        self.path, self.file, self.digest, self.bar = path, file, digest, bar
        self.buffer, self.position, self.offset, self.row, self.at_end = b"", 0, 0, 0, False
        # The end of a record, what stands between it and the next, and the first key of that one.
        self.boundary = b""

    def fail(self, what: str) -> UserError:
        where = f"record {self.row}, byte {self.offset + self.position}"
        return UserError(f"{self.path}: {what} ({where}); repair or download the file again")

    def read_more(self) -> None:
        try:
            block = self.file.read(max(READ_BYTES, len(self.buffer) - self.position))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check the disk") from error
        self.at_end = not block
        if self.digest is not None:
            self.digest.update(block)
        self.bar.update(len(block))
        self.offset += self.position
        self.buffer, self.position = self.buffer[self.position :] + block, 0

    def skip_space(self) -> bytes:
        """Move to the next byte that is not white space and return it; b"" at the end of the file."""
        while True:
            self.position = _SPACE.match(self.buffer, self.position).end()  # type: ignore[union-attr]
            if self.position < len(self.buffer) or self.at_end:
                return self.buffer[self.position : self.position + 1]
            self.read_more()

    def record(self) -> tuple[int, bytes, Any]:
        """The record at hand; the position moves to its end."""
        raw, record = self.by_boundary() or self.by_second_look()
        start = self.offset + self.position
        self.position += len(raw)
        self.row += 1
        return start, raw, record

    def by_boundary(self) -> tuple[bytes, Any] | None:
        """The record up to where the boundary of the last one is met again; None where that is no record.

        A JSON value that starts at the record's first byte and ends at the boundary is the record, whatever follows.
        """
        if not self.boundary:
            return None
        end = self.buffer.find(self.boundary, self.position, self.position + _REACH)
        if end < 0 and len(self.buffer) - self.position < _REACH and not self.at_end:
            self.read_more()
            end = self.buffer.find(self.boundary, self.position, self.position + _REACH)
        if end < 0:
            return None
        raw = self.buffer[self.position : end + 1]
        try:
            return raw, _parse_strictly(raw)
        except _REFUSED:
            return None

    def by_second_look(self) -> tuple[bytes, Any]:
        """The record at hand by Python's reader, which finds its end itself, from pieces of growing size."""
        size, reason = min(4096, MAX_RECORD_BYTES), "it does not end"
        while True:
            while len(self.buffer) - self.position < size and not self.at_end:
                self.read_more()
            piece = self.buffer[self.position : self.position + size]
            last = self.at_end and self.position + size >= len(self.buffer)
            try:
                text = codecs.utf_8_decode(piece, "strict", last)[0]
                record, end = _parse_leniently(text)
                # A number or a word at the end of the piece may go on.
                if end < len(text) or last:
                    break
            except RecursionError as error:
                raise self.fail("a record is nested too deeply") from error
            except UnicodeDecodeError as error:
                raise self.fail(f"not UTF-8 text ({error.reason}; iconv turns another encoding into it)") from error
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                if last:
                    raise self.fail(f"not JSON: {reason}, or the file breaks off") from error
            if len(piece) > MAX_RECORD_BYTES:
                raise self.fail(f"not JSON: {reason}, or one record above {MAX_RECORD_BYTES >> 20} MiB")
            size *= 2
        raw = text[:end].encode()
        if len(raw) > MAX_RECORD_BYTES:
            raise self.fail(f"one record above {MAX_RECORD_BYTES >> 20} MiB")
        self.learn_boundary(self.position + len(raw))
        return raw, record

    def learn_boundary(self, end: int) -> None:
        """Remember what stands between the record that ends at `buffer[end]` and the next one."""
        gap = re.compile(rb"[ \t\n\r]*,?[ \t\n\r]*").match(self.buffer, end)
        key = _FIRST_KEY.match(self.buffer, gap.end())  # type: ignore[union-attr]
        self.boundary = self.buffer[end - 1 : key.end()] if key else b""

    def records(self) -> Iterator[tuple[int, bytes, Any]]:
        while len(self.buffer) < len(codecs.BOM_UTF8) and not self.at_end:
            self.read_more()
        if self.buffer.startswith(codecs.BOM_UTF8):
            self.position += len(codecs.BOM_UTF8)
        first = self.skip_space()
        if first == b"":
            raise self.fail("the file is empty")
        if first == b"{":
            while self.skip_space():
                yield self.record()
            return
        if first != b"[":
            raise self.fail("neither a JSON list of records nor JSON Lines")
        self.position += 1
        if self.skip_space() == b"]":
            self.position += 1
        else:
            while True:
                yield self.record()
                separator = self.skip_space()
                if separator not in (b",", b"]"):
                    raise self.fail("not JSON: a comma or the closing bracket is missing, or the file breaks off")
                self.position += 1
                if separator == b"]":
                    break
                self.skip_space()
        if self.skip_space():
            raise self.fail("text stands after the end of the list")


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether a data file that `stream_records` reads is JSON Lines; its first character tells.

    Raises:
        UserError: as `stream_records`, for a file that is not there or of another kind.
    """
    with open_data_file(path) as file:
        head = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8).strip()
        while not head and (block := file.read(4096)):
            head = block.strip()
    return head.startswith(b"{")


def write_raw(path: str | os.PathLike[str], texts: Iterable[bytes], lines: bool = False) -> None:
    """Write the raw text of records as a JSON list, or as JSON Lines; whole or not at all."""
    with whole_file(path) as file:
        append_raw(file, texts, lines)


def append_raw(file: BinaryIO, texts: Iterable[bytes], lines: bool = False) -> None:
    """`write_raw` into an open file."""
    empty = True
    for text in texts:
        if lines:
            # JSON strings hold no bare line break: those that stand here are white space between tokens.
            file.write(text.replace(b"\r", b" ").replace(b"\n", b" ") + b"\n")
        else:
            file.write(b"[\n" if empty else b",\n")
            file.write(text)
        empty = False
    if not lines:
        file.write(b"[]\n" if empty else b"\n]\n")
