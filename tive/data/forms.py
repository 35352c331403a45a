"""Records in the forms that other trainers read, from LLaVA's (the table of `tive.data.conversations`)."""

from __future__ import annotations

from typing import Any

from tive.data.conversations import images_in
from tive.data.media import IMAGE_TAG

FORMS = ("llava", "sharegpt", "messages", "parts")
_MESSAGE_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


def from_llava(record: dict[str, Any], form: str, image_list: bool = False) -> dict[str, Any]:
    """A record as `to_llava` returns it, in one of `FORMS`.

    Args:
        image_list: the form `llava` gets `image` as a list, also where there is one.

    Raises:
        ValueError: a turn has a key that the form uses for something else.
    """
    images = images_in(record)
    if form == "llava":
        return {**record, "image": images} if images and image_list else record
    converted: dict[str, Any] = {}
    for name, value in record.items():
        if name == "image":
            converted["images"] = images
        elif name != "conversations" or form == "sharegpt":
            converted[name] = value
        else:
            converted["messages"] = [_as_message(turn, index) for index, turn in enumerate(value)]
    if form == "sharegpt":
        return converted
    if isinstance(converted.get("system"), str):
        converted["messages"].insert(0, {"role": "system", "content": converted.pop("system")})
    if form == "parts":
        for message in converted["messages"]:
            message["content"] = _as_parts(message["content"], has_image=bool(images))
    return converted


def count_tags(record: dict[str, Any]) -> tuple[int, int]:
    """How many `<image>` tags and how many images a record has, in the form that `to_llava` returns."""
    return sum(turn["value"].count(IMAGE_TAG) for turn in record["conversations"]), len(images_in(record))


def _as_message(turn: dict[str, Any], index: int) -> dict[str, Any]:
    if "role" in turn or "content" in turn:
        raise ValueError(f"has a turn {index} with keys of both forms")
    renamed = {"from": ("role", _MESSAGE_ROLES[turn["from"]]), "value": ("content", turn["value"])}
    return dict(renamed.get(name, (name, value)) for name, value in turn.items())


def _as_parts(text: str, has_image: bool) -> list[dict[str, str]]:
    """A text as TRL's parts. The tag of a record without an image is only text."""
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]
