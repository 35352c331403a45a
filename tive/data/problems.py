"""What keeps records from being used: found, printed, listed in a file, and dropped by that file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tive.data.conversations import OTHER_ROLE_NAMES, ROLES, images_of, to_llava
from tive.data.media import IMAGE_TAG, is_empty, media_of, name_of_image
from tive.data.records import Records, TableRecords, name_of, suffix_of
from tive.data.trained import TRAINED_KEYS, acted_on_problem, conversation_of
from tive.util.errors import UserError
from tive.util.files import read_json, write_json
from tive.util.text import command, is_unicode, listed, shown, shown_value

SHOWN = 10


def problem_of(record: Any) -> str | None:
    """What keeps LLaVA from training on a record, in the words that follow its name; None when nothing does.

    Checked: `conversations` is a list of turns with `from` and `value`, the roles are known and alternate (a leading
    `gpt` turn is allowed: it is dropped with what it holds), one image at most and no other medium, the image's tag in
    one turn at most, and no key asks for what LLaVA's trainer does not do. A problem with a remedy of its own names it
    after a semicolon.
    """
    if problem := _llava_problem(record):
        return problem
    for index, turn in enumerate(record["conversations"]):
        if len(turn) > 2 and turn["from"] == "gpt":
            for key in TRAINED_KEYS:
                if not is_empty(turn.get(key)) and turn[key] not in (True, 1):
                    return (
                        f"has `{key}` {shown_value(turn[key])} in turn {index}, and LLaVA's trainer trains on every "
                        "answer; remove the key, or the record"
                    )
    return None


def _llava_problem(record: Any) -> str | None:
    if not isinstance(record, dict):
        return "is not an object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns or not is_empty(record.get("messages")):
        return _other_form(record)
    for index, turn in enumerate(turns):
        text = turn.get("value") if isinstance(turn, dict) else None
        if not isinstance(text, str):
            is_other = isinstance(turn, dict) and "content" in turn and "value" not in turn
            return _other_form(record) if is_other else f"has a turn {index} without a text `value`"
        if turn.get("from") not in ROLES:
            return _unknown_role(turn.get("from"), index)
        if not is_unicode(text):
            return f"has text in turn {index} that is not valid Unicode"
    first = 1 if turns[0]["from"] == "gpt" else 0
    if first == len(turns):
        return "has no human turn"
    tagged = 0
    for index, turn in enumerate(turns[first:]):
        if turn["from"] != ROLES[index % 2]:
            return f"has two {turn['from']} turns in a row (turn {index + first})"
        tagged += IMAGE_TAG in turn["value"]
    media = media_of(record)
    if problem := media.problem or acted_on_problem(record, turns):
        return problem
    if len(media.images) > 1:
        return f"has {len(media.images)} images, and one is supported"
    if media.images and tagged > 1:
        return f"has {IMAGE_TAG} in {tagged} turns and one image"
    return None


def form_problem(record: Any) -> str | None:
    """What keeps a record from being read by any trainer that is known here; None when nothing does.

    LLaVA's form with one image and no system turn has to be what LLaVA's trainer takes (`problem_of`); any other has to
    be one that `conversation_of` reads. Which of them a model reads is asked where the model is known.
    """
    problem = _llava_problem(record)
    if problem is None or not isinstance(record, dict):
        return problem
    try:
        conversation = conversation_of(record)
    except ValueError as other:
        return str(other)
    turns = record.get("conversations")
    is_llavas = turns == conversation["conversations"] and "system" not in conversation
    return problem if is_llavas and not isinstance(conversation.get("image"), list) else None


def _other_form(record: dict[str, Any]) -> str:
    """The problem of a record that has no turns in LLaVA's form."""
    try:
        turns = to_llava(record)["conversations"]
    except ValueError as error:
        return str(error)
    return (
        "is not in LLaVA's form; convert the data with scripts/convert_data.py (to llava)" if turns else "has no turns"
    )


def _unknown_role(role: Any, index: int) -> str:
    """The problem of a record whose turn `index` has a role that LLaVA does not know."""
    problem = f"has an unknown role {shown_value(role)} in turn {index} (known: {', '.join(ROLES)})"
    if isinstance(role, str) and role in OTHER_ROLE_NAMES:
        return problem + "; convert the data with scripts/convert_data.py (to llava)"
    return problem


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
    return writable(identity) if isinstance(identity, str) else identity if isinstance(identity, int) else None


def images_named(record: Any) -> str:
    """The paths of a record's images in one text, empty where there is none that can be told."""
    try:
        return writable(", ".join(map(name_of_image, images_of(record))))
    except ValueError:
        return ""


def kind_of(reason: str) -> str:
    """What is counted of a reason: an image has many ways to be unreadable."""
    return "unreadable image" if reason.startswith("unreadable image") else reason


def writable(text: str) -> str:
    """A text as it can be written and printed: half of a surrogate pair, which is no text, as its escape."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()


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
        f"{count_and_first(records, reasons)}, all are listed in {listing}; {remedy_of(records, reasons, listing)}"
    )


def remedy_of(records: Records, reasons: dict[int, str], listing: Path) -> str:
    """What to do about records that cannot be used: convert them, look at the file's form, or leave them out."""
    first = records[min(reasons)]
    path = records.path
    stem = path.name.split(".")[0]
    try:
        is_other_form = problem_of(first) is not None and problem_of(to_llava(first)) is None
    except ValueError:
        is_other_form = False
    if is_other_form:
        return f"convert the data: {convert_command(records)}"
    if 2 * len(reasons) > len(records):
        keys = listed([*first], 12) if isinstance(first, dict) else "none"
        return f"most of the file is like this (keys of a record: {keys}); docs/data.md shows the forms that are read"
    target = path.with_name(f"{stem}_good{suffix_of(path)}")
    without = command("scripts/convert_data.py", source_path=path, target_path=target, drop=listing)
    return f"repair them, or write the data without them: {without}"


def convert_command(records: Records) -> str:
    """The command that makes JSON in LLaVA's form of a data file, with its images, where they lie in it, as files."""
    path, stem = records.path, records.path.name.split(".")[0]
    options: dict[str, str | Path] = {"target_path": path.with_name(f"{stem}_llava.json"), "to": "llava"}
    if isinstance(records, TableRecords) and records.image_columns:
        options["image_folder"] = path.with_name(f"{stem}_images")
    return command("scripts/convert_data.py", source_path=path, **options)


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
