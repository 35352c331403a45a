"""What the two selections print: tables, what a reader of them may want to act on, and which files there are."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from tive.method.value import mean_budgets, rounded_down
from tive.selection.choose import AIM, FEW
from tive.selection.less import CheckpointFeatures, Subtask
from tive.selection.options import WITHOUT_SCORES, TiveOptions
from tive.selection.output import Chosen, Task
from tive.util.text import LABEL_LIMIT, listed, percent, print_table, shown

# A sentence names the tasks whose budget is below this part of their share of the records.
SMALL_SHARE = 0.2


def print_files(files: Mapping[str, Path], chosen: Chosen) -> None:
    selected, records = int(chosen.times_selected.sum()), len(chosen.times_selected)
    size = f"{selected:,} records, {selected / records:.2%} of {records:,}"
    about = {"subset": size, "rows": "their rows" if "subset" in files else size}
    about |= {"scores": "the scores of every record", "summary": "arguments, hashes, tasks"}
    print("written:", "\n         ".join(f"{path}  ({about[kind]})" for kind, path in files.items()))


def print_choice(chosen: Chosen, options: TiveOptions) -> None:
    """Print the tasks' table and sentences on it."""
    included = [task for task in chosen.tasks if not task.excluded]
    records, selected = len(chosen.times_selected), int(chosen.times_selected.sum())
    total = sum(task.budget_before_rounding or 0 for task in included)
    sums = {"task": "total", "records": f"{records:,}", "budget": f"{total:,.1f}", "selected": f"{selected:,}"}
    rows = [*(_row(task, options) for task in chosen.tasks), sums]
    header = max((tuple(row) for row in rows), key=len)
    print_table([header, *(tuple(row.get(column, "") for column in header) for row in rows)])
    print(f"\nsampling: {_sampling(included, options)}")
    if options.from_sample:
        _print_errors(chosen, included)
    whole, without = rounded_down(total), [task.name for task in included if not task.selected]
    lost = whole - selected
    if lost > (0 if without else whole / 100):
        print(
            f"rounding down loses {lost:,} of {whole:,} records ({percent(lost / whole)}); rounding largest_remainder "
            f"selects exactly {whole:,}"
        )
    if without:
        print(f"{len(without):,} of {len(included):,} tasks get nothing ({listed(without)}); raise p to reach them")
    if small := [*_small_shares(included, total, options, records)]:
        more = f" and {len(small) - 8:,} more" if len(small) > 8 else ""
        print(
            f"budget below a fifth of the task's share of the records: {', '.join(small[:8])}{more} "
            "(docs/selection.md, Budgets)"
        )
    if repeated := [
        f"{task.name} ({task.selected:,} of {task.distinct:,} records)"
        for task in included
        if task.selected > task.distinct
    ]:
        print(
            f"taken more than once, because the budget is above the records: {listed(repeated)}; at_most_once gives "
            "what is over to the other tasks"
        )
    _print_left_out(chosen, "count in no mean and are never drawn")


def _row(task: Task, options: TiveOptions) -> dict[str, str]:
    row = {"task": task.name, "records": f"{task.records:,}"}
    if task.excluded:
        return row | {"selected": "excluded"}
    if task.sampled is not None:
        row["with features"] = f"{task.sampled:,}"
    if task.value is not None:
        error = "" if task.value_error is None else f" ± {task.value_error:.2g}"
        row["mean gradient norm"] = f"{task.value:.4g}{error}"
    row |= {f"by {rule}": f"{part:,.1f}" for rule, part in (task.budget_parts or {}).items()}
    if task.basis is not None and options.task_budget not in ("difficulty", *WITHOUT_SCORES):
        row[f"mean {options.task_budget}"] = f"{task.basis:.4g}"
    row["budget"] = f"{task.budget_before_rounding:,.1f}"
    if task.budget_interval is not None:
        row["95%"] = " to ".join(f"{end:,.1f}" for end in task.budget_interval)
    row["selected"] = f"{task.selected:,}"
    if not options.from_sample:
        row["effective sample size"] = f"{task.effective_sample_size:,.1f} of {task.counted:,}"
    return row


def _sampling(included: Sequence[Task], options: TiveOptions) -> str:
    """What decides within a task, and of weights how near to uniform they are."""
    if options.sampling == "top":
        return f"the highest {options.instance_score} of each task; q and seed play no part"
    if options.sampling == "clusters":
        return "the records nearest to the centres of clusters of each task's features; q plays no part"
    if options.score_column is None:
        return "every record of a task is as likely as any other; q plays no part"
    share = min((task.effective_sample_size or 0) / task.counted for task in included)
    size = f"the effective sample size of every task is at least {share:.2%} of its records"
    if share <= 0.99:
        return f"the draw leans towards high {options.instance_score} at q = {options.q}: {size}"
    return (
        f"all but uniform at q = {options.q}: {size}. Raise q to let {options.instance_score} decide "
        "(docs/selection.md, Choosing q)"
    )


