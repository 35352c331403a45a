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
from typing import Any

import yaml

from tive.data.conversations import image_paths, to_llava
from tive.data.media import IMAGE_TAG
from tive.data.tasks import value_at
from tive.util.errors import UserError
from tive.util.text import shown

# Whether a record, its image (or None) and its questions (the text of the human turns) meet a condition.
Test = Callable[[dict[str, Any], str | None, list[str]], bool]


@dataclass(frozen=True)
class Rule:
    """A task, the conditions that a record of it meets (all of them), and the finer tasks it splits into."""

    task: str
    tests: list[Test]
    split: list[Rule] = field(default_factory=list)

    def matches(self, record: dict[str, Any], image: str | None, questions: list[str]) -> bool:
        return all(test(record, image, questions) for test in self.tests)


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
        image = next(iter(image_paths(conversation)), None)
        questions = [turn["value"] for turn in conversation["conversations"] if turn["from"] == "human"]
        for rule in self.rules:
            if rule.matches(record, image, questions):
                if not (split and rule.split):
                    return rule.task
                return next((part.task for part in rule.split if part.matches(record, image, questions)), None)
        return None


def bare(question: str) -> str:
    """A question without the image's tag and the white space and full stop around it, for `first_question_is`."""
    return question.replace(IMAGE_TAG, "").strip().rstrip(".").strip()


# The vocabulary. Each entry turns the value beside a condition's name into a test, or raises ValueError with what
# the value must be.


def _texts(value: Any) -> tuple[str, ...]:
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text for text in texts):
        raise ValueError("must be a text or a list of texts")
    return tuple(texts)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("must be a whole number")
    return value


def _image(value: Any) -> Test:
    if value not in ("present", "absent"):
        raise ValueError("must be `present` or `absent`")
    return lambda record, image, questions: bool(image) == (value == "present")


def _image_prefix(value: Any) -> Test:
    prefixes = _texts(value)
    return lambda record, image, questions: image is not None and image.startswith(prefixes)


def _any_question_contains(value: Any) -> Test:
    texts = _texts(value)
    return lambda record, image, questions: any(text in question for question in questions for text in texts)


def _first_question_is(value: Any) -> Test:
    texts = {bare(text) for text in _texts(value)}
    return lambda record, image, questions: bool(questions) and bare(questions[0]) in texts


def _min_questions(value: Any) -> Test:
    count = _count(value)
    return lambda record, image, questions: len(questions) >= count


def _max_questions(value: Any) -> Test:
    count = _count(value)
    return lambda record, image, questions: len(questions) <= count


def _on_key(met: Callable[[str, tuple[str, ...]], bool]) -> Callable[[Any], Test]:
    def build(value: Any) -> Test:
        if not isinstance(value, dict) or len(value) != 1 or not isinstance(next(iter(value)), str):
            raise ValueError("must be one key and its texts, as in `{task_name: [a, b]}`")
        ((key, wanted),) = value.items()
        texts = _texts(wanted)

        def test(record: dict[str, Any], image: str | None, questions: list[str]) -> bool:
            found = value_at(record, key)
            return isinstance(found, str) and met(found, texts)

        return test

    return build


CONDITIONS: dict[str, Callable[[Any], Test]] = {
    "image": _image,
    "image_prefix": _image_prefix,
    "any_question_contains": _any_question_contains,
    "first_question_is": _first_question_is,
    "min_questions": _min_questions,
    "max_questions": _max_questions,
    "key_is": _on_key(lambda found, texts: found in texts),
    "key_prefix": _on_key(lambda found, texts: found.startswith(texts)),
    "key_contains": _on_key(lambda found, texts: any(text in found for text in texts)),
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
    except yaml.MarkedYAMLError as error:
        line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(
            f"{path}{line}: not YAML that can be used ({error.problem or error.context}); correct it"
        ) from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        what = shown(" ".join(str(error).split()), 120)
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
    tests = []
    for name, value in conditions.items():
        if name not in CONDITIONS:
            raise UserError(f"{where}: unknown condition `{name}` (known: {', '.join(CONDITIONS)})")
        try:
            tests.append(CONDITIONS[name](value))
        except ValueError as error:
            raise UserError(f"{where}: `{name}` {error}") from error
    if "split" not in entry:
        return Rule(entry["task"], tests)
    if is_part or not isinstance(entry["split"], list) or not entry["split"]:
        raise UserError(f"{where}: `split` must be a list of rules, themselves without `split`")
    parts = [_rule(f"{where}: part {number}", part, True) for number, part in enumerate(entry["split"], start=1)]
    return Rule(entry["task"], tests, parts)


def add_key(raw: bytes, key: str, value: str) -> bytes:
    """The text of a JSON object with a new last `key`; every byte of it stays as it was."""
    body = raw[:-1].rstrip()
    comma = b"" if body == b"{" else b", "
    return body + comma + f"{json.dumps(key)}: {json.dumps(value)}".encode() + raw[len(body) :]


def replace_key(raw: bytes, key: str, value: str) -> bytes:
    """The text of a JSON object with another value under a `key` that it has (wherever the key stands, if it stands
    more than once); every other byte stays as it was."""
    text = raw.decode()
    for start, end in reversed(_value_spans(text, key)):
        text = text[:start] + json.dumps(value) + text[end:]
    return text.encode()


def _value_spans(text: str, key: str) -> list[tuple[int, int]]:
    """Where the values of a top-level key of a JSON object start and end, in characters."""
    decode = json.JSONDecoder().raw_decode
    spans, position = [], 1

    def skip(position: int, marks: str) -> int:
        while text[position] in marks:
            position += 1
        return position

    while text[position := skip(position, " \t\r\n,")] == '"':
        name, position = decode(text, position)
        start = skip(position, " \t\r\n:")
        _, position = decode(text, start)
        if name == key:
            spans.append((start, position))
    return spans
