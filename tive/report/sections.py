"""The sections of a page about a selection for the mixture as a whole, and those that every page has."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from markupsafe import Markup
from msgspec import structs
from scipy.stats import spearmanr

from tive.method.value import effective_sample_size, instance_weights
from tive.report import plots
from tive.report.page import Block, Pictures, Section, Table, facts, name
from tive.report.plots import Part
from tive.selection.options import SCORE_COLUMNS
from tive.selection.reading import Selection
from tive.selection.summary import Task
from tive.util.text import duration, memory, percent, plural, short

# A plot has a row for each of the largest tasks; its table has them all.
ROWS_A_PLOT = 30
CASES = 100  # of records left out
Q_GRID = np.logspace(-4, 5, 91)
# A scores file's column -> title of its section, its axis, and whether that is logarithmic.
COLUMNS = {
    "norm": ("Gradient norms", "gradient norm (logarithmic)", True),
    "loss": ("Losses", "loss: mean cross-entropy over the supervised tokens", False),
    "el2n": ("EL2N", "EL2N: mean length of predicted minus true probabilities", False),
    "visual_gain": ("Visual gain", "visual gain: what its images take off a record's loss", False),
    "influence": ("Influence", "influence: mean cosine to the task's records", False),
    "score": ("Scores", "score", False),
}


def tive_sections(selection: Selection, records: Sequence[Section], pictures: Pictures) -> list[Section]:
    """The sections of TIVE's selection; `records` are those of the sample records."""
    further = (column for column in ("loss", "el2n", "visual_gain") if column in selection.numbers)
    columns = ["norm", *further, "influence"]
    return [
        mixture(selection, pictures),
        task_values(selection, pictures),
        *(distributions(selection, pictures, column) for column in columns),
        choice(selection, pictures),
        *records,
        left_out(selection),
        cost(selection),
        origin(selection),
    ]


def mixture(selection: Selection, pictures: Pictures) -> Section:
    tasks = selection.tasks
    records, selected = sum(task.records for task in tasks), sum(task.selected for task in tasks)
    before = [task.records / max(1, records) for task in tasks]
    after = [task.selected / max(1, selected) for task in tasks]
    budgets = any(task.budget is not None for task in tasks)
    header = ["task", "records", "share before", *["budget"] * budgets, "selected", "distinct", "share after"]
    lines = []
    for task, old, new in zip(tasks, before, after, strict=True):
        budget = ["excluded" if task.excluded else f"{task.budget or 0:,}"] * budgets
        drawn = [f"{task.selected:,}", f"{task.distinct:,}", percent(new)]
        lines.append([name(task.name), f"{task.records:,}", percent(old), *budget, *drawn])
    numbers = Table("Share of each task in the records and in the subset", header, lines)
    names = [f"{task.name} (excluded)" if task.excluded else task.name for task in tasks[:ROWS_A_PLOT]]
    series = {"all records": before[:ROWS_A_PLOT], "subset": after[:ROWS_A_PLOT]}
    draw = partial(plots.bars, names, series, "share of the records, share of the subset", percent=True)
    caption = f"The subset holds {selected:,} of {records:,} records ({percent(selected / max(1, records))})."
    if (distinct := sum(task.distinct for task in tasks)) < selected:
        caption = f"{distinct:,} of the {selected:,} records are distinct: a task below its budget is taken repeatedly."
    plot = pictures.plot("mixture", draw, caption + _largest_alone(tasks), numbers)
    return Section("mixture", "The mixture, before and after", [plot])


def _largest_alone(rows: Sequence[Any], noun: str = "task") -> str:
    return f" The plot shows the first {ROWS_A_PLOT} of {len(rows)} {noun}s." if len(rows) > ROWS_A_PLOT else ""


