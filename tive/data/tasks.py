"""Which task a record names, and rules that tell it where records name none.

Public mixtures name no tasks, but each source has its own image folder, response-formatting prompt and number of
questions. A rule file (YAML, see scripts/rules/) lists the tasks with what tells them; the first rule that matches
wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
import yaml
from msgspec import UNSET, Meta, UnsetType

from tive.data.containers import entries_of
from tive.data.conversations import image_of, image_paths, to_llava
from tive.data.media import IMAGE_KEYS, IMAGE_TAG, name_of_image
from tive.util.errors import UserError
from tive.util.text import is_unicode, shown

NO_TASK = "(no task)"  # what a record that names none is listed under


def value_at(record: dict[str, Any], key: str) -> Any:
    """The value under a key, or under a dotted path (`meta.source`); None when nothing is there."""
    if key in record:
        return record[key]
    value: Any = record
    for step in key.split("."):
        value = value.get(step) if isinstance(value, dict) else None
    return value


def task_of(record: dict[str, Any], task_key: str = "dataset") -> str | None:
    """The task that a record names; None when it names none.

    Args:
        task_key: a key (`dataset`), a dotted path (`meta.source`), or `KEY:SEPARATOR`, the part of the value before
            the first separator (`image:/`, the first folder of the image; `id:_`); a `UserError` without a separator.
    """
    return task_or_problem(record, task_key)[0]


def task_or_problem(record: dict[str, Any], task_key: str = "dataset") -> tuple[str | None, str]:
    """The task of a record, and why it names none (empty where it does)."""
    key, colon, separator = task_key.partition(":")
    if colon and not separator:
        raise UserError(f"the task key {task_key} names no separator; write it after the colon, as in `image:/`")
    # Whichever of the two keys of an image the record has, and however its path is spelled.
    value = value_at(record, key)
    if key in IMAGE_KEYS:
        image = image_of(record)
        value = None if image is None else name_of_image(image)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, dict)):
        kind = "a list" if isinstance(value, list) else "an object"
        return None, f"has {kind} under `{task_key}`, and a task is a text, a number, true or false"
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value)
    if not is_unicode(text):
        return None, f"names a task under `{task_key}` that is not valid Unicode"
    if colon:
        before, found, _ = text.partition(separator)
        text = before if found else ""
    return (text, "") if text else (None, no_task(task_key))


def no_task(task_key: str) -> str:
    """The problem of a record that names no task."""
    return f"names no task under `{task_key}`"


def rows_by_task(tasks: Sequence[str]) -> dict[str, np.ndarray]:
    """The rows of every task, ascending; the tasks in order of their first record."""
    codes_by_name = {name: code for code, name in enumerate(dict.fromkeys(tasks))}
    codes = np.fromiter((codes_by_name[name] for name in tasks), np.int64, len(tasks))
    groups = np.split(np.argsort(codes, kind="stable"), np.cumsum(np.bincount(codes))[:-1])
    return dict(zip(codes_by_name, groups, strict=True))


class Facts(NamedTuple):
    """What the rules tell a task from: the record, its (first) image's path, and the texts of its human turns."""

    record: dict[str, Any]
    image: str
    questions: list[str]

    def text_at(self, key: str) -> str:
        value = value_at(self.record, key)
        return value if isinstance(value, str) else ""


def bare(question: str) -> str:
    """A question without the image's tag and the white space and full stop around it, for `first_question_is`."""
    return question.replace(IMAGE_TAG, "").strip().rstrip(".").strip()


_Text = Annotated[str, Meta(min_length=1)]
_Texts = _Text | Annotated[tuple[_Text, ...], Meta(min_length=1)]
_AtKey = Annotated[dict[str, _Texts], Meta(min_length=1, max_length=1)]
_Count = Annotated[int, Meta(ge=0)]
# The vocabulary: the type of the value beside a condition's name, and whether a record meets the condition. Texts come
# as a tuple, one key and its texts as a pair.
CONDITIONS: dict[str, tuple[Any, Callable[[Facts, Any], bool]]] = {
    "image": (Literal["present", "absent"], lambda facts, wanted: bool(facts.image) == (wanted == "present")),
    "image_prefix": (_Texts, lambda facts, texts: facts.image.startswith(texts)),
    "any_question_contains": (
        _Texts,
        lambda facts, texts: any(text in one for one in facts.questions for text in texts),
    ),
    "first_question_is": (
        _Texts,
        lambda facts, texts: bool(facts.questions) and bare(facts.questions[0]) in map(bare, texts),
    ),
    "min_questions": (_Count, lambda facts, count: len(facts.questions) >= count),
    "max_questions": (_Count, lambda facts, count: len(facts.questions) <= count),
    "key_is": (_AtKey, lambda facts, wanted: facts.text_at(wanted[0]) in wanted[1]),
    "key_prefix": (_AtKey, lambda facts, wanted: facts.text_at(wanted[0]).startswith(wanted[1])),
    "key_contains": (_AtKey, lambda facts, wanted: any(text in facts.text_at(wanted[0]) for text in wanted[1])),
}
# A rule as it stands in the file.
_Entry = msgspec.defstruct(
    "_Entry",
    [
        ("task", _Text),
        *((name, kind | UnsetType, UNSET) for name, (kind, _) in CONDITIONS.items()),  # null is no value of one
        ("split", Annotated[list[Any], Meta(min_length=1)] | UnsetType, UNSET),
    ],
    forbid_unknown_fields=True,
)


