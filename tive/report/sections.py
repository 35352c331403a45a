"""The sections that are plots: a picture, a sentence on what to see in it, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from tive.report import captions, plots
from tive.report.captions import percent, plural, short
from tive.report.choice import Choice
from tive.report.markup import Markup, join, name, table, tag
from tive.selection.files import Selection
from tive.selection.summary import Task

TASKS_A_PLOT = 30


@dataclass
class Pictures:
    """Draws plots for the page, and keeps the PNG files of what was drawn: file name to bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    bar: tqdm = field(default_factory=lambda: tqdm(desc="Drawing", unit=" plots", delay=2))

    def figure(
        self, key: str, draw: Callable[[], Figure], what: str, caption: Markup, numbers: Markup | None
    ) -> Markup:
        picture, self.files[f"{key}.png"] = plots.render(draw, key, what)
        self.bar.update()
        shown = tag("figure", picture, tag("figcaption", tag("p", caption)))
        if not numbers:
            return shown
        return join([shown, tag("details", tag("summary", "The numbers of this plot"), numbers, class_="numbers")])

    def by_task(
        self,
        key: str,
        selection: Selection,
        draw: Callable[[Selection, Sequence[int]], Figure],
        what: str,
        caption: Markup,
        header: Sequence[str],
        row: Callable[[int, Task], Sequence[Any]],
        tasks: Sequence[int],
    ) -> Markup:
        """A plot with a row a task, and its table; above 30 tasks there are several plots, all but the first folded."""
        lines = ([name(selection.tasks[index].name), *row(index, selection.tasks[index])] for index in tasks)
        numbers = table(["task", *header], lines, f"{what}, by task")
        shown, *others = [tasks[start : start + TASKS_A_PLOT] for start in range(0, len(tasks), TASKS_A_PLOT)]
        first = self.figure(key, partial(draw, selection, shown), what, caption, numbers)
        if not others:
            return first
        rest = []
        for page, part in enumerate(others, start=2):
            text = f"Tasks {(page - 1) * TASKS_A_PLOT + 1} to {(page - 1) * TASKS_A_PLOT + len(part)} of {len(tasks)}."
            drawn = partial(draw, selection, part)
            rest.append(self.figure(f"{key}_{page}", drawn, f"{what}. {text}", join([text]), None))
        folded = tag("summary", f"Plots of the other {plural(len(tasks) - len(shown), 'task')}")
        return join([first, tag("details", folded, *rest, class_="more")])


def mixture(selection: Selection, pictures: Pictures) -> Markup:
    records = max(1, sum(task.records for task in selection.tasks))
    selected = max(1, sum(task.selected for task in selection.tasks))

    def row(_: int, task: Task) -> list[str]:
        budget = "excluded" if task.excluded else f"{task.budget or 0:,}"
        after = [budget, f"{task.selected:,}", f"{task.distinct:,}", percent(task.selected / selected)]
        return [f"{task.records:,}", percent(task.records / records), *after]

    header = ["records", "share before", "budget", "selected", "distinct", "share after"]
    what = "Share of each task in the records and in the subset"
    tasks = range(len(selection.tasks))
    return pictures.by_task("mixture", selection, plots.mixture, what, captions.mixture(selection), header, row, tasks)


def task_values(selection: Selection, pictures: Pictures) -> Markup:
    valued = [index for index, task in enumerate(selection.tasks) if task.value is not None]
    valued.sort(key=lambda index: -(selection.tasks[index].value or 0))
    if not valued:
        return tag("p", "No task has a value: all are excluded.")

    def row(_: int, task: Task) -> list[str]:
        return [short(task.value), f"{task.counted:,}", f"{task.budget or 0:,}"]

    header = ["value", "records counted", "budget"]
    what = "Value (difficulty) of each task, the mean gradient norm of its records"
    caption = captions.task_values(selection)
    return pictures.by_task("task_values", selection, plots.task_values, what, caption, header, row, valued)


def distribution(selection: Selection, pictures: Pictures, column: str) -> Markup:
    values = selection.column(column)
    if not np.isfinite(values).any():
        return tag("p", f"No record has a {column}.")

    def row(index: int, _: Task) -> list[str]:
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(values[rows])]
        if not len(rows):
            return ["–"] * 6
        drawn = rows[selection.drawn[rows]]
        median = float(np.median(values[drawn])) if len(drawn) else None
        return [*map(short, np.quantile(values[rows], [0, 0.25, 0.5, 0.75, 1])), short(median)]

    header = ["least", "lower quartile", "median", "upper quartile", "largest", "median of the drawn"]
    noun = "gradient norm" if column == "norm" else column
    what = f"Distribution of the {noun} in each task, with the drawn records marked"
    draw = partial(plots.distribution, column=column)
    caption = captions.distribution(selection, column)
    return pictures.by_task(column, selection, draw, what, caption, header, row, range(len(selection.tasks)))


def choice(selection: Selection, choice: Choice | None, pictures: Pictures) -> Markup:
    if choice is None:
        return tag("p", "No record has a score, so there are no weights.")
    drawn = sum(selection.tasks[index].distinct for index in choice.tasks)
    drawn_share = float(drawn / choice.sizes.sum())
    what = "Effective sample size, as a share of the task, over q from 0.0001 to 100,000"
    steps = choice.qs[::5]
    rows = [(f"{float(f'{q:.3g}'):,g}", percent(share)) for q, share in zip(steps, choice.shares[::5], strict=True)]
    numbers = table(["q", "effective share, all tasks"], rows, what)
    caption = captions.choice(selection, choice, drawn_share)
    curve = pictures.figure("choice_curve", partial(plots.choice_curve, choice, drawn_share), what, caption, numbers)

    lines = []
    for position, index in enumerate(choice.tasks):
        task, size = selection.tasks[index], int(choice.sizes[position])
        effective = choice.at_q[position]
        half, narrow = choice.q_where(0.5, position), choice.q_where(task.distinct / size, position)
        sizes = [f"{size:,}", f"{task.distinct:,}", f"{effective:,.1f}", percent(effective / size)]
        lines.append([name(task.name), *sizes, short(choice.largest_ratio(position)), short(half), short(narrow)])
    header = ["task", "records", "drawn", "effective size", "share", "largest weight / smallest"]
    header += ["q for half", "q for the share drawn"]
    what = f"Effective sample size against task size at q = {choice.q:g}, with the records drawn"
    caption = join(
        [
            "A point a task. On the diagonal every record of the task weighs the same; the closer a point comes to the "
            "records drawn, the less is left to chance. A task drawn whole lies on the diagonal with both."
        ]
    )
    numbers = table(header, lines, what)
    sizes = partial(plots.choice_sizes, selection, choice)
    return join([curve, pictures.figure("choice_sizes", sizes, what, caption, numbers)])
