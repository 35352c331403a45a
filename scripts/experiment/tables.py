"""The experiment's words, tables and plots, from its CSV files.

`python -m scripts.experiment.tables FOLDER` reads and writes `FOLDER/results/`. With the CSV file of an experiment of
which only the arms' means are kept, `docs/results/first_experiment.csv`, it prints the arms' tables.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from scipy.stats import spearmanr

from scripts.experiment.plan import ARMS, AT_ALL_SHARES, HYPOTHESES, P, Run
from scripts.experiment.results import BASE, MEASURES, Losses, measures, read_csv, read_losses
from scripts.experiment.statistics import Difference, difference, holm_levels, rank_interval, verdict
from tive.util.errors import run as run_script
from tive.util.files import whole_file, write_json
from tive.util.text import print_table

Measured = Mapping[Run, Mapping[str, float]]
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Answer:
    """What the protocol says of one hypothesis; `cells` by mixture and reference, clean."""

    hypothesis: str
    word: str
    p: float
    level: float
    cells: dict[str, Difference]


def references(measured: Measured) -> list[int]:
    return sorted({run.reference for run in measured if run.reference is not None})


def mean_of(measured: Measured, arm: str, share: float = P) -> float:
    """The main measure of an arm, over its references and seeds."""
    return float(np.mean([values["mean"] for run, values in measured.items() if (run.arm, run.share) == (arm, share)]))


def paired(measured: Measured, lower: str, upper: str, reference: int) -> Difference:
    """The paired differences of the main measure between two arms, over the seeds that both have.

    An arm without a reference stands beside every reference.
    """
    values = [
        {
            run.seed: measured[run]["mean"]
            for run in measured
            if (run.arm, run.share) == (arm, P) and run.reference in (None, reference)
        }
        for arm in (lower, upper)
    ]
    return difference([values[0][seed] - values[1][seed] for seed in sorted(values[0].keys() & values[1].keys())])


def answers(measured: Mapping[str, Measured]) -> list[Answer]:
    """The hypotheses, in the protocol's words."""
    clean = {variant: runs for variant, runs in measured.items() if variant.endswith("clean")}
    places = [(variant, reference) for variant, runs in clean.items() for reference in references(runs)]
    cells = [
        {
            f"{variant.removesuffix('_clean')}, reference {reference}": paired(clean[variant], lower, upper, reference)
            for variant, reference in places
        }
        for lower, upper in HYPOTHESES
    ]
    p_values = [max(cell.p for cell in by_place.values()) for by_place in cells]
    gaps = [abs(mean_of(clean[variant], "random") - mean_of(clean[variant], "all_epochs")) for variant, _ in places]
    return [
        Answer(f"{lower} below {upper}", verdict(list(by_place.values()), gaps, level), p, level, by_place)
        for (lower, upper), by_place, p, level in zip(HYPOTHESES, cells, p_values, holm_levels(p_values), strict=True)
    ]


def answer_rows(said: Sequence[Answer]) -> Rows:
    rows: Rows = [("hypothesis", "answer", "p", "level", "cells: mean difference ± half width of its interval")]
    for answer in said:
        cells = [
            f"{name}: {cell.mean:+.4f} ± {cell.half_width(answer.level or 0.05):.4f}"
            for name, cell in answer.cells.items()
        ]
        rows.append((answer.hypothesis, answer.word, f"{answer.p:.3f}", f"{answer.level:.4f}", "; ".join(cells)))
    return rows


def arm_rows(measured: Measured) -> Rows:
    """A row an arm: the mean of each measure over references and seeds, and the differences to random and to equal."""
    measures_shown = [key for key in MEASURES if not np.isnan([values[key] for values in measured.values()]).any()]
    rows: Rows = [("arm", "seeds", *measures_shown, "to random", "to equal")]
    for arm in _arms(measured):
        runs = [run for run in measured if (run.arm, run.share) == (arm, P)]
        cells = [f"{np.mean([measured[run][key] for run in runs]):.4f}" for key in measures_shown]
        others = []
        for other in ("random", "equal"):
            places = references(measured) if ARMS[arm].by_reference else references(measured)[:1]
            cell = ", ".join(_difference(paired(measured, arm, other, reference)) for reference in places)
            others.append("-" if arm == other else cell)
        rows.append((arm, str(len({run.seed for run in runs})), *cells, *others))
    return rows


