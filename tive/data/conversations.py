"""LLaVA's form of a record, and the forms that other trainers read; each converts to LLaVA's and back.

| form | turns | images | system prompt | read by |
| --- | --- | --- | --- | --- |
| llava | `conversations`: `from`, `value` | `image`, a path | none: the template's own | LLaVA, this project |
| sharegpt | `conversations`: `from`, `value` | `images`, a list | `system`, a key | LLaMA-Factory, ms-swift |
| messages | `messages`: `role`, `content` | `images`, a list | a first turn | LLaMA-Factory, ms-swift |
| parts | `messages`, `content` a list of parts | `images`, a list | a first turn | TRL |

In the first three the tag `<image>` in the text marks where an image stands; in `parts` a part of type `image` does.
Turns with `from` and `value` are read under `messages` too, and `role` and `content` under `conversations`, with every
name of a role in `_ROLES`. Every other key of a record and of a turn is kept as it is. Errors are a `ValueError` whose
text goes on from the record's name.
"""

from __future__ import annotations

from typing import Any

from tive.data.media import IMAGE_TAG, media_of, plain_path
from tive.util.text import shown_value

ROLES = ("human", "gpt")
# What other trainers call LLaVA's roles.
OTHER_ROLE_NAMES = {"user": "human", "assistant": "gpt", "chatgpt": "gpt"}
FORMS = ("llava", "sharegpt", "messages", "parts")
# Every name of a role that is known, and LLaVA's; a system turn is no turn of LLaVA's.
_ROLES = {"human": "human", "gpt": "gpt", "system": "system", **OTHER_ROLE_NAMES}
_MESSAGE_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


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
    key = "messages" if "messages" in record else "conversations"
    if not isinstance(record[key], list):
        raise ValueError(f"has `{key}` that are not a list of turns")
    images = _images(record)
    paths: list[str] = []
    turns = [_turn(turn, index, paths, key) for index, turn in enumerate(record[key])]
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
        _images(converted)
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
            converted["messages"] = [_as_message(turn, index) for index, turn in enumerate(value)]
    if form == "sharegpt":
        return converted
    if isinstance(converted.get("system"), str):
        converted["messages"].insert(0, {"role": "system", "content": converted.pop("system")})
    if form == "parts":
        for message in converted["messages"]:
            message["content"] = _parts(message["content"], has_image=bool(images))
    return converted


def form_problem(record: Any) -> str | None:
    """What keeps a record from being read by any trainer that is known here; None when nothing does.

    LLaVA's form with one image and no system turn has to be what LLaVA's trainer takes (`problem_of`); any other has to
    be one that `to_llava` reads. Which of them a model reads is asked where the model is known.
    """
    problem = problem_of(record)
    if problem is None or not isinstance(record, dict):
        return problem
    turns = record.get("conversations")
    with_system = isinstance(turns, list) and turns and isinstance(turns[0], dict) and turns[0].get("from") == "system"
    if "messages" not in record and not with_system and len(media_of(record).images) < 2:
        return problem
    try:
        to_llava(record)
    except ValueError as other:
        return str(other)
    return None


def images_of(record: dict[str, Any]) -> tuple[str, ...]:
    """The paths of a record's images below the image folder, in any of the forms.

    Raises:
        ValueError: as `to_llava`.
    """
    # Only the parts of messages name images in a place of their own.
    return tuple(plain_path(image) for image in _images(to_llava(record) if "messages" in record else record))


