"""Records that cannot be used: said on the terminal, listed in a file, and dropped by that file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tive.data.conversations import images_of
from tive.data.records import Records, name_of
from tive.util.errors import UserError
from tive.util.files import read_json, write_json
from tive.util.text import shown, shown_value

SHOWN = 10


def listing_beside(target: str | os.PathLike[str]) -> Path:
    """Where a script that writes `target` lists the records that it cannot use."""
    target = Path(target)
    return target.with_name(f"{target.stem}_bad_records.json")


def bad_record(row: int, record: Any, reason: str) -> dict[str, Any]:
    """How a list of bad records names one; its images are paths below the image folder."""
    return {"row": row, "id": identity_of(record), "reason": reason, "image": images_named(record) or None}


def identity_of(record: Any) -> str | int | None:
    """A record's id as it can be written, if it is a text or a number."""
    identity = record.get("id") if isinstance(record, dict) else None
    return _writable(identity) if isinstance(identity, str) else identity if isinstance(identity, int) else None


def images_named(record: Any) -> str:
    """The paths of a record's images in one text, empty where there is none that can be told."""
    try:
        return _writable(", ".join(images_of(record))) if isinstance(record, dict) else ""
    except ValueError:
        return ""


def kind_of(reason: str) -> str:
    """What is counted of a reason: an image has many ways to be unreadable."""
    return "unreadable image" if reason.startswith("unreadable image") else reason


def _writable(text: str) -> str:
    # Half of a surrogate pair is no text, and could not be written.
    return text.encode(errors="replace").decode()


def refuse_bad_records(records: Records, reasons: dict[int, str], listing: Path) -> None:
    """Stop where records cannot be used; a list of an earlier call goes where all can.

    Args:
        reasons: row -> why the record cannot be used.

    Raises:
        UserError: there are such records. Their counts and the first ten are printed, all are listed in `listing`.
    """
    if not reasons:
        listing.unlink(missing_ok=True)
        return
    report_bad_records(records, reasons, len(records), listing)
    raise UserError(
        f"{count_and_first(records, reasons)}, all are listed in {listing}; repair them, or write the data without "
        f"them: `python scripts/convert_data.py --source_path {records.path} --target_path good.json --drop {listing}`"
    )


def count_and_first(records: Records, reasons: dict[int, str]) -> str:
    """How many records cannot be used, and which is the first."""
    row = min(reasons)
    first = name_of(records.path, row, records[row]).removeprefix(f"{records.path}: ")
    return (
        f"{records.path}: {len(reasons):,} of {len(records):,} records cannot be used "
        f"(the first: {first} {shown(reasons[row], 160)})"
    )


def report_bad_records(
    records: Records, reasons: dict[int, str], total: int, listing: Path, what: str = "records"
) -> None:
    """Print how many of `total` records cannot be used, why, and the first ten; write all of them to `listing`.

    Args:
        reasons: row -> why the record cannot be used; at least one.
        what: of what there are `total`.

    Raises:
        UserError: the list cannot be written.
    """
    entries = list_bad_records(records, reasons, listing)
    print(f"{len(entries):,} of {total:,} {what} cannot be used:")
    for kind, count in Counter(map(kind_of, reasons.values())).most_common(SHOWN):
        print(f"  {count:>8,}  {shown(kind, 160)}")
    print("the first:")
    for entry in entries[:SHOWN]:
        image = f" ({shown(entry['image'], 120)})" if entry["image"] else ""
        print(f"  record {entry['row']} (id {shown_value(entry['id'])}): {shown(entry['reason'], 160)}{image}")


def list_bad_records(records: Records, reasons: dict[int, str], listing: Path) -> list[dict[str, Any]]:
    """Write down, by row, the records that cannot be used, as `listed_records` reads them.

    Raises:
        UserError: the list cannot be written.
    """
    entries = [bad_record(row, records[row], reason) for row, reason in sorted(reasons.items())]
    write_json(listing, entries)
    return entries


def listed_records(listings: Iterable[str | os.PathLike[str]]) -> dict[int, dict[str, Any]]:
    """The records that lists of bad records name, by row.

    Raises:
        UserError: a file cannot be read, or is no such list.
    """
    found: dict[int, dict[str, Any]] = {}
    for path in listings:
        entries = read_json(path)
        if not isinstance(entries, list) or not all(map(_is_entry, entries)):
            raise UserError(f"{path} is no list of bad records, as the steps write it (objects with `row` and `id`)")
        found |= {entry["row"]: entry for entry in entries}
    return found


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and type(entry.get("row")) is int and entry["row"] >= 0 and "id" in entry


def check_listed(name: str, entry: dict[str, Any], record: Any) -> None:
    """See that a list of bad records is of this data.

    Raises:
        UserError: the record has another id than the one that is listed for its row.
    """
    if entry["id"] != identity_of(record):
        raise UserError(
            f"{name} is listed with the id {shown_value(entry['id'])}; the list is of another data file, or the file "
            "was changed since: make it again"
        )
