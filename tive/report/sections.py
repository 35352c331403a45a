"""The sections of a page about one selection: TIVE's, of the mixture as a whole, or LESS's, for a target's subtasks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import msgspec
import numpy as np
from markupsafe import Markup
from msgspec import Meta, Struct, structs
from scipy.stats import spearmanr

from tive.method.value import effective_sample_size, instance_weights
from tive.report import plots
from tive.report.page import Block, Plot, Section, Table, by_name, facts, name
from tive.report.samples import Group, Samples, groups_of_tasks, sample_records
from tive.selection.less import Subtask
from tive.selection.options import column_of
from tive.selection.output import Selection, Size
from tive.util.errors import UserError
from tive.util.text import DASH, duration, memory, percent, plural, short, shown

# The score that records are ordered by -> the anchor and title of their section, and the names of its two ends.
ENDS = {
    "influence": ("records", "Most and least influential records", ("Most influential", "Least influential")),
    "visual_gain": ("seen", "Records whose images help most and least", ("Help most", "Help least, or mislead")),
}
SUBTASK_ENDS = ("records", "Best and worst records of each subtask", ("Serve it best", "Serve it least"))
CASES = 100  # of records left out
Q_GRID = np.logspace(-4, 5, 91)
# A scores file's column -> title of its section, its axis, and whether that is logarithmic.
COLUMNS = {
    "norm": ("Gradient norms", "gradient norm (logarithmic)", True),
    "loss": ("Losses", "loss: mean cross-entropy over the supervised tokens", False),
    "el2n": ("EL2N", "EL2N: mean length of predicted minus true probabilities", False),
    "supervised_tokens": ("Lengths", "supervised tokens (logarithmic)", True),
    "visual_gain": ("Visual gain", "visual gain: what its images take off a record's loss", False),
    "influence": ("Influence", "influence: mean cosine to the task's records", False),
}


class TargetDetails(Struct, frozen=True):
    """What LESS's summary says of its target."""

    subtasks: Annotated[list[Subtask], Meta(min_length=1)]


class PassDetails(Struct, frozen=True):
    """What a chunk's manifest says of its cost."""

    seconds: Size = 0.0
    records_per_second: Size | None = None
    peak_memory_bytes: Size = 0.0
    padding_efficiency: Size = math.nan
    device: str = DASH
    dtype: str = DASH


_Form = TypeVar("_Form")


def _typed(selection: Selection, content: Any, form: type[_Form]) -> _Form:
    """A part of the summary; a `UserError` names the key that is not of this form."""
    try:
        return msgspec.convert(content, form)
    except msgspec.ValidationError as error:
        raise UserError(f"the summary of {selection.stem} is damaged ({error}); make the selection again") from error


def selection_sections(selection: Selection, samples: Samples) -> list[Section]:
    """All sections of the page about a selection.

    Raises:
        UserError: the summary or the scores file lacks what the method writes, or another method selected.
    """
    by_method = {"TIVE": tive_sections, "LESS": less_sections}
    method = selection.summary.method
    if method not in by_method:
        raise UserError(f"{selection.stem} is a selection of the method {shown(method, 60)}; TIVE and LESS have pages")
    sections = by_method[method](selection, samples)
    return [tasks_of(selection), *sections, left_out(selection), cost_and_origin(selection)]


def tive_sections(selection: Selection, samples: Samples) -> list[Section]:
    """Scores, the choice that the weights make, and each task's records by influence and visual gain."""
    captions = {"norm": _norms_and_lengths(selection)}
    sections = [
        distributions(selection, column, labels, captions.get(column, ""))
        for column, labels in COLUMNS.items()
        if column in selection.columns
    ]
    sections.append(choice(selection))
    for column, end in ENDS.items():
        if column in selection.columns:
            sections.append(sample_records(selection, end, groups_of_tasks(selection, column), samples))
    return sections


