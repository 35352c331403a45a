"""The plots, drawn by matplotlib in one style."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from tive.util.text import shown

# Blue, orange and grey stay apart for every kind of colour vision.
GREY, BLUE, ORANGE, INK, QUIET = "#a3abb9", "#0b69b7", "#c24d00", "#1c2230", "#5c6576"
COLOURS = (GREY, BLUE, ORANGE, "#3f9d63", "#7a4fb5", "#c9a227", "#4fb0c6", INK)
WIDTH, ROW, LABEL = 4.6, 0.32, 22
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tive",
    "text.parse_math": False,
    "font.size": 8.5,
    "figure.constrained_layout.use": True,
    "axes.edgecolor": "#d5d9e0",
    "axes.labelcolor": QUIET,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d5d9e0",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Part:
    """A score of some of the records, those of a task for instance.

    Attributes:
        values: float64 `[n]`, finite.
        drawn: which of them are in the subset, bool `[n]`.
    """

    name: str
    values: np.ndarray
    drawn: np.ndarray


def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, percent: bool = False) -> Figure:
    """Horizontal bars, a group a name and a bar of each group for every series."""
    figure, axes = _rows(names, len(series))
    height = 0.8 / len(series)
    for number, (title, values) in enumerate(series.items()):
        places = np.arange(len(names)) - 0.4 + height * (number + 0.5)
        axes.barh(places, values, height * 0.92, color=_colour(number, len(series)), label=title)
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel(label)
    if len(series) > 1:
        figure.legend(loc="outside upper left", ncols=min(4, len(series)))
    return figure


def distribution(parts: Sequence[Part], label: str, logarithmic: bool) -> Figure:
    """Of each part, two boxes: all records and the drawn ones. Quartiles and median; whiskers hold 90% of the records.

    On a logarithmic axis only what lies above 0 is shown.
    """
    figure, axes = _rows([part.name for part in parts], 2)
    for offset, colour in ((-0.2, GREY), (0.2, BLUE)):
        for row, part in enumerate(parts):
            values = part.values if colour == GREY else part.values[part.drawn]
            values = values[values > 0] if logarithmic else values
            if len(values):
                axes.boxplot(
                    values,
                    positions=[row + offset],
                    widths=0.32,
                    whis=(5, 95),
                    orientation="horizontal",
                    showfliers=False,
                    patch_artist=True,
                    manage_ticks=False,
                    boxprops={"facecolor": colour, "edgecolor": "none"},
                    medianprops={"color": INK},
                    whiskerprops={"color": colour},
                    capprops={"color": colour},
                )
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    handles = [Patch(color=GREY, label="all records (box 50%, whiskers 90%)"), Patch(color=BLUE, label="drawn")]
    figure.legend(handles=handles, loc="outside upper left", ncols=2)
    return figure


def choice_curve(qs: np.ndarray, shares: np.ndarray, all_tasks: np.ndarray, q: float, drawn_share: float) -> Figure:
    """Effective sample size by task size over q: a thin line a task, a thick one for all; the selection's q is marked.

    Args:
        shares: `[tasks, qs]`; `all_tasks` `[qs]`.
    """
    figure = Figure(figsize=(WIDTH, 3.1), dpi=72)
    axes = figure.add_subplot()
    axes.plot(qs, shares.T, color=GREY, linewidth=0.8, alpha=0.8 if len(shares) < 40 else 0.35)
    axes.plot([], [], color=GREY, label="each task")
    axes.plot(qs, all_tasks, color=BLUE, linewidth=2.2, label="all tasks")
    axes.axhline(drawn_share, color=QUIET, linewidth=1, linestyle=":", label="share drawn")
    if q > 0:
        axes.axvline(q, color=ORANGE, linewidth=1.4, linestyle="--", label=f"q = {q:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set(xlabel="q", ylabel="effective share of the task")
    figure.legend(loc="outside upper left", ncols=4)
    return figure


def _colour(number: int, count: int) -> str:
    return BLUE if count == 1 else COLOURS[number % len(COLOURS)]


def _rows(names: Sequence[str], bars_a_row: int) -> tuple[Figure, Axes]:
    """A figure with one row a name, the first on top."""
    height = ROW * max(1.0, 0.5 * bars_a_row) * len(names)
    figure = Figure(figsize=(WIDTH, 0.95 + height), dpi=72)
    axes = figure.add_subplot()
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [shown(name, LABEL) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    return figure, axes


def render(draw: Callable[[], Figure]) -> tuple[str, bytes]:
    """A plot as the data URI of an SVG, and as a PNG file."""
    vector, pixels = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = draw()
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=200)
    return f"data:image/svg+xml;base64,{base64.b64encode(vector.getvalue()).decode()}", pixels.getvalue()
