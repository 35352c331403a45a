"""What the two selections print: tables, what a reader of them should know, and which files there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from tive.method.value import mean_budgets, rounded_down
from tive.selection.choose import AIM, FEW
from tive.selection.less import CheckpointFeatures
from tive.selection.options import TiveOptions
from tive.selection.summary import Task
from tive.selection.writing import Chosen, Files
from tive.util.text import LABEL_LIMIT, listed, print_table, shown

# A sentence names the tasks whose budget is below this part of their share of the records.
SMALL_SHARE = 0.2
_NAMED = 8


def print_files(files: Files, chosen: Chosen) -> None:
    selected, records = int(chosen.times_selected.sum()), len(chosen.times_selected)
    size = f"({selected:,} records, {selected / records:.2%} of {records:,})"
    if files.subset:
        print(f"written: {files.subset}  {size}")
    print(f"{'        ' if files.subset else 'written:'} {files.rows}  {'(their rows)' if files.subset else size}")
    print(f"         {files.scores}  (the scores of every record)")
    print(f"         {files.summary}  (arguments, hashes, tasks)")


def print_choice(chosen: Chosen, task: np.ndarray, options: TiveOptions) -> None:
    """Print the tasks' table, how much the weights decide, and what was left out.

    Args:
        task: int `[N]`, each record's task.
    """
    print_table(_table(chosen, options))
    print()
    for sentence in _sentences(chosen, task, options):
        print(sentence)


def _table(chosen: Chosen, options: TiveOptions) -> list[tuple[str, ...]]:
    rules = options.budget_rules
    further = [f"mean {rule}" for rule in rules if rule not in ("difficulty", "size", "equal")]
    if len(rules) > 1:
        further = [f"by {rule}" for rule in rules]
    rows: list[tuple[str, ...]] = [
        ("task", "records", "mean gradient norm", *further, "budget", "selected", "effective sample size")
    ]
    if options.from_sample:
        header = ("task", "records", "with features", "mean gradient norm", *further, "budget", "95%", "selected")
        rows = [header]
    for task in chosen.tasks:
        effective = "excluded"
        if task.effective_sample_size is not None:
            effective = f"{task.effective_sample_size:,.1f} of {task.counted:,}"
        value, basis = (f"{number:.4g}" if number is not None else "" for number in (task.value, task.basis))
        parts = [f"{(task.budget_parts or {}).get(rule, 0):,.1f}" for rule in rules] if len(rules) > 1 else [basis]
        budget = f"{task.budget_before_rounding:,.1f}" if task.budget_before_rounding is not None else ""
        numbers = (value, *(["" for _ in further] if task.excluded else parts[: len(further)]), budget)
        if options.from_sample:
            rows.append((task.name, f"{task.records:,}", *_with_errors(task, numbers), f"{task.selected:,}"))
            continue
        rows.append((task.name, f"{task.records:,}", *numbers, f"{task.selected:,}", effective))
    selected, records = int(chosen.times_selected.sum()), len(chosen.times_selected)
    blank = ["" for _ in rows[0][3 : rows[0].index("budget")]]
    last = (f"{selected:,}", "") if not options.from_sample else ("", f"{selected:,}")
    rows.append(("total", f"{records:,}", "", *blank, f"{_budget(chosen):,.1f}", *last))
    return rows


def _with_errors(task: Task, numbers: tuple[str, ...]) -> tuple[str, ...]:
    """The cells of a task from `with features` to the budget's interval."""
    if task.excluded or task.budget_interval is None:
        return ("", *numbers, "")
    low, high = task.budget_interval
    value = f"{numbers[0]} ± {task.value_error:.2g}" if task.value_error is not None else numbers[0]
    return (f"{task.sampled:,}", value, *numbers[1:], f"{low:,.1f} to {high:,.1f}")


def _budget(chosen: Chosen) -> float:
    """The records that there were to spend, before rounding."""
    return sum(task.budget_before_rounding or 0 for task in chosen.tasks)