def tasks_of(selection: Selection) -> Section:
    """What the tasks hold, what they were given and why."""
    tasks, rule = selection.tasks, str(selection.summary.arguments.get("task_budget", "difficulty"))
    shares = {
        "all records": _shares([task.records for task in tasks]),
        "subset": _shares([task.selected for task in tasks]),
    }
    columns = {
        "records": _whole(task.records for task in tasks),
        "share before": map(percent, shares["all records"]),
        "value": [short(task.value) for task in tasks],
        "its standard error": [short(task.value_error) for task in tasks],
        "records counted": _whole(task.sampled or (task.counted if task.value is not None else None) for task in tasks),
    }
    for part in dict.fromkeys(rule for task in tasks for rule in task.budget_parts or {}):
        columns[f"by {part}"] = [short((task.budget_parts or {}).get(part)) for task in tasks]
    columns |= {
        "budget": ["excluded" if task.excluded else _whole([task.budget])[0] for task in tasks],
        "its 95% interval": [" to ".join(map(short, task.budget_interval or [None])) for task in tasks],
        "selected": _whole(task.selected for task in tasks),
        "distinct": _whole(task.distinct for task in tasks),
        "share after": map(percent, shares["subset"]),
    }
    title = "The tasks. A value is the mean gradient norm of the records counted"
    numbers = by_name(title, "task", [task.name for task in tasks], columns)
    names = [f"{shown(task.name, 11)} (excluded)" if task.excluded else task.name for task in tasks]
    mixture = plots.bars(names, shares, "share of the records, share of the subset", percent=True)
    distinct, selected = sum(task.distinct for task in tasks), sum(task.selected for task in tasks)
    caption = f"{distinct:,} of the {selected:,} records are distinct: a task below its budget is taken repeatedly."
    title = "Share of each task in the records and in the subset"
    blocks: list[Block] = [Plot("mixture", title, mixture, caption=caption if distinct < selected else "")]
    if values := {task.name: task.value for task in tasks if task.value is not None}:
        names = sorted(values, key=lambda name: -values[name])
        figure = plots.bars(names, {"value": [values[name] for name in names]}, "task value: mean gradient norm")
        how = f"the mean of its shares by {rule.replace('+', ' and ')}" if "+" in rule else f"its share by {rule}"
        caption = f"A task's budget is {how}." if rule != "difficulty" else ""
        blocks.append(Plot("task_values", "The value of each task", figure, caption=caption))
    return Section("mixture", "The mixture, before and after", [*blocks, numbers])


def _shares(counts: Sequence[int]) -> list[float]:
    return [count / max(1, sum(counts)) for count in counts]


def _whole(counts: Iterable[int | None]) -> list[str]:
    return [DASH if count is None else f"{count:,}" for count in counts]


def distributions(selection: Selection, column: str, labels: tuple[str, str, bool], caption: str = "") -> Section:
    """A score's distribution in each task; `labels` as in `COLUMNS`."""
    title, label, logarithmic = labels
    if not np.isfinite(selection.column(column)).any():
        return Section(column, title, ["No record has one."])
    groups = groups_of_tasks(selection, column)
    numbers, values = _spread(selection, f"{title} in each task", groups, {})
    figure = plots.boxes([group.name for group in groups], values, label, logarithmic)
    return Section(column, title, [Plot(column, numbers.title, figure, numbers, caption)])


def _spread(
    selection: Selection, title: str, groups: Sequence[Group], columns: Mapping[str, Iterable[str]]
) -> tuple[Table, dict[str, list[np.ndarray]]]:
    """A table of further columns and the quantiles of each group's score; and its values, of all and the drawn ones."""
    everyone, drawn = [], []
    for group in groups:
        values = selection.column(group.column)[group.rows]
        known = np.isfinite(values)
        everyone.append(values[known])
        drawn.append(values[known & selection.drawn[group.rows]])
    quantiles = {"least": 0.0, "lower quartile": 0.25, "median": 0.5, "upper quartile": 0.75, "largest": 1.0}
    columns = {**columns}
    for key, share in quantiles.items():
        columns[key] = [short(np.quantile(values, share) if len(values) else None) for values in everyone]
    columns["median of the drawn"] = [short(np.median(values) if len(values) else None) for values in drawn]
    table = by_name(title, "name", [group.name for group in groups], columns)
    return table, {"all records": everyone, "drawn": drawn}