def _arms(measured: Mapping[Run, object]) -> list[str]:
    return [arm for arm in ARMS if any((run.arm, run.share) == (arm, P) for run in measured)]


def _difference(cell: Difference) -> str:
    return f"{cell.mean:+.4f} ± {cell.half_width():.4f}" if cell.freedom else f"{cell.mean:+.4f}"


def share_rows(measured: Measured) -> Rows:
    """A row a share of the records: the mean held-out loss of the arms that are compared at all of them."""
    rows: Rows = [("% of the records", *AT_ALL_SHARES)]
    for share in _shares(measured):
        rows.append((f"{100 * share:.0f}", *(f"{mean_of(measured, arm, share):.4f}" for arm in AT_ALL_SHARES)))
    return rows


def _shares(measured: Measured) -> list[float]:
    return sorted({run.share for run in measured if run.arm == "tive"})


def task_rows(losses: Mapping[Run, Mapping[str, Mapping[str, float]]]) -> Rows:
    """A row an arm: the mean held-out loss of each task, over references and seeds."""
    tasks = list(losses[BASE])
    rows: Rows = [("arm", *tasks)]
    for arm in (BASE.arm, *_arms(losses)):
        runs = [run for run in losses if run.arm == arm and (run.share == P or run == BASE)]
        rows.append((arm, *(f"{np.mean([losses[run][task]['loss'] for run in runs]):.3f}" for task in tasks)))
    return rows


def mean_rows(means: Sequence[Mapping[str, str]]) -> Rows:
    """A row an arm, of the arms' mean losses by task: these, and the measures that are linear in them."""
    arms: dict[str, dict[str, dict[str, float]]] = {}
    for row in means:
        numbers = {"loss": float(row["loss"]), "mixture_records": float(row["mixture_records"]), "answers": 0.0}
        arms.setdefault(row["arm"], {})[row["task"]] = numbers
    linear = ("mean", "known", "new", "weighted")
    rows: Rows = [("arm", *next(iter(arms.values())), *linear)]
    for arm, tasks in arms.items():
        values = measures(tasks)
        losses = [f"{numbers['loss']:.3f}" for numbers in tasks.values()]
        rows.append((arm, *losses, *(f"{values[key]:.3f}" for key in linear)))
    return rows


def step_rows(steps: Sequence[Mapping[str, str]]) -> Rows:
    """A row a task: the rank correlation of influence with the fall of the loss by one step, with each reference."""
    numbers = sorted({int(step["reference"]) for step in steps})
    rows: Rows = [("task", "records", *(f"reference {number}" for number in numbers))]
    for task in dict.fromkeys(step["task"] for step in steps):
        cells, count = [], 0
        for number in numbers:
            mine = [step for step in steps if (step["task"], step["reference"]) == (task, str(number))]
            pairs = np.array([(float(step["influence"]), float(step["fall_of_loss"])) for step in mine])
            middle, low, high = rank_interval(*pairs.T.tolist())
            count = len(mine)
            cells.append(f"{middle:+.2f} ({low:+.2f} to {high:+.2f})" if np.isfinite(middle) else "-")
        rows.append((task, str(count), *cells))
    return rows


def half_rows(halves: Sequence[Mapping[str, str]]) -> Rows:
    """The linear datamodelling score, a row a reference: rank correlations over the halves, their mean and by task.

    The score sets the sum of a half's influences against the mean of its two losses, positive where more influence is
    less loss; "loss with itself" sets the first loss of a half against its second.
    """
    tasks = list(dict.fromkeys(half["task"] for half in halves))

    def column(key: str, task: str, order: str) -> np.ndarray:
        return np.array([float(half[key]) for half in halves if (half["task"], half["order"]) == (task, order)])

    rows: Rows = [("reference", "score", "loss with itself", "by task")]
    for key in (key for key in halves[0] if key.startswith("influence_")):
        scores = {}
        for task in tasks:
            first, second = (column("loss", task, order) for order in "01")
            predicted = spearmanr(column(key, task, "0"), -(first + second)).statistic
            pair = predicted, spearmanr(first, second).statistic
            if np.isfinite(pair).all():
                scores[task] = pair
        cells = [difference([pair[place] for pair in scores.values()]) for place in (0, 1)]
        both = [f"{cell.mean:+.2f} ± {cell.half_width():.2f}" for cell in cells]
        by_task = ", ".join(f"{task} {pair[0]:+.2f}" for task, pair in scores.items())
        rows.append((key.removeprefix("influence_"), *both, by_task))
    return rows


