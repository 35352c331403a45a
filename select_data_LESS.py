"""Step 4 for a target: the records whose gradients, as Adam applies them, point where the target's point (LESS)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict

from tive.selection.target_options import GRADIENTS, OVER_TARGETS, WITHIN, Options
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
records that many subtasks agree on:
  python select_data_LESS.py ... --over_targets vote

Writes to --save_path, with every option that is not the default in the names:
  Less_p_{p}.json          the subset: records as they came, in the data file's order
  Less_p_{p}_scores.csv    of every record: score, rank, the score for each subtask, whether it is selected
  Less_p_{p}_summary.json  arguments, checkpoints and weights, subtasks, tasks, hashes, versions
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records to select from: a JSON list or JSON Lines")
    add("--train", required=True, nargs="+", metavar="DIR", help="their features, one folder a checkpoint")
    add("--target_data", required=True, help="records of the target: a JSON list or JSON Lines")
    add("--target", required=True, nargs="+", metavar="DIR", help="the target's features, in the same order")
    add("--save_path", required=True, metavar="DIR", help="folder for the subset, the scores and the summary")
    add("--p", type=float, default=Options.p, help="share of all records to select, above 0 and up to 1 (0.05)")
    add("--task_key", default="dataset", help="where a target record names its subtask: KEY, KEY.KEY or KEY:SEPARATOR")
    add("--weights", type=float, nargs="+", metavar="W", help="of the checkpoints (mean logged learning rates)")
    add("--within", default=Options.within, choices=WITHIN, help="mean of a subtask's cosines, or cosine with its mean")
    add(
        "--over_targets", default=Options.over_targets, choices=OVER_TARGETS, help="how subtasks become one score (max)"
    )
    add("--gradient", default=Options.gradient, choices=GRADIENTS, help="what the records' features must be of (adam)")
    add("--device", default="cpu", help="where the passes are computed: cpu, cuda or cuda:K (cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    weights = tuple(arguments.weights) if arguments.weights else None
    options = Options(arguments.p, arguments.within, arguments.over_targets, arguments.gradient, weights)
    # Imported after the arguments are read, so that --help does not wait for torch.
    import numpy as np

    from tive.data.conversations import form_problem
    from tive.data.records import open_records
    from tive.data.scan import scan_records
    from tive.features.read_ahead import read_ahead
    from tive.features.spans import spans_of
    from tive.method.influence import products
    from tive.method.target import subtask_scores
    from tive.selection import target as less
    from tive.selection.checkpoints import described, open_checkpoints, weights_of
    from tive.selection.files import Scores, check_writable, files_of, write_selection
    from tive.selection.mixture import mixture_of
    from tive.selection.printed import bar
    from tive.selection.printed_target import print_target_choice, print_warnings
    from tive.selection.summary import inputs_of, summary_of
    from tive.util.device import double_device

    device = double_device(arguments.device)
    check_writable(arguments.save_path)
    files = files_of(arguments.save_path, less.less_stem(options, arguments.task_key), arguments.data_path)
    read_ahead(*arguments.train)  # while the records are parsed
    scans = [
        scan_records(open_records(path), form_problem, arguments.task_key)
        for path in (arguments.data_path, arguments.target_data)
    ]
    mixture, target = map(mixture_of, scans)
    checkpoints = open_checkpoints(arguments.train, arguments.target, mixture.records, target.records, options.gradient)
    checkpoint_weights = weights_of(checkpoints, options.weights)
    groups, target_left_out = less.target_groups(target, checkpoints)
    reasons = less.records_left_out(mixture, checkpoints)
    print_warnings(checkpoints, less.repeated_in(target, mixture), target_left_out)

    def products_of_checkpoints() -> Iterator[np.ndarray]:
        for checkpoint in checkpoints:
            means = less.subtask_means(checkpoint, groups, options.within, device)
            with bar(checkpoint.train_path, len(mixture.ids)) as done:
                yield products(spans_of(checkpoint.train), means, device=device, progress=done.update).values

    scores = subtask_scores(products_of_checkpoints(), checkpoint_weights)
    choice = less.choose(scores, reasons, options)
    tasks, subtasks = less.tasks_of(mixture, choice), less.subtasks_of(target, groups, scores, choice)

    columns = {"score": choice.scores, "rank": choice.ranks}
    columns |= {f"score_{name}": scores[:, number] for number, name in enumerate(target.task_names)}
    details = {
        "target_data": str(target.records.path),
        "target_sha256": target.records.fingerprint,
        "checkpoints": described(checkpoints, checkpoint_weights),
        "subtasks": [asdict(subtask) for subtask in subtasks],
        "target_left_out": [{"row": row, "reason": reason} for row, reason in sorted(target_left_out.items())],
    }
    last = checkpoints[-1]
    write_selection(
        files,
        mixture.records,
        Scores(mixture.ids, mixture.tasks, columns, choice.times_selected, choice.reasons),
        summary_of(
            vars(arguments),
            inputs_of(mixture.records, last.train_path, last.train),
            last.train,
            tasks,
            mixture.left_out(choice.reasons),
            "LESS",
            details,
        ),
    )
    print_target_choice(choice, checkpoints, checkpoint_weights, tasks, subtasks, files)


if __name__ == "__main__":
    run(main)
