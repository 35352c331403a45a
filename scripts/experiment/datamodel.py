"""The linear datamodelling score of the sum of influences: do they predict which half of the records trains better?

Models are trained on random halves of a mixture, the same half of every task's number, and each half twice, in another
order (`tables.half_rows` has the score).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from pathlib import Path

from scripts.experiment.commands import Evaluate, Paths, train
from scripts.experiment.plan import Plan
from scripts.experiment.results import first_selection, read_result, write_csv
from tive.util.files import read_json, write_json

VARIANT = "varied_clean"
ORDERS = (0, 1)


def half_of(plan: Plan, tasks: list[str], number: int) -> list[int]:
    """The rows of a half: half of each task's, drawn by its number."""
    drawn = random.Random(f"half {number}")
    rows = []
    for task in plan.records:
        members = [row for row, name in enumerate(tasks) if name == task]
        rows += drawn.sample(members, len(members) // 2)
    return sorted(rows)


def train_halves(paths: Paths, plan: Plan) -> list[Callable[[], None]]:
    """Jobs: each trains on one half in one order for one epoch, and evaluates."""
    records = read_json(paths.mixture(VARIANT))
    tasks = [record["dataset"] for record in records]

    def job(number: int, order: int) -> None:
        data = paths.folder / "halves" / "data" / f"{number}.json"
        model = paths.folder / "halves" / "models" / f"{number}_{order}"
        write_json(data, [records[row] for row in half_of(plan, tasks, number)])
        evaluation = Evaluate(_evaluation(paths.folder, number, order), 0)
        train(paths, "finetune.sh", data, model, evaluation, "--seed", order, EPOCHS=1)

    # Both orders of a half use one file of data, which is the same whoever writes it.
    return [functools.partial(job, number, order) for order in ORDERS for number in range(plan.halves)]


def _evaluation(folder: Path, number: int, order: int) -> Path:
    return folder / "halves" / "evaluated" / f"{number}_{order}"


def collect_halves(folder: Path, plan: Plan) -> None:
    """Write `results/halves.csv`: each half's, order's and task's loss, and its sum of each reference's influences."""
    names = [record["dataset"] for record in read_json(folder / "data" / f"{VARIANT}.json")]
    influences = [
        first_selection(folder, VARIANT, reference).column("influence") for reference in range(plan.references)
    ]
    lines = []
    for number in range(plan.halves):
        rows = half_of(plan, names, number)
        for order in ORDERS:
            for task in read_result(_evaluation(folder, number, order)).tasks:
                sums = {
                    f"influence_{reference}": sum(float(influence[row]) for row in rows if names[row] == task.name)
                    for reference, influence in enumerate(influences)
                }
                lines.append({"half": number, "order": order, "task": task.name, "loss": task.loss} | sums)
    write_csv(folder / "results" / "halves.csv", lines)
