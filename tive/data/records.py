"""Read, check, chunk and write instruction records.

A data file is a JSON list of records, or JSON Lines. It is read as a stream: a record stays on disk, and what
is kept in memory is where it lies, so 665K records cost megabytes and are written again byte for byte.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tive.data.media import IMAGE_TAG, media_of, plain_path
from tive.data.stream import append_raw, parse_record, stream_records
from tive.util.errors import UserError
from tive.util.files import whole_file
from tive.util.text import shown_value

ROLES = ("human", "gpt")
# What other trainers call LLaVA's roles.
OTHER_ROLE_NAMES = {"user": "human", "assistant": "gpt", "chatgpt": "gpt"}


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
        return parse_record(self.raw(row))


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
    with whole_file(path) as file:
        copy_records(file, records, rows)


def copy_records(file: BinaryIO, records: RecordFile, rows: Iterable[int]) -> None:
    """`write_records` into an open file."""
    with open(records.path, "rb") as source:
        descriptor = source.fileno()
        append_raw(file, (os.pread(descriptor, int(records.lengths[row]), int(records.offsets[row])) for row in rows))


def problem_of(record: Any) -> str | None:
    """What keeps LLaVA from training on a record, in the words that follow its name; None when nothing does.

    Checked: `conversations` is a list of turns with `from` and `value`, the roles are known and alternate (a leading
    `gpt` turn is allowed: it is dropped with what it holds), one image at most and no other medium, and the image's
    tag in one turn at most. A problem with a remedy of its own names it after a semicolon.
    """
    if not isinstance(record, dict):
        return "is not an object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no `conversations`" if turns is None else "has `conversations` that are not a list of turns"
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"has a turn {index} without a text `value`"
        role, text = turn.get("from"), turn["value"]
        if role not in ROLES:
            return unknown_role(role, index)
        if not text.isascii() and not is_unicode(text):
            return f"has text in turn {index} that is not valid Unicode"
    first = 1 if turns[0]["from"] == "gpt" else 0
    if first == len(turns):
        return "has no human turn"
    tagged = 0
    for index, turn in enumerate(turns[first:]):
        if turn["from"] != ROLES[index % 2]:
            return f"has two {turn['from']} turns in a row (turn {index + first})"
        tagged += IMAGE_TAG in turn["value"]
    media = media_of(record)
    if media.problem:
        return media.problem
    if len(media.images) > 1:
        return f"has {len(media.images)} images, and one is supported"
    if "image" in record and not media.images:
        return "has an `image` that is neither a path nor a list of one path; remove the key where there is no image"
    if media.images and tagged > 1:
        return f"has {IMAGE_TAG} in {tagged} turns and one image"
    return None


def unknown_role(role: Any, index: int) -> str:
    """The problem of a record whose turn `index` has a role that LLaVA does not know."""
    problem = f"has an unknown role {shown_value(role)} in turn {index} (known: {', '.join(ROLES)})"
    if isinstance(role, str) and role in OTHER_ROLE_NAMES:
        return problem + "; convert the data with scripts/convert_data.py (to llava)"
    return problem


def with_remedy(problem: str) -> str:
    """A problem with what to do about it, where it does not say so itself."""
    return problem if ";" in problem else f"{problem}; repair or remove it"


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def name_of(path: str | os.PathLike[str], row: int, record: Any) -> str:
    """How an error names a record: file, row, and the id where there is one."""
    identity = record.get("id") if isinstance(record, dict) else None
    return f"{path}: record {row}" + (f" (id {shown_value(identity)})" if identity is not None else "")


def image_of(record: dict[str, Any]) -> str | None:
    """The path of the record's (first) image below the image folder, or None. The record is one without a problem."""
    images = media_of(record).images
    return plain_path(images[0]) if images else None


def chunk_range(count: int, num_chunks: int, chunk_idx: int) -> range:
    """Rows of chunk K of N: `[K*c, (K+1)*c)` with `c = ceil(count/N)`; empty past the end.

    Raises:
        UserError: the chunk is not one of `0 .. num_chunks - 1`.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise UserError(f"chunk_idx {chunk_idx} is not one of 0 .. {num_chunks - 1} (num_chunks {num_chunks})")
    size = math.ceil(count / num_chunks)
    return range(min(chunk_idx * size, count), min((chunk_idx + 1) * size, count))
