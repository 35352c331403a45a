"""A record's conversation, whichever way it is spelled; LLaVA's form, those of other trainers, and the way between.

| form | turns | images | system prompt | read by |
| --- | --- | --- | --- | --- |
| llava | `conversations`: `from`, `value` | `image`, a path | none: the template's own | LLaVA, this project |
| sharegpt | `conversations`: `from`, `value` | `images`, a list | `system`, a key | LLaMA-Factory, ms-swift |
| messages | `messages`: `role`, `content` | `images`, a list | a first turn | LLaMA-Factory, ms-swift |
| parts | `messages`, `content` a list of parts | `images`, a list | a first turn | TRL |

In the first three the tag `<image>` in the text marks where an image stands; in `parts` a part of type `image` does.
Turns with `from` and `value` are read under `messages` too, and `role` and `content` under `conversations`, with every
name of a role in `_ROLES`. Without either key, `texts` (The Cauldron, FineVision), `prompt` and `completion` (TRL) and
a question with its answer (`_PAIRS`) are read; their images stand before the first question. A key that is null or
empty is as none. Every other key of a record and of a turn is kept as it is. Errors are a `ValueError` whose text goes
on from the record's name.
"""

from __future__ import annotations

import re
from typing import Any

from tive.data.media import IMAGE_TAG, Image, is_empty, media_of, path_in, plain_path
from tive.util.text import listed, shown, shown_value

ROLES = ("human", "gpt")
# What other trainers call LLaVA's roles.
OTHER_ROLE_NAMES = {"user": "human", "assistant": "gpt", "chatgpt": "gpt"}
# Every name of a role that is known, and LLaVA's; a system turn is no turn of LLaVA's.
_ROLES = {"human": "human", "gpt": "gpt", "system": "system", **OTHER_ROLE_NAMES}
# One question and its answer, each a text under a key of the record.
_PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"))
# One of these is in every record that is read.
KEYS_OF_TURNS = ("conversations", "messages", "texts", "prompt", *(keys[0] for keys in _PAIRS))
# Keys of a turn that no trainer acts on.
NOTES = ("id", "source", "metadata", "model", "markdown", "timestamp")


def to_llava(record: Any) -> dict[str, Any]:
    """A record of any form in LLaVA's. A system turn becomes the key `system`, which LLaVA's trainer does not read.

    `image` is a path where there is one image, a list where there are more, and absent where there is none.

    Raises:
        ValueError: the record is of none of the forms, or holds what LLaVA's has no place for.
    """
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    images = images_in(record)
    keys = _keys_of_turns(record)
    paths: list[Image] = []
    indices: list[int] = []
    turns = _turns(record, keys, paths, indices)
    if paths and images:
        raise ValueError("names its images twice: in `images` and in the parts of its turns")
    if indices:
        images = _in_order(images, indices)
    images = images or paths
    if keys[0] in _LISTS:
        _check_parts(record[keys[0]], has_image=bool(images))
    if images and keys[0] not in _LISTS and not any(IMAGE_TAG in turn["value"] for turn in turns):
        first = next((index for index, turn in enumerate(turns) if turn["from"] == "human"), None)
        if first is None:
            raise ValueError("has images and no question")
        turns[first] = turns[first] | {"value": IMAGE_TAG * len(images) + turns[first]["value"]}

    converted: dict[str, Any] = {}
    for name, value in record.items():
        if name in keys:
            converted["conversations"] = turns
        elif name in ("image", "images"):
            if images:
                converted["image"] = _image_value(images)
        elif name not in _LISTS and not (name == "system" and is_empty(value)):
            converted[name] = value
    if images:
        converted["image"] = _image_value(images)
    if paths:
        images_in(converted)
    _move_system(converted)
    return converted


def image_paths(conversation: dict[str, Any]) -> tuple[Image, ...]:
    """The images, paths below the image folder or the images themselves, of what `to_llava` returned."""
    images = conversation.get("image", [])
    return tuple(map(plain_path, images if isinstance(images, list) else [images]))


def without_images(record: Any) -> dict[str, Any]:
    """A record in LLaVA's form without its images and their tags.

    Raises:
        ValueError: as `to_llava`.
    """
    text_alone = {key: value for key, value in to_llava(record).items() if key != "image"}
    text_alone["conversations"] = [
        turn | {"value": turn["value"].replace(IMAGE_TAG, "").strip()} if IMAGE_TAG in turn["value"] else turn
        for turn in text_alone["conversations"]
    ]
    return text_alone


def images_of(record: Any) -> tuple[Image, ...]:
    """The paths of a record's images below the image folder, in any of the forms.

    Raises:
        ValueError: as `to_llava`.
    """
    return image_paths(to_llava(record))


