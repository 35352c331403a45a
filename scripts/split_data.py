"""Put records aside, equally from every task, to compare trained models on; before anything is selected."""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

from tive.util.errors import UserError, run

EXAMPLE = """
example:
  python scripts/split_data.py --source_path data.json --target_path split --per_task 200
  writes split/held_out.json, for scripts/evaluate.py, and split/train.json, the data for steps 1 to 5

Records are drawn at random and written as they came, in their order. The folder is there with both files or not at
all; one that is there is left as it is. The script prints how many images the two files share; it does not keep them
apart.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source_path", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder")
    add("--target_path", required=True, type=Path, metavar="DIR", help="new folder for held_out.json and train.json")
    add("--per_task", required=True, type=int, metavar="N", help="records to put aside from each task")
    add("--seed", type=int, default=0, help="the same seed draws the same records on every machine (0)")
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    arguments = parser.parse_args()
    if arguments.per_task < 1:
        raise UserError(f"--per_task {arguments.per_task} is no number of records; give one from 1 up")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} is negative; give a number from 0 up")
    if arguments.target_path.exists():
        raise UserError(f"--target_path {arguments.target_path} is there already; name another folder, or remove it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import numpy as np

    from tive.data.records import open_records, suffix_of, write_records
    from tive.data.scan import refuse_problems, scan_records
    from tive.data.tasks import rows_by_task
    from tive.data.trained import form_problem
    from tive.method.value import draw
    from tive.util.text import listed, print_table

    target: Path = arguments.target_path
    records = open_records(arguments.source_path)
    scan = scan_records(records, form_problem, arguments.task_key)
    refuse_problems(scan, arguments.task_key, target.with_name(f"{target.name}_bad_records.json"))
    groups = rows_by_task(scan.tasks)
    small = [task for task, rows in groups.items() if len(rows) <= arguments.per_task]
    if small:
        raise UserError(
            f"tasks with no more than --per_task {arguments.per_task} records would keep none: {listed(small)}; "
            "lower it, or merge them with scripts/label_tasks.py"
        )
    held_out = np.zeros(len(records), bool)
    for task, rows in groups.items():
        # Another draw than those of the steps, which the same seed would otherwise follow.
        held_out[rows[draw(np.zeros(len(rows)), 0.0, arguments.per_task, arguments.seed, f"held out of {task}")]] = True

    end = suffix_of(arguments.source_path)
    unfinished = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write_records(unfinished / f"held_out{end}", records, np.flatnonzero(held_out))
        write_records(unfinished / f"train{end}", records, np.flatnonzero(~held_out))
        os.rename(unfinished, target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}; name another folder") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)

    rows_of_table = [(task, f"{len(rows):,}", f"{arguments.per_task:,}") for task, rows in groups.items()]
    total = (f"{len(held_out):,}", f"{int(held_out.sum()):,}")
    print_table([("task", "records", "held out"), *rows_of_table, ("total", *total)])
    seen = {image for row in np.flatnonzero(~held_out) for image in scan.images[row]}
    shared = sum(not seen.isdisjoint(scan.images[row]) for row in np.flatnonzero(held_out))
    if shared:
        print(f"{shared:,} held-out records have an image that records of train.json have too")
    print(f"written: {target}/held_out{end}, {target}/train{end}")


if __name__ == "__main__":
    run(main)
