"""The experiments' results as a CSV file with a row a run and task; and its tables, answers and plot.

`python -m scripts.experiment.tables CSV [--plot PNG]` prints the tables as Markdown, as the experiment's page has them.
Of the first experiment only the arms' means are kept, in a file without the columns seed, answers and exact.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

from scripts.experiment.plan import ARMS, BASE, BELOW, EQUAL, FEWEST_SEEDS, KNOWN, SHORT, Run
from tive.util.errors import UserError
from tive.util.errors import run as run_script
from tive.util.files import whole_file

LEVEL = 0.05
# An interval within this part of the gap between random and all records is no difference.
NEGLIGIBLE = 0.1
# Of a run: task -> number of the CSV.
Losses = Mapping[str, Mapping[str, float]]
Measured = Mapping[Run, Mapping[str, float]]
Rows = list[tuple[str, ...]]


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows under their keys; no value has a comma."""
    lines: list[Iterable[object]] = [rows[0].keys(), *(row.values() for row in rows)]
    with whole_file(path) as file:
        file.write("".join(",".join(map(str, line)) + "\n" for line in lines).encode())


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV; none where there is no file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read_losses(path: Path) -> dict[str, dict[Run, dict[str, dict[str, float]]]]:
    """The numbers of each task, by variant of the experiment and run."""
    losses: dict[str, dict[Run, dict[str, dict[str, float]]]] = {}
    for row in read_csv(path):
        run = Run(row["arm"], int(row.get("seed", 0)))
        numbers = {key: float(row.get(key, 0)) for key in ("mixture_records", "loss", "answers", "exact")}
        losses.setdefault(row["variant"], {}).setdefault(run, {})[row["task"]] = numbers
    return losses


def measures(tasks: Losses) -> dict[str, float]:
    """The measures of a run, under their names.

    They are the mean loss over tasks (the main measure), over known and over new ones, weighted by the mixture's
    records, the worst task's; and the exact share of the short tasks, NaN where no answer was asked for.
    """
    losses = {task: numbers["loss"] for task, numbers in tasks.items()}
    weights = [numbers["mixture_records"] for numbers in tasks.values()]
    asked = [numbers for task, numbers in tasks.items() if task in SHORT and numbers["answers"]]
    return {
        "mean": float(np.mean([*losses.values()])),
        "known": float(np.mean([loss for task, loss in losses.items() if task in KNOWN])),
        "new": float(np.mean([loss for task, loss in losses.items() if task not in KNOWN])),
        "weighted": float(np.average([*losses.values()], weights=weights)),
        "worst": max(losses.values()),
        "exact": float(np.mean([numbers["exact"] / numbers["answers"] for numbers in asked])) if asked else math.nan,
    }


def paired(measured: Measured, arm: str, other: str) -> list[float]:
    """The differences of the main measure between two arms, of the seeds that both have."""
    values = [{run.seed: of_run["mean"] for run, of_run in measured.items() if run.arm == one} for one in (arm, other)]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def interval(pairs: Sequence[float], level: float = LEVEL) -> tuple[float, float, float]:
    """The mean of two differences or more, and the two ends of its interval by Student's t, at this level."""
    mean, half = float(np.mean(pairs)), float(stats.t.ppf(1 - level / 2, len(pairs) - 1) * stats.sem(pairs))
    return mean, mean - half, mean + half


def p_value(pairs: Sequence[float]) -> float:
    """Of a two-sided t test against 0; 1 where too few seeds ran or nothing differs."""
    enough = len(pairs) >= FEWEST_SEEDS and any(pairs)
    return float(stats.ttest_1samp(pairs, 0.0).pvalue) if enough else 1.0


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """The level that Holm's procedure tests each hypothesis at, in their order.

    The smallest p-value at 0.05 by their number, the next at 0.05 by one less, and so on; once one fails, those behind
    it fail too, and their level is 0.
    """
    levels, failed = [0.0] * len(p_values), False
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        level = LEVEL / (len(p_values) - rank)
        levels[index] = 0.0 if failed else level
        failed = failed or p_values[index] > level
    return levels


def is_below(pairs: Sequence[float], margin: float, level: float) -> str:
    """`yes`, `no` or `undecided`, as the protocol says, of an arm that is said to be lower.

    Args:
        margin: a 95% interval within it says `no`, as one above 0 does.
        level: of Holm's step, at which `yes` is said; 0 where the step was not reached.
    """
    if level > 0 and interval(pairs, level)[2] < 0:
        return "yes"
    _, low, high = interval(pairs)
    return "no" if low > 0 or (-margin <= low and high <= margin) else "undecided"


def is_equal(pairs: Sequence[float], margin: float) -> str:
    """Whether the 95% interval lies within the margin around 0, outside it altogether, or neither."""
    _, low, high = interval(pairs)
    if -margin <= low and high <= margin:
        return "yes"
    return "no" if low > margin or high < -margin else "undecided"