def image_of(record: dict[str, Any]) -> Image | None:
    """The path of a record's (first) image below the image folder, in any of the forms or none; None without one."""
    try:
        images = images_of(record)
    except ValueError:
        images = tuple(map(plain_path, media_of(record).images))
    return next(iter(images), None)


def placeholder_in(turns: list[dict[str, Any]]) -> str | None:
    """What stands for an image in the questions of records that were made for another model: `<image 1>`, say."""
    questions = (turn["value"] for turn in turns if turn["from"] == "human")
    return next((mark[0] for text in questions if (mark := _OTHER_TAG.search(text))), None)


# <image 1>, <|image_pad|>, <start_of_image>, <Image>, <img>, <ImageHere>, [IMG] and others like them.
_OTHER_TAG = re.compile(
    r"(?-i:(?!<image>))(?:<[|/]?[a-z_]{0,16}(?:image|img)[^<>]{0,24}>|[\[{](?:image|img)[^\[\]{}]{0,8}[\]}])",
    re.IGNORECASE,
)
_LISTS = ("conversations", "messages")


def _keys_of_turns(record: dict[str, Any]) -> tuple[str, ...]:
    """The keys that hold a record's conversation: a list of turns, `texts`, a prompt and completion, or a pair."""
    filled = [key for key in _LISTS if key in record and not is_empty(record[key])]
    if len(filled) == 2:
        raise ValueError("has both `conversations` and `messages`; remove one of them")
    texts = record.get("texts")
    if filled and isinstance(texts, list) and any(isinstance(one, dict) and "assistant" in one for one in texts):
        raise ValueError(f"has both `{filled[0]}` and `texts`; remove one of them")
    if filled:
        return (filled[0],)
    for keys in (("texts",), ("prompt", "completion"), *_PAIRS):
        if not any(is_empty(record.get(key)) for key in keys):
            return keys
    empty = [key for key in _LISTS if isinstance(record.get(key), list)]
    if empty:
        return (empty[0],)
    names = listed([shown(key, 20) for key in record], 6) or "none"
    raise ValueError(f"has no `conversations` or `messages` (its keys: {names})")


def _turns(
    record: dict[str, Any], keys: tuple[str, ...], paths: list[Image], indices: list[int]
) -> list[dict[str, Any]]:
    """The turns under `keys`, with `from` and `value`; what the image parts of turns name is added to `paths` and
    `indices`."""
    if keys[0] in _LISTS:
        return _turns_of_list(record[keys[0]], keys[0], paths, indices)
    if keys[0] == "texts":
        entries = record["texts"]
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and isinstance(entry.get("user"), str) and isinstance(entry.get("assistant"), str)
            for entry in entries
        ):
            raise ValueError("has `texts` that are not a list of `user` and `assistant`")
        turns = []
        for entry in entries:
            notes = {key: value for key, value in entry.items() if key not in ("user", "assistant")}
            turns += [{"from": "human", "value": entry["user"], **notes}, {"from": "gpt", "value": entry["assistant"]}]
        return turns
    if keys[0] == "prompt":
        for key in keys:
            if not isinstance(record[key], list):
                raise ValueError(f"has a `{key}` that is not a list of turns, on which TRL trains without a template")
        asked = _turns_of_list(record["prompt"], "prompt", paths, indices)
        # TRL trains on the completion alone.
        asked = [turn | {"loss": False} if turn["from"] == "gpt" else turn for turn in asked]
        return asked + _turns_of_list(record["completion"], "completion", paths, indices)
    question, answer = (record[key] for key in keys)
    if not isinstance(question, str) or not isinstance(answer, str):
        raise ValueError(f"has a `{keys[0]}` and an `{keys[1]}` that are not both a text")
    for key in ("history", "input"):
        if not is_empty(record.get(key)):
            raise ValueError(f"has `{key}` beside `{keys[0]}`; write it into `conversations`")
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _turns_of_list(turns: Any, key: str, paths: list[Image], indices: list[int]) -> list[dict[str, Any]]:
    if not isinstance(turns, list):
        raise ValueError(f"has `{key}` that are not a list of turns")
    return [_turn(turn, index, key, paths, indices) for index, turn in enumerate(turns)]


def images_in(record: dict[str, Any]) -> list[Image]:
    """The images under a record's own keys, as it writes them.

    Raises:
        ValueError: a medium is not read.
    """
    media = media_of(record)
    if media.problem:
        raise ValueError(media.problem)
    return list(media.images)