def task_values(selection: Selection, pictures: Pictures) -> Section:
    valued = [index for index, task in enumerate(selection.tasks) if task.value is not None]
    valued.sort(key=lambda index: -(selection.tasks[index].value or 0))
    if not valued:
        return Section("values", "Task values", ["No task has a value: all are excluded."])
    means = {"loss": "mean loss", "el2n": "mean EL2N", "supervised_tokens": "mean supervised tokens"}
    means = {column: title for column, title in means.items() if column in selection.numbers}
    lines = []
    for index in valued:
        task, rows = selection.tasks[index], selection.rows_of(index)
        cells = [short(_mean(selection.column(column)[rows])) for column in means]
        value, budget = short(task.value), f"{task.budget or 0:,}"
        if task.value_error is not None and task.budget_interval is not None:
            value += f" ± {short(task.value_error)}"
            budget += f" ({short(task.budget_interval[0])} to {short(task.budget_interval[1])})"
        counted = task.counted if task.sampled is None else task.sampled
        lines.append([name(task.name), value, f"{counted:,}", budget, *cells])
    header = ["task", "value", "records counted", "budget", *means.values()]
    from_sample = any(task.sampled is not None for task in selection.tasks)
    title = "Value of each task: the mean gradient norm of its records"
    title += " in the sample, ± its standard error, and the budget with its 95% interval" if from_sample else ""
    numbers = Table(title, header, lines)
    tasks = [selection.tasks[index] for index in valued]
    values = {"value": [task.value or 0 for task in tasks[:ROWS_A_PLOT]]}
    names = [task.name for task in tasks[:ROWS_A_PLOT]]
    draw = partial(plots.bars, names, values, "task value: mean gradient norm")
    first, last = tasks[0], tasks[-1]
    caption = Markup("The largest mean gradient norm is that of {} ({}), the smallest that of {} ({}). {}").format(
        name(first.name), short(first.value), name(last.name), short(last.value), _budget_rule(selection)
    )
    plot = pictures.plot("task_values", draw, caption + _largest_alone(tasks), numbers)
    return Section("values", "Task values", [plot, *_budget_parts(tasks, pictures)])


def _budget_parts(tasks: Sequence[Task], pictures: Pictures) -> list[Block]:
    """What each of several rules gives the tasks, and the budgets that are their means."""
    parts = [task.budget_parts or {} for task in tasks]
    if not parts[0]:
        return []
    series = {rule: [part[rule] for part in parts] for rule in parts[0]}
    series["budget"] = [task.budget_before_rounding or 0.0 for task in tasks]
    lines = [[name(task.name), *map(short, row)] for task, *row in zip(tasks, *series.values(), strict=True)]
    numbers = Table("Records that each rule gives a task, and the budget, their mean", ["task", *series], lines)
    shown = {rule: values[:ROWS_A_PLOT] for rule, values in series.items()}
    draw = partial(plots.bars, [task.name for task in tasks[:ROWS_A_PLOT]], shown, "records")
    return [pictures.plot("budget_parts", draw, "", numbers)]


def _budget_rule(selection: Selection) -> str:
    rule = str(selection.summary.arguments.get("task_budget"))
    if "+" in rule:
        return f"The budgets are the mean of what {rule.replace('+', ' and ')} give."
    if rule == "equal":
        return "The budgets are equal instead."
    others = {"size": "sizes", "loss": "mean losses", "length": "mean supervised tokens", "el2n": "mean EL2N"}
    if rule in others:
        return f"The budgets follow the tasks' {others[rule]} instead."
    return "Budgets are in proportion to it, whatever a task's size."


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def distributions(selection: Selection, pictures: Pictures, column: str) -> Section:
    """A score's distribution in each task."""
    title, label, logarithmic = COLUMNS[column]
    values = selection.column(column)
    if not np.isfinite(values).any():
        return Section(column, title, ["No record has one."])
    parts = []
    for index, task in enumerate(selection.tasks):
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(values[rows])]
        parts.append(Part(task.name, values[rows], selection.drawn[rows]))
    caption = {"norm": lengths, "score": over_targets}.get(column, lambda _: "")(selection) + _largest_alone(parts)
    draw = partial(plots.distribution, parts[:ROWS_A_PLOT], label, logarithmic)
    return Section(column, title, [pictures.plot(column, draw, caption, quantiles(parts, title))])


def quantiles(parts: Sequence[Part], title: str, noun: str = "task") -> Table:
    lines = []
    for part in parts:
        cells = map(short, np.quantile(part.values, [0, 0.25, 0.5, 0.75, 1])) if len(part.values) else "–" * 5
        lines.append([name(part.name), *cells, short(np.median(part.values[part.drawn]) if part.drawn.any() else None)])
    header = [noun, "least", "lower quartile", "median", "upper quartile", "largest", "median of the drawn"]
    return Table(f"{title} in each {noun}, with the drawn records beside all", header, lines)


