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

FORMAT = 2
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
    """What the numbers of a model depend on; a result with another one is another result.

    Attributes:
        data_sha256: of the held-out file, which has `data_records` records.
        model: what tells the model from another, as its family gives it.
        max_new_tokens: most tokens of a generated answer; 0 where none was generated.
    """

    data_sha256: str
    data_records: Count
    model: str
    dtype: str
    max_new_tokens: Count
    task_key: str


class HeldOutResult(Struct, frozen=True):
    """One held-out record: its loss and its answers, or why it has none.

    Attributes:
        loss: mean cross-entropy over its supervised tokens.
        answers: how many answers the model was asked for; `exact` of them it produced.
        not_asked: answers that were cut at the model's maximum length, or stand before an image of a later turn.
        left_out: the reason, in the words of the gradient step; then there is no loss.
        content: the record's hash (`record_hash`), by which results are found again in data that changed.
    """

    row: Count
    loss: Loss | None = None
    answers: Count = 0
    exact: Count = 0
    not_asked: Count = 0
    left_out: str | None = None
    content: str | None = None


class TaskResult(Struct, frozen=True, rename={"name": "task"}):
    """One task of one model.

    Attributes:
        records: of the held-out file; `left_out` of them have no loss.
        loss: mean over its records; None where none has one.
        answers: that the model was asked for; `exact` of them it produced.
        loss_error, exact_share_error: standard errors over the records; None where fewer than two say something.
    """

    name: str
    records: Count
    left_out: Count
    loss: Loss | None
    answers: Count
    exact: Count
    loss_error: Loss | None = None
    exact_share_error: Loss | None = None

    @property
    def exact_share(self) -> float | None:
        return self.exact / self.answers if self.answers else None


class ModelResult(Struct, frozen=True):
    """One model on a held-out file.

    Attributes:
        name: as the command calls it; `path` and `base` are where it lay.
        records: by row, every one of the held-out file.
        versions: of what the numbers depend on.
    """

    name: str
    path: str
    base: str | None
    conditions: Conditions
    device: str
    seconds: float
    tasks: list[TaskResult]
    records: list[HeldOutResult]
    versions: dict[str, str]
    format: int = FORMAT


class Evaluation(Struct, frozen=True):
    """Several models on one held-out file; the first is what the others are relative to."""

    data_path: str
    models: Annotated[list[ModelResult], Meta(min_length=1)]
    format: int = FORMAT


def differing(stored: Conditions, wanted: Conditions) -> str:
    """In a few words, in what a stored result differs from what is wanted; empty where it does not."""
    names = [name for name in Conditions.__struct_fields__ if getattr(stored, name) != getattr(wanted, name)]
    return "another " + " and another ".join(name.replace("_", " ") for name in names) if names else ""


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
    return [_task_result(name, members) for name, members in by_task.items()]


def _task_result(name: str, records: Sequence[HeldOutResult]) -> TaskResult:
    losses = np.array([record.loss for record in records if record.loss is not None])
    answers, exact = np.array([(record.answers, record.exact) for record in records if record.answers]).reshape(-1, 2).T
    # Several answers of a record are alike, so the error of their share is that of a ratio over the records.
    share, mean = (exact.sum() / answers.sum(), answers.mean()) if len(answers) else (0.0, 1.0)
    return TaskResult(
        name,
        len(records),
        sum(record.left_out is not None for record in records),
        float(losses.mean()) if len(losses) else None,
        int(answers.sum()),
        int(exact.sum()),
        _standard_error(losses),
        _standard_error((exact - share * answers) / mean),
    )


def _standard_error(values: np.ndarray) -> float | None:
    return float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None


def mean_over_tasks(model: ModelResult, measure: Measure) -> float | None:
    """Mean over tasks; every task counts the same, whatever its size. None where a task has no value."""
    values = [getattr(task, measure) for task in model.tasks]
    return sum(values) / len(values) if values and None not in values else None


def error_over_tasks(model: ModelResult, measure: Measure) -> float | None:
    """Standard error of `mean_over_tasks` over the records; None where that of a task is not known."""
    errors = [getattr(task, f"{measure}_error") for task in model.tasks]
    return math.hypot(*errors) / len(errors) if errors and None not in errors else None


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
    answered = any(task.answers for model in evaluation.models for task in model.tasks)
    return {title: _rows(evaluation, measure) for measure, title in TITLES.items() if answered or measure == "loss"}


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
    means = [mean_over_tasks(model, measure) for model in models]
    errors = [error_over_tasks(model, measure) for model in models]
    cells = list(zip(means, errors, strict=True))
    rows.append(("mean over tasks", f"{total:,}", *(_cell(measure, *cell) for cell in cells)))
    if len(models) > 1:
        # A model that lacks a task has no mean, so none that could be compared.
        ratios = [
            None if model_mean is None else relative(model, models[0], measure)
            for model, model_mean in zip(models, means, strict=True)
        ]
        rows.append((f"relative to {models[0].name}", "", *("-" if part is None else f"{part:.1%}" for part in ratios)))
    return rows


def _cell(measure: Measure, value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    form = "{:.4f}".format if measure == "loss" else "{:.1%}".format
    return form(value) + ("" if error is None else f" ± {form(1.96 * error)}")


def write_result(path: Path, result: ModelResult | Evaluation) -> None:
    write_json(path, msgspec.to_builtins(result), indent=None)


_Form = TypeVar("_Form", ModelResult, Evaluation)


def read_stored(path: Path, form: type[_Form]) -> _Form:
    """A result of `scripts/evaluate.py`: a model's, or an evaluation, which its folder stands for too.

    Raises:
        UserError: the file cannot be read, was not written by this version, or holds no model.
    """
    path = path / EVALUATION_FILE if path.is_dir() else path
    try:
        content = msgspec.json.decode(path.read_bytes(), type=form)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no result of scripts/evaluate.py ({error}); write it again") from error
    if content.format != FORMAT:
        raise UserError(f"{path} is of another version (format {content.format}); write it again")
    return content
