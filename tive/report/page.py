"""The page: one HTML file that needs nothing beside itself, and what it is made of."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import ClassVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from tqdm import tqdm

from tive.report import plots
from tive.util.files import whole_file
from tive.util.text import shown

# Characters that HTML forbids in any spelling; white space stays.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it, and cells that are markup hold words, not numbers."""

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    folded: bool = False


@dataclass(frozen=True)
class Plot:
    """A picture (a data URI), a sentence on what it does not show, and its numbers."""

    kind: ClassVar[str] = "plot"
    image: str
    what: str
    caption: str
    numbers: Table


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
    open: bool


# A sentence is a str.
Block = str | Table | Plot | Cards


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]


@dataclass
class Pictures:
    """Draws plots for the page, and keeps the PNG files of what was drawn: file name to bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    bar: tqdm = field(default_factory=lambda: tqdm(desc="Drawing", unit=" plots", delay=2))

    def plot(self, key: str, draw: Callable[[], Figure], caption: str, numbers: Table) -> Plot:
        image, self.files[f"{key}.png"] = plots.render(draw)
        self.bar.update()
        return Plot(image, numbers.title, caption, numbers)


def name(text: str, length: int = 80) -> Markup:
    """A name from the data inside a sentence: cut when long, and its writing direction kept to itself."""
    return Markup("<bdi>{}</bdi>").format(shown(text, length))


def facts(title: str, pairs: Iterable[tuple[str, str]]) -> Table:
    """Names with their values."""
    return Table(title, (), [(name, escape(value[:2000])) for name, value in pairs])


def render(heading: str, about: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]) -> bytes:
    """The whole page.

    Args:
        tiles: what stands on top, a number and what it counts.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_file("page.html.jinja")).render(
        heading=heading, about=about, tiles=tiles, sections=sections, style=Markup(_file("page.css"))
    )
    return _FORBIDDEN.sub("\ufffd", html).lstrip().encode() + b"\n"


def write_page(output: Path, html: bytes, pictures: Pictures) -> None:
    """Write a page, and its plots as PNG files into a folder beside it."""
    pictures.bar.close()
    folder = output.with_name(f"{output.stem}_plots")
    for name, content in pictures.files.items():
        with whole_file(folder / name) as file:
            file.write(content)
    with whole_file(output) as file:
        file.write(html)
    print(f"{output} ({len(html) / 2**20:.1f} MiB) and {len(pictures.files)} plots in {folder}")


def _file(name: str) -> str:
    return resources.files("tive.report").joinpath(name).read_text(encoding="utf-8")