def lengths(selection: Selection) -> str:
    """How gradient norms go with the length of what is supervised, within the tasks."""
    norms, tokens = selection.column("norm"), selection.column("supervised_tokens")
    known, inside = np.isfinite(norms) & np.isfinite(tokens), []
    for index in range(len(selection.tasks)):
        rows = selection.rows_of(index)
        rows = rows[known[rows]]
        if len(rows) and np.ptp(norms[rows]) and np.ptp(tokens[rows]):
            inside.append(float(spearmanr(norms[rows], tokens[rows]).statistic))
    if not inside:
        return ""
    return (
        "A gradient is that of a mean over the record's supervised tokens, so long answers tend to have smaller ones: "
        f"within a task the rank correlation of norm and supervised tokens is {np.median(inside):.2f} "
        f"(median of the tasks, {min(inside):.2f} to {max(inside):.2f})."
    )


def over_targets(selection: Selection) -> str:
    """How the scores for the subtasks became one."""
    how = {
        "mean": "the mean of its scores for the subtasks",
        "vote": "the number of subtasks that it is among the best for",
    }.get(str(selection.summary.arguments.get("over_targets")), "its score for the subtask that it serves best")
    return f"A record's score is {how}; the records of the highest scores are chosen, whatever their task."


def effective_shares(scores: np.ndarray, qs: np.ndarray) -> np.ndarray:
    """Effective sample size of the weights `softmax(q * score)` of `[n]` scores, by n, for each q: float64 `[q]`."""
    return np.array([effective_sample_size(instance_weights(scores, q)) for q in qs]) / len(scores)


def q_where(shares: np.ndarray, share: float) -> float | None:
    """The q of `Q_GRID` at which effective shares have fallen to `share`; None beyond the grid."""
    if not shares[-1] < share < shares[0]:
        return None
    return float(10 ** np.interp(-share, -shares, np.log10(Q_GRID)))


def choice_curves(selection: Selection) -> tuple[list[int], np.ndarray, np.ndarray]:
    """How much choice the instance weights would make: the tasks that have scores, their records `[tasks]`, and the
    effective share of each over `Q_GRID`, `[tasks, q]`.

    The weights are made of the score that the selection asked for; of the influence where it drew at random.
    """
    values, tasks, sizes, curves = selection.column(_score(selection)), [], [], []
    for index, task in enumerate(selection.tasks):
        scores = values[selection.rows_of(index)]
        scores = scores[np.isfinite(scores)]
        if not task.excluded and len(scores):
            tasks.append(index)
            sizes.append(len(scores))
            curves.append(effective_shares(scores, Q_GRID))
    return tasks, np.array(sizes), np.array(curves)


def _score(selection: Selection) -> str:
    return SCORE_COLUMNS.get(str(selection.summary.arguments.get("instance_score")), "influence")


def choice(selection: Selection, pictures: Pictures) -> Section:
    title, q = "How much choice the weights make", float(selection.summary.arguments["q"])
    tasks, sizes, curves = choice_curves(selection)
    if not tasks:
        return Section("choice", title, ["No record has a score, so there are no weights."])
    everyone = sizes @ curves / sizes.sum()
    drawn_share = sum(selection.tasks[index].distinct for index in tasks) / sizes.sum()
    lines = []
    for index, size, curve in zip(tasks, sizes.tolist(), curves, strict=True):
        task = selection.tasks[index]
        effective = task.effective_sample_size
        cells = [f"{size:,}", f"{task.distinct:,}", "–" if effective is None else f"{effective:,.1f}"]
        lines.append([name(task.name), *cells, short(q_where(curve, 0.5)), short(q_where(curve, task.distinct / size))])
    header = ["task", "records", "drawn", f"effective size at q = {q:g}", "q for half", "q for the share drawn"]
    numbers = Table("Effective sample size of each task's weights", header, lines)
    draw = partial(plots.choice_curve, Q_GRID, curves, everyone, q, drawn_share)
    caption = _choice_caption(selection, q, q_where(everyone, 0.5), q_where(everyone, drawn_share))
    return Section("choice", title, [pictures.plot("choice", draw, caption, numbers)])


