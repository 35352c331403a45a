"""Read, check, group and chunk instruction records.

A data file is a JSON list of records, or JSON Lines. It is read as a stream: a record stays on disk, and what
is kept in memory is where it lies, so 665K records cost megabytes and are written again byte for byte.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.errors import UserError
from tive.files import whole_file

IMAGE_TAG = "<image>"
ROLES = ("human", "gpt")
MAX_RECORD_BYTES = 64 << 20
_READ_BYTES = 4 << 20
_SPACE = re.compile(r"[ \t\n\r]*")


@dataclass(frozen=True)
class RecordFile:
    """Where each record of a data file lies. `offsets` and `lengths` are int64 `[n]`, in bytes."""

    path: Path
    sha256: str
    offsets: np.ndarray
    lengths: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets)

    def raw(self, row: int) -> bytes:
        """The record's text as it stands in the file."""
        with open(self.path, "rb") as file:
            return os.pread(file.fileno(), int(self.lengths[row]), int(self.offsets[row]))

    def __getitem__(self, row: int) -> Any:
        return json.loads(self.raw(row))


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
        block = self.file.read(max(_READ_BYTES, len(self.text) - self.position))
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
        while True:
            try:
                record, end = self.parse(self.text, self.position)
                # A number or a word at the end of what was read may go on.
                if end < len(self.text) or self.at_end:
                    break
            except RecursionError as error:
                raise self.fail("a record is nested too deeply") from error
            except ValueError as error:
                if self.at_end:
                    raise self.fail(f"not JSON: {getattr(error, 'msg', error)}, or the file breaks off") from error
            if len(self.text) - self.position > MAX_RECORD_BYTES:
                raise self.fail(f"not JSON, or one record above {MAX_RECORD_BYTES >> 20} MiB")
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


def open_records(path: str | os.PathLike[str], visit: Callable[[int, Any], None] | None = None) -> RecordFile:
    """Find every record of a data file in one pass, calling `visit(row, record)` for each on the way.

    Raises:
        UserError: as `stream_records`, or the file holds no record.
    """
    offsets, lengths, digest = [], [], hashlib.sha256()
    for row, (offset, raw, record) in enumerate(stream_records(path, digest)):
        offsets.append(offset)
        lengths.append(len(raw))
        if visit is not None:
            visit(row, record)
    if not offsets:
        raise UserError(f"{path} holds no records; name a data file with at least one")
    return RecordFile(Path(path), digest.hexdigest(), np.array(offsets, np.int64), np.array(lengths, np.int64))


def write_records(path: str | os.PathLike[str], records: RecordFile, rows: Iterable[int]) -> None:
    """Write the records of `rows`, in that order, as a JSON list; each byte for byte as it came."""
    with open(records.path, "rb") as source, whole_file(path) as file:
        for number, row in enumerate(rows):
            file.write(b",\n" if number else b"[\n")
            file.write(os.pread(source.fileno(), int(records.lengths[row]), int(records.offsets[row])))
        file.write(b"\n]\n" if len(rows) else b"[]\n")  # type: ignore[arg-type]


def problem_of(record: Any) -> str | None:
    """What keeps LLaVA from training on a record, in a few words; None when nothing does.

    Checked: `conversations` is a list of turns with `from` and `value`, the roles are known and alternate (a
    leading `gpt` turn is allowed: it is dropped), one image at most, and its tag in one turn at most.
    """
    if not isinstance(record, dict):
        return "is not an object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no `conversations`" if turns is None else "has `conversations` that are not a list of turns"
    tagged = 0
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"has a turn {number} without a text `value`"
        role, text = turn.get("from"), turn["value"]
        if role not in ROLES:
            return f"has an unknown role {_shown(role)} in turn {number} (known: human, gpt)"
        if not text.isascii() and not _is_unicode(text):
            return f"has text in turn {number} that is not valid Unicode"
        tagged += IMAGE_TAG in text
    first = 1 if turns[0]["from"] == "gpt" else 0
    if first == len(turns):
        return "has no human turn"
    for number, turn in enumerate(turns[first:]):
        if turn["from"] != ROLES[number % 2]:
            return f"has two {turn['from']} turns in a row (turn {number + first})"
    images = record.get("image", [])
    images = images if isinstance(images, list) else [images]
    if len(images) > 1:
        return f"has {len(images)} images; one is supported"
    if "image" in record and (not images or not isinstance(images[0], str) or not images[0]):
        return "has an `image` that is neither a path nor a list of one path"
    if images and tagged > 1:
        return f"has {IMAGE_TAG} in {tagged} turns and one image"
    return None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(path: str | os.PathLike[str], row: int, record: Any) -> str:
    """How an error names a record: file, row, and the id where there is one."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"{path}: record {row}" + (f" (id {_shown(identity)})" if identity is not None else "")


def image_of(record: dict[str, Any]) -> str | None:
    """The path of the record's image below the image folder, or None. The record is one that has no problem."""
    image = record.get("image")
    return image[0] if isinstance(image, list) else image


def task_of(record: dict[str, Any], task_key: str = "dataset") -> str | None:
    """The task that a record names; None when it names none.

    Args:
        task_key: a key (`dataset`), a dotted path (`meta.source`), or `KEY:SEPARATOR`, the part of the value before
            the first separator (`image:/`, the first folder of the image; `id:_`).
    """
    key, colon, separator = task_key.partition(":")
    value: Any = record
    if key in record:
        value = record[key]
    else:
        for step in key.split("."):
            value = value.get(step) if isinstance(value, dict) else None
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    if not colon:
        return str(value)
    before, found, _ = str(value).partition(separator)
    return before if separator and found and before else None


def read_tasks(path: str | os.PathLike[str], task_key: str = "dataset") -> tuple[RecordFile, list[str]]:
    """A data file, and the task of each of its records `[n]`.

    Raises:
        UserError: as `open_records`, or a record has a problem or names no task; the record is named.
    """
    tasks: list[str] = []

    def visit(row: int, record: Any) -> None:
        problem = problem_of(record)
        if problem:
            raise UserError(f"{name_of(path, row, record)} {problem}; repair or remove it")
        task = task_of(record, task_key)
        if task is None:
            raise UserError(
                f"{name_of(path, row, record)} names no task under `{task_key}`; add it with "
                f"`python scripts/label_tasks.py --source_path {path} --target_path labelled.json`, "
                "or name another key with --task_key"
            )
        tasks.append(task)

    return open_records(path, visit), tasks


def chunk_range(count: int, num_chunks: int, chunk_idx: int) -> range:
    """Rows of chunk K of N: `[K*c, (K+1)*c)` with `c = ceil(count/N)`; empty past the end (DESIGN 3).

    Raises:
        UserError: the chunk is not one of `0 .. num_chunks - 1`.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise UserError(f"--chunk_idx {chunk_idx} is not one of 0 .. {num_chunks - 1} (--num_chunks {num_chunks})")
    size = math.ceil(count / num_chunks)
    return range(min(chunk_idx * size, count), min((chunk_idx + 1) * size, count))
