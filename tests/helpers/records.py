"""Values that are records, nearly records, or nothing like one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from tive.data.media import IMAGE_KEYS, OTHER_IMAGE_KEYS, OTHER_MEDIA_KEYS


def turn(role: str, value: Any) -> dict[str, Any]:
    return {"from": role, "value": value}


def record_with(*turns: tuple[str, Any], **keys: Any) -> dict[str, Any]:
    return {"id": "a", "conversations": [turn(role, text) for role, text in turns], **keys}


GOOD_TURNS = (("human", "<image>\nWhere?"), ("gpt", "There."))
RECORDS: list[dict[str, Any]] = [
    {"id": "a", "image": "coco/1.jpg", "conversations": [turn("human", "<image>\nWhere?"), turn("gpt", "Là-bas.")]},
    {"id": 7, "conversations": [turn("human", "你好 \U0001f680"), turn("gpt", "é\u2028\n")], "dataset": "日本"},
    {
        "id": "lone \ud800",
        "conversations": [turn("human", "x"), turn("gpt", "y")],
        "extra": {"deep": [1.50, None, True]},
    },
]


def write(path: Path, content: bytes | str) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
MEDIA = st.dictionaries(
    st.sampled_from(IMAGE_KEYS + OTHER_IMAGE_KEYS + OTHER_MEDIA_KEYS),
    st.sampled_from(["a.jpg", "./coco/1.jpg", ["a.jpg"], ["a", "b"], "data:image/png;base64,AA", "http://a/b.jpg"])
    | JSON_VALUES,
    max_size=2,
)
_TURNS = st.fixed_dictionaries(
    {},
    optional={"from": st.sampled_from(["human", "gpt", "system", "user"]) | JSON_VALUES, "value": JSON_VALUES},
)
NEAR_RECORDS = st.builds(
    lambda record, media: {**record, **media},
    st.fixed_dictionaries(
        {},
        optional={
            "id": JSON_VALUES,
            "image": st.text(max_size=8) | JSON_VALUES,
            "conversations": st.lists(_TURNS, max_size=4) | JSON_VALUES,
            "dataset": st.text(max_size=8) | JSON_VALUES,
        },
    ),
    MEDIA,
)
