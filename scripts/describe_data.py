"""A first look at records, before any model: tasks, images, lengths, repetitions, broken records."""

from __future__ import annotations

import argparse
from pathlib import Path

from tive.util.errors import UserError, run
from tive.util.files import refuse_target

EXAMPLE = """
examples:
  python scripts/describe_data.py --source_path data.json --target_path look.html --image_folder images
  python scripts/describe_data.py --source_path FineVision --target_path look.html --task_key source
  the same, and every image read: equal ones, broken ones, sizes
  python scripts/describe_data.py --source_path FineVision --target_path look.html --task_key source --images
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source_path", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder")
    add("--target_path", required=True, type=Path, metavar="FILE", help="the page, one HTML file; plots go beside it")
    add("--image_folder", default="", metavar="DIR", help="where the images lie that records name by path")
    add("--images", action="store_true", help="read every image: equal bytes, broken ones, sizes")
    add("--samples", type=int, default=3, metavar="N", help="records of each task on the page (3)")
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    arguments = parser.parse_args()
    refuse_target(arguments.source_path, arguments.target_path)
    if arguments.samples < 0:
        raise UserError(f"--samples {arguments.samples} is negative; give 0 for none")
    if arguments.image_folder and not Path(arguments.image_folder).is_dir():
        raise UserError(f"--image_folder {arguments.image_folder} is not a folder; name the one that images lie in")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    from tive.data.records import open_records
    from tive.data.scan import described_keys
    from tive.data.tasks import NO_TASK
    from tive.report.description import describe, look_at_images, sections_of, sentences, table_of_tasks
    from tive.report.page import Samples, write_page
    from tive.util.text import plural, print_table, shown

    records = open_records(arguments.source_path)
    description = describe(records, arguments.task_key)
    looks = look_at_images(description, arguments.image_folder) if arguments.images else None
    print_table(table_of_tasks(description))
    for sentence in sentences(description, looks):
        print(sentence)
    if NO_TASK in description.tasks:
        print(f"Records without a task: name its key with --task_key; the records have {described_keys(records)}.")

    sections = sections_of(description, looks, Samples(arguments.samples, records, arguments.image_folder or None))
    tiles = [
        (f"{len(records):,}", "records"),
        (f"{len(description.tasks):,}", "tasks" if len(description.tasks) > 1 else "task"),
        (f"{description.images.sum():,}", "images"),
        (f"{description.repeated.sum():,}", "repeated texts"),
        (f"{len(description.problems):,}", "broken"),
    ]
    about = f"{shown(records.path.name, 80)}, {plural(len(records), 'record')}"
    write_page(arguments.target_path, "A first look at the data", about, tiles, sections)


if __name__ == "__main__":
    run(main)
