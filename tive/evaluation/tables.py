"""An evaluation as tables, for the terminal and for the report's page: a row a task, a column a model."""

from __future__ import annotations

from tive.evaluation.results import (
    Evaluation,
    Measure,
    error_over_tasks,
    mean_over_tasks,
    relative,
)

TITLES: dict[Measure, str] = {
    "loss": "mean held-out loss (lower is better)",
    "exact_share": "answers produced exactly (higher is better)",
}
INTERVAL = "± is the half width of a 95% interval over the records (1.96 standard errors)"


def tables(evaluation: Evaluation) -> dict[str, list[tuple[str, ...]]]:
    """Title to rows, the header first: the losses, and the exact answers where any were asked for.

    The last two rows are the mean over the tasks, and what the models' values are of the first model's.
    """
    answered = any(task.answers for model in evaluation.models for task in model.tasks)
    measures: list[Measure] = ["loss", "exact_share"] if answered else ["loss"]
    return {TITLES[measure]: _rows(evaluation, measure) for measure in measures}


def _rows(evaluation: Evaluation, measure: Measure) -> list[tuple[str, ...]]:
    models = evaluation.models
    by_name = [{task.name: task for task in model.tasks} for model in models]
    rows, total = [("task", "records", *(model.name for model in models))], 0
    for name in dict.fromkeys(name for tasks in by_name for name in tasks):
        results = [tasks.get(name) for tasks in by_name]
        records = max(task.records for task in results if task)
        total += records
        cells = [(getattr(task, measure, None), getattr(task, f"{measure}_error", None)) for task in results]
        rows.append((name, f"{records:,}", *(_cell(measure, *cell) for cell in cells)))
    means = [(mean_over_tasks(model, measure), error_over_tasks(model, measure)) for model in models]
    rows.append(("mean over tasks", f"{total:,}", *(_cell(measure, *mean) for mean in means)))
    if len(models) > 1:
        # A model that lacks a task has no mean, so none that could be compared.
        parts = [relative(model, models[0], measure) for model in models]
        shown = [
            f"{100 * part:.1f}%" if part is not None and mean[0] is not None else "-"
            for part, mean in zip(parts, means, strict=True)
        ]
        rows.append((f"relative to {models[0].name}", "", *shown))
    return rows


def _cell(measure: Measure, value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    form = "{:.4f}".format if measure == "loss" else "{:.1%}".format
    return form(value) + ("" if error is None else f" ± {form(1.96 * error)}")
