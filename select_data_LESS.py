"""Step 4 for a target: the records whose gradients, as Adam applies them, point where the target's point (LESS)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tive.selection.options import CHOICES, LessOptions, stem_of
from tive.util.errors import run

EXAMPLES = """
features of the records and of the target, checkpoint by checkpoint (docs/less.md):
  python compute_gradient_features.py --input_file data.json --model_path ref/checkpoint-105 --gradient adam \\
      --output_file features/105 ...
  python compute_gradient_features.py --input_file target.json --model_path ref/checkpoint-105 \\
      --output_file target/105 ...
then the best 5% of the records, for the subtask that each serves best:
  python select_data_LESS.py --data_path data.json --train features/105 features/211 \\
      --target_data target.json --target target/105 target/211 --save_path selected --p 0.05
records that many subtasks agree on, or the same number for every subtask:
  python select_data_LESS.py ... --over_targets vote
  python select_data_LESS.py ... --over_targets round_robin

Writes to --save_path, with every option that is not the default in the names:
  Less_p_{p}.json          the subset: records as they came, in the data file's order
  Less_p_{p}_rows.npy      the numbers of their rows
  Less_p_{p}_scores.csv    of every record: score, rank, the score for each subtask, whether it is selected
  Less_p_{p}_summary.json  arguments, checkpoints and weights, subtasks, tasks, hashes, versions
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records to select from: a JSON list, JSON Lines, Parquet or a folder")
    add("--train", required=True, nargs="+", metavar="DIR", help="their features, a folder a checkpoint, or several")
    add("--target_data", required=True, help="records of the target: a JSON list, JSON Lines, Parquet or a folder")
    add("--target", required=True, nargs="+", metavar="DIR", help="the target's features at the same checkpoints")
    add("--save_path", required=True, metavar="DIR", help="folder for the subset, the scores and the summary")
    add("--p", type=float, default=0.05, help="share of all records to select, above 0 and up to 1 (0.05)")
    add("--task_key", default="dataset", help="where a target record names its subtask: KEY, KEY.KEY or KEY:SEPARATOR")
    add("--weights", type=float, nargs="+", metavar="W", help="of the checkpoints (mean logged learning rates)")
    over_targets, gradients = CHOICES["over_targets"], CHOICES["gradient"]
    add("--over_targets", default="max", choices=over_targets, help="how subtasks become one score (max)")
    add("--gradient", default="adam", choices=gradients, help="what the records' features must be of (adam)")
    add("--rows_only", action="store_true", help="write no records, only the numbers of their rows")
    add("--device", default="cpu", help="where the passes are computed: cpu, cuda or cuda:K (cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    weights = tuple(arguments.weights) if arguments.weights else None
    options = LessOptions(arguments.p, arguments.over_targets, arguments.gradient, weights)
    # Imported after the arguments are read, so that --help does not wait for torch.
    import numpy as np

    from tive.features.lookup import read_ahead
    from tive.method.influence import group_means, products
    from tive.method.target import subtask_scores
    from tive.selection import less, printing
    from tive.selection.mixture import bar, read_mixture, reasons_left_out, record_scores
    from tive.selection.output import files_of, write_selection
    from tive.util.device import usable_device
    from tive.util.files import check_writable

    device = usable_device(arguments.device)
    check_writable(arguments.save_path)
    stem = stem_of(options, arguments.task_key, ())
    files = files_of(arguments.save_path, stem, arguments.data_path, arguments.rows_only)
    read_ahead(*arguments.train)  # while the records are parsed
    mixture = read_mixture(arguments.data_path, arguments.task_key)
    target = read_mixture(arguments.target_data, arguments.task_key)
    missing = Path(arguments.save_path) / "missing"
    checkpoints = less.open_checkpoints(arguments.train, arguments.target, mixture, target, options.gradient, missing)
    checkpoint_weights = less.weights_of(checkpoints, options.weights)
    groups, target_left_out = less.target_groups(target, checkpoints, Path(arguments.save_path) / "bad_records.json")
    reasons: dict[int, str] = {}
    for checkpoint in checkpoints:  # a record needs a gradient at each
        reasons = reasons_left_out(checkpoint.train, record_scores(checkpoint.train)) | reasons
    repeated = less.repeated_in(target, mixture)
    printing.print_checkpoints(checkpoints, checkpoint_weights, repeated, target_left_out)

    def products_of_checkpoints() -> Iterator[np.ndarray]:
        for checkpoint in checkpoints:
            means = group_means(checkpoint.target.spans(), groups, device)[0]
            with bar(str(checkpoint.train.folder), len(mixture.ids)) as done:
                yield products(checkpoint.train.spans(), means, device=device, progress=done.update)

    scores = subtask_scores(products_of_checkpoints(), checkpoint_weights)
    chosen = less.choose_for_target(mixture, scores, target, groups, reasons, options)
    details = less.target_details(target, checkpoints, checkpoint_weights, target_left_out)
    chosen = replace(chosen, details={**details, **chosen.details})
    write_selection(files, mixture, chosen, vars(arguments), checkpoints[-1].train)
    printing.print_target_choice(chosen)
    printing.print_files(files, chosen)


if __name__ == "__main__":
    run(main)
