"""Which sections a page has, by the method that selected."""

from __future__ import annotations

from tive.report import sections, tables, target
from tive.report.blocks import Section
from tive.report.choice import Choice
from tive.report.sections import Pictures
from tive.report.target import Target
from tive.selection.files import Selection


def of_tive(selection: Selection, choice: Choice | None, records: Section, pictures: Pictures) -> list[Section]:
    """The sections of a selection for the mixture as a whole; `records` is that of the sample records."""
    further = [column for column in ("loss", "el2n") if column in selection.numbers]
    return [
        sections.mixture(selection, pictures),
        sections.task_values(selection, pictures),
        *(sections.distribution(selection, pictures, column) for column in ("norm", *further, "influence")),
        sections.choice(selection, choice, pictures),
        records,
        tables.left_out(selection),
        tables.cost(selection),
        tables.origin(selection),
    ]


def of_less(selection: Selection, of_target: Target, records: Section, pictures: Pictures) -> list[Section]:
    """The sections of a selection for a target; `records` is that of the sample records."""
    return [
        sections.mixture(selection, pictures),
        target.subtasks(selection, of_target, pictures),
        sections.distribution(selection, pictures, "score"),
        target.checkpoints(of_target),
        records,
        tables.left_out(selection, target.left_out_of_target(of_target)),
        tables.cost(selection),
        tables.origin(selection),
    ]