def _norms_and_lengths(selection: Selection) -> str:
    """How gradient norms go with the length of what is supervised, within the tasks."""
    pairs = np.array([selection.column("norm"), selection.column("supervised_tokens")])
    finite = np.isfinite(pairs).all(axis=0)
    of_tasks = [pairs[:, finite & (selection.task == task)] for task in range(len(selection.tasks))]
    inside = [float(spearmanr(*known).statistic) for known in of_tasks if known.size and np.ptp(known, axis=1).all()]
    if not inside:
        return ""
    return (
        "A gradient is a mean over the answer's tokens, so long answers tend to have small ones: in a task the rank "
        f"correlation of norm and supervised tokens is {np.median(inside):.2f} "
        f"(median of the tasks, {min(inside):.2f} to {max(inside):.2f})."
    )


def q_where(shares: np.ndarray, share: float) -> float | None:
    """The q of `Q_GRID` at which effective shares have fallen to `share`; None beyond the grid."""
    if not shares[-1] < share < shares[0]:
        return None
    return float(10 ** np.interp(-share, -shares, np.log10(Q_GRID)))


def choice_curves(selection: Selection) -> tuple[list[int], np.ndarray, np.ndarray]:
    """How much choice the weights `softmax(q * score)` make: the tasks that have scores, their records `[tasks]`, and
    the effective sample size of each over `Q_GRID`, as a share of its records, `[tasks, q]`.

    The score is the one that the selection asked for; the influence where it drew at random.
    """
    score = str(selection.summary.arguments.get("instance_score", "random")).replace("random", "influence")
    values, tasks, sizes, curves = selection.column(column_of(score)), [], [], []
    for index, task in enumerate(selection.tasks):
        scores = values[selection.task == index]
        scores = scores[np.isfinite(scores)]
        if not task.excluded and len(scores):
            tasks.append(index)
            sizes.append(len(scores))
            curves.append([effective_sample_size(instance_weights(scores, q)) / len(scores) for q in Q_GRID])
    return tasks, np.array(sizes), np.array(curves)


def choice(selection: Selection) -> Section:
    title, q = "How much choice the weights make", float(selection.summary.arguments["q"])
    indices, sizes, curves = choice_curves(selection)
    if not indices:
        return Section("choice", title, ["No record has a score, so there are no weights."])
    tasks = [selection.tasks[index] for index in indices]
    shares = [(task.effective_sample_size or math.nan) / task.counted for task in tasks]
    columns = {
        f"effective size at q = {q:g}": [short(task.effective_sample_size) for task in tasks],
        "q for half": [short(q_where(curve, 0.5)) for curve in curves],
    }
    numbers = by_name("Effective sample size of each task's weights", "task", [task.name for task in tasks], columns)
    everyone, drawn_share = sizes @ curves / sizes.sum(), sum(task.distinct for task in tasks) / sizes.sum()
    figure = plots.choice_curve(Q_GRID, curves, everyone, q, drawn_share)
    caption = "This selection does not draw with weights; the curve is the effective size if it did."
    arguments = selection.summary.arguments
    weighted = arguments.get("instance_score") != "random" and arguments.get("sampling", "weighted") == "weighted"
    if weighted and np.isfinite(shares).all():
        caption = f"At q = {q:g} the effective size is at least {percent(min(shares))} of a task's records"
        caption += ": the draw is all but uniform." if min(shares) > 0.99 else "."
    half, narrow = (short(q_where(everyone, share)) for share in (0.5, drawn_share))
    caption += f" Over all tasks it falls to half of the records at q = {half}, and to the share drawn at q = {narrow}."
    return Section("choice", title, [Plot("choice", numbers.title, figure, numbers, caption)])


def less_sections(selection: Selection, samples: Samples) -> list[Section]:
    """The target's subtasks, the scores, and the records by how they serve each subtask."""
    targets = _typed(selection, selection.summary.details, TargetDetails).subtasks
    everyone, groups = np.arange(len(selection.ids)), []
    for subtask in targets:
        column, about = f"score_{subtask.name}", f"{plural(subtask.records, 'record')} of the target"
        if column not in selection.columns:
            raise UserError(f"the scores file of {selection.stem} has no {shown(column, 60)}; make the selection again")
        groups.append(Group(subtask.name, about, column, everyone))
    return [
        subtasks(selection, targets, groups),
        distributions(selection, "score", ("Scores", "score", False)),
        sample_records(selection, SUBTASK_ENDS, groups, samples),
    ]


