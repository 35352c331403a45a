"""The most and the least influential records of each task: which they are, their images and their conversations."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.images import BadImage, find_image, open_image
from tive.data.records import RecordFile, image_of, open_records, problem_of
from tive.selection.files import Selection
from tive.util.errors import UserError

THUMBNAIL = 192
MAX_TURN = 1500
MAX_TURNS = 12


@dataclass(frozen=True)
class Sample:
    """A record as the page shows it. `image` is a data URI, or None with the reason in `no_image`."""

    image: str | None
    no_image: str
    turns: list[tuple[str, str]]


def extremes(selection: Selection, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each task, the rows of its `count` most influential records, best first, and of its least, worst first.

    A task of fewer than `2 * count` records shares them between the two; no record is in both.
    """
    pairs, influence = [], selection.column("influence")
    for index in range(len(selection.tasks)):
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(influence[rows])]
        rows = rows[np.argsort(influence[rows], kind="stable")]
        least = min(count, len(rows) // 2)
        pairs.append((rows[::-1][: min(count, len(rows) - least)], rows[:least]))
    return pairs


def open_checked(selection: Selection, data_path: str | None) -> RecordFile:
    """The data file the selection was made from.

    Args:
        data_path: where it lies now; None for where it lay then.

    Raises:
        UserError: it is not there, or it has changed since.
    """
    inputs = selection.summary.inputs
    path = data_path or inputs.data_path
    try:
        records = open_records(path)
    except ValueError as error:
        raise UserError(f"{path!r} is no file name ({error}); name the data file with --data_path") from error
    if records.sha256 != inputs.data_sha256 or len(records) != len(selection.ids):
        raise UserError(
            f"{records.path} is not the file the selection was made from (SHA-256); name it with --data_path"
        )
    return records


def read_samples(records: RecordFile, rows: Iterable[int], image_folder: str | None) -> dict[int, Sample]:
    """What the page shows of the records of `rows`."""
    samples, thumbnails = {}, {}
    for row in tqdm(sorted(rows), desc="Reading sample records", unit=" records", delay=2):
        record = records[row]
        problem = problem_of(record)
        if problem:
            samples[row] = Sample(None, f"the record {problem}", [])
            continue
        name = image_of(record)
        if name not in thumbnails:
            thumbnails[name] = thumbnail(image_folder, name) if name else (None, "no image: text only")
        samples[row] = Sample(*thumbnails[name], _turns(record))
    return samples


def _turns(record: dict[str, Any]) -> list[tuple[str, str]]:
    turns = []
    for turn in record["conversations"][:MAX_TURNS]:
        text = turn["value"]
        if len(text) > MAX_TURN:
            text = f"{text[:MAX_TURN]} … ({len(text) - MAX_TURN:,} more characters)"
        turns.append((turn["from"], text))
    if len(record["conversations"]) > MAX_TURNS:
        turns.append(("", f"{len(record['conversations']) - MAX_TURNS:,} more turns"))
    return turns


def thumbnail(image_folder: str | None, name: str) -> tuple[str | None, str]:
    """A small JPEG of an image, as the gradient step reads it, in a data URI; or None and the reason in a few words."""
    if image_folder is None:
        return None, "image folder not known (--image_folder)"
    try:
        image = open_image(find_image(image_folder, name))
    except BadImage as reason:
        return None, str(reason)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=72)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""
