"""The plots, drawn by matplotlib in one style: bars and boxes with a row a name, and curves over q."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from tive.util.text import shown

# Names in a plot; the table beside it has them all.
ROWS = 30
# Blue, orange and grey stay apart for every kind of colour vision.
GREY, BLUE, ORANGE, INK, QUIET, LINE = "#a3abb9", "#0b69b7", "#c24d00", "#1c2230", "#5c6576", "#d5d9e0"
COLOURS = (GREY, BLUE, ORANGE, "#3f9d63", "#7a4fb5", "#c9a227", "#4fb0c6", INK)
WIDTH, ROW_HEIGHT, NAME_LENGTH = 4.6, 0.16, 22
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tive",
    "text.parse_math": False,
    "font.size": 8.5,
    "figure.constrained_layout.use": True,
    "figure.dpi": 72,
    "axes.edgecolor": LINE,
    "axes.labelcolor": QUIET,
    "text.color": INK,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "boxplot.whiskers": (5, 95),
    "boxplot.showfliers": False,
    "boxplot.patchartist": True,
    "boxplot.medianprops.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@matplotlib.rc_context(_STYLE)
def bars(names: Sequence[str], series: Mapping[str, Sequence[float]], label: str, percent: bool = False) -> Figure:
    """Horizontal bars: a row a name, in it a bar for each series."""
    figure, axes, height = _rows(names, list(series), label)
    for number, values in enumerate(series.values()):
        places = np.arange(len(names[:ROWS])) + height * (number - (len(series) - 1) / 2)
        axes.barh(places, values[:ROWS], 0.92 * height, color=_colour(number, len(series)))
    if percent:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    return figure


@matplotlib.rc_context(_STYLE)
def boxes(
    names: Sequence[str], series: Mapping[str, Sequence[np.ndarray]], label: str, logarithmic: bool = False
) -> Figure:
    """Distributions: a row a name, in it a box for each series, from quartile to quartile, with the median in it.

    The whiskers hold 90% of the values. A logarithmic axis shows only what is above 0.

    Args:
        series: of each name the finite values, any number of them.
    """
    figure, axes, height = _rows(names, list(series), f"{label}\n(box: half of the values, whiskers: 90%)")
    for number, values in enumerate(series.values()):
        colour = _colour(number, len(series))
        axes.boxplot(
            [one[one > 0] if logarithmic else one for one in values[:ROWS]],
            positions=np.arange(len(names[:ROWS])) + height * (number - (len(series) - 1) / 2),
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


@matplotlib.rc_context(_STYLE)
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


def _colour(number: int, count: int) -> str:
    return BLUE if count == 1 else COLOURS[number % len(COLOURS)]


def _rows(names: Sequence[str], series: Sequence[str], label: str) -> tuple[Figure, Axes, float]:
    """Axes with one row a name, the first on top, and a legend of the series; and the height that each has of a row."""
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
    if len(series) > 1:
        handles = [Patch(color=_colour(number, len(series)), label=title) for number, title in enumerate(series)]
        figure.legend(handles=handles, loc="outside upper left", ncols=min(4, len(series)))
    return figure, axes, 0.8 / len(series)


@matplotlib.rc_context(_STYLE)
def render(figure: Figure) -> tuple[str, bytes]:
    """A plot as the data URI of an SVG, and as a PNG file."""
    vector, pixels = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(vector, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(pixels, format="png", dpi=200)
    return f"data:image/svg+xml;base64,{base64.b64encode(vector.getvalue()).decode()}", pixels.getvalue()
