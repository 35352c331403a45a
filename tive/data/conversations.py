"""A record's conversation in every spelling: LLaVA's form, those of other trainers, and the way between them.

| form | turns | images | system prompt | read by |
| --- | --- | --- | --- | --- |
| llava | `conversations`: `from`, `value` | `image`, a path | none: the template's own | LLaVA, this project |
| sharegpt | `conversations`: `from`, `value` | `images`, a list | `system`, a key | LLaMA-Factory, ms-swift |
| messages | `messages`: `role`, `content` | `images`, a list | a first turn | LLaMA-Factory, ms-swift |
| parts | `messages`, `content` a list of parts | `images`, a list | a first turn | TRL |

In the first three the tag `<image>` in the text marks where an image stands; in `parts` a part of type `image` does.
Either kind of turn is read under either key, with every name of a role in `_ROLES`. Of a record without both keys,
`texts` (The Cauldron, FineVision), `prompt` and `completion` (TRL) or a question with its answer (`_PAIRS`) are read;
their images stand before the first question. A key that is null or empty counts as absent. Every other key of a record
and of a turn is kept. Errors are a `ValueError` whose text goes on from the record's name.
"""

from __future__ import annotations

import re
from typing import Any

from tive.data.media import IMAGE_KEYS, IMAGE_TAG, Image, images_in, is_empty, path_in, plain_path
from tive.util.text import listed, shown, shown_value

FORMS = ("llava", "sharegpt", "messages", "parts")
ROLES = ("human", "gpt")
# Every name of a role that is known, and LLaVA's; a system turn is no turn of LLaVA's.
_ROLES = {"human": "human", "gpt": "gpt", "system": "system", "user": "human", "assistant": "gpt", "chatgpt": "gpt"}
_MESSAGE_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_LISTS = ("conversations", "messages")
# One question and its answer, each a text under a key of the record.
_PAIRS = (("question", "answer"), ("query", "response"), ("instruction", "output"))
# One of these is in every record that is read.
KEYS_OF_TURNS = (*_LISTS, "texts", "prompt", *(keys[0] for keys in _PAIRS))
# Keys of a turn that no trainer acts on.
NOTES = ("id", "source", "metadata", "model", "markdown", "timestamp")
_IMAGE_PART_KEYS = ("image", "path", "url", "image_url")
# <image 1>, <|image_pad|>, <start_of_image>, <Image>, <img>, <ImageHere>, [IMG] and others like them.
_OTHER_TAG = re.compile(
    r"(?-i:(?!<image>))(?:<[|/]?[a-z_]{0,16}(?:image|img)[^<>]{0,24}>|[\[{](?:image|img)[^\[\]{}]{0,8}[\]}])",
    re.IGNORECASE,
)


def to_llava(record: Any) -> dict[str, Any]:
    """A record of any form in LLaVA's; a `ValueError` where it is of none, or holds what LLaVA's has no place for.

    `image` is a path where there is one image, a list where there are more, and absent where there is none. A system
    turn becomes the key `system`, which LLaVA's trainer does not read.
    """
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    images = list(images_in(record))
    keys = _keys_of_turns(record)
    parts: list[tuple[str, Any]] = []
    turns = [_turn(turn, index, parts) for index, turn in enumerate(_raw_turns(record, keys))]
    if parts:
        images = _placed(images, parts)
    if images and keys[0] not in _LISTS and not any(IMAGE_TAG in turn["value"] for turn in turns):
        first = next((index for index, turn in enumerate(turns) if turn["from"] == "human"), None)
        if first is None:
            raise ValueError("has images and no question")
        turns[first] = turns[first] | {"value": IMAGE_TAG * len(images) + turns[first]["value"]}

    converted: dict[str, Any] = {}
    image = {"image": images[0] if len(images) == 1 else images} if images else {}
    for name, value in record.items():
        if name in keys:
            converted["conversations"] = turns
        elif name in IMAGE_KEYS:
            converted |= image  # where it stood
        elif name not in _LISTS and not (name == "system" and is_empty(value)):
            converted[name] = value
    converted |= image
    if parts:
        images_in(converted)  # theirs are to be paths too
    if turns and turns[0]["from"] == "system":
        if "system" in record:
            raise ValueError("has a system turn and a key `system`")
        if len(turns[0]) > 2:
            raise ValueError("has a system turn with more keys than its text")
        converted["system"] = turns.pop(0)["value"]
    if any(turn["from"] == "system" for turn in turns):
        raise ValueError("has a system turn that is not the first")
    return converted


