"""One pass through the records: id, task, images and problem of each; and whether a chunk's images are there."""

from __future__ import annotations

import io
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from tive.data.containers import open_data_file
from tive.data.conversations import image_paths, images_of, placeholder_in, to_llava
from tive.data.images import BadImage, look_for
from tive.data.media import IMAGE_TAG
from tive.data.parquet import TableRecords
from tive.data.problems import refuse_bad_records, writable
from tive.data.records import Records, suffix_of
from tive.data.tasks import no_task, task_or_problem
from tive.data.trained import is_taken_out, plain_images
from tive.util.errors import UserError
from tive.util.text import command, listed

# Records without a tag that are read again for what stands there instead.
_LOOKED_INTO = 100
# Values of a key that are counted.
_COUNTED = 1000


@dataclass(frozen=True)
class Scan:
    """What one pass through n records collects.

    Attributes:
        ids: `[n]`, as text that can be written; empty where a record has none.
        tasks: `[n]`; empty where a record names none, or where no task was asked for.
        images: `[n]`, the paths that each record names; none where it cannot be used, or its images lie in its row.
        answers: `[n]`, how many turns answer another one and are trained on.
        problems: row -> what keeps the record from being used.
        tags_alone: rows whose text has the image's tag, and that name no image.
        images_alone: rows that name an image, and whose text has no tag for it.
        unanswered: rows that end with the user's turn.
    """

    records: Records
    ids: list[str]
    tasks: list[str]
    images: list[tuple[str, ...]]
    answers: list[int]
    problems: dict[int, str]
    tags_alone: list[int]
    images_alone: list[int]
    unanswered: list[int]


def scan_records(records: Records, record_problem: Callable[[Any], str | None], task_key: str | None = None) -> Scan:
    """Go through the records once.

    Args:
        record_problem: what keeps a record from being used, if anything does: `form_problem`, or a family's. A plain
            record (`plain_images`) has no problem.
        task_key: where a record names its task, as `task_of` takes it; a record that names none has a problem. None:
            tasks are not asked for.
    """
    scan = Scan(records, [], [], [], [], {}, [], [], [])
    for row, record in enumerate(records):
        task, problem = None, ""
        if task_key and isinstance(record, dict):
            task, problem = task_or_problem(record, task_key)
        identity = record.get("id") if isinstance(record, dict) else None
        text = identity if isinstance(identity, str) else "" if identity is None else json.dumps(identity)
        scan.ids.append(writable(text))
        scan.tasks.append(sys.intern(task or ""))  # one text for all records of a task
        images, answers = plain_images(record), 0
        if images is not None:
            answers = len(record["conversations"]) // 2
        else:
            images, problem = (), record_problem(record) or problem
            if not problem:
                conversation = to_llava(record)
                turns, paths = conversation["conversations"], image_paths(conversation)
                answers = sum(turn["from"] == "gpt" and not is_taken_out(turn) for turn in turns[1:])
                images = tuple([image for image in paths if isinstance(image, str)])
                has_tag = any(IMAGE_TAG in turn["value"] for turn in turns)
                if has_tag != bool(paths):
                    (scan.tags_alone if has_tag else scan.images_alone).append(row)
                if turns and turns[-1]["from"] == "human":
                    scan.unanswered.append(row)
        if problem:
            scan.problems[row] = problem
            images, answers = (), 0
        scan.images.append(images)
        scan.answers.append(answers)
    return scan


def described_keys(records: Records) -> str:
    """The keys of records that could name a task, and how many values each takes, the fewest first."""
    values: dict[str, set[Any]] = {}
    for record in records:
        for key, value in record.items() if isinstance(record, dict) else ():
            if isinstance(value, (str, int, float)) and value != "" and len(values.setdefault(key, set())) <= _COUNTED:
                values[key].add(value)
    counts = sorted((len(different), key) for key, different in values.items())
    many = f"more than {_COUNTED}"
    return listed([f"`{key}`: {count if count <= _COUNTED else many} values" for count, key in counts], 12)


