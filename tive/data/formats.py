"""LLaVA's form of a record, and the forms that other trainers read; each converts to LLaVA's and back.

| form | turns | images | system prompt | read by |
| --- | --- | --- | --- | --- |
| llava | `conversations`: `from`, `value` | `image`, a path | none: the template's own | LLaVA, this project |
| sharegpt | `conversations`: `from`, `value` | `images`, a list | `system`, a key | LLaMA-Factory, ms-swift |
| messages | `messages`: `role`, `content` | `images`, a list | a first turn | LLaMA-Factory, ms-swift |
| parts | `messages`, `content` a list of parts | `images`, a list | a first turn | TRL |

In the first three the tag `<image>` in the text marks an image's place; in `parts` a part of type `image` does. Every
other key of a record and of a turn is kept as it is. Errors are a `ValueError` whose text goes on from the record's
name.
"""

from __future__ import annotations

from typing import Any

from tive.data.media import IMAGE_TAG, media_of, plain_path

FORMS = ("llava", "sharegpt", "messages", "parts")
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}
_MESSAGE_ROLES = {role: name for name, role in _ROLES.items()}


def to_llava(record: Any) -> dict[str, Any]:
    """A record of any form in LLaVA's. A system turn becomes the key `system`, which LLaVA's trainer does not read.

    `image` is a path where there is one image, a list where there are more, and absent where there is none.

    Raises:
        ValueError: the record is of none of the forms, or holds what LLaVA's has no place for.
    """
    if not isinstance(record, dict):
        raise ValueError("is not an object")
    if ("messages" in record) == ("conversations" in record):
        raise ValueError("must have either `conversations` or `messages`")
    if "image" in record and "images" in record:
        raise ValueError("has both `image` and `images`")
    key = "messages" if "messages" in record else "conversations"
    if not isinstance(record[key], list):
        raise ValueError(f"has `{key}` that are not a list of turns")
    images = _images(record)
    read = _message if key == "messages" else _turn
    paths: list[str] = []
    turns = [read(turn, number, paths) for number, turn in enumerate(record[key])]
    if paths and images:
        raise ValueError("names its images twice: in `images` and in the parts of its turns")
    images = images or paths
    _check_parts(record[key], has_image=bool(images))

    converted: dict[str, Any] = {}
    for name, value in record.items():
        if name == key:
            converted["conversations"] = turns
        elif name not in ("image", "images"):
            converted[name] = value
        elif images:
            converted["image"] = _image_value(images)
    if images:
        converted["image"] = _image_value(images)
    _move_system(converted)
    return converted


def from_llava(record: dict[str, Any], form: str, image_list: bool = False) -> dict[str, Any]:
    """A record as `to_llava` returns it, in one of `FORMS`.

    Args:
        image_list: the form `llava` gets `image` as a list, also where there is one.

    Raises:
        ValueError: a turn has a key that the form uses for something else.
    """
    images = _images(record)
    if form == "llava":
        return {**record, "image": images} if images and image_list else record
    converted: dict[str, Any] = {}
    for name, value in record.items():
        if name == "image":
            converted["images"] = images
        elif name != "conversations" or form == "sharegpt":
            converted[name] = value
        else:
            converted["messages"] = [_as_message(turn, number) for number, turn in enumerate(value)]
    if form == "sharegpt":
        return converted
    if isinstance(converted.get("system"), str):
        converted["messages"].insert(0, {"role": "system", "content": converted.pop("system")})
    if form == "parts":
        for message in converted["messages"]:
            message["content"] = _parts(message["content"], has_image=bool(images))
    return converted


def images_of(record: dict[str, Any]) -> tuple[str, ...]:
    """The paths of a record's images below the image folder, in any of the forms.

    Raises:
        ValueError: as `to_llava`.
    """
    # Only the parts of messages name images in a place of their own.
    return tuple(plain_path(image) for image in _images(to_llava(record) if "messages" in record else record))


def count_tags(record: dict[str, Any]) -> tuple[int, int]:
    """How many `<image>` tags and how many images a record has, in the form that `to_llava` returns."""
    return sum(turn["value"].count(IMAGE_TAG) for turn in record["conversations"]), len(_images(record))


def _images(record: dict[str, Any]) -> list[str]:
    media = media_of(record)
    if media.problem:
        raise ValueError(media.problem)
    return list(media.images)


def _image_value(images: list[str]) -> str | list[str]:
    return images[0] if len(images) == 1 else images


def _turn(turn: Any, number: int, paths: list[str]) -> dict[str, Any]:
    """A turn of `conversations`, checked."""
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
        raise ValueError(f"has a turn {number} without a text `value`")
    if turn.get("from") not in _MESSAGE_ROLES:
        raise ValueError(f"has a turn {number} whose `from` is none of {', '.join(_MESSAGE_ROLES)}")
    return turn


def _message(message: Any, number: int, paths: list[str]) -> dict[str, Any]:
    """A turn of `messages` as one of `conversations`; the images that its parts name are added to `paths`."""
    if not isinstance(message, dict) or message.get("role") not in tuple(_ROLES):
        raise ValueError(f"has a turn {number} whose `role` is none of {', '.join(_ROLES)}")
    if "from" in message or "value" in message:
        raise ValueError(f"has a turn {number} with keys of both forms")
    text = _text(message.get("content"), number, paths)
    renamed = {"role": ("from", _ROLES[message["role"]]), "content": ("value", text)}
    return dict(renamed.get(name, (name, value)) for name, value in message.items())


def _as_message(turn: dict[str, Any], number: int) -> dict[str, Any]:
    if "role" in turn or "content" in turn:
        raise ValueError(f"has a turn {number} with keys of both forms")
    renamed = {"from": ("role", _MESSAGE_ROLES[turn["from"]]), "value": ("content", turn["value"])}
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


def _parts(text: str, has_image: bool) -> list[dict[str, str]]:
    """A text as TRL's parts. The tag of a record without an image is only text."""
    parts: list[dict[str, str]] = []
    for number, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]


def _text(content: Any, number: int, paths: list[str]) -> str:
    """The text of a turn's content, parts joined, an image part as its tag."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a turn {number} whose `content` is neither a text nor a list of parts")
    pieces = []
    for part in content:
        # A table's export fills the keys that other parts have with null.
        known = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = known.pop("type", None)
        if kind == "text" and known.keys() == {"text"} and isinstance(known["text"], str):
            pieces.append(known["text"])
        elif kind == "image" and not known:
            pieces.append(IMAGE_TAG)
        elif kind == "image" and known.keys() == {"image"} and isinstance(known["image"], str) and known["image"]:
            pieces.append(IMAGE_TAG)
            paths.append(known["image"])
        else:
            raise ValueError(f"has a part in turn {number} that is neither a text nor an image by its path")
    return "".join(pieces)


def _check_parts(turns: list[dict[str, Any]], has_image: bool) -> None:
    """Refuse parts whose images or tags the text form could not tell apart."""
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    parts = [part for content in contents for part in content]
    if has_image and any(IMAGE_TAG in part["text"] for part in parts if part["type"] == "text"):
        raise ValueError(f"has a text part with {IMAGE_TAG} in it, beside its image")
    if not has_image and any(part["type"] == "image" for part in parts):
        raise ValueError("has an image part, but no image")
