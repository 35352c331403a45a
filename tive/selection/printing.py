"""What the two selections print: tables, what a reader of them should know, and which files there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tive.method.value import mean_budgets, rounded_down
from tive.selection.choose import AIM, FEW
from tive.selection.less import CheckpointFeatures, Subtask
from tive.selection.options import BUDGET_COLUMNS, TiveOptions
from tive.selection.summary import Task
from tive.selection.writing import Chosen, Files
from tive.util.text import LABEL_LIMIT, listed, percent, print_table, shown

# A sentence names the tasks whose budget is below this part of their share of the records.
SMALL_SHARE = 0.2
_NAMED = 8


def print_files(files: Files, chosen: Chosen) -> None:
    selected, records = int(chosen.times_selected.sum()), len(chosen.times_selected)
    size = f"{selected:,} records, {selected / records:.2%} of {records:,}"
    about = {files.subset: size, files.rows: "their rows" if files.subset else size}
    about |= {files.scores: "the scores of every record", files.summary: "arguments, hashes, tasks"}
    lines = [f"{file}  ({text})" for file, text in about.items() if file]
    print("written:", "\n         ".join(lines))


def print_choice(chosen: Chosen, task: np.ndarray, options: TiveOptions) -> None:
    """Print the tasks' table, how much the weights decide, and what was left out.

    Args:
        task: int `[N]`, each record's task.
    """
    total = {"task": "total", "records": f"{len(task):,}", "budget": f"{_budget(chosen):,.1f}"}
    total |= {"selected": f"{chosen.times_selected.sum():,}"}
    _print_rows([*(_row(entry, options) for entry in chosen.tasks), total])
    for sentence in _sentences(chosen, task, options):
        print(sentence)


def _print_rows(rows: Sequence[Mapping[str, str]]) -> None:
    """Print a table of rows that have their cells by column; some may lack columns."""
    columns = max((tuple(row) for row in rows), key=len)
    print_table([columns, *(tuple(row.get(column, "") for column in columns) for row in rows)])
    print()


def _row(task: Task, options: TiveOptions) -> dict[str, str]:
    row = {"task": task.name, "records": f"{task.records:,}"}
    if task.excluded:
        return row | {"selected": "excluded"}
    if task.sampled is not None:
        row["with features"] = f"{task.sampled:,}"
    if task.value is not None:
        row["mean gradient norm"] = f"{task.value:.4g}"
        if task.value_error is not None:
            row["mean gradient norm"] += f" ± {task.value_error:.2g}"
    row |= {f"by {rule}": f"{part:,.1f}" for rule, part in (task.budget_parts or {}).items()}
    if options.task_budget in BUDGET_COLUMNS and options.task_budget != "difficulty":
        row[f"mean {options.task_budget}"] = f"{task.basis:.4g}"
    row["budget"] = f"{task.budget_before_rounding:,.1f}"
    if task.budget_interval is not None:
        row["95%"] = " to ".join(f"{end:,.1f}" for end in task.budget_interval)
    row["selected"] = f"{task.selected:,}"
    if not options.from_sample:
        row["effective sample size"] = f"{task.effective_sample_size:,.1f} of {task.counted:,}"
    return row


def _budget(chosen: Chosen) -> float:
    """The records that there were to spend, before rounding."""
    return sum(task.budget_before_rounding or 0 for task in chosen.tasks)


def _sentences(chosen: Chosen, task: np.ndarray, options: TiveOptions) -> Iterator[str]:
    included = [entry for entry in chosen.tasks if not entry.excluded]
    if options.sampling == "top":
        yield f"sampling: the highest {options.instance_score} of each task; q and seed play no part"
    elif options.sampling == "clusters":
        yield "sampling: the records nearest to the centres of clusters of each task's features; q plays no part"
    elif options.instance_score == "random" or options.from_sample:
        yield "sampling: every record of a task is as likely as any other; q plays no part"
    else:
        yield _weights(chosen, task, included, options)
    if options.from_sample:
        yield from _sample(chosen, included)
    yield from _rounding(chosen, included)
    yield from _small_shares(chosen, included, options)
    if repeated := [
        f"{entry.name} ({entry.selected:,} of {entry.distinct:,} records)"
        for entry in included
        if entry.selected > entry.distinct
    ]:
        yield (
            f"taken more than once, because the budget is above the records: {listed(repeated)}; at_most_once gives "
            "what is over to the other tasks"
        )
    if options.at_most_once and (full := [entry.name for entry in included if entry.selected == entry.counted]):
        yield f"taken whole: {listed(full)}; what their budgets have over went to the other tasks in proportion"
    yield from _left_out(chosen, "count in no mean and are never drawn")


def _weights(chosen: Chosen, task: np.ndarray, included: Sequence[Task], options: TiveOptions) -> str:
    """How near to uniform the draw is, in words and numbers."""
    ratio = 1.0
    for index, entry in enumerate(chosen.tasks):
        if not entry.excluded:
            weights = chosen.columns["weight"][task == index]
            with np.errstate(divide="ignore"):
                ratio = max(ratio, float(np.nanmax(weights) / np.nanmin(weights)))
    share = min((entry.effective_sample_size or 0) / entry.counted for entry in included)
    numbers = (
        f"within a task the largest weight is at most {ratio:.{6 if ratio < 2 else 2}g} times the smallest, and the "
        f"effective sample size at least {share:.2%} of its records"
    )
    if share > 0.99:
        return (
            f"sampling: all but uniform at q = {options.q}: {numbers}. Raise q to let {options.instance_score} decide "
            "(docs/selection.md, Choosing q)"
        )
    kind = "leans towards" if share > 0.5 else "is decided by"
    return f"sampling: the draw {kind} high {options.instance_score} at q = {options.q}: {numbers}"


def _sample(chosen: Chosen, included: Sequence[Task]) -> Iterator[str]:
    """What a reader of budgets from a sample should know."""
    sampled, records = (sum(numbers) for numbers in zip(*((t.sampled or 0, t.records) for t in included), strict=True))
    # The middle of an interval is the budget before what at_most_once takes from it.
    errors = [(task.budget_error or 0) / math.sqrt(math.prod(task.budget_interval or (1, 1))) for task in included]
    yield (
        f"from a sample: {sampled:,} of {records:,} records have features; the largest standard error of a budget is "
        f"{max(errors):.1%} of it ({shown(included[int(np.argmax(errors))].name, LABEL_LIMIT)}); "
        f"{chosen.details['records_per_task']:,} records a task bring all under {AIM:.0%}"
    )
    if few := [f"{task.name} ({task.sampled})" for task in included if (task.sampled or 0) < min(FEW, task.counted)]:
        yield f"fewer than {FEW} records have features, so that the error itself is uncertain: {listed(few)}"


def _rounding(chosen: Chosen, included: Sequence[Task]) -> Iterator[str]:
    """What rounding the budgets costs, where it is more than 1% of the records or all of a task's."""
    total, selected = rounded_down(_budget(chosen)), int(chosen.times_selected.sum())
    without = [task.name for task in included if not task.selected]
    if not without and total - selected <= total / 100:
        return
    parts, remedy = [], "raise p to reach them"
    if selected < total:
        parts.append(f"rounding down loses {total - selected:,} of {total:,} records ({percent(1 - selected / total)})")
        remedy = f"rounding largest_remainder selects exactly {total:,}"
    if without:
        parts.append(f"{len(without):,} of {len(included):,} tasks get nothing ({listed(without)})")
    yield f"{', and '.join(parts)}; {remedy}"


