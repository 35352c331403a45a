"""Step 4: task value and instance value from the gradient features, and the subset to train on (paper, section 3.3)."""

from __future__ import annotations

import argparse
import math

from tive.util.errors import UserError, run

EXAMPLES = """
the paper's selection, 15% of the records:
  python select_data_TIVE.py --data_path data.json --gradient_path features --save_path selected
influence decides within a task (README, "Choosing q"), and no task is left out:
  python select_data_TIVE.py ... --q 50 --exclude_tasks none
gradient norm instead of influence, the best instead of a draw:
  python select_data_TIVE.py ... --instance_score norm --sampling top

Writes to --save_path:
  Tive_q_{q}_p_{p}.json          the subset: records as they came, in the data file's order
  Tive_q_{q}_p_{p}_scores.csv    of every record: norm, influence, weight, times selected
  Tive_q_{q}_p_{p}_summary.json  arguments, hashes, versions, tasks: enough to rebuild and check the subset
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data_path", required=True, help="records the gradients were taken of: a JSON list or JSON Lines")
    add("--gradient_path", required=True, metavar="DIR", help="features, as compute_gradient_features.py wrote them")
    add("--save_path", required=True, metavar="DIR", help="folder for the subset, the scores and the summary")
    add("--p", type=float, default=0.15, help="share of all records to select, above 0 and up to 1 (0.15)")
    add("--q", type=float, default=0.001, help="sharpness of the instance weights softmax(q * score) (0.001)")
    add("--seed", type=int, default=0, help="the same seed draws the same subset on every machine (0)")
    add("--chunk_num", type=int, metavar="N", help="how many chunks there should be; they are found without it")
    add(
        "--exclude_tasks",
        nargs="*",
        default=["textcaps"],
        metavar="TASK",
        help="tasks to leave out, or none (textcaps)",
    )
    add("--task_key", default="dataset", help="where a record names its task: KEY, KEY.KEY or KEY:SEPARATOR (dataset)")
    add("--task_budget", default="difficulty", choices=("difficulty", "size", "equal"), help="budget by (difficulty)")
    add("--instance_score", default="influence", choices=("influence", "norm", "random"), help="score (influence)")
    add(
        "--sampling", default="weighted", choices=("weighted", "top"), help="draw by weight or take the best (weighted)"
    )
    add("--device", default="cpu", help="where the two passes are computed: cpu, cuda or cuda:K (cpu)")
    arguments = parser.parse_args()
    if not 0 < arguments.p <= 1:
        raise UserError(f"--p {arguments.p} is not a share; give a number above 0 and up to 1")
    if not (arguments.q >= 0 and math.isfinite(arguments.q)):
        raise UserError(f"--q {arguments.q} is not a sharpness; give a number from 0 up")
    if arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed} is negative; give a number from 0 up")
    if arguments.device.partition(":")[0] not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {arguments.device} has no double precision; give cpu, cuda or cuda:K")
    if arguments.sampling == "top" and arguments.instance_score == "random":
        raise UserError("--sampling top has no meaning for --instance_score random; leave one of them out")
    return arguments


def main() -> None:
    arguments = parse_arguments()
    # Imported after the arguments are read, so that --help does not wait for torch.
    import numpy as np

    from tive.features.chunks import open_chunks
    from tive.features.read_ahead import read_ahead
    from tive.method.influence import influences
    from tive.selection import choice as selection
    from tive.selection import files as outcome
    from tive.util.device import usable_device

    device = usable_device(arguments.device)
    files = outcome.files_of(arguments)
    read_ahead(arguments.gradient_path)
    mixture = selection.read_mixture(arguments.data_path, arguments.task_key)
    chunks = open_chunks(arguments.gradient_path, mixture.records, arguments.chunk_num)

    norms = selection.gradient_norms(chunks)
    reasons = selection.reasons_left_out(mixture, chunks, norms)
    excluded = selection.excluded_names(arguments.exclude_tasks, mixture)
    tasks, task_of_row = selection.group_by_task(mixture, excluded, reasons)
    influence, lengths = influences(chunks, task_of_row, device)
    selection.leave_out_features(tasks, task_of_row, lengths, reasons)

    selection.give_budgets(tasks, norms, arguments.p, arguments.task_budget)
    instance_scores = {"influence": influence, "norm": norms, "random": np.zeros_like(norms)}[arguments.instance_score]
    weights, times = np.full_like(norms, np.nan), np.zeros(len(norms), int)
    for task in tasks:
        if not task.excluded:
            weights[task.counted], times[task.counted] = selection.draw_task(
                task, instance_scores[task.counted], arguments.q, arguments.seed, arguments.sampling
            )

    scores = outcome.Scores(norms, influence, weights, times)
    outcome.write_selection(files, arguments, mixture, chunks, tasks, scores, reasons)
    outcome.report(files, arguments, mixture, tasks, scores, reasons)


if __name__ == "__main__":
    run(main)
