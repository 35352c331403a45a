"""The plots. Each is drawn once, and rendered as PNG and as SVG whose colours follow the page."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from tive.report.choice import Choice
from tive.selection.files import Selection
from tive.selection.summary import Task
from tive.util.text import shown

# Blue, orange and grey stay apart for every kind of colour vision. The page's style sheet has a variable for each.
COLOURS = {
    "ink": "#1c2230",
    "quiet": "#5c6576",
    "line": "#d5d9e0",
    "all": "#a3abb9",
    "drawn": "#0b69b7",
    "mark": "#c24d00",
}
WIDTH = 4.4
ROW = 0.3
LABEL = 22
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tive",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.labelsize": 8.5,
    "axes.facecolor": "none",
    "axes.edgecolor": COLOURS["line"],
    "axes.labelcolor": COLOURS["quiet"],
    "text.color": COLOURS["ink"],
    "xtick.color": COLOURS["quiet"],
    "ytick.color": COLOURS["quiet"],
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": COLOURS["line"],
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.handlelength": 1.2,
    "hatch.linewidth": 0.6,
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


@dataclass(frozen=True)
class Scale:
    """The axis and the bins of a score, the same for all parts: edges float64 `[bins + 1]`."""

    edges: np.ndarray
    logarithmic: bool
    label: str


def scale_of(parts: Sequence[Part], label: str, logarithmic: bool) -> Scale:
    """The bins of all parts; on a logarithmic axis, of what lies above 0."""
    values = np.concatenate([part.values for part in parts])
    values = values[values > 0] if logarithmic else values
    low, high = (values.min(), values.max()) if len(values) else (1.0, 2.0)
    if low == high:
        low, high = (low * 0.9, high * 1.1) if logarithmic else (low - 0.05, high + 0.05)
    # Finer bins than a usual part's records can fill would show noise.
    usual = np.median([len(part.values) for part in parts])
    bins = int(np.clip(2 * np.sqrt(usual), 16, 48))
    return Scale((np.geomspace if logarithmic else np.linspace)(low, high, bins + 1), logarithmic, label)


def mixture(tasks: Sequence[Task], records: int, selected: int) -> Figure:
    """Each task's share of the `records` and of the `selected` ones, two bars a task."""
    figure, axes = _rows([task.name for task in tasks])
    rows = np.arange(len(tasks))
    before = [task.records / records for task in tasks]
    after = [task.selected / max(1, selected) for task in tasks]
    axes.barh(rows - 0.19, before, 0.36, color=COLOURS["all"], label="all records")
    axes.barh(rows + 0.19, after, 0.36, color=COLOURS["drawn"], label="drawn")
    for row, task in enumerate(tasks):
        if task.excluded:
            axes.text(0, row + 0.2, " excluded", va="center", fontsize=7.5, color=COLOURS["quiet"])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.set_xlabel("share of the records, share of the subset")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def task_values(tasks: Sequence[Task]) -> Figure:
    """Each task's value, one bar a task."""
    figure, axes = _rows([task.name for task in tasks])
    axes.barh(range(len(tasks)), [task.value or 0 for task in tasks], 0.6, color=COLOURS["drawn"])
    axes.set_xlabel("task value: mean gradient norm")
    return figure


def distribution(parts: Sequence[Part], scale: Scale) -> Figure:
    """A histogram of each part, the drawn records a part of it, and the medians of both."""
    figure, axes = _rows([part.name for part in parts], height=ROW * 1.25)
    edges = scale.edges
    for row, part in enumerate(parts):
        usable = part.values > 0 if scale.logarithmic else np.ones(len(part.values), bool)
        values, drawn = part.values[usable], part.values[usable & part.drawn]
        if not len(values):
            axes.text(
                0.01, row + 0.2, "none", transform=axes.get_yaxis_transform(), fontsize=7.5, color=COLOURS["quiet"]
            )
            continue
        base = row + 0.42
        everyone = np.histogram(values, edges)[0]
        for shown_values, colour in ((values, "all"), (drawn, "drawn")):
            if len(shown_values):
                heights = np.histogram(shown_values, edges)[0] / everyone.max() * 0.84
                axes.stairs(base - heights, edges, baseline=base, fill=True, color=COLOURS[colour], linewidth=0)
        axes.plot([np.median(values)] * 2, [base, base - 0.84], color=COLOURS["ink"], linewidth=1)
        if len(drawn):
            axes.plot([np.median(drawn)] * 2, [base, base - 0.84], color=COLOURS["mark"], linewidth=1, dashes=(3, 2))
    if scale.logarithmic:
        _log_axis(axes)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_xlabel(scale.label)
    handles = [
        Patch(color=COLOURS["all"], label="all"),
        Patch(color=COLOURS["drawn"], label="drawn"),
        Line2D([], [], color=COLOURS["ink"], linewidth=1, label="median, all"),
        Line2D([], [], color=COLOURS["mark"], linewidth=1, dashes=(3, 2), label="median, drawn"),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=4, columnspacing=1.2, fontsize=8)
    return figure


