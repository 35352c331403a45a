"""What a record's gradient depends on, as one short hash: its turns, system prompt and images, in whatever form."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec

from tive.data.conversations import image_paths, to_llava

HASH_BYTES = 16
_encode = msgspec.json.Encoder(order="sorted").encode


def record_hash(record: Any) -> bytes:
    """128 bits of a record's turns, system prompt and images; `HASH_BYTES` long.

    Two records have the same hash where a trainer sees the same in both: the form (`to_llava`), the order of keys,
    the spelling of a path, ids, tasks and other keys play no part. A record of no known form is hashed whole.
    """
    try:
        converted = to_llava(record)
    except ValueError:
        return _digest(["unknown form", record])
    # A system prompt that is null or empty is none.
    return _digest([converted["conversations"], converted.get("system") or "", image_paths(converted)])


def _digest(content: Any) -> bytes:
    try:
        encoded = _encode(content)
    except (UnicodeEncodeError, RecursionError):
        encoded = repr(content).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(encoded, digest_size=HASH_BYTES).digest()
