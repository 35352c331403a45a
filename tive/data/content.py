"""What a record's gradient depends on, as one short hash: its turns, system prompt and images, in whatever form."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from tive.data.conversations import images_of, to_llava
from tive.data.media import plain_path

HASH_BYTES = 16
_encode = msgspec.json.Encoder(order="sorted").encode
_PLAIN_ROLES = ("human", "gpt")


def record_hash(record: Any) -> bytes:
    """128 bits of a record's turns, system prompt and images; `HASH_BYTES` long.

    Two records have the same hash where a trainer sees the same in both: the form (`to_llava`), the order of keys,
    the spelling of a path, ids, tasks and other keys play no part. A record of no known form is hashed whole.
    """
    try:
        if _is_plain(record):
            turns, paths = record["conversations"], list(images_of(record))
        else:
            record = to_llava(record)
            turns, images = record["conversations"], record.get("image", [])
            paths = [plain_path(image) for image in ([images] if isinstance(images, str) else images)]
        # A system prompt that is null or empty is none.
        content = [turns, record.get("system") or "", paths]
    except ValueError:
        content = ["unknown form", record]
    try:
        encoded = _encode(content)
    except (UnicodeEncodeError, RecursionError):
        encoded = repr(content).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()


def _is_plain(record: Any) -> bool:
    """Whether a record's turns are as `to_llava` would return them; most are, and it takes a third of the time."""
    turns = record.get("conversations") if isinstance(record, dict) and "messages" not in record else None
    if not isinstance(turns, list):
        return False
    for turn in turns:
        if not isinstance(turn, dict) or len(turn) != 2 or turn.get("from") not in _PLAIN_ROLES:
            return False
        if not isinstance(turn.get("value"), str):
            return False
    return True