def choice_sizes(selection: Selection, choice: Choice) -> Figure:
    """Effective sample size and drawn records against task size, a pair of points a task."""
    figure, axes = _figure(3.1)
    drawn = np.array([selection.tasks[index].distinct for index in choice.tasks])
    ends = np.array([min(choice.sizes.min(), max(1, drawn.min()), choice.at_q.min()), choice.sizes.max()])
    axes.plot(ends * [0.8, 1.25], ends * [0.8, 1.25], color=COLOURS["quiet"], linewidth=0.8)
    axes.plot(choice.sizes, np.maximum(drawn, 0.5), "_", color=COLOURS["mark"], markersize=7, label="records drawn")
    axes.plot(choice.sizes, choice.at_q, "o", color=COLOURS["drawn"], markersize=4, label="effective sample size")
    axes.set_yscale("log")
    axes.set_xscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("records of the task")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def choice_curve(choice: Choice, drawn_share: float) -> Figure:
    """Effective sample size by task size over q: a thin line a task, a thick one for all; the q used is marked."""
    figure, axes = _figure(3.1)
    alpha = 0.8 if len(choice.tasks) < 40 else 0.35
    for curve, size in zip(choice.curves, choice.sizes, strict=True):
        axes.plot(choice.qs, curve / size, color=COLOURS["all"], linewidth=0.8, alpha=alpha)
    axes.plot([], [], color=COLOURS["all"], label="each task")
    axes.plot(choice.qs, choice.shares, color=COLOURS["drawn"], linewidth=2.2, label="all tasks")
    axes.axhline(drawn_share, color=COLOURS["quiet"], linewidth=1, dashes=(1, 1.5), label="share drawn")
    if choice.q > 0:
        axes.axvline(choice.q, color=COLOURS["mark"], linewidth=1.4, dashes=(4, 2), label=f"q = {choice.q:g}")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(0, 1.04)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("q (logarithmic)")
    axes.set_ylabel("effective share of the task")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, columnspacing=1.2, fontsize=8)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), dpi=72, layout="constrained")
    return figure, figure.add_subplot()


def _rows(names: Sequence[str], height: float = ROW) -> tuple[Figure, Axes]:
    """A figure with one row a name, the first on top."""
    figure, axes = _figure(0.95 + height * len(names))
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_yticks(range(len(names)), [shown(name, LABEL) for name in names])
    axes.tick_params(axis="y", length=0, labelcolor=COLOURS["ink"])
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return figure, axes


def _log_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def render(draw: Callable[[], Figure], name: str, description: str) -> tuple[Markup, bytes]:
    """A plot as inline SVG, its ids beginning with `name` and `description` as its text, and as a PNG file."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = draw()
        figure.patch.set_visible(False)
        vector, pixels = io.BytesIO(), io.BytesIO()
        # The canvases' own methods draw once; `savefig` draws twice, and would find the layout each time.
        FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None, "Creator": None})
        figure.set_layout_engine("none")
        figure.patch.set_visible(True)
        figure.set_facecolor("white")
        figure.set_dpi(200)
        FigureCanvasAgg(figure).print_png(pixels)
    return _inline(vector.getvalue(), name, description), pixels.getvalue()


def _inline(svg: bytes, name: str, description: str) -> Markup:
    """matplotlib's SVG as an element of the page: unique ids, no metadata, colours and font from the style sheet."""
    root = ElementTree.fromstring(svg)
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        attributes = {key.rpartition("}")[2]: value for key, value in element.attrib.items()}
        element.attrib.clear()
        for key, value in attributes.items():
            if key == "id":
                value = f"{name}-{value}"
            elif key == "href":
                value = f"#{name}-{value[1:]}"
            elif key == "clip-path":
                value = value.replace("#", f"#{name}-")
            elif key == "style":
                value = re.sub(r"font: (?:\w+ )*([\d.]+px) [^;]*", r"font-size: \1", value)
                for colour, code in COLOURS.items():
                    value = value.replace(code, f"var(--{colour})")
            element.set(key, value)
    width, height = root.get("viewBox", "").split()[2:]
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": description}
    return Markup(ElementTree.tostring(root, encoding="unicode"))