def answer_rows(measured: Measured) -> Rows:
    """The hypotheses and their answers; a difference counts against the gap between random and all records."""
    margin = NEGLIGIBLE * abs(mean_of(measured, "random") - mean_of(measured, "all"))
    rows: Rows = [("hypothesis", "answer", "seeds", "mean difference ± half width of the 95% interval", "p", "level")]
    levels = [*holm_levels([p_value(paired(measured, *pair)) for pair in BELOW]), LEVEL]
    for (arm, other), level in zip([*BELOW, EQUAL], levels, strict=True):
        equal, pairs = (arm, other) == EQUAL, paired(measured, arm, other)
        word, cells = "not run", ("-", "-", "-")
        if len(pairs) >= FEWEST_SEEDS and (not equal or math.isfinite(margin)):
            word = is_equal(pairs, margin) if equal else is_below(pairs, margin, level)
        if len(pairs) >= FEWEST_SEEDS:
            cells = (str(len(pairs)), shown(pairs), f"{p_value(pairs):.3f}")
        rows.append((f"{arm} {'equal to' if equal else 'below'} {other}", f"**{word}**", *cells, f"{level:.4f}"))
    return rows


def shown(pairs: Sequence[float]) -> str:
    """The mean and the half width of its interval, which a single pair has not."""
    if len(pairs) < 2:
        return f"{pairs[0]:+.4f}" if pairs else "-"
    mean, low, _ = interval(pairs)
    return f"{mean:+.4f} ± {mean - low:.4f}"


def mean_of(measured: Measured, arm: str, key: str = "mean") -> float:
    """A measure of an arm, the mean over its seeds; NaN where it did not run."""
    values = [of_run[key] for run, of_run in measured.items() if run.arm == arm]
    return float(np.mean(values)) if values else math.nan


def arms_of(measured: Mapping[Run, object]) -> list[str]:
    """The arms in the order of the plan; the first experiment's as they stand in its file."""
    there = list(dict.fromkeys(run.arm for run in measured))
    return sorted(there, key=[BASE.arm, *ARMS, *there].index)


def arm_rows(measured: Measured) -> Rows:
    """A row an arm: the mean of each measure over seeds, and the differences to random and to equal."""
    first = next(iter(measured.values()))
    kept = [key for key in first if not any(math.isnan(of_run[key]) for of_run in measured.values())]
    whole = mean_of(measured, "all")
    rows: Rows = [("arm", "seeds", *kept, "% of all", "to random", "to equal")]
    for arm in arms_of(measured):
        cells = [f"{mean_of(measured, arm, key):.4f}" for key in kept]
        cells.append(f"{100 * mean_of(measured, arm) / whole:.1f}" if math.isfinite(whole) else "-")
        cells += ["-" if arm == other else shown(paired(measured, arm, other)) for other in ("random", "equal")]
        rows.append((arm, str(sum(run.arm == arm for run in measured)), *cells))
    return rows


def task_rows(losses: Mapping[Run, Losses]) -> Rows:
    """A row an arm: the mean loss of each task over seeds."""
    rows: Rows = [("arm", *next(iter(losses.values())))]
    for arm in arms_of(losses):
        runs = [tasks for run, tasks in losses.items() if run.arm == arm]
        rows.append((arm, *(f"{np.mean([tasks[task]['loss'] for tasks in runs]):.3f}" for task in rows[0][1:])))
    return rows


def arms_figure(measured: Measured) -> Figure:
    """Every arm's mean held-out loss against random's of the same seed: a point a seed, the mean, its 95% interval."""
    arms = [arm for arm in arms_of(measured) if arm not in (BASE.arm, "random") and paired(measured, arm, "random")]
    figure = Figure(figsize=(6.4, 0.36 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        pairs = paired(measured, arm, "random")
        if len(pairs) > 1:
            axes.plot(interval(pairs)[1:], [row, row], color="#1b2a41", lw=1.5)
        axes.plot(pairs, [row] * len(pairs), "o", color="#4a78b5", alpha=0.5, markersize=4)
        axes.plot([np.mean(pairs)] * 2, [row - 0.25, row + 0.25], color="#1b2a41", lw=1.5)
    axes.axvline(0, color="#999999", lw=1)
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel("mean held-out loss minus that of records drawn at random (left is better)", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    return figure


def markdown(rows: Rows) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="losses of runs by task")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="also draw the arms")
    arguments = parser.parse_args()
    losses = read_losses(arguments.csv)
    if not losses:
        raise UserError(f"{arguments.csv} holds no run; name a CSV file of docs/results")
    for variant, runs in losses.items():
        measured = {run: measures(tasks) for run, tasks in runs.items()}
        tables = [arm_rows(measured), task_rows(runs)]
        if any(run.arm == EQUAL[0] for run in runs):
            tables.insert(0, answer_rows(measured))
        print("\n\n".join([f"**{variant.replace('_', ', ')}**", *map(markdown, tables)]), end="\n\n")
    if arguments.plot:
        with whole_file(arguments.plot) as file:
            arms_figure(measured).savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    run_script(main)