def image_paths(conversation: dict[str, Any]) -> tuple[Image, ...]:
    """The images, paths below the image folder or the images themselves, of what `to_llava` returned."""
    images = conversation.get("image", [])
    return tuple(map(plain_path, images if isinstance(images, list) else [images]))


def images_of(record: Any) -> tuple[Image, ...]:
    """The paths of a record's images below the image folder, in any of the forms; a `ValueError` as of `to_llava`."""
    return image_paths(to_llava(record))


def image_of(record: dict[str, Any]) -> Image | None:
    """The path of a record's (first) image below the image folder, in any of the forms or none; None without one."""
    try:
        images = images_of(record)
    except ValueError:
        try:
            images = tuple(map(plain_path, images_in(record)))
        except ValueError:
            return None
    return next(iter(images), None)


def without_images(record: Any) -> dict[str, Any]:
    """A record in LLaVA's form without its images and their tags; a `ValueError` as of `to_llava`."""
    text_alone = {key: value for key, value in to_llava(record).items() if key != "image"}
    text_alone["conversations"] = [
        turn | {"value": turn["value"].replace(IMAGE_TAG, "").strip()} if IMAGE_TAG in turn["value"] else turn
        for turn in text_alone["conversations"]
    ]
    return text_alone


def placeholder_in(turns: list[dict[str, Any]]) -> str | None:
    """What stands for an image in the questions of records that were made for another model: `<image 1>`, say."""
    questions = (turn["value"] for turn in turns if turn["from"] == "human")
    return next((mark[0] for text in questions if (mark := _OTHER_TAG.search(text))), None)


def _keys_of_turns(record: dict[str, Any]) -> tuple[str, ...]:
    """The keys that hold a record's conversation: a list of turns, `texts`, a prompt and completion, or a pair."""
    filled = [key for key in _LISTS if key in record and not is_empty(record[key])]
    texts = record.get("texts")
    if filled and isinstance(texts, list) and any(isinstance(one, dict) and "assistant" in one for one in texts):
        filled.append("texts")
    if len(filled) > 1:
        raise ValueError(f"has both `{filled[0]}` and `{filled[1]}`; remove one of them")
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


def _raw_turns(record: dict[str, Any], keys: tuple[str, ...]) -> list[Any]:
    """The turns under `keys`, in either form of a turn."""
    if keys[0] in _LISTS and isinstance(record[keys[0]], list):
        return record[keys[0]]
    if keys in _PAIRS:
        for key in ("history", "input"):
            if not is_empty(record.get(key)):
                raise ValueError(f"has `{key}` beside `{keys[0]}`; write it into `conversations`")
        return [{"from": role, "value": record[key]} for role, key in zip(ROLES, keys, strict=True)]
    for key in keys:
        if not isinstance(record[key], list):
            raise ValueError(f"has `{key}` that are not a list of turns")
    turns = []
    if keys[0] == "prompt":  # TRL trains on the completion alone
        for turn in record["prompt"]:
            is_answer = isinstance(turn, dict) and _ROLES.get(str(turn.get("role") or turn.get("from"))) == "gpt"
            turns.append(turn | {"loss": False} if is_answer else turn)
        return turns + record["completion"]
    for entry in record["texts"]:
        if not isinstance(entry, dict):
            raise ValueError("has `texts` that are not a list of `user` and `assistant`")
        notes = {key: value for key, value in entry.items() if key not in ("user", "assistant")}
        # Last, so that no note stands for a text.
        turns += [notes | {"from": role, "value": entry.get(_MESSAGE_ROLES[role])} for role in ROLES]
    return turns


def _placed(images: list[Image], parts: list[tuple[str, Any]]) -> list[Image]:
    """A record's images, those of its own keys and those that its parts name by path or number, in the parts' order."""
    named = [image for kind, image in parts if kind == "image" and image is not None]  # paths, and numbers of images
    if images and any(isinstance(image, str) for image in named):
        raise ValueError("names its images twice: in `images` and in the parts of its turns")
    for image in named:
        if isinstance(image, int) and image >= len(images):
            raise ValueError(f"has an image part with `index` {image}, and {len(images)} images")
    images = [images[image] if isinstance(image, int) else image for image in named] or images
    if images and any(kind == "text" and IMAGE_TAG in text for kind, text in parts):
        raise ValueError(f"has a text part with {IMAGE_TAG} in it, beside its image")
    if not images and any(kind == "image" for kind, _ in parts):
        raise ValueError("has an image part, but no image")
    return images


