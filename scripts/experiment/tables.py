"""The experiment's results: verdicts, tables and plots, from the held-out losses of every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from scripts.experiment.datamodel import score_rows
from scripts.experiment.measures import MEASURES, measures
from scripts.experiment.plan import (
    ARMS,
    AT_ALL_SHARES,
    HYPOTHESES,
    MIXTURES,
    P,
    Plan,
    Run,
    references,
    runs,
    seeds,
    variants,
)
from scripts.experiment.results import evaluation_of, read_result, step_results
from scripts.experiment.statistics import Difference, difference, holm_levels, verdict
from tive.evaluation.results import ModelResult
from tive.util.files import read_json, whole_file, write_json
from tive.util.text import print_table

Measured = Mapping[Run, Mapping[str, float]]


@dataclass(frozen=True)
class Answer:
    """What the protocol says of one hypothesis; `cells` by mixture and reference, clean."""

    hypothesis: str
    word: str
    p: float
    level: float
    cells: dict[str, Difference]


def value(measured: Measured, arm: str, reference: int, seed: int, measure: str = "mean", share: float = P) -> float:
    """A measure of a run; an arm without a reference stands beside every reference."""
    return measured[Run(arm, share, seed, reference if ARMS[arm].by_reference else None)][measure]


def mean_of(measured: Measured, arm: str, share: float = P) -> float:
    """The main measure of an arm, over its references and seeds."""
    return float(np.mean([found["mean"] for run, found in measured.items() if (run.arm, run.share) == (arm, share)]))


def paired(measured: Measured, lower: str, upper: str, reference: int) -> Difference:
    """The paired differences of the main measure between two arms, over the seeds that both have."""
    common = set.intersection(
        *({run.seed for run in measured if (run.arm, run.share) == (arm, P)} for arm in (lower, upper))
    )
    return difference(
        [value(measured, lower, reference, seed) - value(measured, upper, reference, seed) for seed in sorted(common)]
    )


def answers(measured: Mapping[str, Measured], plan: Plan) -> list[Answer]:
    """The hypotheses, in the protocol's words."""
    found = []
    for lower, upper in HYPOTHESES:
        cells = {
            f"{mixture}, reference {reference}": paired(measured[f"{mixture}_clean"], lower, upper, reference)
            for mixture in MIXTURES
            for reference in range(plan.references)
        }
        found.append((f"{lower} below {upper}", cells, max(cell.p for cell in cells.values())))
    levels = holm_levels([p for _, _, p in found])
    gaps = []
    for mixture in MIXTURES:
        own = measured[f"{mixture}_clean"]
        gaps += [abs(mean_of(own, "random") - mean_of(own, "all_epochs"))] * plan.references
    return [
        Answer(name, verdict(list(cells.values()), gaps, level), p, level, cells)
        for (name, cells, p), level in zip(found, levels, strict=True)
    ]


