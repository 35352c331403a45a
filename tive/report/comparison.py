"""The sections that compare: selections of the same data (budgets, overlap, means), and models on held-out records."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from markupsafe import Markup

from tive.evaluation.results import Evaluation
from tive.evaluation.tables import INTERVAL, tables
from tive.report import plots
from tive.report.page import Block, Pictures, Section, Table, name
from tive.report.sections import ROWS_A_PLOT
from tive.selection.reading import Selection
from tive.util.errors import UserError
from tive.util.text import percent, plural, short

MEANS = {
    "norm": "gradient norm",
    "influence": "influence",
    "loss": "loss",
    "el2n": "EL2N",
    "supervised_tokens": "supervised tokens",
}


def comparison(selections: Sequence[Selection], pictures: Pictures) -> list[Section]:
    """The sections of the page; a selection is called by its number in the first of them.

    Raises:
        UserError: they are not of the same data.
    """
    first = selections[0]
    for other in selections:
        tasks = [[(task.name, task.records) for task in one.tasks] for one in (first, other)]
        if other.summary.inputs.data_sha256 != first.summary.inputs.data_sha256 or tasks[0] != tasks[1]:
            raise UserError(f"{first.stem} and {other.stem} are of different data or tasks; keep them in two folders")
    return [
        described(selections),
        budgets(selections, pictures),
        overlap(selections),
        means(selections),
    ]


def described(selections: Sequence[Selection]) -> Section:
    """Number, name and size of each selection, and the arguments in which they differ."""
    lines = [
        [str(number), f"{int(one.drawn.sum()):,}", one.summary.method, name(one.stem, 400)]
        for number, one in enumerate(selections, start=1)
    ]
    numbers = [str(number) for number in range(1, len(selections) + 1)]
    arguments = [selection.summary.arguments for selection in selections]
    keys = dict.fromkeys(key for one in arguments for key in one if not key.endswith("path"))
    values = {key: [json.dumps(one[key]) if key in one else "–" for one in arguments] for key in keys}
    differing = [[key, *(value[:80] for value in row)] for key, row in values.items() if len(set(row)) > 1]
    tables = [Table("The selections", ["number", "records", "method", "name"], lines)]
    if differing:
        tables.append(Table("Arguments in which they differ", ["argument", *numbers], differing))
    return Section("selections", "The selections", tables)


def budgets(selections: Sequence[Selection], pictures: Pictures) -> Section:
    """How many records each selection took from each task."""
    tasks = selections[0].tasks
    selected = [{task.name: task.selected for task in selection.tasks} for selection in selections]
    lines = [
        [name(task.name), f"{task.records:,}", *(f"{counts[task.name]:,}" for counts in selected)] for task in tasks
    ]
    numbers = [str(number) for number in range(1, len(selections) + 1)]
    table = Table("Records that each selection took from each task", ["task", "records", *numbers], lines)
    shown = tasks[:ROWS_A_PLOT]
    series = {
        number: [counts[task.name] / max(1, sum(counts.values())) for task in shown]
        for number, counts in zip(numbers, selected, strict=True)
    }
    draw = partial(plots.bars, [task.name for task in shown], series, "share of the selection", percent=True)
    return Section("budgets", "Budgets", [pictures.plot("budgets", draw, "", table)])


def overlap(selections: Sequence[Selection]) -> Section:
    """The share of each selection's records that each other one has too, beside what chance would give."""
    drawn = np.array([selection.drawn for selection in selections])
    shared = drawn.astype(np.float64) @ drawn.T
    shares = shared / np.maximum(1, drawn.sum(1, keepdims=True))
    numbers = [str(number) for number in range(1, len(selections) + 1)]
    lines = [[number, *map(percent, row)] for number, row in zip(numbers, shares, strict=True)]
    lines.append(["by chance", *map(percent, drawn.mean(1))])
    title = "Of the records of the selection in a row, the share that the selection in a column has too"
    return Section("overlap", "Overlap", [Table(title, ["selection", *numbers], lines)])


def means(selections: Sequence[Selection]) -> Section:
    """Mean scores of the records of each selection, and of all records."""
    columns = {key: title for key, title in MEANS.items() if all(key in one.numbers for one in selections)}
    everyone = np.ones(len(selections[0].ids), bool)
    rows = [("all records", selections[0], everyone)]
    rows += [(str(number), one, one.drawn) for number, one in enumerate(selections, start=1)]
    lines = []
    for title, selection, members in rows:
        values = [selection.column(key)[members] for key in columns]
        known = [column[np.isfinite(column)] for column in values]
        lines.append([title, *(short(float(column.mean()) if len(column) else None) for column in known)])
    table = Table("Mean over the records of each selection", ["selection", *columns.values()], lines)
    return Section("means", "Means", [table])


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