def refuse_problems(scan: Scan, task_key: str, listing: Path) -> None:
    """Raise a `UserError` where a record cannot be used or names no task, as `refuse_bad_records` does."""
    path = scan.records.path
    if all(scan.problems.get(row) == no_task(task_key) for row in range(len(scan.records))):
        labelled = path.with_name(f"labelled{suffix_of(path)}")
        raise UserError(
            f"{path}: no record names a task under `{task_key}`; name another key as task_key (the records have "
            f"{described_keys(scan.records)}), or add it with "
            + command("scripts/label_tasks.py", source_path=path, target_path=labelled)
        )
    refuse_bad_records(scan.records, scan.problems, listing)


def tag_notes(scan: Scan, rows: range) -> list[str]:
    """How many of these records have a tag and no image, or an image and no tag, a sentence each."""
    notes = []
    if tags := [row for row in scan.tags_alone if row in rows]:
        notes.append(
            f"{len(tags):,} records have {IMAGE_TAG} in their text and no image, and it is trained on as text (the "
            f"first: record {tags[0]}); where an image is meant, name it under `image`"
        )
    if images := [row for row in scan.images_alone if row in rows]:
        marks = (placeholder_in(to_llava(scan.records[row])["conversations"]) for row in images[:_LOOKED_INTO])
        mark = next(filter(None, marks), None)
        instead = f"; `{mark}` stands in some" if mark else ""
        notes.append(
            f"{len(images):,} records name an image and have no {IMAGE_TAG} in their text, and the model does not see "
            f"it (the first: record {images[0]}{instead}); write {IMAGE_TAG} where the image belongs"
        )
    return notes


@dataclass(frozen=True)
class Checked:
    """The records of one chunk, and what is wrong with them.

    Attributes:
        rows: the chunk's rows.
        reasons: row -> why the record cannot be used.
        renamed: row -> the file that stands in for an image, whose name differs from the record's.
        notes: what is odd about records that can be used, a sentence each.
    """

    records: Records
    rows: range
    reasons: dict[int, str]
    renamed: dict[int, str]
    notes: list[str]


def check_image_folder(scan: Scan, rows: range, image_folder: str) -> None:
    """Raise a `UserError` when records of a chunk have images, and the image folder is not there."""
    if os.path.isfile(image_folder):
        open_data_file(image_folder).close()  # an archive is named, with the command that unpacks it
    if not os.path.isdir(image_folder) and any(scan.images[row] for row in rows):
        folder = f"the image folder {image_folder} is not there" if image_folder else "no image folder is given"
        raise UserError(f"{folder}, and records have images; name the folder of their paths (image_folder)")


def check_chunk(
    scan: Scan, rows: range, image_folder: str, read_image: Callable[[str | BinaryIO], object] | None = None
) -> Checked:
    """What is wrong with a chunk's records, and which images are not there; a `UserError` as of `check_image_folder`.

    Args:
        read_image: also reads every image, a file's path or the bytes that lie in the row; raises `BadImage`.
    """
    check_image_folder(scan, rows, image_folder)
    reasons = {row: scan.problems[row] for row in rows if row in scan.problems}
    checked = Checked(scan.records, rows, reasons, {}, tag_notes(scan, rows))
    images = itertools.chain.from_iterable(scan.images[row] for row in rows)
    unusable, renamed = look_for(image_folder, images, read_image)
    for row in rows:
        paths = scan.images[row]
        if wrong := [unusable[image] for image in paths if image in unusable]:
            reasons[row] = wrong[0]
        elif files := [renamed[image] for image in paths if image in renamed]:
            checked.renamed[row] = files[0]
    if read_image is not None and isinstance(scan.records, TableRecords) and scan.records.image_columns:
        for row in tqdm(rows, "Opening images", unit=" records", delay=2):
            try:
                for image in () if row in reasons else images_of(scan.records[row]):
                    if not isinstance(image, str):
                        read_image(io.BytesIO(image.content or b""))
            except BadImage as error:
                reasons[row] = str(error)
    return checked
