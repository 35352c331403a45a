"""What of a conversation is trained on, and the keys that trainers act on: followed, or refused by name."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

from tive.data.conversations import NOTES, ROLES, to_llava
from tive.data.media import IMAGE_TAG, is_empty, media_of
from tive.util.text import is_unicode, shown, shown_value

# Whether a turn is trained on: ms-swift and LLaMA-Factory, OpenAI, axolotl (both).
TRAINED_KEYS = ("loss", "weight", "train", "training")
# Keys of a record that trainers act on and that nothing here follows: preference pairs, tools, options of a template.
_ACTED_ON = {"chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag"}
_ACTED_ON |= {"positive_messages", "negative_messages", "tools", "functions", "chat_template_kwargs"}
_LOOKED_AT = {"messages", "texts", "images", "system", "objects", *_ACTED_ON}
# ms-swift puts the entries of `objects` in their place before it trains.
_PLACEHOLDERS = ("<bbox>", "<ref-object>")


def conversation_of(record: Any) -> dict[str, Any]:
    """A record as trainers of any of the forms train on it, in LLaVA's form (`is_trained_on` tells of each answer).

    Raises:
        ValueError: as `to_llava`; or its text cannot be written, or it has a key that trainers act on and that is not
            followed here.
    """
    converted = to_llava(record)
    turns = converted["conversations"]
    if problem := acted_on_problem(record, turns) or text_problem(turns):
        raise ValueError(problem)
    if not turns:
        raise ValueError("has no turns")
    for index, turn in enumerate(turns):
        is_trained_on(turn, index)
    return converted


def plain_images(record: Any) -> tuple[str, ...] | None:
    """The path of a plain record's image, none where it has no image; None where the record is not plain.

    A plain record is in LLaVA's form: questions and answers in turn, none of them empty, one image at most, its tag
    once and in the first question, and no other key that is looked at. Nearly every record of nearly every file is
    plain, every trainer takes it, and a pass through all records need not look further.
    """
    if not isinstance(record, dict) or not _are_plain(tuple(record)):
        return None
    turns, image = record["conversations"], record.get("image")
    try:
        roles, texts = [turn["from"] for turn in turns], [turn["value"] for turn in turns]
        text, keys = "\n".join(texts), sum(map(len, turns))
    except (KeyError, TypeError):
        return None
    if type(turns) is not list or len(turns) % 2 or roles != _ROLES_IN_TURN[: len(turns)] or keys != 2 * len(turns):
        return None
    media = media_of(record)
    tags = [IMAGE_TAG in texts[0], text.count(IMAGE_TAG)] if turns else []
    if media.problem or not is_unicode(text) or (type(image) is not str if media.images else "image" in record):
        return None
    if tags != ([True, 1] if media.images else [False, 0]) or not all(texts) or text.isspace():
        return None
    return (os.path.normpath(str(image)),) if media.images else ()


_ROLES_IN_TURN = [*ROLES] * 128


@lru_cache(maxsize=4096)
def _are_plain(keys: tuple[str, ...]) -> bool:
    return "conversations" in keys and _LOOKED_AT.isdisjoint(keys)


def is_trained_on(turn: dict[str, Any], index: int = 0) -> bool:
    """Whether an answer, a turn as `to_llava` returns it, is trained on: `loss`, `weight` or `train` may say no.

    Args:
        index: of the turn, for the error.

    Raises:
        ValueError: such a key says something else than yes or no, a question is to be trained on, or the turn has a key
            that is not known here.
    """
    if len(turn) == 2:  # nearly every turn
        return True
    trained = True
    for key, value in turn.items():
        if key in ("from", "value") or key in NOTES or is_empty(value):
            continue
        if key not in TRAINED_KEYS:
            raise ValueError(
                f"has a turn {index} with `{shown(key, 40)}`, which is not followed; write it into the text, or remove "
                "the key"
            )
        if value not in (True, False):  # 1 and 0 among them
            raise ValueError(f"has a turn {index} with `{key}` {shown_value(value)}, and only yes and no are followed")
        if turn["from"] == "human" and value and key != "weight":
            raise ValueError(
                f"has a question in turn {index} that is to be trained on (`{key}`), which is not followed"
            )
        trained = trained and bool(value)
    return trained


def text_problem(turns: list[dict[str, Any]]) -> str | None:
    """What keeps the texts of turns from being written; None when nothing does."""
    wrong = [index for index, turn in enumerate(turns) if not is_unicode(turn["value"])]
    return f"has text in turn {wrong[0]} that is not valid Unicode" if wrong else None


def acted_on_problem(record: dict[str, Any], turns: list[dict[str, Any]]) -> str | None:
    """The problem of a record with a key that trainers act on and that is not followed here; None where none is."""
    for key in () if _ACTED_ON.isdisjoint(record) else sorted(record.keys() & _ACTED_ON):
        if not is_empty(record[key]):
            return f"has `{key}`, which trainers act on and which is not followed here; remove the key, or the record"
    if "objects" in record and not is_empty(record["objects"]):
        marks = [mark for mark in _PLACEHOLDERS if any(mark in turn["value"] for turn in turns)]
        if marks:
            return (
                f"has `objects` for {marks[0]} in its text, which ms-swift replaces before it trains; write the names "
                "and boxes into the text"
            )
    return None
