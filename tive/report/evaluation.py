"""What trained models do on held-out records, beside the selection that one of them was trained on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import Path

from markupsafe import Markup

from tive.evaluation.results import (
    Evaluation,
    ModelResult,
    TaskResult,
    mean_exact_share,
    mean_loss,
    relative_exact_share,
    relative_loss,
)
from tive.report.blocks import Block, Section, Table, name, sentences
from tive.report.numbers import percent, plural, short


def evaluation(evaluations: Sequence[Evaluation]) -> Section:
    """Tables of tasks and models, for each held-out file: mean losses, and the answers that were produced exactly."""
    blocks: list[Block] = []
    for one in evaluations:
        losses = _table(one, "Mean held-out loss", short, attrgetter("loss"), mean_loss, relative_loss)
        blocks += [_summary(one), losses]
        if any(task.answers for model in one.models for task in model.tasks):
            title, share = "Answers produced exactly", attrgetter("exact_share")
            blocks.append(_table(one, title, _percent, share, mean_exact_share, relative_exact_share))
    return Section("evaluation", "Held-out evaluation", blocks)


def _summary(evaluation: Evaluation) -> Markup:
    first = evaluation.models[0]
    records = plural(first.match.data_records, "record")
    said = [
        Markup("{} in {}. Every task counts the same in a mean.").format(records, name(Path(evaluation.data_path).name))
    ]
    ranked = [(loss, model) for model in evaluation.models if (loss := mean_loss(model)) is not None]
    if len(ranked) > 1:
        loss, best = min(ranked, key=lambda pair: pair[0])
        said.append(Markup("The lowest mean loss is that of {}: {}.").format(name(best.name), short(loss)))
    for model in evaluation.models:
        if left_out := sum(task.left_out for task in model.tasks):
            said.append(Markup("{} could not be given to {}.").format(plural(left_out, "record"), name(model.name)))
    return sentences(*said)


def _percent(share: float | None) -> str:
    return "–" if share is None else percent(share)


def _table(
    evaluation: Evaluation,
    title: str,
    form: Callable[[float | None], str],
    value: Callable[[TaskResult], float | None],
    mean: Callable[[ModelResult], float | None],
    relative: Callable[[ModelResult, ModelResult], float | None],
) -> Table:
    """A row a task, a column a model; then the means over the tasks, of the values and of their parts of the first's.

    Args:
        form: how a value is written; `value` is that of a task, and `mean` the models' mean of it.
    """
    models = evaluation.models
    by_name = [{task.name: task for task in model.tasks} for model in models]
    lines, total = [], 0
    for task in dict.fromkeys(task for tasks in by_name for task in tasks):
        found = [tasks.get(task) for tasks in by_name]
        records = max(one.records for one in found if one)
        total += records
        lines.append([name(task), f"{records:,}", *("–" if one is None else form(value(one)) for one in found)])
    lines.append(["mean over tasks", f"{total:,}", *(form(mean(model)) for model in models)])
    # A model that lacks a task has no mean, so none that could be compared.
    parts = [relative(model, models[0]) if mean(model) is not None else None for model in models]
    lines.append([_relative_to(models[0]), "", *map(_percent, parts)])
    return Table(title, ["task", "records", *(name(model.name) for model in models)], lines)


def _relative_to(model: ModelResult) -> Markup:
    return Markup("relative to {}, mean over tasks").format(name(model.name))
