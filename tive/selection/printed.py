"""What the selection prints: its passes' bars, the tasks' table, and what a reader of it should know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from tive.method.value import rounded_down
from tive.selection.choice import Choice
from tive.selection.files import Files
from tive.util.text import listed, print_table

# A sentence names the tasks whose budget is below this part of their share of the records.
SMALL_SHARE = 0.2


def bar(title: str, records: int) -> tqdm:
    """The bar of a pass over the features."""
    return tqdm(total=records, desc=title, unit=" records", unit_scale=True, delay=1)


def print_choice(choice: Choice, files: Files) -> None:
    """Print the tasks' table, how much the weights decide, what was left out and which files there are."""
    print_table(_table(choice))
    print()
    for sentence in _sentences(choice):
        print(sentence)
    print_files(files, int(choice.times_selected.sum()), len(choice.task))


def print_files(files: Files, selected: int, records: int) -> None:
    print(f"written: {files.subset}  ({selected:,} records, {selected / records:.2%} of {records:,})")
    print(f"         {files.scores}  (the scores of every record)")
    print(f"         {files.summary}  (arguments, hashes, tasks)")


def most_common(reasons: dict[int, str]) -> str:
    """The three reasons that most records have, with their counts."""
    common = Counter(reasons.values()).most_common(4)
    return ", ".join(f"{count:,} {reason}" for reason, count in common[:3]) + (", ..." if len(common) > 3 else "")


def _table(choice: Choice) -> list[tuple[str, ...]]:
    by = choice.options.task_budget
    further = by if by not in ("difficulty", "size", "equal") else ""
    rows: list[tuple[str, ...]] = [
        ("task", "records", "mean gradient norm", f"mean {further}", "budget", "selected", "effective sample size")
    ]
    for task in choice.tasks:
        effective = "excluded"
        if task.effective_sample_size is not None:
            effective = f"{task.effective_sample_size:,.1f} of {task.counted:,}"
        value, basis = (f"{number:.4g}" if number is not None else "" for number in (task.value, task.basis))
        budget = f"{task.budget_before_rounding:,.1f}" if task.budget_before_rounding is not None else ""
        rows.append((task.name, f"{task.records:,}", value, basis, budget, f"{task.selected:,}", effective))
    selected = int(choice.times_selected.sum())
    rows.append(("total", f"{len(choice.task):,}", "", "", f"{_budget(choice):,.1f}", f"{selected:,}", ""))
    return rows if further else [row[:3] + row[4:] for row in rows]


def _budget(choice: Choice) -> float:
    """The records that there were to spend, before rounding."""
    return sum(task.budget_before_rounding or 0 for task in choice.tasks)


def _sentences(choice: Choice) -> Iterator[str]:
    options = choice.options
    if options.sampling == "top":
        yield f"sampling: the highest {options.instance_score} of each task; q and seed play no part"
    elif options.sampling == "middle":
        yield f"sampling: the middle of each task by {options.instance_score}; q and seed play no part"
    elif options.instance_score == "random":
        yield "sampling: every record of a task is as likely as any other; q plays no part"
    else:
        yield _weights(choice)
    yield from _rounding(choice)
    yield from _small_shares(choice)
    repeated = [
        f"{task.name} ({task.selected:,} of {task.distinct:,} records)"
        for task in choice.included
        if task.selected > task.distinct
    ]
    if repeated:
        yield f"taken more than once, because the budget is above the records: {listed(repeated)}"
    if choice.reasons:
        yield (
            f"left out: {len(choice.reasons):,} records that count in no mean and are never drawn "
            f"({most_common(choice.reasons)})"
        )


def _weights(choice: Choice) -> str:
    """How near to uniform the draw is, in words and numbers."""
    options = choice.options
    ratio = 1.0
    for index, task in enumerate(choice.tasks):
        if not task.excluded:
            weights = choice.weights[choice.task == index]
            with np.errstate(divide="ignore"):
                ratio = max(ratio, float(np.nanmax(weights) / np.nanmin(weights)))
    share = min((task.effective_sample_size or 0) / task.counted for task in choice.included)
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


def _rounding(choice: Choice) -> Iterator[str]:
    """What rounding the budgets costs, where it is more than 1% of the records or all of a task's."""
    total, selected = rounded_down(_budget(choice)), int(choice.times_selected.sum())
    without = [task.name for task in choice.included if not task.selected]
    if not without and total - selected <= total / 100:
        return
    said = []
    if selected < total:
        said.append(f"rounding down loses {total - selected:,} of {total:,} records ({1 - selected / total:.1%})")
    if without:
        said.append(f"{len(without):,} of {len(choice.included):,} tasks get nothing ({listed(without)})")
    remedy = "raise p to reach them"
    if selected < total:
        remedy = f"rounding largest_remainder selects exactly {total:,}"
    yield f"{', and '.join(said)}; {remedy}"


def _small_shares(choice: Choice) -> Iterator[str]:
    """Tasks that get far less than their share of the records."""
    records = sum(task.records for task in choice.included)
    small = [
        f"{task.name} ({task.selected:,}, by its records {share:,.0f})"
        for task in choice.included
        if (task.budget_before_rounding or 0) < SMALL_SHARE * (share := _budget(choice) * task.records / records)
    ]
    if small:
        yield f"budget below a fifth of the task's share of the records: {listed(small)} (docs/selection.md, Budgets)"
