"""What an evaluation says: the files of `scripts/evaluate.py`, written and read by the same structs.

`model_NAME.json` is one `ModelResult`; `evaluation.json` is one `Evaluation`, all models over one held-out file. Only
what is in the files is read here, so that a page can be made without torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from tive.util.errors import UserError
from tive.util.files import write_json

FORMAT = 1
EVALUATION_FILE = "evaluation.json"
Count = Annotated[int, Meta(ge=0, lt=1 << 40)]
Loss = Annotated[float, Meta(ge=0, lt=1e300)]
Share = Annotated[float, Meta(ge=0, le=1)]


class Match(Struct, frozen=True):
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


class RecordResult(Struct, frozen=True):
    """One held-out record: its loss and its answers, or why it has none.

    Attributes:
        loss: mean cross-entropy over its supervised tokens.
        answers: how many answers the model was asked for; `exact` of them it produced.
        not_asked: answers that were cut at the model's maximum length, or stand before an image of a later turn.
        left_out: the reason, in the words of the gradient step; then there is no loss.
    """

    row: Count
    loss: Loss | None = None
    answers: Count = 0
    exact: Count = 0
    not_asked: Count = 0
    left_out: str | None = None


class TaskResult(Struct, frozen=True, rename={"name": "task"}):
    """One task of one model.

    Attributes:
        records: of the held-out file; `left_out` of them have no loss.
        loss: mean over its records; None where none has one.
        exact_share: of its answers; None where none was generated.
    """

    name: str
    records: Count
    left_out: Count
    loss: Loss | None
    answers: Count
    exact: Count

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
    match: Match
    device: str
    seconds: float
    tasks: list[TaskResult]
    records: list[RecordResult]
    versions: dict[str, str]
    format: int = FORMAT


class Evaluation(Struct, frozen=True):
    """Several models on one held-out file; the first is what the others are relative to."""

    data_path: str
    models: list[ModelResult]
    format: int = FORMAT


def differing(found: Match, wanted: Match) -> str:
    """In a few words, what a result that was found depends on that is not as wanted; empty when all is."""
    names = [name for name in Match.__struct_fields__ if getattr(found, name) != getattr(wanted, name)]
    return "another " + " and another ".join(name.replace("_", " ") for name in names) if names else ""


def task_results(tasks: Sequence[str], records: Sequence[RecordResult]) -> list[TaskResult]:
    """The results of each task, in order of the tasks' first records.

    Args:
        tasks: the task of every record of the file.
        records: by row.
    """
    found = []
    for name in dict.fromkeys(tasks):
        own = [record for record, task in zip(records, tasks, strict=True) if task == name]
        losses = [record.loss for record in own if record.loss is not None]
        found.append(
            TaskResult(
                name,
                len(own),
                sum(record.left_out is not None for record in own),
                _mean(losses),
                sum(record.answers for record in own),
                sum(record.exact for record in own),
            )
        )
    return found


def mean_loss(model: ModelResult) -> float | None:
    """Mean over tasks of the held-out loss; every task counts the same, whatever its size. None where one has none."""
    return _mean_of_all(model, lambda task: task.loss)


def mean_exact_share(model: ModelResult) -> float | None:
    """Mean over tasks of the share of answers produced exactly; None where none was generated."""
    return _mean_of_all(model, lambda task: task.exact_share)


def relative_exact_share(model: ModelResult, to: ModelResult) -> float | None:
    """Mean over tasks of this model's exact share as a part of the other's (the paper's last column).

    A task in which the other produces none counts in no mean; None where that is so of all.
    """
    ratios = []
    for own, other in _pairs(model, to):
        if own.exact_share is not None and other.exact_share:
            ratios.append(own.exact_share / other.exact_share)
    return _mean(ratios)


def relative_loss(model: ModelResult, to: ModelResult) -> float | None:
    """Mean over tasks of this model's held-out loss as a part of the other's; below 1 is better."""
    pairs = _pairs(model, to)
    return _mean([own.loss / other.loss for own, other in pairs if own.loss is not None and other.loss])


def write_model(path: Path, result: ModelResult) -> None:
    write_json(path, msgspec.to_builtins(result), indent=None)


def write_evaluation(path: Path, evaluation: Evaluation) -> None:
    write_json(path, msgspec.to_builtins(evaluation), indent=None)


def read_model(path: Path) -> ModelResult:
    """One model's results.

    Raises:
        UserError: the file cannot be read, or was not written by this version.
    """
    return _read(path, ModelResult)


def read_evaluation(path: Path) -> Evaluation:
    """The results of `scripts/evaluate.py`; a folder stands for the file in it.

    Raises:
        UserError: the file cannot be read, was not written by this version, or holds no model.
    """
    evaluation = _read(path / EVALUATION_FILE if path.is_dir() else path, Evaluation)
    if not evaluation.models:
        raise UserError(f"{path} holds no model; write it again with scripts/evaluate.py")
    return evaluation


_Form = TypeVar("_Form", ModelResult, Evaluation)


def _read(path: Path, form: type[_Form]) -> _Form:
    try:
        content = msgspec.json.decode(path.read_bytes(), type=form)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is no result of scripts/evaluate.py ({error}); write it again") from error
    if content.format != FORMAT:
        raise UserError(f"{path} is of format {content.format}, this version reads {FORMAT}; write it again")
    return content


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _mean_of_all(model: ModelResult, value: Callable[[TaskResult], float | None]) -> float | None:
    values = [found for task in model.tasks if (found := value(task)) is not None]
    return _mean(values) if len(values) == len(model.tasks) else None


def _pairs(model: ModelResult, to: ModelResult) -> list[tuple[TaskResult, TaskResult]]:
    others = {task.name: task for task in to.tasks}
    return [(task, others[task.name]) for task in model.tasks if task.name in others]
