"""What can be known before any GPU time: data, images, disk. Bad records are counted, shown and written down."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tive.errors import UserError
from tive.files import write_json
from tive.images import BadImage, find_image, names_in, open_image, other_names, path_of
from tive.records import RecordFile, chunk_range, image_of, open_records, problem_of

SHOWN = 10
_THREADS = 16


@dataclass
class Checked:
    """A data file and what is wrong in this process's chunk of it.

    Attributes:
        rows: the chunk's rows.
        reasons: row -> why the record cannot be used.
        renamed: rows whose image was found under another extension.
    """

    records: RecordFile
    rows: range
    reasons: dict[int, str] = field(default_factory=dict)
    renamed: list[int] = field(default_factory=list)


def check_data(path: str, num_chunks: int, chunk_idx: int, image_folder: str, open_images: bool) -> Checked:
    """Read the data file, check this chunk's records and that their images are there.

    Args:
        open_images: also read every image whole.

    Raises:
        UserError: the data file cannot be read, or the image folder is not there.
    """
    found: dict[int, tuple[str | None, str | None]] = {}

    def visit(row: int, record: Any) -> None:
        problem = problem_of(record)
        image = None if problem else image_of(record)
        if problem or image:
            found[row] = (problem, image)

    records = open_records(path, visit)
    checked = Checked(records, chunk_range(len(records), num_chunks, chunk_idx))
    images: dict[int, str] = {}
    for row in checked.rows:
        problem, image = found.get(row, (None, None))
        if problem:
            checked.reasons[row] = problem
        elif image:
            images[row] = image
    if images and not os.path.isdir(image_folder):
        raise UserError(f"--image_folder {image_folder or '(not given)'} is not a folder, and records have images")
    _check_images(images, image_folder, checked, open_images)
    return checked


def _check_images(images: dict[int, str], folder: str, checked: Checked, open_images: bool) -> None:
    """Look for the images in listings of their folders: one listing answers for thousands of records."""
    paths: dict[int, str] = {}
    for row, image in images.items():
        try:
            paths[row] = path_of(folder, image)
        except BadImage as reason:
            checked.reasons[row] = str(reason)
    folders = {os.path.dirname(path) for path in paths.values()}
    with ThreadPoolExecutor(_THREADS) as threads:
        list(threads.map(names_in, folders))

        def look(row: int) -> tuple[int, str | None, bool]:
            listed = names_in(os.path.dirname(paths[row]))
            there = os.path.basename(paths[row]) in listed
            try:
                if not there and not other_names(paths[row]) & listed:
                    raise BadImage("missing image")
                if open_images:
                    open_image(find_image(folder, images[row]))
            except BadImage as reason:
                return row, str(reason), False
            return row, None, not there

        results: Iterable[tuple[int, str | None, bool]] = map(look, paths)
        if open_images:
            results = tqdm(threads.map(look, paths), total=len(paths), desc="Opening images", unit=" images", delay=1)
        for row, reason, renamed in results:
            if reason:
                checked.reasons[row] = reason
            elif renamed:
                checked.renamed.append(row)


def left_out_entry(checked: Checked, row: int, reason: str) -> dict[str, Any]:
    """How a manifest names a record that was left out."""
    record = checked.records[row]
    identity = record.get("id") if isinstance(record, dict) else None
    return {"row": row, "id": identity if isinstance(identity, (str, int)) else None, "reason": reason}


def report_bad_records(checked: Checked, folder: Path, chunk_idx: int, stop: bool) -> None:
    """Say what is wrong: counts, the first ten, and a file with all of them.

    Raises:
        UserError: records are bad, and `stop` is set.
    """
    if checked.renamed:
        print(
            f"{len(checked.renamed)} images are there under another extension and are used (first: record "
            f"{checked.renamed[0]}); LLaVA's trainer will not find them: rename them before step 5"
        )
    if not checked.reasons:
        return
    entries = [left_out_entry(checked, row, reason) for row, reason in sorted(checked.reasons.items())]
    listed = folder / f"bad_records_{chunk_idx}.json"
    write_json(listed, entries)
    counts = Counter(checked.reasons.values())
    print(f"{len(entries)} of {len(checked.rows)} records of this chunk cannot be used:")
    for reason, count in counts.most_common(SHOWN):
        print(f"  {count:>8}  {reason}")
    for entry in entries[:SHOWN]:
        print(f"  record {entry['row']} (id {entry['id']}): {entry['reason']}")
    if stop:
        raise UserError(
            f"{len(entries)} records cannot be used, all listed in {listed}; repair them, or leave them out with "
            "--on_bad_record skip"
        )
    print(f"they are left out; all are listed in {listed}")


def check_disk(folder: Path, needed: int) -> None:
    """Make the output folder and see that it can hold what will be written (bytes).

    Raises:
        UserError: it cannot be made or written, or has too little room.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make --output_file {folder}: {error.strerror}; name another folder") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_file {folder} cannot be written; name another folder")
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"--output_file {folder} has {free / 1e9:.3g} GB free, this chunk needs {needed / 1e9:.3g} GB while it is "
            "made (features twice); free space or name another folder"
        )
