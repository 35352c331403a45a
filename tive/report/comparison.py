"""The sections that compare: selections of the same data (budgets, overlap, means), and models on held-out records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from tive.evaluation.results import INTERVAL, Evaluation, tables
from tive.report import plots
from tive.report.page import Block, Plot, Section, Table, by_name, name
from tive.selection.output import Selection
from tive.util.errors import UserError
from tive.util.text import percent, plural, short

MEANS = ("norm", "influence", "loss", "el2n", "supervised_tokens")


def comparison(selections: Sequence[Selection]) -> list[Section]:
    """The sections of the page; a selection is called by its number in the first of them.

    Raises:
        UserError: they are not of the same data.
    """
    first = selections[0]
    for other in selections:
        tasks = [[(task.name, task.records) for task in one.tasks] for one in (first, other)]
        if other.summary.inputs.data_sha256 != first.summary.inputs.data_sha256 or tasks[0] != tasks[1]:
            raise UserError(f"{first.stem} and {other.stem} are of different data or tasks; keep them in two folders")
    numbered = {str(number): selection for number, selection in enumerate(selections, start=1)}
    return [described(numbered), budgets(numbered), overlap(numbered), means(numbered)]


def described(selections: Mapping[str, Selection]) -> Section:
    """Number, name and size of each selection, and the arguments in which they differ."""
    columns: dict[str, list[str]] = {
        "records": [f"{int(one.drawn.sum()):,}" for one in selections.values()],
        "method": [one.summary.method for one in selections.values()],
        "name": [name(one.stem, 400) for one in selections.values()],
    }
    blocks = [by_name("The selections", "number", selections, columns)]
    arguments = [selection.summary.arguments for selection in selections.values()]
    keys = dict.fromkeys(key for one in arguments for key in one if not key.endswith("path"))
    values = {key: [json.dumps(one[key])[:80] if key in one else "–" for one in arguments] for key in keys}
    if differing := [[key, *row] for key, row in values.items() if len(set(row)) > 1]:
        blocks.append(Table("Arguments in which they differ", ["argument", *selections], differing))
    return Section("selections", "The selections", blocks)


def budgets(selections: Mapping[str, Selection]) -> Section:
    """How many records each selection took from each task."""
    tasks = next(iter(selections.values())).tasks
    names = [task.name for task in tasks]
    taken = {number: {task.name: task.selected for task in one.tasks} for number, one in selections.items()}
    columns = {"records": [f"{task.records:,}" for task in tasks]}
    columns |= {number: [f"{counts[name]:,}" for name in names] for number, counts in taken.items()}
    numbers = by_name("Records that each selection took from each task", "task", names, columns)
    shares = {
        number: [counts[name] / max(1, sum(counts.values())) for name in names] for number, counts in taken.items()
    }
    figure = plots.bars(names, shares, "share of the selection", percent=True)
    return Section("budgets", "Budgets", [Plot("budgets", numbers.title, figure, numbers)])


def overlap(selections: Mapping[str, Selection]) -> Section:
    """The share of each selection's records that each other one has too, beside what chance would give."""
    drawn = np.array([selection.drawn for selection in selections.values()])
    shared = drawn.astype(np.float64) @ drawn.T
    shares = shared / np.maximum(1, drawn.sum(1, keepdims=True))
    rows = dict(zip([*selections, "by chance"], [*shares, drawn.mean(1)], strict=True))
    lines = [[number, *map(percent, row)] for number, row in rows.items()]
    title = "Of the records of the selection in a row, the share that the selection in a column has too"
    return Section("overlap", "Overlap", [Table(title, ["selection", *selections], lines)])


def means(selections: Mapping[str, Selection]) -> Section:
    """Mean scores of the records of each selection, and of all records."""
    first, *_ = selections.values()
    rows = {"all records": (first, np.ones(len(first.ids), bool))}
    rows |= {number: (one, one.drawn) for number, one in selections.items()}
    columns: dict[str, list[str]] = {}
    for key in MEANS:
        if all(key in one.columns for one in selections.values()):
            values = [one.column(key)[members] for one, members in rows.values()]
            known = [column[np.isfinite(column)] for column in values]
            columns[key.replace("_", " ")] = [short(float(column.mean()) if len(column) else None) for column in known]
    return Section("means", "Means", [by_name("Mean over the records of each selection", "selection", rows, columns)])


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
