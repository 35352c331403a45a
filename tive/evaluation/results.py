"""What an evaluation says: the files of `scripts/evaluate.py`, written and read by the same structs.

`model_NAME.json` is one `ModelResult`; `evaluation.json` is one `Evaluation`, all models over one held-out file. Only
what is in the files is read here, so that a page can be made without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import msgspec
import numpy as np
from msgspec import Meta, Struct
from msgspec.structs import replace

from tive.util.errors import UserError
from tive.util.files import write_json
from tive.util.text import DASH, percent

EVALUATION_FILE = "evaluation.json"
Measure = Literal["loss", "exact_share"]
TITLES: dict[Measure, str] = {
    "loss": "mean held-out loss (lower is better)",
    "exact_share": "answers produced exactly (higher is better)",
}
INTERVAL = "± is the half width of a 95% interval over the records (1.96 standard errors)"
_OF_THE_DATA = ("data_sha256", "data_records", "task_key")
Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
Loss = Annotated[float, Meta(ge=0, lt=1e300)]


class Conditions(Struct, frozen=True):
    """What the numbers of a model depend on; a result with another one is another result."""

    data_sha256: str  # of the held-out file
    data_records: Count
    model: str  # what tells the model from another, as its family gives it
    dtype: str
    max_new_tokens: Count  # of a generated answer; 0 where none was generated
    task_key: str


class HeldOutResult(Struct, frozen=True):
    """One held-out record: its loss and its answers, or why it has none."""

    row: Count
    loss: Loss | None = None  # mean cross-entropy over its supervised tokens
    answers: Count = 0  # that the model was asked for
    exact: Count = 0  # of them, those that it produced
    not_asked: Count = 0  # cut at the model's maximum length, or before an image of a later turn
    left_out: str | None = None  # the reason, in the words of the gradient step; then there is no loss
    content: str | None = None  # the record's hash, by which results are found again in data that changed


class TaskResult(Struct, frozen=True, rename={"name": "task"}):
    """One task of one model; errors are standard errors over the records, None where fewer than two say something."""

    name: str
    records: Count  # of the held-out file
    left_out: Count  # of them, those without a loss
    loss: Loss | None  # mean over the others
    answers: Count
    exact: Count
    loss_error: Loss | None = None
    exact_share_error: Loss | None = None

    @property
    def exact_share(self) -> float | None:
        return self.exact / self.answers if self.answers else None


class ModelResult(Struct, frozen=True):
    """One model on a held-out file."""

    name: str  # as the command calls it
    path: str
    base: str | None
    conditions: Conditions
    device: str
    seconds: float
    tasks: list[TaskResult]
    records: list[HeldOutResult]  # by row, every one of the held-out file
    versions: dict[str, str]  # of what the numbers depend on
    format: Literal[2] = 2


class Evaluation(Struct, frozen=True):
    """Several models on one held-out file; the first is what the others are relative to."""

    data_path: str
    models: Annotated[list[ModelResult], Meta(min_length=1)]
    format: Literal[2] = 2


def known_results(folder: Path, wanted: Conditions) -> dict[str | None, HeldOutResult]:
    """What a folder's results say of records of any data, by the content of the record, under the other conditions."""
    known: dict[str | None, HeldOutResult] = {}
    for path in sorted(folder.glob("model_*.json")):
        stored = read_stored(path, ModelResult)
        same = replace(stored.conditions, **{name: getattr(wanted, name) for name in _OF_THE_DATA})
        if same == wanted:
            known |= {record.content: record for record in stored.records if record.loss is not None}
    known.pop(None, None)
    return known