class _File(msgspec.Struct, forbid_unknown_fields=True):
    rules: Annotated[list[Any], Meta(min_length=1)]
    expected: dict[str, _Count] = {}


@dataclass(frozen=True)
class Rule:
    """A task, the conditions that a record of it meets (all of them), and the finer tasks it splits into.

    Attributes:
        conditions: names in `CONDITIONS`, and the value beside each.
    """

    task: str
    conditions: list[tuple[str, Any]]
    split: list[Rule]

    def matches(self, facts: Facts) -> bool:
        return all(CONDITIONS[name][1](facts, value) for name, value in self.conditions)


@dataclass(frozen=True)
class Rules:
    """The rules of a mixture, in order, and how many records of each task its authors counted."""

    path: Path
    rules: list[Rule]
    expected: dict[str, int]

    def task_of(self, record: dict[str, Any], split: bool) -> str | None:
        """The task of a record by the first rule that matches, or None; a `ValueError` as of `to_llava`."""
        conversation = to_llava(record)
        questions = [turn["value"] for turn in conversation["conversations"] if turn["from"] == "human"]
        image = next(map(name_of_image, image_paths(conversation)), "")
        facts = Facts(record, image, questions)
        rule = next((rule for rule in self.rules if rule.matches(facts)), None)
        if rule is not None and split and rule.split:
            rule = next((part for part in rule.split if part.matches(facts)), None)
        return None if rule is None else rule.task


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a name that stands twice is an error: the second would silently replace the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = []
        for key, _ in node.value:
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"`{key.value}` stands twice", problem_mark=key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


def read_rules(path: str | os.PathLike[str]) -> Rules:
    """Read a rule file; a `UserError` where it cannot be read, is not YAML, or holds a rule outside the vocabulary."""
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path of the rules") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        what = shown(" ".join(str(error).split()), 200)
        raise UserError(f"{path}: not YAML that can be used ({what}); correct it") from error
    file = _converted(str(path), content, _File)
    rules = [_rule(f"{path}: rule {number}", entry) for number, entry in enumerate(file.rules, start=1)]
    for task in file.expected:
        if task not in {rule.task for rule in rules}:
            raise UserError(f"{path}: `expected:` counts the task {shown(task, 60)}, and no rule has it; correct it")
    return Rules(path, rules, file.expected)


def _rule(where: str, entry: Any, is_part: bool = False) -> Rule:
    read = _converted(where, entry, _Entry)
    conditions: list[tuple[str, Any]] = []
    for name in CONDITIONS:
        value = getattr(read, name)
        if isinstance(value, dict):
            ((key, texts),) = value.items()
            conditions.append((name, (key, (texts,) if isinstance(texts, str) else texts)))
        elif value is not UNSET:
            conditions.append((name, (value,) if isinstance(value, str) and name != "image" else value))
    where = f"{where} ({read.task})"
    if not conditions:
        raise UserError(f"{where}: has no condition; for the records that are left over name a default task")
    if is_part and read.split:
        raise UserError(f"{where}: a part of a `split` cannot have one itself; make it a rule")
    parts = [_rule(f"{where}: part {number}", part, True) for number, part in enumerate(read.split or (), start=1)]
    return Rule(read.task, conditions, parts)


def _converted(where: str, value: Any, kind: Any) -> Any:
    """A value of the file as what it has to be; a `UserError` that names its place."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, RecursionError) as error:
        raise UserError(
            f"{where}: {error}; docs/data.md has the form (a word that YAML takes for something else goes in quotes)"
        ) from error


def add_key(raw: bytes, key: str, value: str) -> bytes:
    """The text of a JSON object with a new last `key`; every byte of it stays as it was."""
    body = raw[:-1].rstrip()
    comma = b"" if body == b"{" else b", "
    return body + comma + f"{json.dumps(key)}: {json.dumps(value)}".encode() + raw[len(body) :]


def replace_key(raw: bytes, key: str, value: str) -> bytes:
    """The text of a JSON object with another value under a `key` that it has (wherever the key stands, if it stands
    more than once); every other byte stays as it was."""
    text = raw.decode()
    starts = [start for name, start in entries_of(text) if name == key]
    for start in reversed(starts):
        text = text[:start] + json.dumps(value) + text[json.JSONDecoder().raw_decode(text, start)[1] :]
    return text.encode()
