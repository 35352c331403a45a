"""A page: one HTML file that needs nothing beside itself, made of sections, and its plots as PNG files."""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from tqdm import tqdm

from tive.data.conversations import image_of, to_llava
from tive.data.images import BadImage, read_image
from tive.data.records import Records
from tive.util.files import whole_file
from tive.util.text import DASH, plural, short, shown

_HERE = Path(__file__).parent
_STYLE = _HERE / "page.mplstyle"
# Characters that HTML forbids in any spelling; white space stays.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
# Names in a plot; the table beside it has them all.
ROWS = 30
# Blue, orange and grey stay apart for every kind of colour vision.
GREY, BLUE, ORANGE, INK, QUIET = "#a3abb9", "#0b69b7", "#c24d00", "#1c2230", "#5c6576"
COLOURS = (GREY, BLUE, ORANGE, "#3f9d63", "#7a4fb5", "#c9a227", "#4fb0c6", INK)
WIDTH, ROW_HEIGHT, NAME_LENGTH = 4.6, 0.16, 22
THUMBNAIL, MAX_TURN, MAX_TURNS = 192, 1500, 12


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row names it, and cells that are markup hold words, not numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Plot:
    """A figure with its numbers, where no table beside it has them; the caption says what neither shows."""

    key: str  # the name of its PNG file
    title: str  # what it shows, for those who cannot see it
    figure: Figure
    numbers: Table | None = None
    caption: str = ""


@dataclass(frozen=True)
class Card:
    """A record with what is said of it, its scores for instance."""

    row: int
    id: str
    times_selected: int | None  # None on a page without a selection
    scores: str
    image: str | None  # a data URI, or None for the reason in `no_image`
    no_image: str
    turns: Sequence[tuple[str, str]]  # role and text


@dataclass(frozen=True)
class Cards:
    """Records side by side, in columns with a title each."""

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


def name(text: str, length: int = 80) -> Markup:
    """A name from the data inside a sentence: cut when long, and its writing direction kept to itself."""
    return Markup("<bdi>{}</bdi>").format(shown(text, length))


def by_name(title: str, noun: str, names: Iterable[str], columns: Mapping[str, Iterable[Any]]) -> Table:
    """A table with a row a name, `noun` being what the names are of: counts are whole, other numbers short, None is a
    dash, and a column of dashes alone is left out.
    """
    known = {}
    for key, column in columns.items():
        cells = [f"{one:,}" if isinstance(one, int) else one if isinstance(one, str) else short(one) for one in column]
        if {*cells} != {DASH}:
            known[key] = cells
    return Table(title, [noun, *map(name, known)], list(zip(map(name, names), *known.values(), strict=True)))


@dataclass(frozen=True)
class Samples:
    """How many records to show in a group, and where they are read from."""

    count: int
    records: Records | None = None  # None where none can be read, for the reason in `trouble`, or none is wanted
    image_folder: str | None = None
    trouble: str = ""


def card_of(samples: Samples, row: int, identity: str, scores: str, times_selected: int | None = None) -> Card:
    """A record with its first turns and its image, as the gradient step reads it, in a small JPEG."""
    if samples.records is None:
        return Card(row, name(identity), times_selected, scores, None, "not read", [])
    image, no_image, turns = None, "no image", []
    try:
        record = to_llava(samples.records[row])
        for turn in record["conversations"][:MAX_TURNS]:
            text, more = turn["value"][:MAX_TURN], len(turn["value"]) - MAX_TURN
            turns.append((turn["from"], f"{text} … ({more:,} more characters)" if more > 0 else text))
        if (more := len(record["conversations"]) - MAX_TURNS) > 0:
            turns.append(("", f"{more:,} more turns"))
        source = image_of(record)
        if isinstance(source, str) and samples.image_folder is None:
            no_image = "image folder not known (image_folder)"
        elif source:
            picture, content = read_image(samples.image_folder or "", source), io.BytesIO()
            picture.thumbnail((THUMBNAIL, THUMBNAIL))
            picture.save(content, "JPEG", quality=72)
            image = f"data:image/jpeg;base64,{base64.b64encode(content.getvalue()).decode()}"
    except BadImage as reason:
        no_image = str(reason)
    except ValueError as problem:
        no_image = f"the record {problem}"
    return Card(row, name(identity), times_selected, scores, image, no_image, turns)


