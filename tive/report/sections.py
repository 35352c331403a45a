"""The sections of a page about one selection: TIVE's, of the mixture as a whole, or LESS's, for a target's subtasks."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from markupsafe import Markup, escape
from msgspec import Meta, Struct, structs
from scipy.stats import spearmanr
from tqdm import tqdm

from tive.method.value import effective_sample_size, instance_weights
from tive.report import page
from tive.report.page import Block, Card, Cards, Plot, Samples, Section, Table, by_name, name
from tive.selection.less import Subtask
from tive.selection.options import column_of
from tive.selection.output import Selection, Size
from tive.util.errors import UserError
from tive.util.text import DASH, LABEL_LIMIT, duration, memory, percent, plural, short, shown

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
    "score": ("Scores", "score", False),
}
# The score that records are ordered by -> the anchor and title of their section, and the names of its two ends.
ENDS = {
    "influence": ("records", "Most and least influential records", ("Most influential", "Least influential")),
    "visual_gain": ("seen", "Records whose images help most and least", ("Help most", "Help least, or mislead")),
    "subtasks": ("records", "Best and worst records of each subtask", ("Serve it best", "Serve it least")),
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


class Group(NamedTuple):
    """Records that are shown together, those of a task for instance: int64 rows, and the column that orders them."""

    name: str
    about: str
    column: str
    rows: np.ndarray


def selection_sections(selection: Selection, samples: Samples) -> list[Section]:
    """All sections of the page about a selection; a `UserError` where the summary or the scores file lacks what the
    method writes, or another method than TIVE or LESS selected.
    """
    summary = selection.summary
    if summary.method not in ("TIVE", "LESS"):
        method = shown(summary.method, 60)
        raise UserError(f"{selection.stem} is a selection of the method {method}; TIVE and LESS have pages")
    try:
        chunks = msgspec.convert(summary.gradient_pass, list[PassDetails])
        targets = msgspec.convert(summary.details, TargetDetails).subtasks if summary.method == "LESS" else []
    except msgspec.ValidationError as error:
        raise UserError(f"the summary of {selection.stem} is damaged ({error}); make the selection again") from error
    groups = []
    for one in targets:
        column, about = f"score_{one.name}", f"{plural(one.records, 'record')} of the target"
        if column not in selection.columns:
            lacking = shown(column, 60)
            raise UserError(f"the scores file of {selection.stem} has no {lacking}; make the selection again")
        groups.append(Group(one.name, about, column, np.arange(len(selection.ids))))
    sections = [subtasks(selection, targets, groups)] if targets else []
    sections += [distributions(selection, column) for column in COLUMNS if column in selection.columns]
    if summary.method == "TIVE":
        sections.append(choice(selection))
    for column in ENDS:
        if column in selection.columns:
            sections.append(both_ends(selection, column, groups_of_tasks(selection, column), samples))
    if targets:
        sections.append(both_ends(selection, "subtasks", groups, samples))
    return [tasks_of(selection), *sections, left_out(selection), cost_and_origin(selection, chunks)]


def groups_of_tasks(selection: Selection, column: str) -> list[Group]:
    """Each task's records, by a score."""
    return [
        Group(task.name, plural(task.records, "record"), column, np.flatnonzero(selection.task == index))
        for index, task in enumerate(selection.tasks)
    ]


