"""The sections of a selection for a target (LESS): its subtasks, its checkpoints, and which records serve which."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import msgspec
import numpy as np
from markupsafe import Markup
from msgspec import Meta, Struct

from tive.report import plots
from tive.report.page import Pictures, Section, Table, name
from tive.report.plots import Part
from tive.report.samples import Group
from tive.report.sections import ROWS_A_PLOT, cost, distributions, left_out, mixture, origin, quantiles
from tive.selection.less import Subtask
from tive.selection.reading import Selection
from tive.selection.summary import Count, Size
from tive.util.errors import UserError
from tive.util.text import plural, short, shown


class CheckpointDetails(Struct, frozen=True):
    """A checkpoint of the reference model: its features, and what it counts for."""

    train: str
    weight: Size
    gradient: str = "–"
    step: Count | None = None


class TargetDetails(Struct, frozen=True):
    """What a summary says of the target."""

    checkpoints: Annotated[list[CheckpointDetails], Meta(min_length=1)]
    subtasks: Annotated[list[Subtask], Meta(min_length=1)]
    target_left_out: list[dict[str, str | int]] = []

    @property
    def columns(self) -> list[str]:
        """The scores file's column of each subtask."""
        return [f"score_{subtask.name}" for subtask in self.subtasks]


def target_of(selection: Selection) -> TargetDetails | None:
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
        target = msgspec.convert(selection.summary.details, TargetDetails)
    except msgspec.ValidationError as error:
        raise UserError(f"the summary of {selection.stem} has no target ({error}); make the selection again") from error
    for column in target.columns:
        if column not in selection.numbers:
            raise UserError(
                f"the scores file of {selection.stem} has no column {shown(column, 60)!r}, and its summary has that "
                "subtask; make the selection again"
            )
    return target


def less_sections(selection: Selection, target: TargetDetails, records: Section, pictures: Pictures) -> list[Section]:
    """The sections of LESS's selection; `records` is that of the sample records."""
    unused = plural(len(target.target_left_out), "record")
    further = [f"Left out of the target itself: {unused}, in no subtask's mean."] if target.target_left_out else []
    return [
        mixture(selection, pictures),
        subtasks(selection, target, pictures),
        distributions(selection, pictures, "score"),
        records,
        left_out(selection, further),
        cost(selection),
        origin(selection),
    ]


def subtasks(selection: Selection, target: TargetDetails, pictures: Pictures) -> Section:
    """How all records and the chosen ones score for each subtask, and which tasks the chosen ones are from."""
    parts = []
    for subtask, column in zip(target.subtasks, target.columns, strict=True):
        known = np.isfinite(selection.column(column))
        parts.append(Part(subtask.name, selection.column(column)[known], selection.drawn[known]))
    most = max(target.subtasks, key=lambda subtask: subtask.selected)
    fewest = min(target.subtasks, key=lambda subtask: subtask.selected)
    caption = Markup("Most of the chosen records serve {} best ({}), fewest {} ({}).").format(
        name(most.name), f"{most.selected:,}", name(fewest.name), f"{fewest.selected:,}"
    )
    draw = partial(plots.distribution, parts[:ROWS_A_PLOT], "score for the subtask: a cosine", False)
    plot = pictures.plot("subtasks", draw, caption, quantiles(parts, "Scores of all records", "subtask"))
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
    header = ["subtask", "target records", "chosen that serve it best", "mean score, all", "mean score, chosen"]
    described = Table("The subtasks", header, lines)
    title = "Of each task, how many chosen records serve which subtask best"
    served = Table(title, ["task", *(name(one.name) for one in target.subtasks)], _served_by(selection, target))
    weights = [
        [str(number), f"{one.step:,}" if one.step else "–", one.gradient, short(one.weight), name(one.train, 200)]
        for number, one in enumerate(target.checkpoints, start=1)
    ]
    header = ["checkpoint", "step", "gradient", "weight", "features of the records"]
    checkpoints = Table("The checkpoints: a score is the mean over them, with these weights", header, weights)
    return Section("subtasks", "The target's subtasks", [plot, described, served, checkpoints])


def _served_by(selection: Selection, target: TargetDetails) -> list[list[str]]:
    drawn = np.flatnonzero(selection.drawn)
    best = np.array([selection.column(column)[drawn] for column in target.columns]).argmax(axis=0)
    counts = np.zeros((len(selection.tasks), len(target.subtasks)), int)
    np.add.at(counts, (selection.task[drawn], best), 1)
    return [
        [name(task.name), *(f"{count:,}" for count in row)]
        for task, row in zip(selection.tasks, counts.tolist(), strict=True)
    ]


def groups_of_subtasks(selection: Selection, target: TargetDetails) -> list[Group]:
    """All records for each subtask, by how they serve it."""
    everyone = np.arange(len(selection.ids))
    return [
        Group(one.name, f"{plural(one.records, 'record')} of the target", column, everyone)
        for one, column in zip(target.subtasks, target.columns, strict=True)
    ]