def write_tables(results: Path) -> None:
    """Read `losses.csv`, `halves.csv` and `steps.csv`; write `tables.md`, `results.json`, `arms.png`, `shares.png`."""
    losses = read_losses(results / "losses.csv")
    measured = measured_of(losses)
    said = answers(measured)
    print_table([row[:4] for row in answer_rows(said)])
    text = ["# Results of the experiment", "", "Mean held-out loss unless another measure is named.", ""]
    text += ["Intervals are over seeds, 95%, one for each reference."]
    text += ["", "## Hypotheses", "", *_markdown(answer_rows(said))]
    for variant, runs in measured.items():
        text += ["", f"## {variant}", "", *_markdown(arm_rows(runs)), "", *_markdown(task_rows(losses[variant]))]
        if len(_shares(runs)) > 1:
            text += ["", *_markdown(share_rows(runs))]
    halves = half_rows(read_csv(results / "halves.csv"))
    print_table(halves)
    text += ["", "## Linear datamodelling score", "", *_markdown(halves)]
    steps = step_rows(read_csv(results / "steps.csv"))
    text += ["", "## One small step along a record's gradient", "", *_markdown(steps)]
    with whole_file(results / "tables.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    write_json(results / "results.json", {answer.hypothesis: answer.word for answer in said})
    figures = {"arms.png": arms_figure(measured)}
    if any(len(_shares(runs)) > 1 for runs in measured.values()):
        figures["shares.png"] = shares_figure(measured)
    for name, figure in figures.items():
        with whole_file(results / name) as file:
            figure.savefig(file, format="png", dpi=150)
    print(f"written: {results}/tables.md, results.json, {', '.join(figures)}")


def measured_of(losses: Losses) -> dict[str, dict[Run, dict[str, float]]]:
    """The measures of every run but the base."""
    return {
        variant: {run: measures(tasks) for run, tasks in runs.items() if run != BASE}
        for variant, runs in losses.items()
    }


def arms_figure(measured: Mapping[str, Measured]) -> Figure:
    """Every arm's mean held-out loss on each mixture, a point a run."""
    arms = list(dict.fromkeys(arm for runs in measured.values() for arm in _arms(runs)))
    figure = Figure(figsize=(3.4 * len(measured), 0.32 * len(arms) + 1.2), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharex=True, sharey=True))
    for axes, (variant, runs) in zip(plots, measured.items(), strict=True):
        for row, arm in enumerate(arms):
            values = [result["mean"] for run, result in runs.items() if (run.arm, run.share) == (arm, P)]
            if values:
                axes.plot(values, [row] * len(values), "o", color="#4a78b5", alpha=0.5, markersize=4)
                axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color="#1b2a41", linewidth=1.5)
        axes.set_title(variant.replace("_", ", "), fontsize=9)
        axes.set_xlabel("mean held-out loss", fontsize=8)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(axis="x", alpha=0.3)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.invert_yaxis()
    return figure


def shares_figure(measured: Mapping[str, Measured]) -> Figure:
    """Mean held-out loss of random, equal and tive over the share of the records."""
    measured = {variant: runs for variant, runs in measured.items() if len(_shares(runs)) > 1}
    figure = Figure(figsize=(3.4 * len(measured), 3), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharey=True))
    for axes, (variant, runs) in zip(plots, measured.items(), strict=True):
        for arm, style in zip(AT_ALL_SHARES, ("o--", "s:", "^-"), strict=True):
            shares = _shares(runs)
            means = [mean_of(runs, arm, share) for share in shares]
            axes.plot([100 * share for share in shares], means, style, label=arm, markersize=4)
        axes.set_title(variant.replace("_", ", "), fontsize=9)
        axes.set_xlabel("% of the records", fontsize=8)
    plots[0].set_ylabel("mean held-out loss", fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _markdown(rows: Rows) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def main() -> None:
    path = Path(sys.argv[1])
    if path.is_dir():
        write_tables(path / "results")
        return
    means = read_csv(path)
    for variant in dict.fromkeys(row["variant"] for row in means):
        rows = mean_rows([row for row in means if row["variant"] == variant])
        print("\n".join([f"**{variant.replace('_', ', ')}**", "", *_markdown(rows), ""]))


if __name__ == "__main__":
    run_script(main)
