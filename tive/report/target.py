"""The sections of a selection for a target (LESS): its subtasks, its checkpoints, and which records serve which."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
import numpy as np
from markupsafe import Markup
from msgspec import Meta, Struct

from tive.report import captions, plots
from tive.report.blocks import Block, Section, Table, name, sentences
from tive.report.numbers import plural, short
from tive.report.plots import Part
from tive.report.samples import Ends, ends
from tive.report.sections import Pictures, quantiles
from tive.selection.files import Selection
from tive.selection.less import Subtask
from tive.selection.summary import Count, Size
from tive.util.errors import UserError
from tive.util.text import shown


class Checkpoint(Struct, frozen=True):
    """A checkpoint of the reference model: its features, and what it counts for."""

    train: str
    weight: Size
    gradient: str = "–"
    step: Count | None = None


class Target(Struct, frozen=True):
    """What a summary says of the target."""

    checkpoints: Annotated[list[Checkpoint], Meta(min_length=1)]
    subtasks: Annotated[list[Subtask], Meta(min_length=1)]
    target_left_out: list[dict[str, str | int]] = []

    def column(self, subtask: int) -> str:
        """The scores file's column of a subtask."""
        return f"score_{self.subtasks[subtask].name}"


def target_of(selection: Selection) -> Target | None:
    """The target of a selection that LESS made; None for one of TIVE's.

    Raises:
        UserError: the summary does not say it, the scores file does not have a subtask's scores, or another method
            selected.
    """
    method = selection.summary.method
    if method == "TIVE":
        return None
    if method != "LESS":
        raise UserError(
            f"{selection.stem} is a selection of the method {shown(method, 60)}; there are pages of TIVE and LESS"
        )
    try:
        target = msgspec.convert(selection.summary.details, Target)
    except msgspec.ValidationError as error:
        raise UserError(
            f"the summary of {selection.stem} does not describe a target: details: {error}; make the selection again"
        ) from error
    for number in range(len(target.subtasks)):
        if target.column(number) not in selection.numbers:
            raise UserError(
                f"the scores file of {selection.stem} has no column {shown(target.column(number), 60)!r}, and its "
                "summary has that subtask; make the selection again"
            )
    return target


def subtasks(selection: Selection, target: Target, pictures: Pictures) -> Section:
    """How all records and the chosen ones score for each subtask, and which tasks the chosen ones are from."""
    names = [subtask.name for subtask in target.subtasks]
    parts = []
    for number, subtask in enumerate(names):
        values = selection.column(target.column(number))
        known = np.isfinite(values)
        parts.append(Part(subtask, values[known], selection.drawn[known]))
    scale = plots.scale_of(parts, "score for the subtask: a cosine", logarithmic=False)
    what = "Distribution of all records' scores for each subtask, with the drawn records marked"
    draw = partial(plots.distribution, scale=scale)
    caption = sentences(_served(target), captions.distribution(parts, "score", "subtask"))
    numbers = quantiles(parts, what, "subtask")
    blocks = pictures.rows("subtasks", parts, draw, what, caption, numbers, "subtask")
    header = ["subtask", "target records", "chosen that serve it best", "mean score, all", "mean score, chosen"]
    lines = [
        [
            name(one.name),
            f"{one.records:,}",
            f"{one.selected:,}",
            short(one.mean_score),
            short(one.mean_score_of_selected),
        ]
        for one in target.subtasks
    ]
    served = Table(
        "Of each task, how many chosen records serve which subtask best",
        ["task", *map(name, names)],
        _served_by(selection, target),
    )
    return Section("subtasks", "The target's subtasks", [*blocks, Table("The subtasks", header, lines), served])


def _served(target: Target) -> Markup:
    most = max(target.subtasks, key=lambda subtask: subtask.selected)
    fewest = min(target.subtasks, key=lambda subtask: subtask.selected)
    if most.selected == fewest.selected:
        return Markup("")
    chosen = sum(subtask.selected for subtask in target.subtasks)
    said = "Each chosen record serves one subtask best: most of the {} serve {} ({}), fewest {} ({})."
    return Markup(said).format(
        f"{chosen:,}", name(most.name), f"{most.selected:,}", name(fewest.name), f"{fewest.selected:,}"
    )


def _served_by(selection: Selection, target: Target) -> list[list[str]]:
    drawn = np.flatnonzero(selection.drawn)
    best = np.array([selection.column(target.column(number))[drawn] for number in range(len(target.subtasks))])
    counts = np.zeros((len(selection.tasks), len(target.subtasks)), int)
    np.add.at(counts, (selection.task[drawn], best.argmax(axis=0)), 1)
    return [
        [name(task.name), *(f"{count:,}" for count in row)]
        for task, row in zip(selection.tasks, counts.tolist(), strict=True)
    ]


def checkpoints(target: Target) -> Section:
    """What each checkpoint counted for."""
    lines = [
        [
            str(number),
            "–" if one.step is None else f"{one.step:,}",
            one.gradient,
            short(one.weight),
            name(one.train, 200),
        ]
        for number, one in enumerate(target.checkpoints, start=1)
    ]
    table = Table("The checkpoints", ["checkpoint", "step", "gradient", "weight", "features of the records"], lines)
    said = "A score is the mean over the checkpoints of the reference model, with these weights."
    return Section("checkpoints", "Checkpoints", [said, table])


def extremes(selection: Selection, target: Target, count: int) -> list[Ends]:
    """For each subtask, the `count` records that serve it best, and the `count` that serve it least."""
    everyone = np.arange(len(selection.ids))
    return [
        ends(
            selection,
            one.name,
            f"{plural(one.records, 'record')} of the target",
            target.column(number),
            everyone,
            count,
        )
        for number, one in enumerate(target.subtasks)
    ]


def left_out_of_target(target: Target) -> list[Block]:
    """Target records that are in no subtask's mean."""
    if not target.target_left_out:
        return []
    return [f"Left out of the target itself: {plural(len(target.target_left_out), 'record')}, in no subtask's mean."]
