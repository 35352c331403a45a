"""What each plot shows, said in sentences that are computed from the data."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tive.report.choice import Choice
from tive.report.markup import Markup, join, name
from tive.selection.files import Selection


def short(value: float | None) -> str:
    """A number with three digits that count; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def mixture(selection: Selection) -> Markup:
    tasks = selection.tasks
    records, selected = sum(task.records for task in tasks), sum(task.selected for task in tasks)
    share = percent(selected / max(1, records))
    parts: list[Any] = [f"The subset holds {selected:,} of {records:,} records ({share}). "]
    distinct = sum(task.distinct for task in tasks)
    if distinct < selected:
        parts.append(f"{distinct:,} of them are distinct: a task smaller than its budget is taken more than once. ")
    moved = []
    for task in tasks:
        if selected and not task.excluded:
            before, after = task.records / records, task.selected / selected
            moved.append(
                (after - before, task.name, f"{percent(before)} of the records, {percent(after)} of the subset. ")
            )
    moved.sort()
    if moved and moved[-1][0] > 0.0005:
        parts += [name(moved[-1][1]), " gains most: ", moved[-1][2]]
    if moved and moved[0][0] < -0.0005:
        parts += [name(moved[0][1]), " loses most: ", moved[0][2]]
    excluded = [task.name for task in tasks if task.excluded]
    if excluded:
        others = " and others" if len(excluded) > 5 else ""
        parts += [
            "Excluded, so that nothing is drawn: ",
            join((name(task) for task in excluded[:5]), ", "),
            others,
            ".",
        ]
    return join(parts)


def task_values(selection: Selection) -> Markup:
    known = sorted((task for task in selection.tasks if task.value), key=lambda task: task.value or 0)
    if not known:
        return join(["No task has a value."])
    easiest, hardest = known[0], known[-1]
    ratio = short((hardest.value or 0) / (easiest.value or 1))
    rule = {
        "size": "The budgets of this selection follow the tasks' sizes instead.",
        "equal": "The budgets of this selection are equal instead.",
        "loss": "The budgets of this selection follow the tasks' mean loss instead.",
        "length": "The budgets of this selection follow the tasks' mean number of supervised tokens instead.",
        "el2n": "The budgets of this selection follow the tasks' mean EL2N instead.",
    }.get(
        str(selection.summary.arguments.get("task_budget")), "Budgets are in proportion to it, whatever a task's size."
    )
    if len(known) == 1:
        return join([name(hardest.name), f" has the value {short(hardest.value)}. ", rule])
    first = [name(hardest.name), f" ({short(hardest.value)}): its value is {ratio} times that of "]
    return join(
        ["Hardest for the reference model is ", *first, name(easiest.name), f" ({short(easiest.value)}). ", rule]
    )


def distribution(selection: Selection, column: str) -> Markup:
    values = selection.column(column)
    drawn = selection.drawn
    higher, known, largest = 0, 0, (0.0, "", 0.0, 0.0)
    for index, task in enumerate(selection.tasks):
        rows = selection.rows_of(index)
        rows = rows[np.isfinite(values[rows])]
        if not drawn[rows].any():
            continue
        everyone, part = float(np.median(values[rows])), float(np.median(values[rows[drawn[rows]]]))
        known, higher = known + 1, higher + (part > everyone)
        largest = max(largest, (abs(part - everyone), task.name, everyone, part))
    parts: list[Any] = ["Grey: all records of a task; blue: those among them that were drawn, on the same scale. "]
    if not known:
        return join([*parts, "No record was drawn."])
    parts.append(f"The drawn records' median {column} is above their task's in {higher} of {plural(known, 'task')}")
    if largest[0]:
        medians = f" ({short(largest[2])} of all, {short(largest[3])} of the drawn)"
        parts += ["; it differs most in ", name(largest[1]), medians]
    return join([*parts, "."])


def choice(selection: Selection, choice: Choice, drawn_share: float) -> Markup:
    """What the weights do at the selection's q, and at which q they would do more."""
    weighted = "; q plays no part, and the curve shows what drawing with weights would do."
    if selection.summary.arguments.get("instance_score") == "random":
        used = f"This selection draws at random within each task{weighted}"
    elif (sampling := selection.summary.arguments.get("sampling")) in ("top", "middle"):
        which = "highest scores" if sampling == "top" else "middle of the scores"
        used = f"This selection takes the {which} of each task{weighted}"
    else:
        used = _at_q(choice, drawn_share)
    half, narrow = choice.q_where(0.5), choice.q_where(drawn_share)
    if half and narrow and half < narrow:
        used += (
            f" The effective size falls to half at q ≈ {short(half)} and to the share that is drawn at "
            f"q ≈ {short(narrow)}: between the two, {choice.score} decides and the seed still matters. Below, the draw "
            f"tends to uniform; above, to the records of highest {choice.score}."
        )
    elif half:
        used += f" The effective size falls to half at q ≈ {short(half)}."
    return join([used])


def _at_q(choice: Choice, drawn_share: float) -> str:
    more = choice.largest_ratio() - 1
    used = f"At q = {choice.q:g} the weights"
    size = f"the effective sample size is {percent(choice.share_at_q)} of the tasks' size"
    if more < 0.05:
        return f"{used} within a task differ by at most {short(100 * more)}%: the draw is all but uniform, and {size}."
    if choice.share_at_q > 0.9:
        return f"{used} lean only a little to high {choice.score}: {size}."
    if choice.share_at_q > drawn_share:
        return f"{used} prefer records of high {choice.score}: {size}."
    return f"{used} all but decide the draw: {size}, no more than the share drawn ({percent(drawn_share)})."
