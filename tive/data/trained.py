"""What a trainer sees of a record: its conversation, which answers it trains on, and a hash of both.

A key that changes what a trainer computes is followed, or the record is refused and the key named. What keeps a record
from being used is told in words that go on from the record's name.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np

from tive.data.conversations import NOTES, ROLES, image_paths, to_llava
from tive.data.media import IMAGE_TAG, images_in, is_empty
from tive.data.records import Records, whole_records
from tive.util.text import is_unicode, shown, shown_value

HASH_BYTES = 16
# Whether a turn is trained on: ms-swift and LLaMA-Factory, OpenAI, axolotl (both).
TRAINED_KEYS = ("loss", "weight", "train", "training")
# Keys of a record that trainers act on and that nothing here follows: preference pairs, tools, options of a template.
_ACTED_ON = {"chosen", "rejected", "rejected_response", "rejected_messages", "rejected_images", "kto_tag"}
_ACTED_ON |= {"positive_messages", "negative_messages", "tools", "functions", "chat_template_kwargs"}
_LOOKED_AT = {"messages", "texts", "images", "system", "objects", *_ACTED_ON}
_ROLES_IN_TURN = [*ROLES] * 128
_encode = msgspec.json.Encoder(order="sorted").encode


def conversation_of(record: Any) -> dict[str, Any]:
    """A record as trainers of any of the forms train on it, in LLaVA's form (`is_trained_on` tells of each answer); a
    `ValueError` as of `to_llava`, or where it has no turns, text that cannot be written, or a key that trainers act on
    and that is not followed here."""
    conversation = _followed(record)
    for index, turn in enumerate(conversation["conversations"]):
        is_trained_on(turn, index)
    return conversation


def _followed(record: Any) -> dict[str, Any]:
    """`conversation_of`, whatever keys its turns have."""
    if isinstance(record, dict) and (key := _acted_on(record)):
        raise ValueError(
            f"has `{key}`, which trainers act on and which is not followed here; remove the key, or the record"
        )
    conversation = to_llava(record)
    turns, system = conversation["conversations"], conversation.get("system", "")
    if not isinstance(system, str) or not is_unicode(system):
        raise ValueError("has a `system` that is not a text, or not valid Unicode; write the system prompt as one")
    if not is_empty(record.get("objects")):
        for mark in ("<bbox>", "<ref-object>"):
            if any(mark in text for text in (system, *(turn["value"] for turn in turns))):
                raise ValueError(
                    f"has `objects` for {mark} in its text, which ms-swift replaces before it trains; write the names "
                    "and boxes into the text"
                )
    for index, turn in enumerate(turns):
        if not is_unicode(turn["value"]):
            raise ValueError(f"has text in turn {index} that is not valid Unicode")
    if not turns:
        raise ValueError("has no turns")
    return conversation


def _acted_on(record: dict[str, Any]) -> str | None:
    """A key of a record that trainers act on and that is not followed here."""
    for key in sorted(record.keys() & _ACTED_ON):
        if not is_empty(record[key]) and record[key] not in ("[]", "{}"):  # a list of tools is mostly JSON in a text
            return key
    # TRL's and ms-swift's KTO: whether the answer is a good one.
    is_kto = isinstance(record.get("label"), bool) and is_empty(record.get("conversations"))
    return "label" if is_kto else None


def is_trained_on(turn: dict[str, Any], index: int = 0) -> bool:
    """Whether an answer, a turn as `to_llava` returns it, is trained on: `loss`, `weight` or `train` may say no; a
    `ValueError` that names `index` where such a key says something else, or another key is not known here."""
    for key, value in turn.items():
        if key in ("from", "value") or _is_note(key, value):
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
    return not is_taken_out(turn)


def is_taken_out(turn: dict[str, Any]) -> bool:
    """Whether one of `TRAINED_KEYS` says that a turn is not trained on."""
    return any(turn.get(key) in (False,) for key in TRAINED_KEYS)  # 0 among them


def _is_note(key: str, value: Any) -> bool:
    """Whether a key of a turn, as `to_llava` returns it, says nothing that a trainer acts on."""
    return key not in ("from", "value") and (key in NOTES or is_empty(value))


def problem_of(record: Any) -> str | None:
    """What keeps LLaVA's trainer from taking a record; None when nothing does.

    The trainer wants `conversations` of `from` and `value`, human and gpt in turn (it drops a leading gpt turn), at
    most one image and no other medium, and the image's tag in one turn at most; and it trains on every answer.
    """
    try:
        conversation = _followed(record)
        if not _is_llavas(record, conversation):
            return "is not in LLaVA's form; convert the data with scripts/convert_data.py (to llava)"
        _check_llavas(conversation)
    except ValueError as error:
        return str(error)
    for index, turn in enumerate(conversation["conversations"]):
        for key in TRAINED_KEYS if turn["from"] == "gpt" else ():
            if not is_empty(turn.get(key)) and turn[key] not in (True, 1):
                return (
                    f"has `{key}` {shown_value(turn[key])} in turn {index}, and LLaVA's trainer trains on every "
                    "answer; remove the key, or the record"
                )
    return None


def form_problem(record: Any) -> str | None:
    """What keeps a record from being read by every trainer that is known here; None when nothing does.

    LLaVA's form, with one image at most and no system prompt, must be what LLaVA's trainer takes; another form one that
    `conversation_of` reads. Which of them a model reads is asked where the model is known.
    """
    try:
        conversation = _followed(record)
        several = isinstance(conversation.get("image"), list)
        if several or "system" in conversation or not _is_llavas(record, conversation):
            for index, turn in enumerate(conversation["conversations"]):
                is_trained_on(turn, index)
        else:
            _check_llavas(conversation)
    except ValueError as error:
        return str(error)
    return None


def _is_llavas(record: dict[str, Any], conversation: dict[str, Any]) -> bool:
    """Whether a record's own turns are those of LLaVA's form."""
    turns, raw = conversation["conversations"], record.get("conversations")
    return isinstance(raw, list) and [(turn["from"], turn["value"]) for turn in turns] == [
        (turn.get("from"), turn.get("value")) for turn in raw
    ]


def _check_llavas(conversation: dict[str, Any]) -> None:
    """Raise a `ValueError` where LLaVA's trainer does not take the turns or the images."""
    turns, images = conversation["conversations"], image_paths(conversation)
    first = 1 if turns[0]["from"] == "gpt" else 0
    if first == len(turns):
        raise ValueError("has no human turn")
    for index, turn in enumerate(turns[first:]):
        if turn["from"] != ROLES[index % 2]:
            raise ValueError(f"has two {turn['from']} turns in a row (turn {index + first})")
    tagged = sum(IMAGE_TAG in turn["value"] for turn in turns[first:])
    if len(images) > 1:
        raise ValueError(f"has {len(images)} images, and one is supported")
    if images and tagged > 1:
        raise ValueError(f"has {IMAGE_TAG} in {tagged} turns and one image")


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
    try:
        images = images_in(record)
    except ValueError:
        return None
    tags = [IMAGE_TAG in texts[0], text.count(IMAGE_TAG)] if turns else []
    if not is_unicode(text) or (type(image) is not str if images else "image" in record):
        return None
    if tags != ([True, 1] if images else [False, 0]) or not all(texts) or text.isspace():
        return None
    return (os.path.normpath(str(image)),) if images else ()