def task_results(tasks: Sequence[str], records: Sequence[HeldOutResult]) -> list[TaskResult]:
    """The results of each task, in order of the tasks' first records.

    Args:
        tasks: the task of every record of the file.
        records: by row.
    """
    by_task: dict[str, list[HeldOutResult]] = {}
    for record, task in zip(records, tasks, strict=True):
        by_task.setdefault(task, []).append(record)
    results = []
    for task, of_task in by_task.items():
        losses = np.array([record.loss for record in of_task if record.loss is not None])
        asked = [(record.answers, record.exact) for record in of_task if record.answers]
        answers, exact = np.array(asked).reshape(-1, 2).T
        # Several answers of a record are alike, so the error of their share is that of a ratio over the records.
        share, mean = (exact.sum() / answers.sum(), answers.mean()) if asked else (0.0, 1.0)
        loss_error, share_error = (
            float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
            for values in (losses, (exact - share * answers) / mean)
        )
        results.append(
            TaskResult(
                task,
                len(of_task),
                sum(record.left_out is not None for record in of_task),
                float(losses.mean()) if len(losses) else None,
                int(answers.sum()),
                int(exact.sum()),
                loss_error,
                share_error,
            )
        )
    return results


def mean_over_tasks(model: ModelResult, measure: Measure) -> tuple[float | None, float | None]:
    """Mean over tasks, of which every one counts the same, whatever its size; and its standard error over the records.
    None where a task has none.
    """
    values, errors = ([getattr(task, f"{measure}{end}") for task in model.tasks] for end in ("", "_error"))
    mean = sum(values) / len(values) if values and None not in values else None
    return mean, math.hypot(*errors) / len(errors) if errors and None not in errors else None


def relative(model: ModelResult, first: ModelResult, measure: Measure) -> float | None:
    """Mean over tasks of this model's value as a part of the first's (the last column of the paper's tables).

    A task counts where both have a value and the first's is not 0; None where that is so of no task.
    """
    others = {task.name: getattr(task, measure) for task in first.tasks}
    values = [(getattr(task, measure), others.get(task.name)) for task in model.tasks]
    ratios = [value / other for value, other in values if value is not None and other]
    return sum(ratios) / len(ratios) if ratios else None


def tables(evaluation: Evaluation) -> dict[str, list[tuple[str, ...]]]:
    """Title to rows, the header first: the losses, and the exact answers where any were asked for.

    The last two rows are the mean over the tasks, and what the models' values are of the first model's.
    """
    models = evaluation.models
    records: dict[str, int] = {}
    for task in (task for model in models for task in model.tasks):
        records[task.name] = max(task.records, records.get(task.name, 0))
    answered = any(task.answers for model in models for task in model.tasks)
    result = {}
    for measure, title in TITLES.items():
        if measure == "exact_share" and not answered:
            continue
        values = [
            {task.name: (getattr(task, measure), getattr(task, f"{measure}_error")) for task in model.tasks}
            for model in models
        ]
        rows = [("task", "records", *(model.name for model in models))]
        for name, count in records.items():
            rows.append((name, f"{count:,}", *(_cell(measure, *of.get(name, (None, None))) for of in values)))
        means = [mean_over_tasks(model, measure) for model in models]
        rows.append(("mean over tasks", f"{sum(records.values()):,}", *(_cell(measure, *mean) for mean in means)))
        if len(models) > 1:
            # A model that lacks a task has no mean, so none that could be compared.
            parts = [
                None if mean is None else relative(model, models[0], measure)
                for model, (mean, _) in zip(models, means, strict=True)
            ]
            cells = (DASH if part is None else percent(part) for part in parts)
            rows.append((f"relative to {models[0].name}", "", *cells))
        result[title] = rows
    return result


def _cell(measure: Measure, value: float | None, error: float | None) -> str:
    form = "{:.4f}".format if measure == "loss" else percent
    return DASH if value is None else form(value) + ("" if error is None else f" ± {form(1.96 * error)}")


def write_result(path: Path, result: ModelResult | Evaluation) -> None:
    write_json(path, msgspec.to_builtins(result), indent=None)


_Form = TypeVar("_Form", ModelResult, Evaluation)


def read_stored(path: Path, form: type[_Form]) -> _Form:
    """A result of `scripts/evaluate.py`: a model's, or an evaluation, which its folder stands for too; a `UserError`
    where the file cannot be read, was not written by this version, or holds no model.
    """
    path = path / EVALUATION_FILE if path.is_dir() else path
    try:
        return msgspec.json.decode(path.read_bytes(), type=form)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no result of scripts/evaluate.py as it is now ({error}); evaluate again") from error