def _choice_caption(selection: Selection, q: float, half: float | None, narrow: float | None) -> str:
    """What the weights do at the selection's q, and at which q they would do more."""
    arguments, score = selection.summary.arguments, _score(selection)
    if arguments.get("instance_score") == "random" or arguments.get("sampling", "weighted") != "weighted":
        said = "This selection does not draw with weights; the curve shows what doing so would change."
    else:
        values = [selection.column(score)[selection.rows_of(index)] for index in range(len(selection.tasks))]
        spread = max((np.ptp(known) for known in (v[np.isfinite(v)] for v in values) if len(known)), default=0.0)
        more = math.expm1(min(700.0, q * float(spread)))
        if more < 0.05:
            differ = f"differ by at most {short(100 * more)}%: the draw is all but uniform"
            said = f"At q = {q:g} the weights of a task {differ}."
        else:
            said = f"At q = {q:g} the largest weight of a task is at most {short(1 + more)} times its smallest."
    if half:
        said += f" The effective size falls to half at q ≈ {short(half)}"
        said += f" and to the share that is drawn at q ≈ {short(narrow)}" if narrow and narrow > half else ""
        said += f"; far below, the draw is uniform, far above, it takes the records of highest {score}."
    return said


def left_out(selection: Selection, further: Sequence[Block] = ()) -> Section:
    """Records without a gradient: how many for each reason and task, and one of them; then `further` blocks."""
    title, entries = "Records left out", selection.summary.left_out
    if not entries:
        return Section("left-out", title, ["None: every record has a gradient.", *further])
    cases = [(entry.reason, str(entry.task)) for entry in entries]
    examples = dict(reversed(list(zip(cases, entries, strict=True))))
    counts = Counter(cases)
    lines = []
    for case in sorted(counts, key=lambda case: (-counts[case], case))[:CASES]:
        example = Markup("row {}, id {}").format(examples[case].row, name(str(examples[case].id), 40))
        lines.append([name(case[0], 200), name(case[1]), f"{counts[case]:,}", example])
    share = percent(len(entries) / max(1, len(selection.ids)))
    said = f"{plural(len(entries), 'record')} of {len(selection.ids):,} ({share}): in no mean, and never drawn."
    if len(counts) > CASES:
        said += f" The table has the {CASES} most frequent of {len(counts):,} cases; the scores file has every record."
    return Section("left-out", title, [said, Table(title, ["reason", "task", "records", "example"], lines), *further])


def cost(selection: Selection) -> Section:
    """What the gradient pass took, from the chunks' manifests."""
    title, chunks = "What the gradient pass cost", selection.summary.gradient_pass
    if not chunks:
        return Section("cost", title, ["Not known: the feature files of the paper's release have no manifests."])
    seconds, rates, peaks, paddings = (
        [_number(chunk.get(key)) or 0.0 for chunk in chunks]
        for key in ("seconds", "records_per_second", "peak_memory_bytes", "padding_efficiency")
    )
    records = sum(time * rate for time, rate in zip(seconds, rates, strict=True))
    devices = sorted({f"{chunk.get('device', '–')}, {chunk.get('dtype', '–')}" for chunk in chunks})
    pairs = [
        ("time on all devices", duration(sum(seconds))),
        ("records a second on a device", short(records / sum(seconds) if any(seconds) else None)),
        ("devices and dtypes", "; ".join(devices)),
        ("chunks", f"{len(chunks):,}"),
        ("largest peak of memory", memory(max(peaks))),
        ("least padding efficiency: the share of what is computed that is no padding", short(min(paddings))),
    ]
    which = ["This is the pass of the last checkpoint."] if selection.summary.method == "LESS" else []
    return Section("cost", title, [*which, facts("From the chunks' manifests", pairs)])


def _number(value: Any) -> float | None:
    """A finite number of reasonable size as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def origin(selection: Selection) -> Section:
    """Arguments, versions and hashes: what it takes to make the subset again and to check it."""
    summary = selection.summary
    inputs = {key: value for key, value in structs.asdict(summary.inputs).items() if key not in ("chunks", "match")}
    contents = [("Arguments", summary.arguments), ("Inputs", inputs), ("Gradient features", summary.inputs.match)]
    contents += [("Subset", structs.asdict(summary.subset)), ("Versions", summary.versions)]
    contents.append(("Target", {key: value for key, value in summary.details.items() if isinstance(value, str)}))
    if summary.gradient_pass:
        contents.append(("Versions of the gradient pass", summary.gradient_pass[0].get("versions")))
    blocks: list[Block] = [f"Selected {summary.created}."] if summary.created else []
    for title, content in contents:
        if isinstance(content, dict) and content:
            pairs = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in content.items())
            blocks.append(facts(title, pairs))
    return Section("origin", "Arguments, versions, hashes", blocks)