def arm_rows(measured: Measured, plan: Plan, variant: str, shown: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A row an arm: the mean of each measure over references and seeds, and the differences to random and to equal."""
    rows: list[tuple[str, ...]] = [("arm", "seeds", *shown, "to random", "to equal")]
    for arm, count in seeds(plan, variant).items():
        own = [result for run, result in measured.items() if run.arm == arm and run.share == P]
        cells = [f"{np.mean([result[measure] for result in own]):.4f}" for measure in shown]
        to_others = []
        for other in ("random", "equal"):
            differences = [paired(measured, arm, other, reference) for reference in references(plan, variant)]
            if not ARMS[arm].by_reference:
                differences = differences[:1]
            shown_differences = ", ".join(_difference(cell) for cell in differences)
            to_others.append("-" if arm == other else shown_differences)
        rows.append((arm, str(count), *cells, *to_others))
    return rows


def _difference(cell: Difference) -> str:
    return f"{cell.mean:+.4f} ± {cell.half_width():.4f}" if cell.freedom else f"{cell.mean:+.4f}"


def share_rows(measured: Measured, plan: Plan) -> list[tuple[str, ...]]:
    """A row a share of the records: the mean held-out loss of the arms that are compared at all of them."""
    rows: list[tuple[str, ...]] = [("% of the records", *AT_ALL_SHARES)]
    for share in sorted({P, *plan.shares}):
        means = [f"{mean_of(measured, arm, share):.4f}" for arm in AT_ALL_SHARES]
        rows.append((f"{100 * share:.0f}", *means))
    return rows


def task_rows(results: Mapping[Run, ModelResult], base: ModelResult) -> list[tuple[str, ...]]:
    """A row an arm: the mean held-out loss of each task, over references and seeds."""
    tasks = [task.name for task in base.tasks]
    rows: list[tuple[str, ...]] = [("arm", *tasks)]
    rows.append(("base", *(f"{task.loss:.3f}" for task in base.tasks)))
    for arm in dict.fromkeys(run.arm for run in results):
        own = [result for run, result in results.items() if (run.arm, run.share) == (arm, P)]
        losses = [[task.loss for task in result.tasks] for result in own]
        rows.append((arm, *(f"{mean:.3f}" for mean in np.mean(np.asarray(losses, np.float64), 0))))
    return rows


def step_rows(folder: Path, plan: Plan) -> list[tuple[str, ...]]:
    """A row a task: the rank correlation of influence with the fall of the loss by one step, with each reference."""
    found = [read_json(step_results(folder, reference))["tasks"] for reference in range(plan.references)]
    rows: list[tuple[str, ...]] = [("task", "records", *(f"reference {number}" for number in range(plan.references)))]
    for task in plan.records:
        cells = []
        for tasks in found:
            low, high = tasks[task]["interval"] or (None, None)
            middle = tasks[task]["rank_correlation"]
            cells.append("-" if middle is None else f"{middle:+.2f} ({low:+.2f} to {high:+.2f})")
        rows.append((task, str(len(found[0][task]["rows"])), *cells))
    return rows


def write_results(folder: Path, plan: Plan, answered: bool) -> None:
    """Read all held-out losses and write `results/`: `tables.md`, `results.json`, `arms.png`, `shares.png`.

    Args:
        answered: whether the gate for exact answers was passed.
    """
    base = read_result(folder / "base_evaluation")
    found: dict[str, dict[Run, ModelResult]] = {
        variant: {run: read_result(evaluation_of(folder, variant, run, answered)) for run in runs(plan, variant)}
        for variant in variants(plan)
    }
    measured = {
        variant: {run: measures(result, plan.records) for run, result in own.items()} for variant, own in found.items()
    }
    shown = MEASURES if answered else tuple(measure for measure in MEASURES if measure != "exact")
    vqa = next(task.exact_share for task in base.tasks if task.name == "vqa") or 0.0
    text = [
        "# Results of the experiment",
        "",
        f"{plan.references} references, {sum(plan.records.values()):,} records a mixture, "
        f"{plan.held_out} held-out records a task. "
        "Mean held-out loss unless said otherwise; intervals over seeds, 95%, one for each reference.",
        "",
        f"The base produces {vqa:.0%} of vqa's answers. "
        + ("Exact answers are shown." if answered else "Exact answers are left out: the gate was not passed."),
        "",
        "## Hypotheses",
        "",
    ]
    said = answers(measured, plan)
    header = ("hypothesis", "answer", "p", "level", "cells: mean difference ± half width of its interval")
    rows = []
    for answer in said:
        cells = [
            f"{name}: {cell.mean:+.4f} ± {cell.half_width(answer.level or 0.05):.4f}"
            for name, cell in answer.cells.items()
        ]
        rows.append((answer.hypothesis, answer.word, f"{answer.p:.3f}", f"{answer.level:.4f}", "; ".join(cells)))
    text += _markdown([header, *rows])
    print_table([row[:4] for row in (header, *rows)])
    for variant in variants(plan):
        text += ["", f"## {variant}", "", *_markdown(arm_rows(measured[variant], plan, variant, shown))]
        text += ["", *_markdown(task_rows(found[variant], base))]
        if plan.shares and variant.endswith("clean"):
            text += ["", *_markdown(share_rows(measured[variant], plan))]
    datamodel = score_rows(folder, plan)
    text += ["", "## Linear datamodelling score", "", *_markdown(datamodel)]
    print_table(datamodel)
    text += ["", "## One small step along a record's gradient", "", *_markdown(step_rows(folder, plan))]
    results = folder / "results"
    with whole_file(results / "tables.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    write_json(
        results / "results.json",
        {
            "answers": {answer.hypothesis: answer.word for answer in said},
            "exact_answers_shown": answered,
            "measures": {
                variant: {run.name: dict(found) for run, found in own.items()} for variant, own in measured.items()
            },
        },
    )
    figures = {"arms.png": arms_figure(measured, plan)}
    if plan.shares:
        figures["shares.png"] = shares_figure(measured, plan)
    for name, figure in figures.items():
        with whole_file(results / name) as file:
            figure.savefig(file, format="png", dpi=150)
    print(f"written: {results}/tables.md, results.json, {', '.join(figures)}")


def arms_figure(measured: Mapping[str, Measured], plan: Plan) -> Figure:
    """Every arm's mean held-out loss on each mixture, a point a run."""
    arms = list(plan.clean)
    figure = Figure(figsize=(3.4 * len(measured), 0.32 * len(arms) + 1.2), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharex=True, sharey=True))
    for axes, (variant, own) in zip(plots, measured.items(), strict=True):
        for row, arm in enumerate(arms):
            values = [result["mean"] for run, result in own.items() if run.arm == arm and run.share == P]
            if not values:
                continue
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


def shares_figure(measured: Mapping[str, Measured], plan: Plan) -> Figure:
    """Mean held-out loss of random, equal and tive over the share of the records."""
    shares = sorted({P, *plan.shares})
    measured = {variant: own for variant, own in measured.items() if variant.endswith("clean")}
    figure = Figure(figsize=(3.4 * len(measured), 3), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharey=True))
    for axes, (variant, own) in zip(plots, measured.items(), strict=True):
        for arm, style in zip(AT_ALL_SHARES, ("o--", "s:", "^-"), strict=True):
            means = [mean_of(own, arm, share) for share in shares]
            axes.plot([100 * share for share in shares], means, style, label=arm, markersize=4)
        axes.set_title(variant.replace("_", ", "), fontsize=9)
        axes.set_xlabel("% of the records", fontsize=8)
    plots[0].set_ylabel("mean held-out loss", fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