def _in_order(images: list[Image], indices: list[int]) -> list[Image]:
    """The images that image parts count by their `index`."""
    if max(indices) >= len(images):
        raise ValueError(f"has an image part with `index` {max(indices)}, and {len(images)} images")
    return [images[index] for index in indices]


def _image_value(images: list[Image]) -> Image | list[Image]:
    return images[0] if len(images) == 1 else images


def _turn(turn: Any, index: int, key: str, paths: list[Image], indices: list[int]) -> dict[str, Any]:
    """A turn of the list under `key` with `from` and `value`."""
    if not isinstance(turn, dict):
        raise ValueError(f"has a turn {index} that is not an object")
    is_message, is_turn = ("role" in turn or "content" in turn), ("from" in turn or "value" in turn)
    if is_message and is_turn:
        missing = {"from", "value"} if is_empty(turn.get("from")) else {"role", "content"}
        turn = {name: value for name, value in turn.items() if name not in missing or not is_empty(value)}
        is_message, is_turn = ("role" in turn or "content" in turn), ("from" in turn or "value" in turn)
        if is_message and is_turn:
            raise ValueError(f"has a turn {index} with keys of both forms")
    role_key, text_key = ("role", "content") if is_message else ("from", "value")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"has a turn {index} whose `{role_key}` {shown_value(role)} is none of {known}; rename it")
    if is_message:
        text = _text(text, index, paths, indices)
    elif not isinstance(text, str):
        raise ValueError(f"has a turn {index} without a text `value`")
    renamed = {role_key: ("from", _ROLES[role]), text_key: ("value", text)}
    return dict(renamed.get(name, (name, value)) for name, value in turn.items())


def _move_system(record: dict[str, Any]) -> None:
    """Make a first turn of the system a key of the record: LLaVA's template has no such turn."""
    turns = record["conversations"]
    if turns and turns[0]["from"] == "system":
        if "system" in record:
            raise ValueError("has a system turn and a key `system`")
        if len(turns[0]) > 2:
            raise ValueError("has a system turn with more keys than its text")
        record["system"] = turns[0]["value"]
        record["conversations"] = turns = turns[1:]
    if any(turn["from"] == "system" for turn in turns):
        raise ValueError("has a system turn that is not the first")


_IMAGE_PART_KEYS = ("image", "path", "url", "image_url")


def _text(content: Any, index: int, paths: list[Image], indices: list[int]) -> str:
    """The text of a turn's content, parts joined, an image part as its tag."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a turn {index} whose `content` is neither a text nor a list of parts")
    return "".join([_part(part, index, paths, indices) for part in content])


def _part(part: Any, index: int, paths: list[Image], indices: list[int]) -> str:
    # A table's export fills the keys that other parts have with null.
    known = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = known.pop("type", "text" if "text" in known else "image" if known.keys() & _IMAGE_PART_KEYS else None)
    if kind == "text" and isinstance(known.get("text"), str):
        text = known.pop("text")
    elif kind in ("image", "image_url"):
        text = IMAGE_TAG
        named = [path for key in _IMAGE_PART_KEYS if (path := _path_of_part(known.pop(key, None)))]
        number = known.pop("index", None)
        if len(named) > 1 or (number is not None and (type(number) is not int or number < 0)):
            raise ValueError(f"has an image part in turn {index} that names more than one image, or none")
        paths += named
        indices += [] if number is None or named else [number]
    else:
        raise ValueError(f"has a part in turn {index} that is neither a text nor an image")
    for key, value in known.items():
        if key not in NOTES and not is_empty(value):
            raise ValueError(f"has `{shown(key, 40)}` in a part of turn {index}, which is not followed; remove the key")
    return text


def _path_of_part(value: Any) -> str | None:
    """The path in an image part: a text, OpenAI's `{"url": ...}`, or a path whose bytes are not there."""
    if isinstance(value, dict) and value.keys() <= {"url", "detail"}:
        value = value.get("url")
    value = path_in(value)
    if value is None or isinstance(value, str):
        return value.removeprefix("file://") if value else None
    raise ValueError("has an image part whose image is no path; write it to a file and give its path")


def _check_parts(turns: Any, has_image: bool) -> None:
    """Refuse parts whose images or tags the text form could not tell apart."""
    contents = [turn["content"] for turn in turns if "content" in turn and isinstance(turn["content"], list)]
    if not contents:
        return
    parts = [part for content in contents for part in content]
    if has_image and any(IMAGE_TAG in (part.get("text") or "") for part in parts):
        raise ValueError(f"has a text part with {IMAGE_TAG} in it, beside its image")
    if not has_image and any(part.get("type", "text") != "text" for part in parts):
        raise ValueError("has an image part, but no image")