def _included(chosen: Chosen) -> list[Task]:
    return [task for task in chosen.tasks if not task.excluded]


def _sentences(chosen: Chosen, task: np.ndarray, options: TiveOptions) -> Iterator[str]:
    if options.sampling == "top":
        yield f"sampling: the highest {options.instance_score} of each task; q and seed play no part"
    elif options.sampling == "clusters":
        yield "sampling: the records nearest to the centres of clusters of each task's features; q plays no part"
    elif options.instance_score == "random" or options.from_sample:
        yield "sampling: every record of a task is as likely as any other; q plays no part"
    else:
        yield _weights(chosen, task, options)
    if options.from_sample:
        yield from _sample(chosen)
    yield from _rounding(chosen)
    yield from _small_shares(chosen, options)
    repeated = [
        f"{task.name} ({task.selected:,} of {task.distinct:,} records)"
        for task in _included(chosen)
        if task.selected > task.distinct
    ]
    if repeated:
        yield (
            f"taken more than once, because the budget is above the records: {listed(repeated)}; at_most_once gives "
            "what is over to the other tasks"
        )
    if options.at_most_once and (full := [task.name for task in _included(chosen) if task.selected == task.counted]):
        yield f"taken whole: {listed(full)}; what their budgets have over went to the other tasks in proportion"
    if chosen.reasons:
        yield (
            f"left out: {len(chosen.reasons):,} records that count in no mean and are never drawn "
            f"({_most_common(chosen.reasons)})"
        )


def _sample(chosen: Chosen) -> Iterator[str]:
    """What a reader of budgets from a sample should know."""
    tasks = [task for task in chosen.tasks if task.sampled is not None]
    sampled, records = sum(task.sampled or 0 for task in tasks), sum(task.records for task in tasks)
    # The middle of an interval is the budget before what at_most_once takes from it.
    errors = [(task.budget_error or 0) / math.sqrt(math.prod(task.budget_interval or (1, 1))) for task in tasks]
    error, worst = max(errors), tasks[int(np.argmax(errors))]
    yield (
        f"from a sample: {sampled:,} of {records:,} records have features; the largest standard error of a budget is "
        f"{error:.1%} of it ({shown(worst.name, LABEL_LIMIT)}); {chosen.details['records_per_task']:,} records a task "
        f"bring all under {AIM:.0%}"
    )
    if few := [f"{task.name} ({task.sampled})" for task in tasks if (task.sampled or 0) < min(FEW, task.counted)]:
        yield f"fewer than {FEW} records have features, so that the error itself is uncertain: {listed(few)}"


def _weights(chosen: Chosen, task: np.ndarray, options: TiveOptions) -> str:
    """How near to uniform the draw is, in words and numbers."""
    ratio = 1.0
    for index, entry in enumerate(chosen.tasks):
        if not entry.excluded:
            weights = chosen.columns["weight"][task == index]
            with np.errstate(divide="ignore"):
                ratio = max(ratio, float(np.nanmax(weights) / np.nanmin(weights)))
    share = min((task.effective_sample_size or 0) / task.counted for task in _included(chosen))
    digits = 6 if ratio < 2 else 2
    numbers = (
        f"within a task the largest weight is at most {ratio:.{digits}g} times the smallest, and the effective sample "
        f"size at least {share:.2%} of its records"
    )
    if share > 0.99:
        return (
            f"sampling: all but uniform at q = {options.q}: {numbers}. Raise q to let "
            f"{options.instance_score} decide (docs/selection.md, Choosing q)"
        )
    kind = "leans towards" if share > 0.5 else "is decided by"
    return f"sampling: the draw {kind} high {options.instance_score} at q = {options.q}: {numbers}"


