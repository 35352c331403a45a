"""A page: one HTML file that needs nothing beside itself, made of sections, and its plots as PNG files."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from tqdm import tqdm

from tive.report import plots
from tive.util.files import whole_file
from tive.util.text import DASH, shown

# Characters that HTML forbids in any spelling; white space stays.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it, and cells that are markup hold words, not numbers."""

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure with its numbers, where no table beside it has them; the caption says what neither shows.

    Attributes:
        key: the name of its PNG file.
        title: what it shows, for those who cannot see it.
    """

    kind: ClassVar[str] = "plot"
    key: str
    title: str
    figure: Figure
    numbers: Table | None = None
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """A record with what is said of it, its scores for instance.

    Attributes:
        times_selected: None on a page without a selection.
        image: a data URI, or None for the reason in `no_image`.
        turns: (role, text) each.
    """

    row: int
    id: str
    times_selected: int | None
    scores: str
    image: str | None
    no_image: str
    turns: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Cards:
    """Records side by side, in columns with a title each."""

    kind: ClassVar[str] = "cards"
    title: str
    about: str
    columns: Sequence[tuple[str, Sequence[Card]]]


# A sentence is a str.
Block = str | Table | Plot | Cards


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """All of a page; the tiles on top are a number and what it counts."""

    heading: str
    about: str
    tiles: Sequence[tuple[str, str]]
    sections: Sequence[Section]


def name(text: str, length: int = 80) -> Markup:
    """A name from the data inside a sentence: cut when long, and its writing direction kept to itself."""
    return Markup("<bdi>{}</bdi>").format(shown(text, length))


def by_name(title: str, noun: str, names: Iterable[str], columns: Mapping[str, Iterable[str]]) -> Table:
    """A table with a row a name, `noun` being what the names are of; a column of dashes alone is left out."""
    known = {key: cells for key, column in columns.items() if {*(cells := list(column))} != {DASH}}
    return Table(title, [noun, *map(name, known)], list(zip(map(name, names), *known.values(), strict=True)))


def facts(title: str, pairs: Iterable[tuple[str, str]]) -> Table:
    """Names with their values."""
    return Table(title, (), [(name, escape(value[:2000])) for name, value in pairs])


def write_page(output: Path, page: Page) -> None:
    """Write a page to `output`, and its plots into the folder beside it that ends in `_plots`; print where they are."""
    drawn = [block for section in page.sections for block in section.blocks if isinstance(block, Plot)]
    folder, images = output.with_name(f"{output.stem}_plots"), {}
    for plot in tqdm(drawn, desc="Drawing", unit=" plots", delay=2):
        images[plot.key], png = plots.render(plot.figure)
        with whole_file(folder / f"{plot.key}.png") as file:
            file.write(png)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_text_of("page.html.jinja"))
    html = template.render(page=page, images=images, style=Markup(_text_of("page.css")))
    content = _FORBIDDEN.sub("\ufffd", html).lstrip().encode() + b"\n"
    with whole_file(output) as file:
        file.write(content)
    print(f"{output} ({len(content) / 2**20:.1f} MiB) and {len(drawn)} plots in {folder}")


def _text_of(file: str) -> str:
    return resources.files("tive.report").joinpath(file).read_text(encoding="utf-8")