def write_page(
    output: Path, heading: str, about: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]
) -> None:
    """Write a page to `output`, and its plots into the folder beside it that ends in `_plots`; print where they are.

    Args:
        tiles: on top of the page, a number and what it counts.
    """
    drawn = [block for section in sections for block in section.blocks if isinstance(block, Plot)]
    folder, images = output.with_name(f"{output.stem}_plots"), {}
    for plot in tqdm(drawn, desc="Drawing", unit=" plots", delay=2):
        images[plot.key], png = render(plot.figure)
        with whole_file(folder / f"{plot.key}.png") as file:
            file.write(png)
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template, style = environment.get_template("page.html.jinja"), Markup((_HERE / "page.css").read_text())
    html = template.render(heading=heading, about=about, tiles=tiles, sections=sections, images=images, style=style)
    content = _FORBIDDEN.sub("\ufffd", html).lstrip().encode() + b"\n"
    with whole_file(output) as file:
        file.write(content)
    print(f"{output} ({len(content) / 2**20:.1f} MiB) and {plural(len(drawn), 'plot')} in {folder}")


@matplotlib.rc_context(fname=_STYLE)
def render(figure: Figure) -> tuple[str, bytes]:
    """A plot as the data URI of an SVG, and as a PNG file."""
    vector, pixels = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=200)
    return f"data:image/svg+xml;base64,{base64.b64encode(vector.getvalue()).decode()}", pixels.getvalue()


@matplotlib.rc_context(fname=_STYLE)
def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, percent: bool = False) -> Figure:
    """Horizontal bars: a row a name, in it a bar for each series."""
    figure, axes, height, places = _rows(names, list(series), label)
    for (place, colour), values in zip(places, series.values(), strict=True):
        axes.barh(place, values[:ROWS], 0.92 * height, color=colour)
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    return figure


@matplotlib.rc_context(fname=_STYLE)
def boxes(
    names: Sequence[str], series: Mapping[str, Sequence[np.ndarray]], label: str, logarithmic: bool = False
) -> Figure:
    """Distributions: a row a name, in it a box for each series, from quartile to quartile, with the median in it.

    The whiskers hold 90% of the values. A logarithmic axis shows only what is above 0.

    Args:
        series: of each name the finite values, any number of them.
    """
    figure, axes, height, places = _rows(names, list(series), f"{label}\n(box: half of the values, whiskers: 90%)")
    for (place, colour), values in zip(places, series.values(), strict=True):
        axes.boxplot(
            [one[one > 0] if logarithmic else one for one in values[:ROWS]],
            positions=place,
            widths=0.8 * height,
            orientation="horizontal",
            manage_ticks=False,
            boxprops={"facecolor": colour, "edgecolor": "none"},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    return figure


@matplotlib.rc_context(fname=_STYLE)
def choice_curve(qs: np.ndarray, shares: np.ndarray, all_tasks: np.ndarray, q: float, drawn: float) -> Figure:
    """Effective sample size by task size over q: a thin line a task, a thick one for all; the selection's q is marked.

    Args:
        shares: `[tasks, qs]`; `all_tasks` `[qs]`.
    """
    figure = Figure(figsize=(WIDTH, 3.1))
    axes = figure.add_subplot()
    axes.plot(qs, shares.T, color=GREY, linewidth=0.8, alpha=0.8 if len(shares) < 40 else 0.35)
    axes.plot([], [], color=GREY, label="each task")
    axes.plot(qs, all_tasks, color=BLUE, linewidth=2.2, label="all tasks")
    axes.axhline(drawn, color=QUIET, linewidth=1, linestyle=":", label="share drawn")
    if q > 0:
        axes.axvline(q, color=ORANGE, linewidth=1.4, linestyle="--", label=f"q = {q:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="q", ylabel="effective share of the task")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _rows(
    names: Sequence[str], series: Sequence[str], label: str
) -> tuple[Figure, Axes, float, list[tuple[np.ndarray, str]]]:
    """Axes with one row a name, the first on top, and a legend of the series; the height that each series has of a row,
    and its places and colour.
    """
    if len(names) > ROWS:
        label += f"\nthe first {ROWS} of {len(names):,}; the table has all"
    names = [shown(name, NAME_LENGTH) for name in names[:ROWS]]
    figure = Figure(figsize=(WIDTH, 1.05 + ROW_HEIGHT * max(2, len(series)) * len(names)))
    axes = figure.add_subplot()
    axes.set_xlabel(label)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    colours = [COLOURS[number % len(COLOURS)] for number in range(len(series))] if len(series) > 1 else [BLUE]
    if len(series) > 1:
        handles = [Patch(color=colour, label=title) for colour, title in zip(colours, series, strict=True)]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(series)))
    height = 0.8 / len(series)
    offsets = height * (np.arange(len(series)) - (len(series) - 1) / 2)
    places = [(np.arange(len(names)) + offset, colour) for offset, colour in zip(offsets, colours, strict=True)]
    return figure, axes, height, places
