"""Rules that tell the task of a record from its image path, its questions and its keys.

Public mixtures name no tasks, but each source has its own image folder, response-formatting prompt and number of
questions. A rule file (YAML, see scripts/rules/) lists the tasks with what tells them; the first rule that matches
wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tive.data.containers import entries_of
from tive.data.conversations import image_paths, to_llava
from tive.data.media import IMAGE_TAG, name_of_image
from tive.data.tasks import value_at
from tive.util.errors import UserError
from tive.util.text import shown


class Facts(NamedTuple):
    """What the rules tell a task from: the record, its (first) image's path, and the texts of its human turns."""

    record: dict[str, Any]
    image: str | None
    questions: list[str]


@dataclass(frozen=True)
class Rule:
    """A task, the conditions that a record of it meets (all of them), and the finer tasks it splits into.

    Attributes:
        conditions: names in `CONDITIONS`, and what was read of the value beside each.
    """

    task: str
    conditions: list[tuple[str, Any]]
    split: list[Rule] = field(default_factory=list)

    def matches(self, facts: Facts) -> bool:
        return all(CONDITIONS[name][1](facts, value) for name, value in self.conditions)


@dataclass(frozen=True)
class Rules:
    """The rules of a mixture, in order, and how many records of each task its authors counted."""

    path: Path
    rules: list[Rule]
    expected: dict[str, int]

    def parts(self) -> dict[str, list[str]]:
        """Each task in the order of the rules, with the tasks it splits into."""
        found: dict[str, list[str]] = {}
        for rule in self.rules:
            found.setdefault(rule.task, []).extend(part.task for part in rule.split)
        return found

    def task_of(self, record: dict[str, Any], split: bool) -> str | None:
        """The task of a record by the first rule that matches; None when none does.

        Raises:
            ValueError: the record has none of the forms (`to_llava`).
        """
        conversation = to_llava(record)
        questions = [turn["value"] for turn in conversation["conversations"] if turn["from"] == "human"]
        image = next(iter(image_paths(conversation)), None)
        facts = Facts(record, None if image is None else name_of_image(image), questions)
        rule = next((rule for rule in self.rules if rule.matches(facts)), None)
        if rule is not None and split and rule.split:
            rule = next((part for part in rule.split if part.matches(facts)), None)
        return None if rule is None else rule.task


def bare(question: str) -> str:
    """A question without the image's tag and the white space and full stop around it, for `first_question_is`."""
    return question.replace(IMAGE_TAG, "").strip().rstrip(".").strip()


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts")
    return tuple(texts)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("must be a whole number")
    return value


def _presence(value: Any) -> bool:
    if value not in ("present", "absent"):
        raise ValueError("must be `present` or `absent`")
    return value == "present"


def _key_and_texts(value: Any) -> tuple[str, tuple[str, ...]]:
    if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value)), str):
        raise ValueError("must be one key and its texts, as in `{task_name: [a, b]}`")
    ((key, texts),) = value.items()
    return key, _texts(texts)


def _text_at(facts: Facts, key: str) -> str:
    value = value_at(facts.record, key)
    return value if isinstance(value, str) else ""


# The vocabulary: what reads the value beside a condition's name, or raises ValueError with what it must be; and whether
# a record meets the condition.
CONDITIONS: dict[str, tuple[Callable[[Any], Any], Callable[[Facts, Any], bool]]] = {
    "image": (_presence, lambda facts, wanted: bool(facts.image) == wanted),
    "image_prefix": (_texts, lambda facts, texts: facts.image is not None and facts.image.startswith(texts)),
    "any_question_contains": (
        _texts,
        lambda facts, texts: any(text in one for one in facts.questions for text in texts),
    ),
    "first_question_is": (
        lambda value: frozenset(map(bare, _texts(value))),
        lambda facts, texts: bool(facts.questions) and bare(facts.questions[0]) in texts,
    ),
    "min_questions": (_count, lambda facts, count: len(facts.questions) >= count),
    "max_questions": (_count, lambda facts, count: len(facts.questions) <= count),
    "key_is": (_key_and_texts, lambda facts, wanted: _text_at(facts, wanted[0]) in wanted[1]),
    "key_prefix": (_key_and_texts, lambda facts, wanted: _text_at(facts, wanted[0]).startswith(wanted[1])),
    "key_contains": (
        _key_and_texts,
        lambda facts, wanted: any(text in _text_at(facts, wanted[0]) for text in wanted[1]),
    ),
}


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
    """Read a rule file.

    Raises:
        UserError: the file cannot be read, is not YAML, or holds a rule outside the vocabulary; the rule is named.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path of the rules") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        what = shown(" ".join(str(error).split()), 200)
        raise UserError(f"{path}: not YAML that can be used ({what}); correct it") from error
    if not isinstance(content, dict) or not isinstance(content.get("rules"), list) or not content["rules"]:
        raise UserError(f"{path}: has no list under `rules:`; see scripts/rules/llava_v1_5.yaml for the form")
    unknown = [name for name in content if name not in ("rules", "expected")]
    if unknown:
        raise UserError(f"{path}: unknown entry `{unknown[0]}` (known: rules, expected)")
    rules = [_rule(f"{path}: rule {number}", entry) for number, entry in enumerate(content["rules"], start=1)]
    known = {rule.task for rule in rules}
    expected = content.get("expected", {})
    if not isinstance(expected, dict):
        raise UserError(f"{path}: `expected:` must hold a number of records for each task")
    for task, count in expected.items():
        if task not in known or isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise UserError(f"{path}: `expected: {task}: {count}` is not a rule's task and a number of records")
    return Rules(path, rules, expected)


def _rule(where: str, entry: Any, is_part: bool = False) -> Rule:
    if not isinstance(entry, dict) or not isinstance(entry.get("task"), str) or not entry["task"]:
        raise UserError(
            f"{where}: must have a `task:` that is a text (in quotes where YAML takes it for something else)"
        )
    where = f"{where} ({entry['task']})"
    conditions = {name: value for name, value in entry.items() if name not in ("task", "split")}
    if not conditions:
        raise UserError(f"{where}: has no condition; for the records that are left over name a default task")
    read = []
    for name, value in conditions.items():
        if name not in CONDITIONS:
            raise UserError(f"{where}: unknown condition `{name}` (known: {', '.join(CONDITIONS)})")
        try:
            read.append((name, CONDITIONS[name][0](value)))
        except ValueError as error:
            raise UserError(f"{where}: `{name}` {error}") from error
    if "split" not in entry:
        return Rule(entry["task"], read)
    if is_part or not isinstance(entry["split"], list) or not entry["split"]:
        raise UserError(f"{where}: `split` must be a list of rules, themselves without `split`")
    parts = [_rule(f"{where}: part {number}", part, True) for number, part in enumerate(entry["split"], start=1)]
    return Rule(entry["task"], read, parts)


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