def answers_in(record: Any) -> int:
    """How many turns of a record answer another one; 0 for what is no record."""
    turns = record.get("conversations") if isinstance(record, dict) else None
    roles = [turn.get("from") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    return sum(role in ("gpt", "assistant") for role in roles[1:])


def is_unanswered(record: dict[str, Any]) -> bool:
    """Whether a record without a problem ends with the user's turn."""
    turns = record.get("conversations") or record["messages"]
    return turns[-1].get("from", turns[-1].get("role")) in ("human", "user")


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


def _turn(turn: Any, index: int, paths: list[str], key: str) -> dict[str, Any]:
    """A turn of `key` (`conversations` or `messages`) with `from` and `value`; the images that its parts name are added
    to `paths`."""
    if not isinstance(turn, dict):
        raise ValueError(f"has a turn {index} that is not an object")
    is_message, is_turn = "role" in turn or "content" in turn, "from" in turn or "value" in turn
    if key == "messages" and is_message and is_turn:
        raise ValueError(f"has a turn {index} with keys of both forms")
    is_message = is_message and not is_turn
    role_key, text_key = ("role", "content") if is_message else ("from", "value")
    role, text = turn.get(role_key), turn.get(text_key)
    if not isinstance(role, str) or role not in _ROLES:
        known = ", ".join(_ROLES)
        raise ValueError(f"has a turn {index} whose `{role_key}` {shown_value(role)} is none of {known}; rename it")
    if is_message:
        text = _text(text, index, paths)
    elif not isinstance(text, str):
        raise ValueError(f"has a turn {index} without a text `value`")
    renamed = {role_key: ("from", _ROLES[role]), text_key: ("value", text)}
    return dict(renamed.get(name, (name, value)) for name, value in turn.items())


def _as_message(turn: dict[str, Any], index: int) -> dict[str, Any]:
    if "role" in turn or "content" in turn:
        raise ValueError(f"has a turn {index} with keys of both forms")
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
    for index, piece in enumerate(text.split(IMAGE_TAG) if has_image else [text]):
        parts += [{"type": "image"}] if index else []
        parts += [{"type": "text", "text": piece}] if piece else []
    return parts or [{"type": "text", "text": ""}]


def _text(content: Any, index: int, paths: list[str]) -> str:
    """The text of a turn's content, parts joined, an image part as its tag."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"has a turn {index} whose `content` is neither a text nor a list of parts")
    pieces = []
    for part in content:
        # A table's export fills the keys that other parts have with null.
        known = {name: value for name, value in part.items() if value is not None} if isinstance(part, dict) else {}
        kind = known.pop("type", None)
        path = _path_of_part(known.get(kind)) if kind in ("image", "image_url") else None
        if kind == "text" and known.keys() == {"text"} and isinstance(known["text"], str):
            pieces.append(known["text"])
        elif (kind == "image" and not known) or (path and known.keys() == {kind}):
            pieces.append(IMAGE_TAG)
            paths += [path] if path else []
        else:
            raise ValueError(f"has a part in turn {index} that is neither a text nor an image by its path")
    return "".join(pieces)


def _path_of_part(value: Any) -> str | None:
    """The path in an image part: a text, or OpenAI's `{"url": ...}`; None where it holds something else."""
    if isinstance(value, dict) and value.keys() <= {"url", "detail"}:
        value = value.get("url")
    return value.removeprefix("file://") if isinstance(value, str) else None


def _check_parts(turns: list[dict[str, Any]], has_image: bool) -> None:
    """Refuse parts whose images or tags the text form could not tell apart."""
    contents = [turn["content"] for turn in turns if isinstance(turn.get("content"), list)]
    parts = [part for content in contents for part in content]
    if has_image and any(IMAGE_TAG in part["text"] for part in parts if part["type"] == "text"):
        raise ValueError(f"has a text part with {IMAGE_TAG} in it, beside its image")
    if not has_image and any(part["type"] == "image" for part in parts):
        raise ValueError("has an image part, but no image")


def problem_of(record: Any) -> str | None:
    """What keeps LLaVA from training on a record, in the words that follow its name; None when nothing does.

    Checked: `conversations` is a list of turns with `from` and `value`, the roles are known and alternate (a leading
    `gpt` turn is allowed: it is dropped with what it holds), one image at most and no other medium, and the image's
    tag in one turn at most. A problem with a remedy of its own names it after a semicolon.
    """
    if not isinstance(record, dict):
        return "is not an object"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "has no `conversations`" if turns is None else "has `conversations` that are not a list of turns"
    for index, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"has a turn {index} without a text `value`"
        role, text = turn.get("from"), turn["value"]
        if role not in ROLES:
            return unknown_role(role, index)
        if not text.isascii() and not is_unicode(text):
            return f"has text in turn {index} that is not valid Unicode"
    first = 1 if turns[0]["from"] == "gpt" else 0
    if first == len(turns):
        return "has no human turn"
    tagged = 0
    for index, turn in enumerate(turns[first:]):
        if turn["from"] != ROLES[index % 2]:
            return f"has two {turn['from']} turns in a row (turn {index + first})"
        tagged += IMAGE_TAG in turn["value"]
    media = media_of(record)
    if media.problem:
        return media.problem
    if len(media.images) > 1:
        return f"has {len(media.images)} images, and one is supported"
    if "image" in record and not media.images:
        return "has an `image` that is neither a path nor a list of one path; remove the key where there is no image"
    if media.images and tagged > 1:
        return f"has {IMAGE_TAG} in {tagged} turns and one image"
    return None


def unknown_role(role: Any, index: int) -> str:
    """The problem of a record whose turn `index` has a role that LLaVA does not know."""
    problem = f"has an unknown role {shown_value(role)} in turn {index} (known: {', '.join(ROLES)})"
    if isinstance(role, str) and role in OTHER_ROLE_NAMES:
        return problem + "; convert the data with scripts/convert_data.py (to llava)"
    return problem


def with_remedy(problem: str) -> str:
    """A problem with what to do about it, where it does not say so itself."""
    return problem if ";" in problem else f"{problem}; repair or remove it"


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes can hold half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
