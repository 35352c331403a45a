"""Step 4: task value and instance value from the gradient features, and the subset to train on (paper, section 3.3)."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from tive.selection.options import CHOICES, TASK_BUDGETS, TiveOptions, excluded_tasks, stem_of
from tive.util.errors import run

EXAMPLES = """
the paper's selection, 15% of the records:
  python select_data_TIVE.py --data_path data.json --gradient_path features --save_path selected
influence decides within a task (docs/selection.md, "Choosing q"), and no task is left out:
  python select_data_TIVE.py ... --q 50 --exclude_tasks none
half of the budget by difficulty, half in equal numbers, and no record twice:
  python select_data_TIVE.py ... --task_budget difficulty+equal --at_most_once
the same budgets for a hundredth of the cost, from the gradients of a sample (docs/selection.md):
  python select_warm_up_data.py --source_path data.json --target_path sample.json --per_task 1000
  python compute_gradient_features.py --input_file sample.json --output_file sample_features ...
  python select_data_TIVE.py --data_path data.json --gradient_path sample_features --from_sample ...
by the losses of a forward pass alone, which takes less than half of the time:
  python compute_gradient_features.py --gradient none --output_file losses ...
  python select_data_TIVE.py --gradient_path losses --task_budget equal --instance_score loss --q 1 ...
variety within a task instead of a draw:
  python select_data_TIVE.py ... --sampling clusters
gradient norm instead of influence, the best instead of a draw:
  python select_data_TIVE.py ... --instance_score norm --sampling top

Writes to --save_path, with every option that is not the default in the names:
  Tive_q_{q}_p_{p}.json          the subset: records as they came, in the data file's order
  Tive_q_{q}_p_{p}_rows.npy      the numbers of their rows
  Tive_q_{q}_p_{p}_scores.csv    of every record: norm, influence, other scores, weight, times selected
  Tive_q_{q}_p_{p}_summary.json  arguments, hashes, versions, tasks: enough to rebuild and check the subset
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records of the gradients: a JSON list, JSON Lines, Parquet or a folder")
    add(
        "--gradient_path",
        required=True,
        nargs="+",
        metavar="DIR",
        help="features, as compute_gradient_features.py wrote them; several folders where each has a part",
    )
    add("--save_path", required=True, metavar="DIR", help="folder for the subset, the scores and the summary")
    add("--p", type=float, default=0.15, help="share of all records to select, above 0 and up to 1 (0.15)")
    add("--q", type=float, default=0.001, help="sharpness of the instance weights softmax(q * score) (0.001)")
    add("--seed", type=int, default=0, help="the same seed draws the same subset on every machine (0)")
    add("--chunk_num", type=int, metavar="N", help="how many chunks there should be; they are found without it")
    add(
        "--exclude_tasks",
        nargs="*",
        default=list(TiveOptions.exclude_tasks),
        metavar="TASK",
        help="tasks to leave out, or none (textcaps)",
    )
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    add(
        "--task_budget",
        default="difficulty",
        metavar="RULE[+RULE]",
        help=f"what a task's budget follows: {', '.join(TASK_BUDGETS)}, or a sum as difficulty+equal (difficulty)",
    )
    add(
        "--from_sample",
        action="store_true",
        help="budgets from the records that have features (step 1's --per_task), and a uniform draw from all",
    )
    add("--at_most_once", action="store_true", help="what a budget has above its task's records goes to other tasks")
    scores, samplings, roundings = (CHOICES[name] for name in ("instance_score", "sampling", "rounding"))
    add("--instance_score", default="influence", choices=scores, help="what decides within it (influence)")
    add("--sampling", default="weighted", choices=samplings, help="by weight, the best, or varied (weighted)")
    add("--drop_below", type=float, metavar="GAIN", help="leave out records whose visual gain is smaller, such as 0")
    add("--rounding", default="down", choices=roundings, help="budgets to whole records: down loses the rest (down)")
    add("--rows_only", action="store_true", help="write no records, only the numbers of their rows")
    add("--device", default="cpu", help="where the two passes are computed: cpu, cuda or cuda:K (cpu)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    options = TiveOptions(**{name: getattr(arguments, name) for name in TiveOptions.__dataclass_fields__})
    # Imported after the arguments are read, so that --help does not wait for torch.
    import numpy as np

    from tive.features.lookup import open_features, read_ahead
    from tive.method.influence import group_means, products
    from tive.selection import mixture as read
    from tive.selection.choose import choose, is_excluded
    from tive.selection.output import files_of, write_selection
    from tive.selection.printing import print_choice, print_files
    from tive.util.device import usable_device
    from tive.util.files import check_writable

    device = usable_device(arguments.device)
    check_writable(arguments.save_path)
    read_ahead(*arguments.gradient_path)  # while the records are parsed
    mixture = read.read_mixture(arguments.data_path, arguments.task_key)
    features = open_features(arguments.gradient_path, mixture.records, arguments.chunk_num)
    read.refuse_gradients(features, ("sgd", "none"), "TIVE selects by plain ones (select_data_LESS.py takes Adam's)")
    if not options.from_sample:
        missing = Path(arguments.save_path) / "missing" / "records.json"
        read.refuse_missing(features, mixture, missing, "; or add --from_sample, with which these give the budgets")
    options = replace(options, exclude_tasks=excluded_tasks(options.exclude_tasks, mixture.task_names))
    stem = stem_of(options, arguments.task_key, mixture.task_names)
    files = files_of(arguments.save_path, stem, arguments.data_path, arguments.rows_only)

    scores = read.record_scores(features, options.columns)
    reasons = read.reasons_left_out(features, scores, options)
    read.refuse_problems(mixture, reasons, Path(arguments.save_path) / "bad_records.json")
    points = None
    if "norm" in scores and not options.from_sample:
        groups = np.where(is_excluded(mixture.task_names, options)[mixture.task], -1, mixture.task)
        groups[list(reasons)] = -1  # in no mean
        spans = features.spans()
        with read.bar("Task means", len(groups)) as done:
            means, lengths = group_means(spans, groups, device, done.update)
        with read.bar("Influence", len(groups)) as done:
            influence = products(spans, means, groups, lengths, device, done.update)
        for row in np.flatnonzero((groups >= 0) & ~(np.isfinite(lengths) & (lengths > 0))).tolist():
            reasons[row] = "features are zero" if lengths[row] == 0 else "features not finite"
        scores = {"norm": scores["norm"], "influence": influence} | scores
        if options.sampling == "clusters":
            points = read.whitened_points(features, lengths, arguments.save_path)

    chosen = choose(mixture.task_names, mixture.task, scores, reasons, options, points)
    write_selection(files, mixture, chosen, vars(arguments), features)
    print_choice(chosen, options)
    print_files(files, chosen)


if __name__ == "__main__":
    run(main)