def _print_errors(chosen: Chosen, included: Sequence[Task]) -> None:
    """Print how sure budgets from a sample are, and what makes them surer."""
    sampled, records = (sum(numbers) for numbers in zip(*((t.sampled or 0, t.records) for t in included), strict=True))
    # The middle of an interval is the budget before what at_most_once takes from it.
    errors = [(task.budget_error or 0) / math.sqrt(math.prod(task.budget_interval or (1, 1))) for task in included]
    print(
        f"from a sample: {sampled:,} of {records:,} records have features; the largest standard error of a budget is "
        f"{max(errors):.1%} of it ({shown(included[int(np.argmax(errors))].name, LABEL_LIMIT)}); "
        f"{chosen.details['records_per_task']:,} records a task bring all under {AIM:.0%}"
    )
    if few := [f"{task.name} ({task.sampled})" for task in included if (task.sampled or 0) < min(FEW, task.counted)]:
        print(f"fewer than {FEW} records have features, so that the error itself is uncertain: {listed(few)}")


def _small_shares(included: Sequence[Task], total: float, options: TiveOptions, records: int) -> Iterator[str]:
    """The tasks that get far less than their share of the records, and what other rules would give them."""
    shares = total * np.array([task.records for task in included]) / sum(task.records for task in included)
    values = {"equal": [np.ones(len(included))]}
    if all(task.value is not None for task in included):
        values["difficulty+equal"] = [np.array([task.value for task in included]), *values["equal"]]
    values.pop("+".join(options.budget_rules), None)
    others = {name: mean_budgets(rules, options.p, records) for name, rules in values.items()}
    for place, task in enumerate(included):
        if (task.budget_before_rounding or 0) < SMALL_SHARE * shares[place]:
            remedies = ", ".join(f"with {rule} {budgets[place]:,.0f}" for rule, budgets in others.items())
            name = shown(task.name, LABEL_LIMIT)
            yield f"{name} ({task.selected:,}, by its records {shares[place]:,.0f}; {remedies})"


def _print_left_out(chosen: Chosen, effect: str) -> None:
    """Print how many records were left out, and the three reasons that most of them have."""
    common = Counter(chosen.reasons.values()).most_common(4)
    if common:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in common[:3]) + (", ..." if common[3:] else "")
        print(f"left out: {len(chosen.reasons):,} records that {effect} ({reasons})")


def print_checkpoints(
    checkpoints: Sequence[CheckpointFeatures],
    weights: np.ndarray,
    repeated: Sequence[int],
    target_left_out: Mapping[int, str],
) -> None:
    """Print the checkpoints' table, and warnings of few checkpoints and of target records.

    Args:
        repeated: target records that the mixture holds too.
        target_left_out: target records without a gradient.
    """
    lines = [("checkpoint", "step", "gradient", "weight")]
    for one, weight in zip(checkpoints, weights.tolist(), strict=True):
        step = "" if one.match.checkpoint is None else str(one.match.checkpoint)
        lines.append((str(one.train.folder), step, one.match.gradient, f"{weight:.4f}"))
    print_table(lines)
    print()
    if len(checkpoints) == 1:
        print("warning: one checkpoint only; LESS adds up several, which tell more than the last one alone")
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
    """Print the tables of tasks and of subtasks, and the subtasks that no selected record serves best."""
    whole = Task("total", len(chosen.times_selected), 0, int(chosen.times_selected.sum()), 0)
    lines = [("task", "records", "selected", "share of the task")]
    for task in (*chosen.tasks, whole):
        lines.append((task.name, f"{task.records:,}", f"{task.selected:,}", percent(task.selected / task.records)))
    print_table(lines)
    print()
    subtasks: list[Subtask] = chosen.details["subtasks"]
    header = ("subtask", "target records", "mean score", "mean score of the selected", "best served by it")
    rows: list[tuple[str, ...]] = [header]
    for one in subtasks:
        means = (f"{mean:.4f}" for mean in (one.mean_score, one.mean_score_of_selected))
        rows.append((one.name, f"{one.records:,}", *means, f"{one.selected:,}"))
    print_table(rows)
    print()
    if without := [subtask.name for subtask in subtasks if not subtask.selected]:
        print(
            f"{len(without):,} of {len(subtasks):,} subtasks have no selected record that serves them best: "
            f"{listed(without)} (docs/less.md, Over the subtasks)"
        )
    _print_left_out(chosen, "have no score and are never selected")