def _small_shares(chosen: Chosen, included: Sequence[Task], options: TiveOptions) -> Iterator[str]:
    """Tasks that get far less than their share of the records, and what other budgets would give them."""
    records = np.array([task.records for task in included])
    shares = _budget(chosen) * records / records.sum()
    values = {"equal": [np.ones(len(included))]}
    if all(task.value is not None for task in included):
        values["difficulty+equal"] = [np.array([task.value for task in included]), *values["equal"]]
    values.pop("+".join(options.budget_rules), None)
    others = {name: mean_budgets(rules, options.p, len(chosen.times_selected)) for name, rules in values.items()}
    small = []
    for place, task in enumerate(included):
        if (task.budget_before_rounding or 0) < SMALL_SHARE * shares[place]:
            remedies = ", ".join(f"with {name} {budgets[place]:,.0f}" for name, budgets in others.items())
            name = shown(task.name, LABEL_LIMIT)
            small.append(f"{name} ({task.selected:,}, by its records {shares[place]:,.0f}; {remedies})")
    if small:
        more = f" and {len(small) - _NAMED:,} more" if len(small) > _NAMED else ""
        yield (
            f"budget below a fifth of the task's share of the records: {', '.join(small[:_NAMED])}{more} "
            "(docs/selection.md, Budgets)"
        )


