"""What a page is made of: sections of blocks. The template has a macro for each kind of block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from markupsafe import Markup

from tive.report.samples import Sample
from tive.util.text import shown


@dataclass(frozen=True)
class Text:
    """A paragraph that stands out as a `note`, or stands back as `quiet`. A plain one is a str."""

    kind: ClassVar[str] = "text"
    text: str
    style: str


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it, and cells that are markup hold words, not numbers."""

    kind: ClassVar[str] = "table"
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    kind: ClassVar[str] = "facts"
    pairs: Sequence[tuple[str, str]]
    title: str = ""


@dataclass(frozen=True)
class Plot:
    """A picture with the sentences that say what to see in it."""

    kind: ClassVar[str] = "plot"
    picture: Markup
    caption: str


@dataclass(frozen=True)
class Fold:
    """Blocks that open at a click."""

    kind: ClassVar[str] = "fold"
    title: str
    blocks: Sequence[Block]
    style: str = ""


@dataclass(frozen=True)
class Card:
    """A record: its scores, which row it is, and the record itself where it could be read."""

    times_selected: int
    scores: str
    row: int
    id: str
    sample: Sample | None


@dataclass(frozen=True)
class Extremes:
    """The records at the two ends of a score, in columns with a title each."""

    kind: ClassVar[str] = "extremes"
    name: str
    about: str
    columns: Sequence[tuple[str, Sequence[Card]]]
    open: bool


Block = str | Text | Table | Facts | Plot | Fold | Extremes


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: Sequence[Block]


def name(text: str, length: int = 80) -> Markup:
    """A name from the data inside a sentence: cut when long, and its writing direction kept to itself."""
    return Markup("<bdi>{}</bdi>").format(shown(text, length))


def sentences(*parts: str) -> Markup:
    """Sentences as one text; those that are not markup are escaped."""
    return Markup(" ").join(part for part in parts if part)
