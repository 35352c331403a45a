"""A held-out file: its records, the task of each, and how many answers each asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tive.data.records import RecordFile, name_of, open_records
from tive.data.tasks import task_or_problem
from tive.util.errors import UserError

_NO_OBJECT = "(no object)"


@dataclass(frozen=True)
class HeldOut:
    """A held-out file.

    Attributes:
        tasks: of every record, by row.
        answers: by row, how many turns answer another one.
    """

    records: RecordFile
    tasks: list[str]
    answers: list[int]
    task_key: str


def read_held_out(path: str, task_key: str) -> HeldOut:
    """Read a held-out file. Whether a record can be used is the model's affair, and is asked of its family.

    Raises:
        UserError: the file cannot be read, or a record names no task.
    """
    tasks: list[str] = []
    answers: list[int] = []

    def visit(row: int, record: Any) -> None:
        task, problem = task_or_problem(record, task_key) if isinstance(record, dict) else (_NO_OBJECT, "")
        if task is None:
            raise UserError(f"{name_of(path, row, record)} {problem}; name another key (task_key)")
        tasks.append(task)
        answers.append(_answers(record))

    return HeldOut(open_records(path, visit), tasks, answers, task_key)


def _answers(record: Any) -> int:
    turns = record.get("conversations") if isinstance(record, dict) else None
    roles = [turn.get("from") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return sum(role in ("gpt", "assistant") for role in roles[1:])
