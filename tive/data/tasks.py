"""Which task a record names, and the records of each task."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from tive.data.conversations import image_of
from tive.data.media import IMAGE_KEYS, name_of_image
from tive.util.errors import UserError
from tive.util.text import is_unicode


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
    return task_or_problem(record, task_key)[0]


def task_or_problem(record: dict[str, Any], task_key: str = "dataset") -> tuple[str | None, str]:
    """The task of a record, and why it names none (empty where it does)."""
    key, colon, separator = task_key.partition(":")
    if colon and not separator:
        raise UserError(f"the task key {task_key} names no separator; write it after the colon, as in `image:/`")
    # Whichever of the two keys of an image the record has, and however its path is spelled.
    value = value_at(record, key)
    if key in IMAGE_KEYS:
        image = image_of(record)
        value = None if image is None else name_of_image(image)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return None, f"has {kind} under `{task_key}`, and a task is a text, a number, true or false"
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not is_unicode(text):
        return None, f"names a task under `{task_key}` that is not valid Unicode"
    if colon:
        before, found, _ = text.partition(separator)
        text = before if found else ""
    return (text, "") if text else (None, no_task(task_key))


def no_task(task_key: str) -> str:
    """The problem of a record that names no task."""
    return f"names no task under `{task_key}`"


def rows_by_task(tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of every task, ascending; the tasks in order of their first record."""
    codes_by_name = {name: code for code, name in enumerate(dict.fromkeys(tasks))}
    codes = np.fromiter((codes_by_name[name] for name in tasks), np.int64, len(tasks))
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(codes_by_name, groups, strict=True))
