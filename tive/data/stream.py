"""The records of a data file as a stream of raw JSON text: a JSON list or JSON Lines, read and written."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tive.util.errors import UserError
from tive.util.files import whole_file

MAX_RECORD_BYTES = 64 << 20
READ_BYTES = 4 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


def stream_records(
    path: str | os.PathLike[str], digest: hashlib._Hash | None = None
) -> Iterator[tuple[int, bytes, Any]]:
    """Yield `(byte offset, raw bytes, parsed record)` of each record of a JSON list or of JSON Lines.

    Args:
        digest: is fed with every byte of the file.

    Raises:
        UserError: the file is not there, is neither format, breaks off, or holds a record above 64 MiB.
    """
    path = Path(path)
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, by the generator's own end
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    size = os.path.getsize(path)
    with file, tqdm(total=size, desc=f"Reading {path.name}", unit="B", unit_scale=True, delay=2) as bar:
        yield from _TextStream(path, file, digest, bar).records()


class _TextStream:
    """What is decoded but not parsed yet: `text[position:]`, which starts at byte `offset` of the file."""

    def __init__(self, path: Path, file: Any, digest: hashlib._Hash | None, bar: tqdm) -> None:
        self.path, self.file, self.digest, self.bar = path, file, digest, bar
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.parse = json.JSONDecoder().raw_decode
        self.text, self.position, self.offset, self.row, self.at_end = "", 0, 0, 0, False

    def fail(self, what: str) -> UserError:
        where = f"record {self.row}, byte {self.offset}"
        return UserError(f"{self.path}: {what} ({where}); repair or download the file again")

    def read_more(self) -> None:
        try:
            block = self.file.read(max(READ_BYTES, len(self.text) - self.position))
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror}; check the disk") from error
        self.at_end = not block
        if self.digest is not None:
            self.digest.update(block)
        self.bar.update(len(block))
        try:
            self.text = self.text[self.position :] + self.decoder.decode(block, final=self.at_end)
        except UnicodeDecodeError as error:
            raise self.fail(f"not UTF-8 text ({error.reason})") from error
        self.position = 0

    def skip_space(self) -> str:
        """Move to the next character that is not white space and return it; "" at the end of the file."""
        while True:
            end = _SPACE.match(self.text, self.position).end()  # type: ignore[union-attr]
            self.offset += end - self.position
            self.position = end
            if end < len(self.text):
                return self.text[end]
            if self.at_end:
                return ""
            self.read_more()

    def step(self) -> None:
        """Move past the one-byte character at hand."""
        self.position += 1
        self.offset += 1

    def record(self) -> tuple[int, bytes, Any]:
        reason = "it does not end"
        while True:
            try:
                record, end = self.parse(self.text, self.position)
                # A number or a word at the end of what was read may go on.
                if end < len(self.text) or self.at_end:
                    break
            except RecursionError as error:
                raise self.fail("a record is nested too deeply") from error
            except ValueError as error:
                reason = getattr(error, "msg", str(error))
                if self.at_end:
                    raise self.fail(f"not JSON: {reason}, or the file breaks off") from error
            if len(self.text) - self.position > MAX_RECORD_BYTES:
                raise self.fail(f"not JSON: {reason}, or one record above {MAX_RECORD_BYTES >> 20} MiB")
            self.read_more()
        raw = self.text[self.position : end].encode()
        if len(raw) > MAX_RECORD_BYTES:
            raise self.fail(f"one record above {MAX_RECORD_BYTES >> 20} MiB")
        start, self.position = self.offset, end
        self.offset += len(raw)
        self.row += 1
        return start, raw, record

    def records(self) -> Iterator[tuple[int, bytes, Any]]:
        first = self.skip_space()
        if first == "\ufeff":
            self.position, self.offset = self.position + 1, self.offset + 3
            first = self.skip_space()
        if first == "":
            raise self.fail("the file is empty")
        if first == "{":
            while self.skip_space():
                yield self.record()
            return
        if first != "[":
            raise self.fail("neither a JSON list of records nor JSON Lines")
        self.step()
        if self.skip_space() == "]":
            self.step()
        else:
            while True:
                yield self.record()
                separator = self.skip_space()
                if separator not in (",", "]"):
                    raise self.fail("not JSON: a comma or the closing bracket is missing, or the file breaks off")
                self.step()
                if separator == "]":
                    break
                self.skip_space()
        if self.skip_space():
            raise self.fail("text stands after the end of the list")


def is_json_lines(path: str | os.PathLike[str]) -> bool:
    """Whether a data file that `stream_records` reads is JSON Lines; its first character tells.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(len(codecs.BOM_UTF8)).removeprefix(codecs.BOM_UTF8).strip()
            while not head and (block := file.read(4096)):
                head = block.strip()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
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
