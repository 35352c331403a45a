"""Records that cannot be used: printed, listed in a file, refused, and dropped by that file."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tive.data.conversations import images_of, to_llava
from tive.data.media import name_of_image
from tive.data.records import Records, TableRecords, name_of, suffix_of
from tive.data.trained import problem_of
from tive.util.errors import UserError
from tive.util.files import read_json, write_json
from tive.util.text import command, listed, shown, shown_value

SHOWN = 10


def listing_beside(target: str | os.PathLike[str]) -> Path:
    """Where a script that writes `target` lists the records that it cannot use."""
    target = Path(target)
    return target.with_name(f"{target.stem}_bad_records.json")


def refuse_bad_records(
    records: Records, reasons: dict[int, str], listing: Path, remedy: str = "", total: int | None = None
) -> None:
    """Raise a `UserError` where records cannot be used: the first ten are printed, all are listed. A list of an earlier
    call goes where all can.

    Args:
        reasons: row -> why the record cannot be used.
        remedy: what to do about them; empty for `form_remedy`'s, or the command that writes the data without them.
        total: of how many records; None for all.
    """
    if not reasons:
        with contextlib.suppress(OSError):
            listing.unlink()
        return
    list_bad_records(records, reasons, listing)
    row = min(reasons)
    remedy = remedy or form_remedy(records, reasons, total)
    remedy = remedy or f"repair them, or write the data without them: {drop_command(records, listing)}"
    raise UserError(
        f"{records.path}: {len(reasons):,} of {total or len(records):,} records cannot be used (the first: "
        f"{name_of(row, records[row])} {shown(reasons[row], 160)}), all are listed in {listing}; {remedy}"
    )


def list_bad_records(records: Records, reasons: dict[int, str], listing: Path) -> None:
    """Print why records cannot be used, and the first ten; write all of them to `listing`, which `kept_rows` reads."""
    entries: list[dict[str, Any]] = []
    for row, reason in sorted(reasons.items()):
        record = records[row]
        entries.append({"row": row, "id": identity_of(record), "reason": reason, "image": images_named(record) or None})
    write_json(listing, entries)
    print(f"{len(entries):,} records cannot be used:")
    for kind, count in Counter(map(kind_of, reasons.values())).most_common(SHOWN):
        print(f"  {count:>8,}  {shown(kind, 160)}")
    print("the first:")
    for entry in entries[:SHOWN]:
        image = f" ({shown(entry['image'], 120)})" if entry["image"] else ""
        print(f"  {name_of(entry['row'], entry)}: {shown(entry['reason'], 160)}{image}")


def form_remedy(records: Records, reasons: dict[int, str], total: int | None = None) -> str:
    """What to do where records lack the form, or most of them lack something; empty where a few are bad."""
    if not reasons:
        return ""
    (reason, _), *_ = Counter(map(kind_of, reasons.values())).most_common()
    first, path = records[next(row for row in sorted(reasons) if kind_of(reasons[row]) == reason)], records.path
    try:
        is_other_form = problem_of(first) == reason and problem_of(to_llava(first)) is None
    except ValueError:
        is_other_form = False
    if is_other_form:
        stem = path.name.split(".")[0]
        options: dict[str, str | Path] = {"target_path": path.with_name(f"{stem}_llava.json"), "to": "llava"}
        if isinstance(records, TableRecords) and records.image_columns:
            options["image_folder"] = path.with_name(f"{stem}_images")
        return f"convert the data: {command('scripts/convert_data.py', source_path=path, **options)}"
    if 2 * len(reasons) <= (total or len(records)):
        return ""
    if reason.startswith(("missing image", "unreadable image", "image path")):
        return "most images cannot be read; name the folder that the records' paths start from (image_folder)"
    keys = listed([*first], 12) if isinstance(first, dict) else "none"
    return f"most of the file is like this (keys of a record: {keys}); docs/data.md shows the forms that are read"


def drop_command(records: Records, listing: Path) -> str:
    """The command that writes the data without the records that a file lists."""
    path = records.path
    target = path.with_name(f"{path.name.split('.')[0]}_good{suffix_of(path)}")
    return command("scripts/convert_data.py", source_path=path, target_path=target, drop=listing)


def kept_rows(records: Records, listings: Sequence[str]) -> list[int]:
    """The rows that none of these lists of bad records names; a `UserError` where a file is no such list, or lists a
    record that is not there or has another id."""
    dropped = set()
    for path in listings:
        entries = read_json(path)
        if not isinstance(entries, list):
            entries = [None]
        for entry in entries:
            row = entry.get("row") if isinstance(entry, dict) and "id" in entry else None
            if type(row) is not int or row < 0:
                raise UserError(f"{path} is no list of bad records, as the steps write it (objects with `row`, `id`)")
            if row >= len(records) or identity_of(records[row]) != entry["id"]:
                raise UserError(
                    f"{records.path} has no record {row} with the id {shown_value(entry['id'])}, which {path} lists; "
                    "the list is of another data file, or the file was changed since: make it again"
                )
            dropped.add(row)
    return [row for row in range(len(records)) if row not in dropped]


def kind_of(reason: str) -> str:
    """What is counted of a reason: an image has many ways to be unreadable."""
    return "unreadable image" if reason.startswith("unreadable image") else reason


def identity_of(record: Any) -> str | int | None:
    """A record's id as it can be written, if it is a text or a number."""
    identity = record.get("id") if isinstance(record, dict) else None
    return writable(identity) if isinstance(identity, str) else identity if isinstance(identity, int) else None


def images_named(record: Any) -> str:
    """The paths of a record's images in one text, empty where there is none that can be told."""
    try:
        return writable(", ".join(map(name_of_image, images_of(record))))
    except ValueError:
        return ""


def writable(text: str) -> str:
    """A text as it can be written and printed: half of a surrogate pair, which is no text, as its escape."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
