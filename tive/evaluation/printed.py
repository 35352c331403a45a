"""An evaluation in the terminal: a table of losses and a table of exact answers, a column a model."""

from __future__ import annotations

from collections.abc import Callable

from tive.evaluation.results import (
    Evaluation,
    ModelResult,
    TaskResult,
    mean_exact_share,
    mean_loss,
    relative_exact_share,
    relative_loss,
)
from tive.util.text import print_table


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the tables; the last row of each is relative to the first model."""
    models = evaluation.models
    print("mean held-out loss")
    _print(models, lambda task: _loss(task.loss), lambda model: _loss(mean_loss(model)), relative_loss)
    if any(model.match.max_new_tokens for model in models):
        print("answers produced exactly")
        _print(
            models,
            lambda task: _percent(task.exact_share),
            lambda model: _percent(mean_exact_share(model)),
            relative_exact_share,
        )


def _print(
    models: list[ModelResult],
    cell: Callable[[TaskResult], str],
    mean: Callable[[ModelResult], str],
    relative: Callable[[ModelResult, ModelResult], float | None],
) -> None:
    first = models[0]
    rows = [("task", "records", *(model.name for model in models))]
    for index, task in enumerate(first.tasks):
        rows.append((task.name, f"{task.records:,}", *(cell(model.tasks[index]) for model in models)))
    total = sum(task.records for task in first.tasks)
    rows.append(("mean over tasks", f"{total:,}", *map(mean, models)))
    if len(models) > 1:
        rows.append((f"relative to {first.name}", "", *(_percent(relative(model, first)) for model in models)))
    print_table(rows)


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
