"""What can be known before any GPU time: data, images, disk. Bad records are counted, shown and written down."""

from __future__ import annotations

import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tive.data.formats import images_of
from tive.data.images import BadImage, find_image, open_image, path_of
from tive.data.records import RecordFile, open_records
from tive.features.manifest import LeftOutRecord
from tive.features.progress import progress_folder
from tive.util.errors import UserError
from tive.util.files import write_json

SHOWN = 10
# Asking for one file after the other would wait for a network's answer each time.
_THREADS = 16


@dataclass(frozen=True)
class DataFile:
    """A data file, read once: what keeps records from being used, and the images that the others name, by row."""

    records: RecordFile
    problems: dict[int, str]
    images: dict[int, tuple[str, ...]]


@dataclass
class Checked:
    """A data file and what is wrong in one chunk of it.

    Attributes:
        rows: the chunk's rows.
        reasons: row -> why the record cannot be used.
        renamed: rows whose image was found under another extension.
    """

    records: RecordFile
    rows: range
    reasons: dict[int, str] = field(default_factory=dict)
    renamed: list[int] = field(default_factory=list)


def read_data(path: str, record_problem: Callable[[Any], str | None]) -> DataFile:
    """Read the data file and check every record.

    Args:
        record_problem: what keeps the model's family from reading a record, if anything does.

    Raises:
        UserError: the data file cannot be read.
    """
    problems: dict[int, str] = {}
    images: dict[int, tuple[str, ...]] = {}

    def visit(row: int, record: Any) -> None:
        problem = record_problem(record)
        if problem:
            problems[row] = problem
        elif paths := images_of(record):
            images[row] = paths

    return DataFile(open_records(path, visit), problems, images)


def check_chunk(data: DataFile, rows: range, image_folder: str, open_images: bool) -> Checked:
    """Check that the images of a chunk's records are there.

    Args:
        open_images: also read every image whole.

    Raises:
        UserError: the image folder is not there.
    """
    checked = Checked(data.records, rows, {row: data.problems[row] for row in rows if row in data.problems})
    images = {row: data.images[row] for row in rows if row in data.images}
    if images and not os.path.isdir(image_folder):
        raise UserError(f"--image_folder {image_folder or '(not given)'} is not a folder, and records have images")
    _check_images(images, image_folder, checked, open_images)
    return checked


def _check_images(images: dict[int, tuple[str, ...]], folder: str, checked: Checked, open_images: bool) -> None:
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row, paths in images.items():
        for image in dict.fromkeys(paths):
            rows_of[image].append(row)

    def look(image: str) -> tuple[str | None, bool]:
        try:
            path = find_image(folder, image)
            if open_images:
                open_image(path)
        except BadImage as reason:
            return str(reason), False
        return None, path != path_of(folder, image)

    # In the order of their folders, whose listings are kept; many at a time, since a thread costs more than a look.
    names = sorted(rows_of)
    size = 8 if open_images else 1000
    blocks = [names[start : start + size] for start in range(0, len(names), size)]
    title = "Opening images" if open_images else "Looking for images"
    with ThreadPoolExecutor(_THREADS) as threads, tqdm(total=len(names), desc=title, unit=" images", delay=2) as bar:
        states = threads.map(lambda block: [look(image) for image in block], blocks)
        for block, found in zip(blocks, states, strict=True):
            for image, (reason, renamed) in zip(block, found, strict=True):
                if reason:
                    checked.reasons |= dict.fromkeys(rows_of[image], reason)
                elif renamed:
                    checked.renamed += rows_of[image]
            bar.update(len(block))
    checked.renamed = sorted(set(checked.renamed) - checked.reasons.keys())


def left_out_entry(row: int, record: Any, reason: str) -> LeftOutRecord:
    """How a manifest names a record that was left out."""
    identity = record.get("id") if isinstance(record, dict) else None
    return LeftOutRecord(row, identity if isinstance(identity, (str, int)) else None, reason)


def report_bad_records(checked: Checked, folder: Path, chunk_idx: int, stop: bool) -> None:
    """Say what is wrong: counts, the first ten, and a file with all of them.

    Raises:
        UserError: records are bad, and `stop` is set.
    """
    if checked.renamed:
        first = checked.renamed[0]
        print(
            f"{len(checked.renamed)} records have their image under another extension, and it is used (the first: "
            f"record {first}, {_image_name(checked.records[first])}); LLaVA's trainer does not look for it: rename "
            "before step 5"
        )
    listed = folder / f"bad_records_{chunk_idx}.json"
    if not checked.reasons:
        listed.unlink(missing_ok=True)  # of an earlier call, repaired since
        return
    entries = []
    for row, reason in sorted(checked.reasons.items()):
        record = checked.records[row]
        entries.append(asdict(left_out_entry(row, record, reason)) | {"image": _image_name(record)})
    write_json(listed, entries)
    print(f"{len(entries)} of {len(checked.rows)} records of this chunk cannot be used:")
    for kind, count in Counter(map(_kind, checked.reasons.values())).most_common():
        print(f"  {count:>8}  {kind}")
    print("the first:")
    for entry in entries[:SHOWN]:
        image = f" ({entry['image']})" if entry["image"] else ""
        print(f"  record {entry['row']} (id {entry['id']}): {entry['reason']}{image}")
    if stop:
        raise UserError(
            f"{len(entries)} of {len(checked.rows)} records cannot be used, all listed in {listed}; repair them, or "
            "leave them out with --on_bad_record skip"
        )
    print(f"they are left out; all are listed in {listed}")


def _image_name(record: Any) -> str | None:
    try:
        images = images_of(record)
    except (ValueError, AttributeError, TypeError):  # not even an object
        return None
    image = ", ".join(images)
    # Half of a surrogate pair is no text, and could neither be printed nor written.
    return image.encode(errors="replace").decode() or None


def _kind(reason: str) -> str:
    return "unreadable image" if reason.startswith("unreadable image") else reason


def check_disk(folder: Path, chunk_idx: int, feature_bytes: int) -> None:
    """See that the output folder can hold the chunk's features twice, which finishing it takes.

    Raises:
        UserError: it has too little room.
    """
    begun = progress_folder(folder, chunk_idx) / "features.f16"
    needed = 2 * feature_bytes - (begun.stat().st_blocks * 512 if begun.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--output_file {folder} has {free / 1e9:.3g} GB free, this chunk needs {needed / 1e9:.3g} GB more while "
            "it is made (its features twice); free space or name another folder; the same command continues"
        )