def both_ends(selection: Selection, ends: str, groups: Sequence[Group], samples: Samples) -> Section:
    """The records with the highest and the lowest values of every group's score, none of them twice; `ENDS` has their
    titles. A card has the score that it is shown for, then the others, without those for other subtasks.
    """
    anchor, title, titles = ENDS[ends]
    blocks: list[Block] = [f"Made without images and conversations: {samples.trouble}."] if samples.trouble else []
    others = [column for column in selection.columns if not column.startswith("score_")]

    def card(row: int, keys: Iterable[str]) -> Card:
        scores = [f"{shown(key.replace('_', ' '), LABEL_LIMIT)} {short(selection.columns[key][row])}" for key in keys]
        return page.card_of(samples, row, selection.ids[row], " · ".join(scores), int(selection.times_selected[row]))

    for group in tqdm(groups, desc="Reading sample records", delay=2):
        values = selection.column(group.column)
        rows = group.rows[np.isfinite(values[group.rows])]
        rows = rows[np.argsort(values[rows], kind="stable")]
        least = min(samples.count, len(rows) // 2)
        both = zip(titles, (rows[::-1][: min(samples.count, len(rows) - least)], rows[:least]), strict=True)
        keys = dict.fromkeys((group.column, *others))
        columns = [(end, [card(row, keys) for row in of_end.tolist()]) for end, of_end in both if len(of_end)]
        if columns:
            blocks.append(Cards(name(group.name), group.about, columns))
    return Section(anchor, title, blocks or ["None is shown."])


def tasks_of(selection: Selection) -> Section:
    """What the tasks hold, what they were given and why."""
    tasks, rule = selection.tasks, str(selection.summary.arguments.get("task_budget", "difficulty"))
    records, selected, distinct = (
        sum(getattr(task, key) for task in tasks) for key in ("records", "selected", "distinct")
    )
    shares = {
        "all records": [task.records / max(1, records) for task in tasks],
        "subset": [task.selected / max(1, selected) for task in tasks],
    }
    columns: dict[str, Iterable[Any]] = {
        "records": [task.records for task in tasks],
        "share before": map(percent, shares["all records"]),
        "value": [task.value for task in tasks],
        "its standard error": [task.value_error for task in tasks],
        "records counted": [None if task.value is None else task.sampled or task.counted for task in tasks],
    }
    for part in dict.fromkeys(part for task in tasks for part in task.budget_parts or {}):
        columns[f"by {part}"] = [(task.budget_parts or {}).get(part) for task in tasks]
    columns |= {
        "budget": ["excluded" if task.excluded else task.budget for task in tasks],
        "its 95% interval": [" to ".join(map(short, task.budget_interval or [None])) for task in tasks],
        "selected": [task.selected for task in tasks],
        "distinct": [task.distinct for task in tasks],
        "share after": map(percent, shares["subset"]),
    }
    values = {task.name: task.value for task in tasks if task.value is not None}
    title = f"The tasks{'. A value is the mean gradient norm of the records counted' if values else ''}"
    numbers = by_name(title, "task", [task.name for task in tasks], columns)
    names = [f"{shown(task.name, 11)} (excluded)" if task.excluded else task.name for task in tasks]
    mixture = page.bars(names, shares, "share of the records, share of the subset", percent=True)
    caption = f"{distinct:,} of the {selected:,} records are distinct: tasks below their budgets repeat records."
    title = "Share of each task in the records and in the subset"
    blocks: list[Block] = [Plot("mixture", title, mixture, caption=caption if distinct < selected else "")]
    if values:
        names = sorted(values, key=lambda name: -values[name])
        figure = page.bars(names, {"value": [values[name] for name in names]}, "task value: mean gradient norm")
        how = f"the mean of its shares by {rule.replace('+', ' and ')}" if "+" in rule else f"its share by {rule}"
        caption = f"A task's budget is {how}." if rule != "difficulty" else ""
        blocks.append(Plot("task_values", "The value of each task", figure, caption=caption))
    return Section("mixture", "The mixture, before and after", [*blocks, numbers])


def distributions(selection: Selection, column: str) -> Section:
    """A score's distribution in each task; of norms, how they go with the length of what is supervised."""
    title, label, logarithmic = COLUMNS[column]
    if not np.isfinite(selection.column(column)).any():
        return Section(column, title, ["No record has one."])
    groups, caption = groups_of_tasks(selection, column), ""
    numbers, values = _spread(selection, f"{title} in each task", groups, {})
    figure = page.boxes([group.name for group in groups], values, label, logarithmic)
    if column == "norm":
        pairs = np.array([selection.column("norm"), selection.column("supervised_tokens")])
        known = [pairs[:, group.rows][:, np.isfinite(pairs[:, group.rows]).all(axis=0)] for group in groups]
        if inside := [float(spearmanr(*one).statistic) for one in known if one.size and np.ptp(one, axis=1).all()]:
            caption = (
                "A gradient is a mean over the answer's tokens, so long answers tend to have small ones: in a task the "
                f"rank correlation of norm and supervised tokens is {np.median(inside):.2f} "
                f"(median of the tasks, {min(inside):.2f} to {max(inside):.2f})."
            )
    of_sample = selection.summary.arguments.get("from_sample")
    sample = ["Of the sample: the other records have no features."] if of_sample else []
    return Section(column, title, [*sample, Plot(column, numbers.title, figure, numbers, caption)])


def _spread(
    selection: Selection, title: str, groups: Sequence[Group], columns: Mapping[str, Iterable[Any]]
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
        columns[key] = [np.quantile(values, share) if len(values) else None for values in everyone]
    columns["median of the drawn"] = [np.median(values) if len(values) else None for values in drawn]
    table = by_name(title, "name", [group.name for group in groups], columns)
    return table, {"all records": everyone, "drawn": drawn}


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
    tasks, sizes, curves = [], [], []
    for index, group in enumerate(groups_of_tasks(selection, column_of(score))):
        scores = selection.column(group.column)[group.rows]
        scores = scores[np.isfinite(scores)]
        if not selection.tasks[index].excluded and len(scores):
            tasks.append(index)
            sizes.append(len(scores))
            curves.append([effective_sample_size(instance_weights(scores, q)) / len(scores) for q in Q_GRID])
    return tasks, np.array(sizes), np.array(curves)


def choice(selection: Selection) -> Section:
    title, arguments = "How much choice the weights make", selection.summary.arguments
    if arguments.get("from_sample"):
        return Section("choice", title, ["Every record of a task was as likely as any other."])
    q = float(arguments["q"])
    indices, sizes, curves = choice_curves(selection)
    if not indices:
        return Section("choice", title, ["No record has a score, so there are no weights."])
    tasks = [selection.tasks[index] for index in indices]
    shares = [(task.effective_sample_size or math.nan) / task.counted for task in tasks]
    columns = {
        f"effective size at q = {q:g}": [task.effective_sample_size for task in tasks],
        "q for half": [q_where(curve, 0.5) for curve in curves],
    }
    numbers = by_name("Effective sample size of each task's weights", "task", [task.name for task in tasks], columns)
    everyone, drawn_share = sizes @ curves / sizes.sum(), sum(task.distinct for task in tasks) / sizes.sum()
    figure = page.choice_curve(Q_GRID, curves, everyone, q, drawn_share)
    caption = "This selection does not draw with weights; the curve is the effective size if it did."
    weighted = arguments.get("instance_score") != "random" and arguments.get("sampling", "weighted") == "weighted"
    if weighted and np.isfinite(shares).all():
        caption = f"At q = {q:g} the effective size is at least {percent(min(shares))} of a task's records"
        caption += ": the draw is all but uniform." if min(shares) > 0.99 else "."
    half, narrow = (short(q_where(everyone, share)) for share in (0.5, drawn_share))
    caption += f" Over all tasks it falls to half of the records at q = {half}, and to the share drawn at q = {narrow}."
    return Section("choice", title, [Plot("choice", numbers.title, figure, numbers, caption)])


def subtasks(selection: Selection, targets: Sequence[Subtask], groups: Sequence[Group]) -> Section:
    """How all records and the chosen ones score for each subtask, and which tasks the chosen ones are from."""
    names = [group.name for group in groups]
    columns = {
        "target records": [subtask.records for subtask in targets],
        "chosen that serve it best": [subtask.selected for subtask in targets],
    }
    numbers, values = _spread(selection, "Scores of all records for each subtask", groups, columns)
    plot = Plot("subtasks", numbers.title, page.boxes(names, values, "score for the subtask: a cosine"), numbers)
    drawn = np.flatnonzero(selection.drawn)
    best = np.array([selection.column(group.column)[drawn] for group in groups]).argmax(axis=0)
    counts = np.zeros((len(groups), len(selection.tasks)), int)
    np.add.at(counts, (best, selection.task[drawn]), 1)
    served = dict(zip(names, counts.tolist(), strict=True))
    title = "Of each task, how many chosen records score highest for which subtask"
    by_task = by_name(title, "task", [task.name for task in selection.tasks], served)
    return Section("subtasks", "The target's subtasks", [plot, by_task])


def left_out(selection: Selection) -> Section:
    """Records without a gradient: how many for each reason and task, and one of them."""
    entries = selection.summary.left_out
    if not entries:
        return Section("left-out", "Records left out", ["None."])
    cases = Counter((entry.reason, str(entry.task)) for entry in entries)
    examples = {(entry.reason, str(entry.task)): entry for entry in reversed(entries)}
    lines = []
    for case, count in cases.most_common(CASES):
        example = Markup("row {}, id {}").format(examples[case].row, name(str(examples[case].id), 40))
        lines.append([name(case[0], 200), name(case[1]), f"{count:,}", example])
    share = percent(len(entries) / max(1, len(selection.ids)))
    said = f"{plural(len(entries), 'record')} of {len(selection.ids):,} ({share}): in no mean, and never drawn."
    title = f"The most frequent of {len(cases):,} cases; the scores file has every record"
    table = Table(title, ["reason", "task", "records", "example"], lines)
    return Section("left-out", "Records left out", [said, table])


def cost_and_origin(selection: Selection, chunks: Sequence[PassDetails]) -> Section:
    """What the gradient pass (of the last checkpoint) took, and what it takes to make the subset again."""
    summary = selection.summary
    inputs = {key: value for key, value in structs.asdict(summary.inputs).items() if key not in ("chunks", "match")}
    cost = {"cost": "not known: the feature files of the paper's release have no manifests"}
    if chunks:
        seconds = sum(chunk.seconds for chunk in chunks)
        records = sum(chunk.seconds * (chunk.records_per_second or 0) for chunk in chunks)
        cost = {
            "chunks": f"{len(chunks):,}",
            "time on all devices": duration(seconds),
            "records a second on a device": short(records / seconds if seconds else None),
            "devices and dtypes": "; ".join(sorted({f"{chunk.device}, {chunk.dtype}" for chunk in chunks})),
            "largest peak of memory": memory(max(chunk.peak_memory_bytes for chunk in chunks)),
            "least share of the tokens that is no padding": short(min(chunk.padding_efficiency for chunk in chunks)),
        }
    contents = {
        "Gradient pass": cost,
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
            blocks.append(Table(title, (), [(key, escape(value[:2000])) for key, value in pairs]))
    return Section("origin", "Cost, arguments, versions, hashes", blocks)
