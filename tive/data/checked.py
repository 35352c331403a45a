"""What can be known of records before a model is loaded: those that cannot be used, and images that are not there."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tive.data.formats import images_of
from tive.data.images import look_for
from tive.data.media import has_tag_alone
from tive.data.records import RecordFile, open_records
from tive.util.errors import UserError


@dataclass(frozen=True)
class DataFile:
    """A data file, read once.

    Attributes:
        problems: row -> what keeps the record from being used.
        images: row -> the images that the record names, where there is no problem.
        tags_alone: rows whose text has the image's tag, and that name no image.
    """

    records: RecordFile
    problems: dict[int, str]
    images: dict[int, tuple[str, ...]]
    tags_alone: list[int]


@dataclass
class Checked:
    """A data file and what is wrong in one chunk of it.

    Attributes:
        rows: the chunk's rows.
        reasons: row -> why the record cannot be used.
        renamed: row -> the file that stands in for an image, whose name differs from the record's.
        tags_alone: rows whose text has the image's tag, and no image.
    """

    records: RecordFile
    rows: range
    reasons: dict[int, str] = field(default_factory=dict)
    renamed: dict[int, str] = field(default_factory=dict)
    tags_alone: list[int] = field(default_factory=list)


def read_data(path: str, record_problem: Callable[[Any], str | None]) -> DataFile:
    """Read the data file and check every record.

    Args:
        record_problem: what keeps the model's family from reading a record, if anything does.

    Raises:
        UserError: the data file cannot be read.
    """
    problems: dict[int, str] = {}
    images: dict[int, tuple[str, ...]] = {}
    tags_alone: list[int] = []

    def visit(row: int, record: Any) -> None:
        problem = record_problem(record)
        if problem:
            problems[row] = problem
        elif paths := images_of(record):
            images[row] = paths
        elif has_tag_alone(record):
            tags_alone.append(row)

    return DataFile(open_records(path, visit), problems, images, tags_alone)


def check_image_folder(data: DataFile, rows: range, image_folder: str) -> None:
    """Raise a `UserError` when records of a chunk have images, and the image folder is not there."""
    if not os.path.isdir(image_folder) and any(row in data.images for row in rows):
        raise UserError(f"the image folder {image_folder or '(not given)'} is not there, and records have images")


def check_chunk(
    data: DataFile, rows: range, image_folder: str, read_image: Callable[[str], object] | None = None
) -> Checked:
    """Check that the images of a chunk's records are there.

    Args:
        read_image: also reads the file of every image whole; raises `BadImage`.

    Raises:
        UserError: the image folder is not there.
    """
    check_image_folder(data, rows, image_folder)
    checked = Checked(data.records, rows, {row: data.problems[row] for row in rows if row in data.problems})
    checked.tags_alone = [row for row in data.tags_alone if row in rows]
    images = {row: data.images[row] for row in rows if row in data.images}
    looked = look_for(image_folder, itertools.chain.from_iterable(images.values()), read_image)
    for row, paths in images.items():
        if bad := [looked.bad[image] for image in paths if image in looked.bad]:
            checked.reasons[row] = bad[0]
        elif renamed := [looked.renamed[image] for image in paths if image in looked.renamed]:
            checked.renamed[row] = renamed[0]
    return checked
