"""The sections that are plots: a picture, a sentence on what to see in it, and its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import numpy as np
from matplotlib.figure import Figure
from tqdm import tqdm

from tive.report import captions, plots
from tive.report.blocks import Block, Fold, Plot, Section, Table, name, sentences
from tive.report.choice import Choice
from tive.report.numbers import percent, plural, short
from tive.report.plots import Part
from tive.selection.files import Selection

ROWS_A_PLOT = 30
# A scores file's column -> title of its section, what it is called in a sentence, its axis, and whether that is
# logarithmic.
COLUMNS = {
    "norm": ("Gradient norms", "gradient norm", "gradient norm (logarithmic)", True),
    "loss": ("Losses", "loss", "loss: mean cross-entropy over the supervised tokens", False),
    "el2n": ("EL2N", "EL2N", "EL2N: mean length of predicted minus true probabilities", False),
    "influence": ("Influence", "influence", "influence: mean cosine to the task's records", False),
    "score": ("Scores", "score", "score", False),
}
Row = TypeVar("Row")


@dataclass
class Pictures:
    """Draws plots for the page, and keeps the PNG files of what was drawn: file name to bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    bar: tqdm = field(default_factory=lambda: tqdm(desc="Drawing", unit=" plots", delay=2))

    def plot(self, key: str, draw: Callable[[], Figure], what: str, caption: str) -> Plot:
        picture, self.files[f"{key}.png"] = plots.render(draw, key, what)
        self.bar.update()
        return Plot(picture, caption)

    def rows(
        self,
        key: str,
        rows: Sequence[Row],
        draw: Callable[[Sequence[Row]], Figure],
        what: str,
        caption: str,
        numbers: Table,
        noun: str = "task",
    ) -> list[Block]:
        """A plot with a row a task, and its numbers; above 30 rows there are several, all but the first folded."""
        shown, *others = [rows[start : start + ROWS_A_PLOT] for start in range(0, len(rows), ROWS_A_PLOT)]
        blocks: list[Block] = [self.plot(key, partial(draw, shown), what, caption), numbers_of(numbers)]
        rest = []
        for page, part in enumerate(others, start=2):
            first = (page - 1) * ROWS_A_PLOT
            text = f"{noun.capitalize()}s {first + 1} to {first + len(part)} of {len(rows)}."
            rest.append(self.plot(f"{key}_{page}", partial(draw, part), f"{what}. {text}", text))
        if rest:
            blocks.append(Fold(f"Plots of the other {plural(len(rows) - len(shown), noun)}", rest, "more"))
        return blocks


def numbers_of(table: Table) -> Fold:
    return Fold("The numbers of this plot", [table], "numbers")


def mixture(selection: Selection, pictures: Pictures) -> Section:
    tasks = selection.tasks
    records, selected = sum(task.records for task in tasks), sum(task.selected for task in tasks)
    budgets = any(task.budget is not None for task in tasks)
    lines = []
    for task in tasks:
        budget = ["excluded" if task.excluded else f"{task.budget or 0:,}"] if budgets else []
        drawn = [f"{task.selected:,}", f"{task.distinct:,}", percent(task.selected / max(1, selected))]
        lines.append([name(task.name), f"{task.records:,}", percent(task.records / max(1, records)), *budget, *drawn])
    header = [
        "task",
        "records",
        "share before",
        *(["budget"] if budgets else []),
        "selected",
        "distinct",
        "share after",
    ]
    what = "Share of each task in the records and in the subset"
    draw = partial(plots.mixture, records=max(1, records), selected=selected)
    numbers = Table(f"{what}, by task", header, lines)
    blocks = pictures.rows("mixture", tasks, draw, what, captions.mixture(selection), numbers)
    return Section("mixture", "The mixture, before and after", blocks)