def _rounding(chosen: Chosen) -> Iterator[str]:
    """What rounding the budgets costs, where it is more than 1% of the records or all of a task's."""
    total, selected = rounded_down(_budget(chosen)), int(chosen.times_selected.sum())
    included = _included(chosen)
    without = [task.name for task in included if not task.selected]
    if not without and total - selected <= total / 100:
        return
    parts = []
    if selected < total:
        parts.append(f"rounding down loses {total - selected:,} of {total:,} records ({1 - selected / total:.1%})")
    if without:
        parts.append(f"{len(without):,} of {len(included):,} tasks get nothing ({listed(without)})")
    remedy = "raise p to reach them"
    if selected < total:
        remedy = f"rounding largest_remainder selects exactly {total:,}"
    yield f"{', and '.join(parts)}; {remedy}"


def _small_shares(chosen: Chosen, options: TiveOptions) -> Iterator[str]:
    """Tasks that get far less than their share of the records, and what other budgets would give them."""
    included, total = _included(chosen), _budget(chosen)
    records = np.array([task.records for task in included])
    shares = total * records / records.sum()
    rules = {"equal": np.ones(len(included))}
    if all(task.value is not None for task in included):
        rules["difficulty"] = np.array([task.value for task in included])
    others = {
        name: mean_budgets([rules[rule] for rule in name.split("+")], options.p, len(chosen.times_selected))
        for name in ("equal", "difficulty+equal")
        if name != "+".join(options.budget_rules) and rules.keys() >= set(name.split("+"))
    }
    small = []
    for place, task in enumerate(included):
        if (task.budget_before_rounding or 0) < SMALL_SHARE * shares[place]:
            remedies = ", ".join(f"with {name} {budgets[place]:,.0f}" for name, budgets in others.items())
            small.append(
                f"{shown(task.name, LABEL_LIMIT)} ({task.selected:,}, by its records {shares[place]:,.0f}; {remedies})"
            )
    if small:
        more = f" and {len(small) - _NAMED:,} more" if len(small) > _NAMED else ""
        yield (
            f"budget below a fifth of the task's share of the records: {', '.join(small[:_NAMED])}{more} "
            "(docs/selection.md, Budgets)"
        )


def _most_common(reasons: Mapping[int, str]) -> str:
    """The three reasons that most records have, with their counts."""
    common = Counter(reasons.values()).most_common(4)
    return ", ".join(f"{count:,} {reason}" for reason, count in common[:3]) + (", ..." if len(common) > 3 else "")


def print_checkpoints(checkpoints: Sequence[CheckpointFeatures], weights: np.ndarray) -> None:
    """Print the checkpoints' table."""
    rows: list[tuple[str, ...]] = [("checkpoint", "step", "gradient", "weight")]
    for checkpoint, weight in zip(checkpoints, weights.tolist(), strict=True):
        step = checkpoint.match.checkpoint
        rows.append(
            (
                str(checkpoint.train.folder),
                "" if step is None else str(step),
                checkpoint.match.gradient,
                f"{weight:.4f}",
            )
        )
    print_table(rows)
    print()
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
    rows: list[tuple[str, ...]] = [("task", "records", "selected", "share of the task")]
    for task in chosen.tasks:
        rows.append((task.name, f"{task.records:,}", f"{task.selected:,}", f"{task.selected / task.records:.1%}"))
    selected, records = int(chosen.times_selected.sum()), len(chosen.times_selected)
    rows.append(("total", f"{records:,}", f"{selected:,}", f"{selected / records:.1%}"))
    print_table(rows)
    print()
    rows = [("subtask", "target records", "mean score", "mean score of the selected", "best served by it")]
    subtasks = chosen.details["subtasks"]
    for subtask in subtasks:
        means = (f"{subtask.mean_score:.4f}", f"{subtask.mean_score_of_selected:.4f}")
        rows.append((subtask.name, f"{subtask.records:,}", *means, f"{subtask.selected:,}"))
    print_table(rows)
    print()
    if without := [subtask.name for subtask in subtasks if not subtask.selected]:
        print(
            f"{len(without):,} of {len(subtasks):,} subtasks have no selected record that serves them best: "
            f"{listed(without)} (docs/less.md, Over the subtasks)"
        )
    if chosen.reasons:
        print(
            f"left out: {len(chosen.reasons):,} records that have no score and are never selected "
            f"({_most_common(chosen.reasons)})"
        )
