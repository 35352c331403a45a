"""The most and the least influential records of each task: which they are, their images and their conversations."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.conversations import form_problem, to_llava
from tive.data.images import BadImage, find_image, open_image
from tive.data.media import image_of
from tive.data.records import Records, open_records
from tive.report.numbers import plural
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


@dataclass(frozen=True)
class Ends:
    """The records at the two ends of a score, int64 rows each: the highest, best first, the lowest, worst first.

    Attributes:
        name: of the task, or of the target's subtask, whose records they are.
        column: the score, as the scores file calls it.
    """

    name: str
    about: str
    column: str
    most: np.ndarray
    least: np.ndarray

    @property
    def rows(self) -> list[int]:
        return [*self.most.tolist(), *self.least.tolist()]


def extremes(selection: Selection, count: int) -> list[Ends]:
    """For each task, its `count` most and its `count` least influential records."""
    return [
        ends(selection, task.name, plural(task.records, "record"), "influence", selection.rows_of(index), count)
        for index, task in enumerate(selection.tasks)
    ]


def ends(selection: Selection, name: str, about: str, column: str, rows: np.ndarray, count: int) -> Ends:
    """Of some rows, the `count` with the highest score and the `count` with the lowest.

    Fewer than `2 * count` are shared between the two; no record is in both.
    """
    values = selection.column(column)
    rows = rows[np.isfinite(values[rows])]
    rows = rows[np.argsort(values[rows], kind="stable")]
    least = min(count, len(rows) // 2)
    return Ends(name, about, column, rows[::-1][: min(count, len(rows) - least)], rows[:least])


def open_checked(selection: Selection, data_path: str | None) -> Records:
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
        raise UserError(f"{path!r} is no file name ({error}); name the data file (data_path)") from error
    if records.fingerprint != inputs.data_sha256 or len(records) != len(selection.ids):
        raise UserError(f"{records.path} is not the file the selection was made from (SHA-256); name it (data_path)")
    return records


def read_samples(records: Records, rows: Iterable[int], image_folder: str | None) -> dict[int, Sample]:
    """What the page shows of the records of `rows`."""
    samples, thumbnails = {}, {}
    for row in tqdm(sorted(rows), desc="Reading sample records", unit=" records", delay=2):
        record = records[row]
        problem = form_problem(record)
        if problem:
            samples[row] = Sample(None, f"the record {problem}", [])
            continue
        if "messages" in record:
            record = to_llava(record)
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
        return None, "image folder not known (image_folder)"
    try:
        image = open_image(find_image(image_folder, name))
    except BadImage as reason:
        return None, str(reason)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=72)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""