def task_values(selection: Selection, pictures: Pictures) -> Section:
    valued = [index for index, task in enumerate(selection.tasks) if task.value is not None]
    valued.sort(key=lambda index: -(selection.tasks[index].value or 0))
    if not valued:
        return Section("values", "Task values", ["No task has a value: all are excluded."])
    means = {"loss": "mean loss", "el2n": "mean EL2N", "supervised_tokens": "mean supervised tokens"}
    means = {column: title for column, title in means.items() if column in selection.numbers}
    lines = []
    for index in valued:
        task = selection.tasks[index]
        found = [short(_mean(selection.column(column)[selection.rows_of(index)])) for column in means]
        lines.append([name(task.name), short(task.value), f"{task.counted:,}", f"{task.budget or 0:,}", *found])
    what = "Value (difficulty) of each task, the mean gradient norm of its records"
    numbers = Table(f"{what}, by task", ["task", "value", "records counted", "budget", *means.values()], lines)
    tasks = [selection.tasks[index] for index in valued]
    caption = captions.task_values(selection)
    blocks = pictures.rows("task_values", tasks, plots.task_values, what, caption, numbers)
    return Section("values", "Task values", blocks)


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def distribution(selection: Selection, pictures: Pictures, column: str) -> Section:
    """A score's distribution in each task."""
    title, noun, label, logarithmic = COLUMNS[column]
    anchor = {"norm": "norms", "loss": "losses", "score": "scores"}.get(column, column)
    values = selection.column(column)
    if not np.isfinite(values).any():
        return Section(anchor, title, [f"No record has a {noun}."])
    parts = []
    for index, task in enumerate(selection.tasks):
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(values[rows])]
        parts.append(Part(task.name, values[rows], selection.drawn[rows]))
    draw = partial(plots.distribution, scale=plots.scale_of(parts, label, logarithmic))
    what = f"Distribution of the {noun} in each task, with the drawn records marked"
    caption = captions.distribution(parts, noun)
    if column == "norm":
        caption = sentences(caption, captions.lengths(selection))
    elif column == "score":
        caption = sentences(captions.over_targets(selection), caption)
    blocks = pictures.rows(column, parts, draw, what, caption, quantiles(parts, what))
    return Section(anchor, title, blocks)


def quantiles(parts: Sequence[Part], what: str, noun: str = "task") -> Table:
    lines = []
    for part in parts:
        median = float(np.median(part.values[part.drawn])) if part.drawn.any() else None
        found = map(short, np.quantile(part.values, [0, 0.25, 0.5, 0.75, 1])) if len(part.values) else "–" * 5
        lines.append([name(part.name), *found, short(median)])
    header = [noun, "least", "lower quartile", "median", "upper quartile", "largest", "median of the drawn"]
    return Table(f"{what}, by {noun}", header, lines)


def choice(selection: Selection, choice: Choice | None, pictures: Pictures) -> Section:
    title = "How much choice the weights make"
    if choice is None:
        return Section("choice", title, ["No record has a score, so there are no weights."])
    drawn = sum(selection.tasks[index].distinct for index in choice.tasks)
    drawn_share = float(drawn / choice.sizes.sum())
    what = "Effective sample size, as a share of the task, over q from 0.0001 to 100,000"
    steps = zip(choice.qs[::5], choice.shares[::5], strict=True)
    shares = [(f"{float(f'{q:.3g}'):,g}", percent(share)) for q, share in steps]
    caption = captions.choice(selection, choice, drawn_share)
    curve = pictures.plot("choice_curve", partial(plots.choice_curve, choice, drawn_share), what, caption)
    blocks: list[Block] = [curve, numbers_of(Table(what, ["q", "effective share, all tasks"], shares))]

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
    caption = (
        "A point a task. On the diagonal every record of the task weighs the same; the closer a point comes to the "
        "records drawn, the less is left to chance. A task drawn whole lies on the diagonal with both."
    )
    sizes_plot = pictures.plot("choice_sizes", partial(plots.choice_sizes, selection, choice), what, caption)
    return Section("choice", title, [*blocks, sizes_plot, numbers_of(Table(what, header, lines))])
