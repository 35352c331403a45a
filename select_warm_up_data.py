"""Step 1: a warm-up sample with equal numbers from every task, to train the reference model on (paper, section 3.2)."""

from __future__ import annotations

import argparse
from pathlib import Path

from tive.util.errors import UserError, run
from tive.util.files import refuse_target, whole_file

EXAMPLE = """
example:
  python select_warm_up_data.py --source_path data.json --target_path warm_up.json
a sample whose gradients are enough for the tasks' budgets (docs/selection.md, Budgets from a sample):
  python select_warm_up_data.py --source_path data.json --target_path sample.json --per_task 1000

Every task gives the same number of records, chosen at random. A task with fewer gives all it has and the others make
up for it, so that the sample has --sample_ratio of all records; what does not divide is given to tasks drawn by the
seed. Records are written as they came, in their order. Records that cannot be used are all listed in a file beside the
target, and nothing else is written.
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--source_path", required=True, help="records: a JSON list, JSON Lines, Parquet or a folder")
    add("--target_path", required=True, help="file for the sample, of the source's kind: .json or .parquet")
    size = parser.add_mutually_exclusive_group().add_argument
    size("--sample_ratio", type=float, default=0.08, help="share of all records to draw, above 0 and up to 1 (0.08)")
    size("--per_task", type=int, metavar="N", help="draw N records of every task instead, all of a smaller one")
    add("--seed", type=int, default=0, help="the same seed draws the same sample on every machine (0)")
    add("--rows_only", action="store_true", help="write no records, only the numbers of their rows")
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    arguments = parser.parse_args()
    if not 0 < arguments.sample_ratio <= 1:
        raise UserError(f"--sample_ratio {arguments.sample_ratio} is not a share; give a number above 0 and up to 1")
    if arguments.per_task is not None and arguments.per_task < 1:
        raise UserError(f"--per_task {arguments.per_task} draws nothing; give a number from 1 up")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} is negative; give a number from 0 up")
    refuse_target(arguments.source_path, arguments.target_path)
    if arguments.rows_only and Path(arguments.target_path).exists():
        raise UserError(f"{arguments.target_path} has the records of an earlier sample; remove it")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    import numpy as np

    from tive.data.problems import listing_beside
    from tive.data.records import open_records, write_records
    from tive.data.scan import refuse_problems, scan_records, tag_notes
    from tive.data.tasks import rows_by_task
    from tive.data.trained import form_problem
    from tive.method.value import draw, equal_shares, rounded_down
    from tive.util.text import print_table

    target = Path(arguments.target_path)
    records = open_records(arguments.source_path)
    scan = scan_records(records, form_problem, arguments.task_key)
    refuse_problems(scan, arguments.task_key, listing_beside(target))
    groups = rows_by_task(scan.tasks)
    sizes = [len(rows) for rows in groups.values()]
    total = rounded_down(arguments.sample_ratio * len(records))
    if arguments.per_task:
        total = sum(min(size, arguments.per_task) for size in sizes)
    if total == 0:
        raise UserError(
            f"--sample_ratio {arguments.sample_ratio} of {len(records)} records is less than one record; raise it"
        )
    # Equal shares of this total are N of every task that has as many.
    shares = dict(zip(groups, equal_shares(sizes, total, arguments.seed), strict=True))
    # A sample whose gradients are taken must not be the records that the reference model was trained on.
    stream = "{}, for its gradients" if arguments.per_task else "{}"
    drawn = [
        rows[draw(np.zeros(len(rows)), 0.0, shares[task], arguments.seed, stream.format(task))]
        for task, rows in groups.items()
    ]
    rows = np.sort(np.concatenate(drawn))
    if not arguments.rows_only:
        write_records(target, records, rows)
    rows_path = target.with_name(f"{target.stem}_rows.npy")
    with whole_file(rows_path) as file:
        np.save(file, rows)

    print_table(
        [
            ("task", "records", "drawn"),
            *((task, f"{len(rows):,}", f"{shares[task]:,}") for task, rows in groups.items()),
            ("total", f"{len(records):,}", f"{total:,}"),
        ]
    )
    without = sum(share == 0 for share in shares.values())
    if without:
        print(
            f"{without:,} of {len(groups):,} tasks give nothing: the sample has fewer records than there are tasks; "
            "raise --sample_ratio, or merge small tasks"
        )
    for note in tag_notes(scan, range(len(records))):
        print(note)
    print(f"written: {rows_path if arguments.rows_only else target}")


if __name__ == "__main__":
    run(main)
