"""What each plot shows, said in sentences that are computed from the data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from scipy.stats import spearmanr

from tive.report.blocks import name, sentences
from tive.report.choice import Choice
from tive.report.numbers import percent, plural, short
from tive.report.plots import Part
from tive.selection.files import Selection
from tive.selection.options import BUDGET_COLUMNS


def mixture(selection: Selection) -> Markup:
    tasks = selection.tasks
    records, selected = sum(task.records for task in tasks), sum(task.selected for task in tasks)
    share = percent(selected / max(1, records))
    said = [f"The subset holds {selected:,} of {records:,} records ({share})."]
    distinct = sum(task.distinct for task in tasks)
    if distinct < selected:
        said.append(f"{distinct:,} of them are distinct: a task smaller than its budget is taken more than once.")
    shares = [
        (task.selected / selected - task.records / records, task.name, task.records / records, task.selected / selected)
        for task in tasks
        if selected and not task.excluded
    ]
    for change, most in (("gains", max(shares, default=None)), ("loses", min(shares, default=None))):
        if most and abs(most[0]) > 0.0005 and (most[0] > 0) == (change == "gains"):
            numbers = f"{percent(most[2])} of the records, {percent(most[3])} of the subset."
            said.append(Markup("{} {} most: {}").format(name(most[1]), change, numbers))
    excluded = [name(task.name) for task in tasks if task.excluded]
    if excluded:
        others = " and others" if len(excluded) > 5 else ""
        names = Markup(", ").join(excluded[:5])
        said.append(Markup("Excluded, so that nothing is drawn: {}{}.").format(names, others))
    return sentences(*said)


def task_values(selection: Selection) -> Markup:
    known = sorted((task for task in selection.tasks if task.value), key=lambda task: task.value or 0)
    if not known:
        return Markup("No task has a value.")
    easiest, hardest = known[0], known[-1]
    if len(known) == 1:
        said = Markup("{} has the value {}.").format(name(hardest.name), short(hardest.value))
    else:
        ratio = short((hardest.value or 0) / (easiest.value or 1))
        said = Markup("Hardest for the reference model is {} ({}): its value is {} times that of {} ({}).").format(
            name(hardest.name), short(hardest.value), ratio, name(easiest.name), short(easiest.value)
        )
    return sentences(said, _budget_rule(str(selection.summary.arguments.get("task_budget"))))


def _budget_rule(rule: str) -> str:
    if rule in ("size", "equal"):
        how = "follow the tasks' sizes" if rule == "size" else "are equal"
    elif rule in BUDGET_COLUMNS and rule != "difficulty":
        what = {"length": "number of supervised tokens", "el2n": "EL2N"}.get(rule, rule)
        how = f"follow the tasks' mean {what}"
    else:
        return "Budgets are in proportion to it, whatever a task's size."
    return f"The budgets of this selection {how} instead."


def lengths(selection: Selection) -> str:
    """How gradient norms go with the length of what is supervised, within the tasks and between them."""
    norms, tokens = selection.column("norm"), selection.column("supervised_tokens")
    known = np.isfinite(norms) & np.isfinite(tokens)
    within, means = [], []
    for index in range(len(selection.tasks)):
        rows = selection.rows_of(index)
        rows = rows[known[rows]]
        if len(rows):
            means.append((norms[rows].mean(), tokens[rows].mean()))
            within.append((norms[rows], tokens[rows]))
    inside = [float(spearmanr(*pair).statistic) for pair in within if all(map(np.ptp, pair))]
    between = float(spearmanr(*np.array(means).T).statistic) if len(means) > 2 else None
    if not inside:
        return ""
    middle, lowest, highest = (f"{value:.2f}" for value in (np.median(inside), min(inside), max(inside)))
    spread = f" (median of the tasks, {lowest} to {highest})" if len(inside) > 1 else ""
    tasks = f", and {between:.2f} between the tasks' means" if between is not None else ""
    return (
        "The gradient is that of a mean over a record's supervised tokens, so long answers tend to have smaller ones: "
        f"the rank correlation of norm and supervised tokens is {middle} within a task{spread}{tasks}."
    )


def over_targets(selection: Selection) -> str:
    """How the scores for the subtasks became one."""
    how = {
        "mean": "the mean of its scores for the subtasks",
        "vote": "the number of subtasks that it is among the best for",
    }.get(str(selection.summary.arguments.get("over_targets")), "its score for the subtask that it serves best")
    return f"A record's score is {how}; the records of the highest scores are chosen, whatever their task."


def distribution(parts: Sequence[Part], noun: str, unit: str = "task") -> Markup:
    """Of a score's distribution in parts of a `unit` each: where the drawn records lie."""
    higher, largest = 0, (0.0, "", 0.0, 0.0)
    known = [part for part in parts if part.drawn.any()]
    for part in known:
        everyone, drawn = float(np.median(part.values)), float(np.median(part.values[part.drawn]))
        higher += drawn > everyone
        largest = max(largest, (abs(drawn - everyone), part.name, everyone, drawn))
    said = ["Grey: all records; blue: those among them that were drawn, on the same scale."]
    if not known:
        return sentences(*said, "No record was drawn.")
    above = f"The drawn records' median {noun} is above that of all in {higher} of {plural(len(known), unit)}"
    if not largest[0]:
        return sentences(*said, f"{above}.")
    medians = f"({short(largest[2])} of all, {short(largest[3])} of the drawn)"
    return sentences(*said, Markup("{}; it differs most in {} {}.").format(above, name(largest[1]), medians))


def choice(selection: Selection, choice: Choice, drawn_share: float) -> str:
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
    return used


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
