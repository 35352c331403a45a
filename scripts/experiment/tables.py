"""The experiments' words, tables and plot, from a CSV file of `docs/results`.

`python -m scripts.experiment.tables CSV [--plot PNG]` prints the tables as Markdown, as the experiment's page has them.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scripts.experiment.plan import ARMS, BELOW, EQUAL, FEWEST_SEEDS, Run
from scripts.experiment.results import BASE, MEASURES, measures, read_losses
from scripts.experiment.statistics import NEGLIGIBLE, Difference, difference, holm_levels, verdict
from tive.util.errors import UserError
from tive.util.errors import run as run_script
from tive.util.files import whole_file

Measured = Mapping[Run, Mapping[str, float]]
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Answer:
    """What the protocol says of one hypothesis; no `cell` where too few seeds ran."""

    hypothesis: str
    word: str
    level: float
    cell: Difference | None


def mean_of(measured: Measured, arm: str, key: str = "mean") -> float:
    """A measure of an arm, the mean over its seeds; NaN where it did not run."""
    values = [of_run[key] for run, of_run in measured.items() if run.arm == arm]
    return float(np.mean(values)) if values else float("nan")


def paired(measured: Measured, arm: str, other: str) -> list[float]:
    """The differences of the main measure between two arms, of the seeds that both have."""
    values = [{run.seed: of_run["mean"] for run, of_run in measured.items() if run.arm == one} for one in (arm, other)]
    return [values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())]


def answers(measured: Measured) -> list[Answer]:
    """The hypotheses, in the protocol's words; a difference counts against the gap between random and all."""
    gap = abs(mean_of(measured, "random") - mean_of(measured, "all"))

    def cell_of(arm: str, other: str) -> Difference | None:
        pairs = paired(measured, arm, other)
        return difference(pairs) if len(pairs) >= FEWEST_SEEDS else None

    said, cells = [], [cell_of(*pair) for pair in BELOW]
    levels = holm_levels([1.0 if cell is None else cell.p for cell in cells])
    for (arm, other), cell, level in zip(BELOW, cells, levels, strict=True):
        word = "not run" if cell is None else verdict([cell], [gap], level)
        said.append(Answer(f"{arm} below {other}", word, level, cell))
    cell, word = cell_of(*EQUAL), "not run"
    if cell is not None and np.isfinite(gap):
        word = within(cell, NEGLIGIBLE * gap)
    return [*said, Answer(f"{EQUAL[0]} equal to {EQUAL[1]}", word, 0.05, cell)]


def within(cell: Difference, margin: float) -> str:
    """Whether the 95% interval lies within the margin around 0, outside it altogether, or neither."""
    low, high = cell.mean - cell.half_width(), cell.mean + cell.half_width()
    if -margin <= low and high <= margin:
        return "yes"
    return "no" if low > margin or high < -margin else "undecided"


def answer_rows(measured: Measured) -> Rows:
    rows: Rows = [("hypothesis", "answer", "seeds", "mean difference ± half width of the 95% interval", "p", "level")]
    for said in answers(measured):
        cells = ("-", "-", "-")
        if said.cell is not None:
            cells = (str(said.cell.freedom + 1), shown(said.cell), f"{said.cell.p:.3f}")
        rows.append((said.hypothesis, f"**{said.word}**", *cells, f"{said.level:.4f}"))
    return rows


def shown(cell: Difference) -> str:
    return f"{cell.mean:+.4f} ± {cell.half_width():.4f}" if cell.freedom else f"{cell.mean:+.4f}"


def arm_rows(measured: Measured) -> Rows:
    """A row an arm: the mean of each measure over seeds, and the differences to random and to equal."""
    kept = [key for key in MEASURES if not np.isnan([of_run[key] for of_run in measured.values()]).any()]
    whole = mean_of(measured, "all")
    rows: Rows = [("arm", "seeds", *kept, "% of all", "to random", "to equal")]
    for arm in arms_of(measured):
        cells = [f"{mean_of(measured, arm, key):.4f}" for key in kept]
        relative = f"{100 * mean_of(measured, arm) / whole:.1f}" if np.isfinite(whole) else "-"
        pairs = [[] if arm == other else paired(measured, arm, other) for other in ("random", "equal")]
        to = [shown(difference(pair)) if pair else "-" for pair in pairs]
        rows.append((arm, str(sum(run.arm == arm for run in measured)), *cells, relative, *to))
    return rows


def arms_of(measured: Measured) -> list[str]:
    """The arms in the order of the plan; the first experiment's as they stand in its file."""
    there = list(dict.fromkeys(run.arm for run in measured))
    return sorted(there, key=lambda arm: [BASE.arm, *ARMS, *there].index(arm))


def task_rows(losses: Mapping[Run, Mapping[str, Mapping[str, float]]], key: str = "loss") -> Rows:
    """A row an arm: the mean number of each task over seeds."""
    rows: Rows = [("arm", *next(iter(losses.values())))]
    for arm in arms_of({run: {} for run in losses}):
        runs = [tasks for run, tasks in losses.items() if run.arm == arm]
        rows.append((arm, *(f"{np.mean([tasks[task][key] for tasks in runs]):.3f}" for task in rows[0][1:])))
    return rows


def arms_figure(measured: Measured) -> Figure:
    """Every arm's mean held-out loss against random's of the same seed: a point a seed, the mean, its 95% interval."""
    arms = [arm for arm in arms_of(measured) if arm not in (BASE.arm, "random") and paired(measured, arm, "random")]
    figure = Figure(figsize=(6.4, 0.36 * len(arms) + 1.3), layout="constrained")
    axes = figure.subplots()
    for row, arm in enumerate(arms):
        pairs = paired(measured, arm, "random")
        cell = difference(pairs)
        if cell.freedom:
            axes.plot(
                [cell.mean - cell.half_width(), cell.mean + cell.half_width()], [row, row], color="#1b2a41", lw=1.5
            )
        axes.plot(pairs, [row] * len(pairs), "o", color="#4a78b5", alpha=0.5, markersize=4)
        axes.plot([cell.mean] * 2, [row - 0.25, row + 0.25], color="#1b2a41", lw=1.5)
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
        if any(run.arm == BELOW[0][0] for run in runs):
            tables.insert(0, answer_rows(measured))
        print("\n\n".join([f"**{variant.replace('_', ', ')}**", *map(markdown, tables)]), end="\n\n")
    if arguments.plot:
        with whole_file(arguments.plot) as file:
            arms_figure(measured).savefig(file, format="png", dpi=150)


if __name__ == "__main__":
    run_script(main)
