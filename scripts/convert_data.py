"""Convert records between JSON and JSON Lines, and between LLaVA's form and those that other trainers read.

The target's name chooses the container: .jsonl is JSON Lines, anything else a JSON list. --to chooses the form:

  llava     conversations: from, value; image        LLaVA, and the other scripts here
  sharegpt  conversations: from, value; images       LLaMA-Factory (formatting: sharegpt), ms-swift
  messages  messages: role, content; images          LLaMA-Factory (its OpenAI tags), ms-swift
  parts     messages, content a list of parts        TRL

The form of each source record is seen from its keys. No key is lost, and back again gives the same record. LLaVA's
template has its own system prompt: a system turn becomes the key `system`, which LLaVA does not train on, and the key
becomes the first turn again in messages and parts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tive.data.formats import FORMS, count_tags, from_llava, to_llava
from tive.data.records import name_of
from tive.data.stream import stream_records, write_raw
from tive.util.errors import UserError, run
from tive.util.files import refuse_same_file


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python scripts/convert_data.py --source_path data.json --target_path data.jsonl
  python scripts/convert_data.py --source_path chat.jsonl --target_path llava.json --to llava
  python scripts/convert_data.py --source_path Tive_q_0.001_p_0.15.json --target_path subset.jsonl --to messages""",
    )
    parser.add_argument("--source_path", required=True, help="records: a JSON list, or JSON Lines")
    parser.add_argument("--target_path", required=True, help="where they go; another file")
    parser.add_argument("--to", choices=FORMS, help="form of the records (default: each as it is, byte for byte)")
    parser.add_argument(
        "--image",
        choices=("string", "list"),
        default="string",
        help="with --to llava: the one image of a record as a path, or as a list of one (default: %(default)s)",
    )
    return parser.parse_args()


@dataclass
class Tally:
    """What the pass found."""

    records: int = 0
    with_system: int = 0
    uneven_tags: int = 0
    first_uneven: str = ""


def converted(arguments: argparse.Namespace, tally: Tally) -> Iterator[bytes]:
    """Yield the text of every record in its new form, counting on the way.

    Raises:
        UserError: a record is of no known form, or holds what the new one has no place for.
    """
    for row, (_, raw, record) in enumerate(stream_records(arguments.source_path)):
        tally.records += 1
        if arguments.to is None:
            yield raw
            continue
        name = name_of(arguments.source_path, row, record)
        try:
            llava = to_llava(record)
            yield text_of(from_llava(llava, arguments.to, arguments.image == "list"))
        except (ValueError, RecursionError) as error:
            what = "is nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{name} {what}; repair or remove it") from error
        tally.with_system += isinstance(llava.get("system"), str)
        tags, images = count_tags(llava)
        if tags != images:
            tally.uneven_tags += 1
            tally.first_uneven = tally.first_uneven or name


def text_of(record: dict[str, Any]) -> bytes:
    """A record as JSON in UTF-8; escaped where it holds half a surrogate pair, which UTF-8 cannot.

    Raises:
        ValueError: it holds a number beyond what JSON can write.
    """
    try:
        try:
            return json.dumps(record, ensure_ascii=False, allow_nan=False).encode()
        except UnicodeEncodeError:
            return json.dumps(record, allow_nan=False).encode()
    except ValueError as error:
        raise ValueError("holds a number that is not finite") from error


def main() -> None:
    arguments = parse_arguments()
    target = arguments.target_path
    refuse_same_file(arguments.source_path, target)
    if arguments.image == "list" and arguments.to != "llava":
        raise UserError("--image list goes with --to llava; the other forms have `images`, always a list")
    tally = Tally()
    write_raw(target, converted(arguments, tally), lines=Path(target).suffix == ".jsonl")
    print(f"Wrote {tally.records:,} records to {target}.")
    if tally.with_system and arguments.to == "llava":
        print(f"{tally.with_system:,} have a system prompt under `system`: LLaVA does not train on it.")
    if tally.uneven_tags and arguments.to != "llava":
        print(
            f"{tally.uneven_tags:,} have more or fewer <image> tags than images; LLaMA-Factory asks for as many; "
            f"the first: {tally.first_uneven}"
        )


if __name__ == "__main__":
    run(main)