def subtasks(selection: Selection, targets: Sequence[Subtask], groups: Sequence[Group]) -> Section:
    """How all records and the chosen ones score for each subtask, and which tasks the chosen ones are from."""
    names = [group.name for group in groups]
    columns = {
        "target records": _whole(subtask.records for subtask in targets),
        "chosen that serve it best": _whole(subtask.selected for subtask in targets),
    }
    numbers, values = _spread(selection, "Scores of all records for each subtask", groups, columns)
    plot = Plot("subtasks", numbers.title, plots.boxes(names, values, "score for the subtask: a cosine"), numbers)
    drawn = np.flatnonzero(selection.drawn)
    best = np.array([selection.column(group.column)[drawn] for group in groups]).argmax(axis=0)
    counts = np.zeros((len(groups), len(selection.tasks)), int)
    np.add.at(counts, (best, selection.task[drawn]), 1)
    served = {subtask: _whole(of_tasks) for subtask, of_tasks in zip(names, counts, strict=True)}
    title = "Of each task, how many chosen records score highest for which subtask"
    by_task = by_name(title, "task", [task.name for task in selection.tasks], served)
    return Section("subtasks", "The target's subtasks", [plot, by_task])


def left_out(selection: Selection) -> Section:
    """Records without a gradient: how many for each reason and task, and one of them."""
    entries = selection.summary.left_out
    if not entries:
        return Section("left-out", "Records left out", ["None: every record has a gradient."])
    cases = Counter((entry.reason, str(entry.task)) for entry in entries)
    examples = {(entry.reason, str(entry.task)): entry for entry in reversed(entries)}
    lines = []
    for case, count in cases.most_common(CASES):
        example = Markup("row {}, id {}").format(examples[case].row, name(str(examples[case].id), 40))
        lines.append([name(case[0], 200), name(case[1]), f"{count:,}", example])
    share = percent(len(entries) / max(1, len(selection.ids)))
    said = f"{plural(len(entries), 'record')} of {len(selection.ids):,} ({share}): in no mean, and never drawn."
    title = f"The most frequent of {len(cases):,} cases; the scores file has every record"
    return Section(
        "left-out", "Records left out", [said, Table(title, ["reason", "task", "records", "example"], lines)]
    )


def cost_and_origin(selection: Selection) -> Section:
    """What the gradient pass took, and what it takes to make the subset again and to check it."""
    summary = selection.summary
    inputs = {key: value for key, value in structs.asdict(summary.inputs).items() if key not in ("chunks", "match")}
    contents = {
        "Gradient pass": _cost(_typed(selection, summary.gradient_pass, list[PassDetails])),
        "Arguments": summary.arguments,
        "Inputs": inputs,
        "Gradient features": summary.inputs.match,
        "Subset": structs.asdict(summary.subset),
        "Versions": summary.versions,
        "Target": {key: value for key, value in summary.details.items() if key != "subtasks"},
        "Versions of the gradient pass": next(iter(summary.gradient_pass), {}).get("versions"),
    }
    blocks: list[Block] = [f"Selected {summary.created}."] if summary.created else []
    for title, content in contents.items():
        if isinstance(content, dict) and content:
            pairs = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in content.items())
            blocks.append(facts(title, pairs))
    return Section("origin", "Cost, arguments, versions, hashes", blocks)


def _cost(chunks: Sequence[PassDetails]) -> dict[str, str]:
    """What the chunks of the (last checkpoint's) pass took; nothing is known of the paper's release's."""
    if not chunks:
        return {"cost": "not known: the feature files of the paper's release have no manifests"}
    seconds = sum(chunk.seconds for chunk in chunks)
    records = sum(chunk.seconds * (chunk.records_per_second or 0) for chunk in chunks)
    return {
        "chunks": f"{len(chunks):,}",
        "time on all devices": duration(seconds),
        "records a second on a device": short(records / seconds if seconds else None),
        "devices and dtypes": "; ".join(sorted({f"{chunk.device}, {chunk.dtype}" for chunk in chunks})),
        "largest peak of memory": memory(max(chunk.peak_memory_bytes for chunk in chunks)),
        "least share of the tokens that is no padding": short(min(chunk.padding_efficiency for chunk in chunks)),
    }