def _turn(turn: Any, index: int, parts: list[tuple[str, Any]]) -> dict[str, Any]:
    """A turn of either form with `from` and `value`; the parts of its content are added to `parts`."""
    if not isinstance(turn, dict):
        raise ValueError(f"has a turn {index} that is not an object")
    is_message = "role" in turn or "content" in turn
    if is_message and ("from" in turn or "value" in turn):  # a table's export has keys of other rows, which are null
        is_message = is_empty(turn.get("from"))
        others = ("from", "value") if is_message else ("role", "content")
        if not all(is_empty(turn.get(name)) for name in others):
            raise ValueError(f"has a turn {index} with keys of both forms")
        turn = {name: value for name, value in turn.items() if name not in others}
    role_key, text_key = ("role", "content") if is_message else ("from", "value")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"has a turn {index} whose `{role_key}` {shown_value(role)} is none of {known}; rename it")
    if is_message and isinstance(text, list):
        first = len(parts)
        parts += [_part(part, index) for part in text]
        text = "".join([IMAGE_TAG if kind == "image" else value for kind, value in parts[first:]])
    if not isinstance(text, str):
        raise ValueError(f"has a turn {index} without a text `{text_key}`")
    if len(turn) == 2:  # nearly every turn
        return {"from": _ROLES[role], "value": text}
    renamed = {role_key: ("from", _ROLES[role]), text_key: ("value", text)}
    return dict(renamed.get(name, (name, value)) for name, value in turn.items())


def _part(part: Any, index: int) -> tuple[str, Any]:
    """A part of turn `index`: `text` and its text, or `image` and its path, its number, or None."""
    # A table's export fills the keys that other parts have with null.
    rest = {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else {}
    kind = rest.pop("type", "text" if "text" in rest else "image" if rest.keys() & _IMAGE_PART_KEYS else None)
    value: Any
    if kind == "text" and isinstance(rest.get("text"), str):
        value = rest.pop("text")
    elif kind in ("image", "image_url"):
        kind, values = "image", [rest.pop(key, None) for key in _IMAGE_PART_KEYS]
        # OpenAI's object, then one of a path whose bytes are not there.
        values = [
            one.get("url") if isinstance(one, dict) and one.keys() <= {"url", "detail"} else one for one in values
        ]
        named = [one for one in map(path_in, values) if one not in (None, "")]
        number = rest.pop("index", None)
        if not all(isinstance(path, str) for path in named):
            raise ValueError("has an image part whose image is no path; write it to a file and give its path")
        if len(named) > 1 or (number is not None and (type(number) is not int or number < 0)):
            raise ValueError(f"has an image part in turn {index} that names more than one image, or none")
        value = named[0].removeprefix("file://") if named else number
    else:
        raise ValueError(f"has a part in turn {index} that is neither a text nor an image (type {shown_value(kind)})")
    for key, other in rest.items():
        if key not in NOTES and not is_empty(other):
            raise ValueError(f"has `{shown(key, 40)}` in a part of turn {index}, which is not followed; remove the key")
    return kind, value


def from_llava(record: dict[str, Any], form: str) -> dict[str, Any]:
    """A record as `to_llava` returns it, in one of `FORMS`; a `ValueError` where a turn has keys of both forms."""
    if form == "llava":
        return record
    images, converted = list(images_in(record)), dict[str, Any]()
    messages: list[dict[str, Any]] = []
    for name, value in record.items():
        if name == "image":
            converted["images"] = images
        elif name != "conversations" or form == "sharegpt":
            converted[name] = value
        else:
            converted["messages"] = messages
            for index, turn in enumerate(value):
                if "role" in turn or "content" in turn:
                    raise ValueError(f"has a turn {index} with keys of both forms")
                renamed = {"from": ("role", _MESSAGE_ROLES[turn["from"]]), "value": ("content", turn["value"])}
                messages.append(dict(renamed.get(name, (name, value)) for name, value in turn.items()))
    if form == "sharegpt":
        return converted
    if isinstance(converted.get("system"), str):
        messages.insert(0, {"role": "system", "content": converted.pop("system")})
    if form == "parts":
        for message in messages:
            parts: list[dict[str, str]] = []
            # The tag of a record without an image is only text.
            for index, piece in enumerate(message["content"].split(IMAGE_TAG) if images else [message["content"]]):
                parts += [{"type": "image"}] if index else []
                parts += [{"type": "text", "text": piece}] if piece else []
            message["content"] = parts or [{"type": "text", "text": ""}]
    return converted
