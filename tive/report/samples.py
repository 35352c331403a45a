"""The records at the two ends of a score: their scores, images and conversations."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.conversations import image_of, to_llava
from tive.data.images import BadImage, read_image
from tive.data.media import StoredImage
from tive.data.records import Records, open_records
from tive.report.page import Block, Card, Cards, Section, name
from tive.selection.reading import Selection
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, plural, short, shown

THUMBNAIL = 192
MAX_TURN = 1500
MAX_TURNS = 12
OPEN = 10  # of the tasks
# What a card says of a record, where the scores file has it.
SCORES = {
    "influence": "influence",
    "score": "score",
    "norm": "norm",
    "weight": "weight",
    "loss": "loss",
    "el2n": "EL2N",
    "visual_gain": "visual gain",
}
COUNTS = {"rank": "rank", "supervised_tokens": "supervised tokens"}
# The score that groups are ordered by -> the section's anchor and title, and the titles of its two ends.
ENDS = {
    "influence": ("records", "Most and least influential records", ("Most influential", "Least influential")),
    "visual_gain": ("seen", "Records whose images help most and least", ("Help most", "Help least, or mislead")),
    "subtask": ("records", "Best and worst records of each subtask", ("Serve it best", "Serve it least")),
}


@dataclass(frozen=True)
class Sample:
    """A record as the page shows it. `image` is a data URI, or None for the reason in `no_image`."""

    image: str | None
    no_image: str
    turns: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Group:
    """The records of a task, or all of them for a subtask of a target: int64 rows, and the score that orders them."""

    name: str
    about: str
    column: str
    rows: np.ndarray


def groups_of_tasks(selection: Selection, column: str) -> list[Group]:
    """Each task's records, by a score."""
    return [
        Group(task.name, plural(task.records, "record"), column, selection.rows_of(index))
        for index, task in enumerate(selection.tasks)
    ]


def both_ends(values: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of some rows, the `count` with the highest values, best first, and the `count` with the lowest, worst first.

    Fewer than `2 * count` are shared between the two; no record is in both.
    """
    rows = rows[np.isfinite(values[rows])]
    rows = rows[np.argsort(values[rows], kind="stable")]
    least = min(count, len(rows) // 2)
    return rows[::-1][: min(count, len(rows) - least)], rows[:least]


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


def read_sample(records: Records, image_folder: str | None, row: int) -> Sample:
    """What the page shows of a record."""
    try:
        record = to_llava(records[row])
    except ValueError as problem:
        return Sample(None, f"the record {problem}")
    image = image_of(record)
    return Sample(*(_thumbnail(image_folder, image) if image else (None, "no image")), _turns(record))


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


def _thumbnail(image_folder: str | None, name: str | StoredImage) -> tuple[str | None, str]:
    """A small JPEG of an image, as the gradient step reads it, in a data URI; or None and the reason in a few words."""
    if image_folder is None and isinstance(name, str):
        return None, "image folder not known (image_folder)"
    try:
        image = read_image(image_folder or "", name)
    except BadImage as reason:
        return None, str(reason)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=72)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""


def records(
    selection: Selection, groups: Sequence[Group], count: int, read: Callable[[int], Sample], trouble: str
) -> Section:
    """The `count` records at each end of every group's score.

    Args:
        groups: all of tasks by one score, or all of subtasks.
        trouble: why no record can be read.
    """
    anchor, title, titles = ENDS.get(groups[0].column, ENDS["subtask"])
    blocks: list[Block] = [f"Made without images and conversations: {trouble}."] if trouble else []
    for group in tqdm(groups, desc="Reading sample records", delay=2):
        columns = [
            (which, [_card(selection, row, group.column, read(row)) for row in rows.tolist()])
            for which, rows in zip(titles, both_ends(selection.column(group.column), group.rows, count), strict=True)
            if len(rows)
        ]
        if columns:
            blocks.append(Cards(name(group.name), group.about, columns, len(blocks) < OPEN))
    return Section(anchor, title, blocks or ["None is shown."])


def _card(selection: Selection, row: int, column: str, sample: Sample) -> Card:
    """A record with its scores: the one that it is shown for, then the others."""
    titles = {} if column in SCORES else {column: f"for {shown(column.removeprefix('score_'), LABEL_LIMIT)}"}
    titles |= SCORES | COUNTS
    values = {key: float(selection.column(key)[row]) for key in titles if key in selection.numbers}
    scores = [
        f"{titles[key]} {value:,.0f}" if key in COUNTS and np.isfinite(value) else f"{titles[key]} {short(value)}"
        for key, value in values.items()
    ]
    times = int(selection.times_selected[row])
    return Card(row, name(selection.ids[row]), times, " · ".join(scores), sample.image, sample.no_image, sample.turns)
