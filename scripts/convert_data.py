"""Convert records between JSON, JSON Lines and Parquet, and between LLaVA's form and those that other trainers read.

The target's name chooses the container: .jsonl is JSON Lines, anything else a JSON list. --to chooses the form:

  llava     conversations: from, value; image        LLaVA, and the other scripts here
  sharegpt  conversations: from, value; images       LLaMA-Factory (formatting: sharegpt), ms-swift
  messages  messages: role, content; images          LLaMA-Factory (its OpenAI tags), ms-swift
  parts     messages, content a list of parts        TRL
  parquet   the same in a folder of Parquet files    TRL, datasets.load_dataset; the images of --image_folder lie in
                                                     the rows

From Parquet or Arrow, --image_folder takes the images that lie in the rows, one file for equal ones. Both ways go on
where they were stopped.

The script tells the form of each source record from its keys; roles may have their other names (user, assistant,
chatgpt). No key is lost, and the way back gives the same record. LLaVA's template has a system prompt of its own: a
system turn becomes the key `system`, on which LLaVA does not train, and in messages and parts the first turn again.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tive.data.conversations import FORMS, from_llava, image_paths, to_llava
from tive.data.images import format_and_size, store_image
from tive.data.media import IMAGE_TAG
from tive.data.problems import kept_rows, listing_beside, refuse_bad_records
from tive.data.records import Records, TableRecords, name_of, open_records, whole_records, write_records, write_texts
from tive.data.scan import check_chunk, scan_records
from tive.data.shards import schema_of, write_shards
from tive.data.trained import form_problem
from tive.util.errors import UserError, run
from tive.util.files import refuse_target
from tive.util.text import is_unicode, listed, plural


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="""examples:
  python scripts/convert_data.py --source_path data.json --target_path data.jsonl
  python scripts/convert_data.py --source_path chat.jsonl --target_path llava.json --to llava
  python scripts/convert_data.py --source_path Tive_q_0.001_p_0.15.json --target_path subset.jsonl --to messages
  python scripts/convert_data.py --source_path data.json --target_path good.json --drop warm_up_bad_records.json
  python scripts/convert_data.py --source_path FineVision --target_path data.json --to llava --image_folder images
  python scripts/convert_data.py --source_path data.json --target_path parquet --to parquet --image_folder images""",
    )
    parser.add_argument(
        "--source_path", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder of it"
    )
    parser.add_argument("--target_path", required=True, help="where they go; another file, or of Parquet a new folder")
    parser.add_argument(
        "--to", choices=(*FORMS, "parquet"), help="form of the records (default: each as it is, byte for byte)"
    )
    parser.add_argument(
        "--image_folder", metavar="DIR", help="where images go that lie in rows; to parquet, where they lie"
    )
    parser.add_argument(
        "--drop", metavar="FILE", nargs="+", default=[], help="leave out the records that these lists of a step name"
    )
    return parser.parse_args()


def converted(
    records: Records, rows: list[int], arguments: argparse.Namespace, notes: dict[str, list[int]]
) -> Iterator[bytes]:
    """Yield the text of each of the rows in its new form.

    Args:
        notes: rows with a system prompt are added to its list `system`, those with more or fewer tags than images to
            `uneven`.

    Raises:
        UserError: records are of no known form, or hold what the new one has no place for (all are listed beside the
            target).
    """
    problems: dict[int, str] = {}
    for row, record in zip(rows, whole_records(records, rows if arguments.drop else None), strict=True):
        try:
            llava = unpacked(to_llava(record), arguments.image_folder)
            yield text_of(from_llava(llava, arguments.to))
        except (ValueError, RecursionError) as error:
            problems[row] = "is nested too deeply" if isinstance(error, RecursionError) else str(error)
            continue
        if isinstance(llava.get("system"), str):
            notes["system"].append(row)
        if sum(turn["value"].count(IMAGE_TAG) for turn in llava["conversations"]) != len(image_paths(llava)):
            notes["uneven"].append(row)
    refuse_bad_records(records, problems, listing_beside(arguments.target_path))


def write_parquet(target: Path, records: Records, image_folder: str) -> None:
    """Write all records and their images into a new folder of Parquet files.

    Raises:
        UserError: the folder is there, or records have no such form or images that cannot be used (all are listed).
    """
    if target.exists():
        raise UserError(f"--target_path {target} is there already; name another folder, or remove it")
    checked = check_chunk(scan_records(records, form_problem), range(len(records)), image_folder, format_and_size)
    schema, problems = schema_of(records)
    refuse_bad_records(records, problems | checked.reasons, listing_beside(target))
    files = write_shards(target, records, schema, image_folder)
    print(f"{plural(files, 'file')}, to be read as they are by datasets.load_dataset and scripts/train_trl.py")


def unpacked(record: dict[str, Any], folder: str | None) -> dict[str, Any]:
    """A record in LLaVA's form whose images are files below the folder: those that lie in the row are written there.

    Raises:
        ValueError: an image lies in the row, and there is no folder, or it is no image.
    """
    images = image_paths(record)
    if all(isinstance(image, str) for image in images):
        return record
    if folder is None:
        raise ValueError("has an image in its row; name a folder for such files (--image_folder)")
    paths = [image if isinstance(image, str) else store_image(folder, image) for image in images]
    return record | {"image": paths[0] if len(paths) == 1 else paths}


def text_of(record: dict[str, Any]) -> bytes:
    """A record as JSON in UTF-8; escaped where it holds half a surrogate pair, which UTF-8 cannot.

    Raises:
        ValueError: it holds a number beyond what JSON can write.
    """
    try:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, default=str)
        return (text if is_unicode(text) else json.dumps(record, default=str)).encode()
    except ValueError as error:
        raise ValueError("holds a number that is not finite") from error


def main() -> None:
    arguments = parse_arguments()
    target = Path(arguments.target_path)
    if arguments.to != "parquet":
        refuse_target(arguments.source_path, target)
    elif arguments.drop:
        raise UserError("--drop goes without --to parquet; write the data without them first, then convert that")
    records = open_records(arguments.source_path)
    has_images = isinstance(records, TableRecords) and records.image_columns
    if has_images and arguments.to in FORMS and arguments.image_folder is None:
        raise UserError(f"{records.path} has images in its rows; name a folder for them with --image_folder")
    rows, notes = kept_rows(records, arguments.drop), defaultdict[str, list[int]](list)
    if arguments.to == "parquet":
        write_parquet(target, records, arguments.image_folder or "")
    elif arguments.to is not None:
        write_texts(target, converted(records, rows, arguments, notes), lines=target.suffix == ".jsonl")
    elif isinstance(records, TableRecords):
        write_records(target, records, rows)
    else:
        for _ in records:  # a record that no step could read ends the script
            pass
        write_texts(target, records.texts(rows), lines=target.suffix == ".jsonl")
    print(f"Wrote {len(rows):,} records to {target}.")
    if arguments.drop:
        print(f"{len(records) - len(rows):,} records are left out, those listed in {listed(arguments.drop)}.")
    if notes["system"] and arguments.to == "llava":
        print(f"{len(notes['system']):,} have a system prompt under `system`: LLaVA does not train on it.")
    if (uneven := notes["uneven"]) and arguments.to != "llava":
        print(
            f"{len(uneven):,} have more or fewer <image> tags than images; LLaMA-Factory asks for as many; the first: "
            f"{name_of(uneven[0], records[uneven[0]])}"
        )


if __name__ == "__main__":
    run(main)
