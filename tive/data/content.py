"""What a record's gradient depends on, as one short hash: its turns, system prompt and images, in whatever form."""

from __future__ import annotations

import hashlib
from typing import Any

import msgspec
import numpy as np

from tive.data.conversations import image_paths, to_llava
from tive.data.media import Image, is_empty
from tive.data.records import Records, whole_records
from tive.data.trained import plain_images

HASH_BYTES = 16
_encode = msgspec.json.Encoder(order="sorted").encode


def record_hash(record: Any) -> bytes:
    """128 bits of a record's turns, system prompt and images; `HASH_BYTES` long.

    Two records have the same hash where a trainer sees the same in both: the form (`to_llava`), the order of keys,
    the spelling of a path, ids, tasks and other keys play no part. An image counts by its path, or by its bytes where
    they lie in the record (`StoredImage`; by its name where they were left on disk). A record of no known form is
    hashed whole.
    """
    try:
        images = plain_images(record)
        content = _content(to_llava(record)) if images is None else [record["conversations"], "", images]
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


def _content(conversation: dict[str, Any]) -> list[Any]:
    """What counts of a record as `to_llava` returns it. A system prompt that is null or empty is none."""
    system, images = conversation.get("system"), [_image(image) for image in image_paths(conversation)]
    return [conversation["conversations"], "" if is_empty(system) else system, images]


def _image(image: Image) -> str | list[str]:
    if isinstance(image, str):
        return image
    if image.content is None:
        return ["name", image.name]
    return ["bytes", hashlib.blake2b(image.content, digest_size=HASH_BYTES).hexdigest()]
