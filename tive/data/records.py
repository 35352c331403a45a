"""Read, check, group and chunk instruction records.

A data file is a JSON list of records, or JSON Lines. It is read as a stream: a record stays on disk, and what
is kept in memory is where it lies, so 665K records cost megabytes and are written again byte for byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tive.data.media import IMAGE_KEYS, IMAGE_TAG, media_of, plain_path
from tive.data.stream import append_raw, stream_records
from tive.util.errors import UserError
from tive.util.files import whole_file

ROLES = ("human", "gpt")


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
        places = ((int(records.lengths[row]), int(records.offsets[row])) for row in rows)
        append_raw(file, (os.pread(source.fileno(), *place) for place in places))


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
    media = media_of(record)
    if media.problem:
        return media.problem
    if len(media.images) > 1:
        return f"has {len(media.images)} images; one is supported"
    if "image" in record and not media.images:  # LLaVA's trainer stops at the key without a path
        return "has an `image` that is neither a path nor a list of one path"
    if media.images and tagged > 1:
        return f"has {IMAGE_TAG} in {tagged} turns and one image"
    return None


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return f"that is a {type(value).__name__}"
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
    """The path of the record's (first) image below the image folder, or None. The record is one without a problem."""
    images = media_of(record).images
    return plain_path(images[0]) if images else None


def value_at(record: dict[str, Any], key: str) -> Any:
    """The value under a key, or under a dotted path (`meta.source`); None when nothing is there."""
    if key in record:
        return record[key]
    value: Any = record
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def task_of(record: dict[str, Any], task_key: str = "dataset") -> str | None:
    """The task that a record names; None when it names none.

    Args:
        task_key: a key (`dataset`), a dotted path (`meta.source`), or `KEY:SEPARATOR`, the part of the value before
            the first separator (`image:/`, the first folder of the image; `id:_`).

    Raises:
        UserError: `task_key` ends in its colon.
    """
    key, colon, separator = task_key.partition(":")
    if colon and not separator:
        raise UserError(f"--task_key {task_key} names no separator; write it after the colon, as in `image:/`")
    value = value_at(record, key)
    if key in IMAGE_KEYS:  # whichever of the two keys the record has, and however its path is spelled
        value = image_of(record)
    elif isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    text = str(value)
    if not text.isascii() and not _is_unicode(text):
        return None
    if not colon:
        return text
    before, found, _ = text.partition(separator)
    return before if found and before else None


def checked_task(path: str | os.PathLike[str], row: int, record: Any, task_key: str = "dataset") -> str:
    """The task of a record that can be trained on.

    Raises:
        UserError: the record has a problem or names no task; it is named.
    """
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
    return task


def read_tasks(path: str | os.PathLike[str], task_key: str = "dataset") -> tuple[RecordFile, list[str]]:
    """A data file, and the task of each of its records `[n]`.

    Raises:
        UserError: as `open_records` and `checked_task`.
    """
    tasks: list[str] = []
    records = open_records(path, lambda row, record: tasks.append(checked_task(path, row, record, task_key)))
    return records, tasks


def rows_by_task(tasks: list[str]) -> dict[str, np.ndarray]:
    """The rows of every task, ascending; the tasks in order of their first record."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(tasks))}
    codes = np.fromiter((numbers[name] for name in tasks), np.int64, len(tasks))
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(numbers, groups, strict=True))


def chunk_range(count: int, num_chunks: int, chunk_idx: int) -> range:
    """Rows of chunk K of N: `[K*c, (K+1)*c)` with `c = ceil(count/N)`; empty past the end.

    Raises:
        UserError: the chunk is not one of `0 .. num_chunks - 1`.
    """
    if num_chunks < 1 or not 0 <= chunk_idx < num_chunks:
        raise UserError(f"--chunk_idx {chunk_idx} is not one of 0 .. {num_chunks - 1} (--num_chunks {num_chunks})")
    size = math.ceil(count / num_chunks)
    return range(min(chunk_idx * size, count), min((chunk_idx + 1) * size, count))