@lru_cache(maxsize=4096)
def _are_plain(keys: tuple[str, ...]) -> bool:
    return "conversations" in keys and _LOOKED_AT.isdisjoint(keys)


def record_hash(record: Any) -> bytes:
    """128 bits of a record's turns, system prompt and images; `HASH_BYTES` long.

    Two records have the same hash where a trainer sees the same in both: the form (`to_llava`), the order of keys,
    the spelling of a path, ids, tasks, notes and other keys play no part. An image counts by its path, or by its bytes
    where they lie in the record (`StoredImage`; by its name where they were left on disk). A record of no known form
    is hashed whole.
    """
    try:
        plain = plain_images(record)
        if plain is not None:
            content: list[Any] = [record["conversations"], "", plain]
        else:
            conversation = to_llava(record)
            turns = [
                {key: value for key, value in turn.items() if not _is_note(key, value)}
                for turn in conversation["conversations"]
            ]
            content = [turns, conversation.get("system", ""), []]
            for image in image_paths(conversation):
                if isinstance(image, str):
                    content[2].append(image)
                elif image.content is None:
                    content[2].append(["name", image.name])
                else:
                    digest = hashlib.blake2b(image.content, digest_size=HASH_BYTES)
                    content[2].append(["bytes", digest.hexdigest()])
    except ValueError:
        content = ["unknown form", record]
    try:
        encoded = _encode(content)
    except (UnicodeEncodeError, RecursionError):
        encoded = repr(content).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()


def record_hashes(records: Records, rows: range | None = None) -> np.ndarray:
    """The hashes of some records or of all, uint8 `[n, HASH_BYTES]`; the bytes of images in the rows are read."""
    digests = bytearray().join(map(record_hash, whole_records(records, rows)))
    return np.frombuffer(digests, np.uint8).reshape(-1, HASH_BYTES)


def rows_with(hashes: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The first row of `hashes` that equals each of `wanted`, int64 `[n]`; -1 where none does.

    Args:
        hashes, wanted: uint8 `[m, HASH_BYTES]` and `[n, HASH_BYTES]`.
    """
    if not len(hashes):
        return np.full(len(wanted), -1, np.int64)
    # Half of the bits tell nearly all records apart, and all of them are compared then.
    keys, wanted_keys = (np.ascontiguousarray(array).view("<u8")[:, 0] for array in (hashes, wanted))
    order = np.argsort(keys, kind="stable")
    places = order[np.minimum(np.searchsorted(keys[order], wanted_keys), len(keys) - 1)]
    return np.where((hashes[places] == wanted).all(axis=1), places, -1)