def _left_out(chosen: Chosen, effect: str) -> Iterator[str]:
    """How many records were left out, and the three reasons that most of them have."""
    common = Counter(chosen.reasons.values()).most_common(4)
    if common:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in common[:3]) + (", ..." if common[3:] else "")
        yield f"left out: {len(chosen.reasons):,} records that {effect} ({reasons})"


def print_checkpoints(checkpoints: Sequence[CheckpointFeatures], weights: np.ndarray) -> None:
    """Print the checkpoints' table."""
    _print_rows(
        [
            {
                "checkpoint": str(checkpoint.train.folder),
                "step": "" if checkpoint.match.checkpoint is None else str(checkpoint.match.checkpoint),
                "gradient": checkpoint.match.gradient,
                "weight": f"{weight:.4f}",
            }
            for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True)
        ]
    )
    if len(checkpoints) == 1:
        print("warning: one checkpoint only; LESS adds up several, which tell more than the last one alone")


def print_target_warnings(repeated: Sequence[int], target_left_out: Mapping[int, str]) -> None:
    """Warn of target records that the mixture holds too, and of those without a gradient."""
    if repeated:
        print(
            f"warning: {len(repeated):,} target records are also records of the mixture (the first: target record "
            f"{repeated[0]}); they rank high by themselves, and what is measured on them later is not held out"
        )
    if target_left_out:
        row, reason = min(target_left_out.items())
        print(
            f"warning: {len(target_left_out):,} target records have no gradient and count in no mean (the first: "
            f"target record {row}, {reason})"
        )


def print_target_choice(chosen: Chosen) -> None:
    """Print the tables of tasks and of subtasks, the subtasks that no selected record serves best, and what was left
    out."""
    whole = Task("total", len(chosen.times_selected), 0, int(chosen.times_selected.sum()), 0)
    _print_rows(
        [
            {
                "task": task.name,
                "records": f"{task.records:,}",
                "selected": f"{task.selected:,}",
                "share of the task": percent(task.selected / task.records),
            }
            for task in (*chosen.tasks, whole)
        ]
    )
    subtasks: list[Subtask] = chosen.details["subtasks"]
    _print_rows(
        [
            {
                "subtask": subtask.name,
                "target records": f"{subtask.records:,}",
                "mean score": f"{subtask.mean_score:.4f}",
                "mean score of the selected": f"{subtask.mean_score_of_selected:.4f}",
                "best served by it": f"{subtask.selected:,}",
            }
            for subtask in subtasks
        ]
    )
    if without := [subtask.name for subtask in subtasks if not subtask.selected]:
        print(
            f"{len(without):,} of {len(subtasks):,} subtasks have no selected record that serves them best: "
            f"{listed(without)} (docs/less.md, Over the subtasks)"
        )
    for sentence in _left_out(chosen, "have no score and are never selected"):
        print(sentence)
