"""The experiment's results: verdicts, tables and plots, from the held-out losses of every run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from scripts.experiment.measures import MEASURES, exact_answers_tell, measures
from scripts.experiment.plan import ARMS, HYPOTHESES, MIXTURES, P, Plan, Run, runs, variants
from scripts.experiment.statistics import Difference, difference, holm_levels, verdict
from tive.evaluation.results import read_evaluation
from tive.util.files import whole_file, write_json
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


def paired(measured: Measured, plan: Plan, lower: str, upper: str, reference: int) -> Difference:
    """The paired differences of the main measure between two arms, over the seeds."""
    return difference(
        [value(measured, lower, reference, seed) - value(measured, upper, reference, seed) for seed in plan.seeds]
    )


def answers(measured: Mapping[str, Measured], plan: Plan) -> list[Answer]:
    """The hypotheses, in the protocol's words."""
    found = []
    for lower, upper in HYPOTHESES:
        cells = {
            f"{mixture}, reference {reference}": paired(measured[f"{mixture}_clean"], plan, lower, upper, reference)
            for mixture in MIXTURES
            for reference in range(plan.references)
        }
        found.append((f"{lower} below {upper}", cells, max(cell.p for cell in cells.values())))
    levels = holm_levels([p for _, _, p in found])
    gaps = []
    for mixture in MIXTURES:
        own = measured[f"{mixture}_clean"]
        ends = [
            np.mean([value(own, arm, reference, seed) for seed in plan.seeds])
            for reference in range(plan.references)
            for arm in ("random", "all_epochs")
        ]
        gaps += [abs(float(first - second)) for first, second in zip(ends[::2], ends[1::2], strict=True)]
    return [
        Answer(name, verdict(list(cells.values()), gaps, level), p, level, cells)
        for (name, cells, p), level in zip(found, levels, strict=True)
    ]


def arm_rows(measured: Measured, plan: Plan, shown: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A row an arm: the mean of each measure over references and seeds, and the differences to random."""
    rows: list[tuple[str, ...]] = [("arm", *shown, "to random")]
    for arm in plan.arms:
        own = [result for run, result in measured.items() if run.arm == arm and run.share == P]
        cells = [f"{np.mean([result[measure] for result in own]):.4f}" for measure in shown]
        to_random = "-"
        if arm != "random":
            differences = [paired(measured, plan, arm, "random", reference) for reference in range(plan.references)]
            to_random = ", ".join(f"{cell.mean:+.4f} ± {cell.half_width():.4f}" for cell in differences)
        rows.append((arm, *cells, to_random))
    return rows


def write_results(folder: Path, plan: Plan) -> None:
    """Read all held-out losses and write `results/`: `tables.md`, `results.json`, `arms.png`, `shares.png`."""
    base = read_evaluation(folder / "base_evaluation").models[0]
    measured: dict[str, Measured] = {}
    whole = []
    for variant in variants(plan):
        by_name = {model.name: model for model in read_evaluation(folder / variant / "evaluation").models}
        measured[variant] = {run: measures(by_name[run.name], plan.records) for run in runs(plan)}
        whole += [by_name[run.name] for run in runs(plan) if run.arm == "all_epochs"]
    exact = exact_answers_tell(base, whole)
    shown = MEASURES if exact else tuple(measure for measure in MEASURES if measure != "exact")
    text = [
        "# Results of the experiment",
        "",
        f"{len(plan.seeds)} seeds, {plan.references} references, {sum(plan.records.values()):,} records a mixture. "
        "Mean held-out loss unless said otherwise; intervals over seeds, 95%, one for each reference.",
        "",
        "Exact answers are shown." if exact else "Exact answers are left out: the gate was not passed.",
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
        text += ["", f"## {variant}", "", *_markdown(arm_rows(measured[variant], plan, shown))]
    results = folder / "results"
    with whole_file(results / "tables.md") as file:
        file.write(("\n".join(text) + "\n").encode())
    write_json(
        results / "results.json",
        {
            "answers": {answer.hypothesis: answer.word for answer in said},
            "exact_answers_shown": exact,
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
    figure = Figure(figsize=(3.4 * len(measured), 0.32 * len(plan.arms) + 1.2), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharey=True))
    for axes, (variant, own) in zip(plots, measured.items(), strict=True):
        for row, arm in enumerate(plan.arms):
            values = [result["mean"] for run, result in own.items() if run.arm == arm and run.share == P]
            axes.plot(values, [row] * len(values), "o", color="#4a78b5", alpha=0.5, markersize=4)
            axes.plot([np.mean(values)] * 2, [row - 0.3, row + 0.3], color="#1b2a41", linewidth=1.5)
        axes.set_title(variant.replace("_", ", "), fontsize=9)
        axes.set_xlabel("mean held-out loss", fontsize=8)
    axes.set_yticks(range(len(plan.arms)), plan.arms, fontsize=8)
    axes.invert_yaxis()
    return figure


def shares_figure(measured: Mapping[str, Measured], plan: Plan) -> Figure:
    """Mean held-out loss of random, equal and tive over the share of the records."""
    shares = sorted({P, *plan.shares})
    figure = Figure(figsize=(3.4 * len(measured), 3), layout="constrained")
    plots = np.atleast_1d(figure.subplots(1, len(measured), sharey=True))
    for axes, (variant, own) in zip(plots, measured.items(), strict=True):
        for arm, style in (("random", "o--"), ("equal", "s:"), ("tive", "^-")):
            means = [
                np.mean([result["mean"] for run, result in own.items() if (run.arm, run.share) == (arm, share)])
                for share in shares
            ]
            axes.plot([100 * share for share in shares], means, style, label=arm, markersize=4)
        axes.set_title(variant.replace("_", ", "), fontsize=9)
        axes.set_xlabel("% of the records", fontsize=8)
    axes.legend(fontsize=8)
    return figure


def _markdown(rows: list[tuple[str, ...]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]
