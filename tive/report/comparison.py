"""The sections that compare: selections of the same data (budgets, overlap, means), and models on held-out records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from tive.evaluation.results import INTERVAL, Evaluation, tables
from tive.report.page import Block, Plot, Section, Table, bars, by_name, name
from tive.selection.output import Selection
from tive.util.errors import UserError
from tive.util.text import percent, plural

MEANS = ("norm", "influence", "loss", "el2n", "supervised_tokens")


def comparison(selections: Sequence[Selection]) -> list[Section]:
    """The sections of the page: what the selections are and where their arguments differ, what each took from each
    task, how far they overlap, their mean scores. A `UserError` where they are not of the same data.
    """
    first = selections[0]
    tasks = {task.name: task.records for task in first.tasks}
    for other in selections:
        is_same = other.summary.inputs.data_sha256 == first.summary.inputs.data_sha256
        if not is_same or {task.name: task.records for task in other.tasks} != tasks:
            raise UserError(f"{first.stem} and {other.stem} are of different data or tasks; keep them in two folders")
    numbers = [str(number) for number in range(1, len(selections) + 1)]
    drawn = np.array([selection.drawn for selection in selections])

    columns: dict[str, list[Any]] = {
        "records": drawn.sum(1).tolist(),
        "method": [one.summary.method for one in selections],
        "name": [name(one.stem, 400) for one in selections],
    }
    described: list[Block] = [by_name("The selections", "number", numbers, columns)]
    arguments = [selection.summary.arguments for selection in selections]
    keys = dict.fromkeys(key for one in arguments for key in one if not key.endswith("path"))
    values = {key: [json.dumps(one[key])[:80] if key in one else "–" for one in arguments] for key in keys}
    if differing := [[key, *row] for key, row in values.items() if len(set(row)) > 1]:
        described.append(Table("Arguments in which they differ", ["argument", *numbers], differing))

    taken = [{task.name: task.selected for task in one.tasks} for one in selections]
    columns = {"records": [*tasks.values()]}
    columns |= {number: [counts[task] for task in tasks] for number, counts in zip(numbers, taken, strict=True)}
    budgets = by_name("Records that each selection took from each task", "task", tasks, columns)
    shares = {
        number: [counts[task] / max(1, sum(counts.values())) for task in tasks]
        for number, counts in zip(numbers, taken, strict=True)
    }
    plot = Plot("budgets", budgets.title, bars([*tasks], shares, "share of the selection", percent=True), budgets)

    overlap = drawn.astype(np.float64) @ drawn.T / np.maximum(1, drawn.sum(1, keepdims=True))
    rows = zip([*numbers, "by chance"], [*overlap, drawn.mean(1)], strict=True)
    title = "Of the records of the selection in a row, the share that the selection in a column has too"
    overlaps = Table(title, ["selection", *numbers], [[number, *map(percent, row)] for number, row in rows])

    columns, everyone = {}, np.ones((1, len(first.ids)), bool)
    whole = min(selections, key=is_of_sample)  # the first that has the scores of all records, where one has
    for key in MEANS:
        if all(key in one.columns or is_of_sample(one) for one in selections):
            groups = zip([whole, *selections], [*everyone, *drawn], strict=True)
            columns[key.replace("_", " ")] = [mean_of(one, key, members) for one, members in groups]
    means = by_name("Mean over the records of each selection", "selection", ["all records", *numbers], columns)
    return [
        Section("selections", "The selections", described),
        Section("budgets", "Budgets", [plot]),
        Section("overlap", "Overlap", [overlaps]),
        Section("means", "Means", [means]),
    ]


def is_of_sample(selection: Selection) -> bool:
    """Whether only a sample of the records has scores, so that means over others are not known."""
    return bool(selection.summary.arguments.get("from_sample"))


def mean_of(selection: Selection, key: str, members: np.ndarray) -> float | None:
    """The mean score of records, those that have one; None where it is not known."""
    if is_of_sample(selection):
        return None
    values = selection.columns[key][members]
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def evaluations(results: Sequence[Evaluation]) -> Section:
    """Tables of tasks and models, for each held-out file."""
    blocks: list[Block] = []
    for evaluation in results:
        file = name(Path(evaluation.data_path).name)
        records = plural(evaluation.models[0].conditions.data_records, "record")
        blocks.append(Markup("{} in {}. Every task counts the same in a mean; {}.").format(records, file, INTERVAL))
        for model in evaluation.models:
            if count := sum(task.left_out for task in model.tasks):
                could_not = Markup("{} could not be given to {}.")
                blocks.append(could_not.format(plural(count, "record"), name(model.name)))
        for title, (header, *rows) in tables(evaluation).items():
            blocks.append(Table(title, header, [(name(row[0]), *row[1:]) for row in rows]))
    return Section("evaluation", "Held-out evaluation", blocks)
