"""Whether LLaVA's trainer can take a data file: every record and every image, all that is wrong at once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tive.data.bad_records import refuse_bad_records
from tive.data.conversations import problem_of
from tive.data.images import look_for
from tive.data.media import media_of
from tive.data.records import open_records
from tive.data.scan import scan_records
from tive.util.errors import UserError
from tive.util.text import shown

# With these the system's words go before the first question, which must not be empty.
_LLAMA_2 = ("llama_2", "llava_llama_2", "mistral_instruct")
_LONGEST_NAME = 80


@dataclass(frozen=True)
class TrainingData:
    """What a data file holds.

    Attributes:
        records, with_image: how many.
        images: how many different files.
        tags_alone: records with the image's tag and no image, which are trained on as text.
        unanswered: records that end with the user's turn, which LLaVA's trainer may mask whole.
    """

    records: int
    with_image: int
    images: int
    tags_alone: int
    unanswered: int


def training_problem_of(record: Any, template: str = "v1") -> str | None:
    """What keeps LLaVA's trainer from taking a record, in a few words and with the remedy; None when nothing does."""
    problem = problem_of(record)
    if problem:
        return problem
    media = media_of(record)
    if media.images and not isinstance(record.get("image"), str):
        return (
            "has its image in a list or under `images`, which LLaVA's trainer does not take; convert it with "
            "scripts/convert_data.py --to llava"
        )
    if "image" in record and not media.images:
        return "has an empty `image`, which LLaVA's trainer would open; remove the key"
    turns = record["conversations"]
    if not any(turn["value"].split() for turn in turns):
        return "has no text in any turn, and LLaVA's sampler stops at it; remove it"
    if template in _LLAMA_2 and not turns[turns[0]["from"] == "gpt"]["value"]:
        return f"begins with an empty question, which the template {template} does not take; remove it"
    return None


def check_data(path: str, image_folder: str | None, template: str, listing: Path) -> TrainingData:
    """Read the whole file and look for every image.

    Args:
        listing: where the records that cannot be trained on are listed; one of an earlier call is removed.

    Raises:
        UserError: the file is not one that LLaVA reads, or records cannot be trained on: counts and the first ten are
            printed.
    """
    records = open_records(path)
    if records.is_lines:
        raise UserError(
            f"{path} is JSON Lines, and LLaVA's trainer takes a JSON list; convert it with scripts/convert_data.py"
        )
    scan = scan_records(records, partial(training_problem_of, template=template))
    problems = scan.problems
    images = {row: paths[0] for row, paths in enumerate(scan.images) if paths}
    if images and not (image_folder and os.path.isdir(image_folder)):
        raise UserError(
            f"{path} names {len(images):,} images, and the folder {image_folder} is not there; set IMAGE_FOLDER"
        )
    problems |= _missing_images(images, image_folder or "")
    refuse_bad_records(records, problems, listing)
    files = len(set(images.values()))
    return TrainingData(len(records), len(images), files, len(scan.tags_alone), len(scan.unanswered))


def _missing_images(images: dict[int, str], folder: str) -> dict[int, str]:
    looked = look_for(folder, images.values())
    found: dict[int, str] = {}
    for row, image in images.items():
        if image in looked.bad:
            found[row] = f"names {shown(image, _LONGEST_NAME)} below {folder}: {looked.bad[image]}"
        elif image in looked.renamed:
            stand_in = shown(os.path.basename(looked.renamed[image]), _LONGEST_NAME)
            found[row] = f"names {shown(image, _LONGEST_NAME)}, and the file is {stand_in}; rename one of them"
    return found
