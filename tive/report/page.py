"""The page: one HTML file that needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from tive.report.blocks import Section, name
from tive.report.choice import Choice
from tive.report.numbers import percent, plural
from tive.selection.files import Selection

# Characters that HTML forbids in any spelling; white space stays.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def page(selection: Selection, choice: Choice | None, sections: Sequence[Section]) -> bytes:
    """The whole page."""
    selected = sum(task.selected for task in selection.tasks)
    tiles = [
        (f"{selected:,}", f"records selected of {len(selection.ids):,}"),
        (percent(selected / max(1, len(selection.ids))), "of the data"),
        (f"{len(selection.tasks):,}", "tasks" if len(selection.tasks) > 1 else "task"),
        (f"{len(selection.summary.left_out):,}", "left out"),
    ]
    if choice is not None:
        tiles.append((percent(choice.share_at_q), f"effective size at q = {choice.q:g}"))
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_file("page.html.jinja")).render(
        method=selection.summary.method,
        stem=selection.stem,
        file=name(Path(selection.summary.inputs.data_path).name),
        records=plural(len(selection.ids), "record"),
        tiles=tiles,
        sections=sections,
        style=Markup(_file("page.css")),
    )
    return _FORBIDDEN.sub("\ufffd", html).lstrip().encode() + b"\n"


def _file(name: str) -> str:
    return resources.files("tive.report").joinpath(name).read_text(encoding="utf-8")
