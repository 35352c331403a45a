"""The records at the two ends of a score: their scores, images and conversations."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.conversations import image_of, to_llava
from tive.data.images import BadImage, read_image
from tive.data.media import StoredImage
from tive.data.records import Records, open_records
from tive.report.page import Block, Card, Cards, Section, name
from tive.selection.output import Selection
from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, plural, short, shown

THUMBNAIL = 192
MAX_TURN = 1500
MAX_TURNS = 12


@dataclass(frozen=True)
class Samples:
    """How many records to show at each end of a score, and where they are read from.

    Attributes:
        records: None where none can be read, for the reason in `trouble` (empty where none is wanted).
    """

    count: int
    records: Records | None = None
    image_folder: str | None = None
    trouble: str = ""


@dataclass(frozen=True)
class Group:
    """Records that are shown together, those of a task for instance: int64 rows, and the column that orders them."""

    name: str
    about: str
    column: str
    rows: np.ndarray


def both_ends(values: np.ndarray, rows: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of some rows, the `count` with the highest values, best first, and the `count` with the lowest, worst first.

    Fewer than `2 * count` are shared between the two; no record is in both.
    """
    rows = rows[np.isfinite(values[rows])]
    rows = rows[np.argsort(values[rows], kind="stable")]
    least = min(count, len(rows) // 2)
    return rows[::-1][: min(count, len(rows) - least)], rows[:least]


def open_samples(selection: Selection, count: int, data_path: str | None, image_folder: str | None) -> Samples:
    """The data file that the selection was made from, at `data_path` or where it lay then, to show records of.

    Raises:
        UserError: `data_path` is not that file.
    """
    inputs = selection.summary.inputs
    path = data_path or inputs.data_path
    if not count:
        return Samples(0)
    try:
        records = open_records(path)
        if records.fingerprint != inputs.data_sha256 or len(records) != len(selection.ids):
            raise UserError(f"{path} is not the file the selection was made from (SHA-256); name it (data_path)")
    except (UserError, ValueError) as error:
        if data_path:
            raise
        return Samples(count, trouble=shown(str(error), 400))
    return Samples(count, records, image_folder or inputs.image_folder)


def groups_of_tasks(selection: Selection, column: str) -> list[Group]:
    """Each task's records, by a score."""
    return [
        Group(task.name, plural(task.records, "record"), column, np.flatnonzero(selection.task == index))
        for index, task in enumerate(selection.tasks)
    ]


def sample_records(
    selection: Selection, section: tuple[str, str, tuple[str, str]], groups: Sequence[Group], samples: Samples
) -> Section:
    """The records at both ends of every group's score.

    Args:
        section: its anchor and title, and the names of the ends, the highest scores first.
    """
    anchor, title, ends = section
    blocks: list[Block] = [f"Made without images and conversations: {samples.trouble}."] if samples.trouble else []
    for group in tqdm(groups, desc="Reading sample records", delay=2):
        both = both_ends(selection.column(group.column), group.rows, samples.count)
        columns = [
            (end, [_card(selection, row, group.column, samples) for row in rows.tolist()])
            for end, rows in zip(ends, both, strict=True)
            if len(rows)
        ]
        if columns:
            blocks.append(Cards(name(group.name), group.about, columns))
    return Section(anchor, title, blocks or ["None is shown."])


def _card(selection: Selection, row: int, column: str, samples: Samples) -> Card:
    """A record with its scores: the one that it is shown for, then the others, without those for other subtasks."""
    columns = [column, *(key for key in selection.columns if key != column and not key.startswith("score_"))]
    scores = [f"{shown(key.replace('_', ' '), LABEL_LIMIT)} {short(selection.columns[key][row])}" for key in columns]
    drawn = int(selection.times_selected[row])
    return Card(row, name(selection.ids[row]), drawn, " · ".join(scores), *read_sample(samples, row))


def read_sample(samples: Samples, row: int) -> tuple[str | None, str, list[tuple[str, str]]]:
    """A record's image as a data URI, or None and the reason in a few words; and its turns, (role, text)."""
    if samples.records is None:
        return None, "not read", []
    try:
        record = to_llava(samples.records[row])
    except ValueError as problem:
        return None, f"the record {problem}", []
    image = image_of(record)
    return (*(_thumbnail(samples.image_folder, image) if image else (None, "no image")), _turns(record))


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


def _thumbnail(image_folder: str | None, image: str | StoredImage) -> tuple[str | None, str]:
    """A small JPEG of an image, as the gradient step reads it, in a data URI; or None and the reason in a few words."""
    if image_folder is None and isinstance(image, str):
        return None, "image folder not known (image_folder)"
    try:
        picture = read_image(image_folder or "", image)
    except BadImage as reason:
        return None, str(reason)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=72)
    return f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}", ""
