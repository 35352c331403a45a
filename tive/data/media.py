"""Which media a record has: the one place that knows the keys and the forms in which public data name them."""

from __future__ import annotations

import os
import re
from functools import lru_cache
from typing import Any, NamedTuple

from tive.util.text import shown

IMAGE_TAG = "<image>"
# The keys that are read; a list of one path under either is that path.
IMAGE_KEYS = ("image", "images")
# The same picture in another spelling. Beside a picture under `image` or `images` they are notes on it.
OTHER_IMAGE_KEYS = (
    *("image_path", "image_paths", "image_file", "image_files", "image_name", "image_list"),
    *("image_url", "image_urls", "image_bytes", "image_base64", "image_base64_str"),
    *("img", "imgs", "img_path", "img_paths", "img_url", "img_urls"),
    *("photo", "photos", "picture", "pictures", "pixel_values"),
)
OTHER_MEDIA_KEYS = (
    *("video", "videos", "video_path", "video_paths", "video_file", "video_files", "video_url", "video_list"),
    *("video_frames", "frames", "speech", "sound"),
    *("audio", "audios", "audio_path", "audio_paths", "audio_file", "audio_url"),
)
_MEDIA_KEYS = frozenset(IMAGE_KEYS + OTHER_IMAGE_KEYS + OTHER_MEDIA_KEYS)
# A file of one of these kinds under any key is a medium where a record names no other.
_MEDIA_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".heic"),
    *(".mp4", ".avi", ".mov", ".mkv", ".webm", ".mp3", ".wav", ".flac", ".ogg", ".m4a"),
)
# No system opens a longer path; what is longer is a file's content.
_LONGEST_PATH = 4096
_NOTHING: tuple[Any, ...] = ("", [], {})


class StoredImage(NamedTuple):
    """An image whose bytes lie in its record's row.

    Attributes:
        name: its path, or the file, row and number that it is found by.
        content: its bytes; None where all records are gone through, which leaves them on disk.
    """

    name: str
    content: bytes | None


# A path below the image folder, or the image itself.
Image = str | StoredImage


def images_in(record: dict[str, Any]) -> tuple[Image, ...]:
    """The images that a record's own keys name, as it writes them; a `ValueError` where a medium is not read.

    A null or empty value is no medium. The error's text names the key and the remedy, goes on from the record's name
    (`has a video ...`) and holds nothing of the value: many records share it.
    """
    keys = _media_keys(tuple(record))
    image = record["image"] if keys == ("image",) else None
    if type(image) is str and image and _path_problem(image) is None:  # nearly every record's
        return (image,)
    keys = tuple(key for key in keys if record[key] is not False and not is_empty(path_in(record[key])))
    named = []
    for key in keys:
        if key.lower() in OTHER_MEDIA_KEYS:
            raise ValueError(f"has media under `{key}`, and only images are read; remove it, or the key if it is none")
        if key in IMAGE_KEYS:
            entries = [path_in(entry) for entry in (record[key] if isinstance(record[key], list) else [record[key]])]
            for problem in filter(None, map(_path_problem, entries)):
                raise ValueError(f"has an `{key}` that {problem}")
            named.append(tuple(entries))
    if len(set(named)) > 1:
        raise ValueError("names different images under `image` and `images`; keep one of the two keys")
    if named:
        return named[0]
    if keys:
        raise ValueError(f"has its image under `{keys[0]}`, which is not read; give its path under `image`")
    for key, value in record.items():
        if key != "id" and _names_media(value):
            told = "which is not read; give an image's path under `image`, or remove the key"
            raise ValueError(f"names a media file under `{shown(key, 40)}`, {told}")
    return ()


@lru_cache(maxsize=4096)
def _media_keys(keys: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(key for key in keys if key.lower() in _MEDIA_KEYS)


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, an empty text, list or object, or a list of these."""
    if isinstance(value, list):
        return all(entry is None or entry in _NOTHING for entry in value)
    return value is None or (not value and value in _NOTHING)


def path_in(value: Any) -> Any:
    """The path of an image that is an object, `{"bytes": null, "path": ...}` or `{"path": ..., "width": ...}`, without
    its bytes; any other value as it is."""
    is_image = isinstance(value, dict) and ("path" in value or value.keys() <= {"bytes"})
    if is_image and is_empty(value.get("bytes")):
        return value.get("path")
    return value


def _names_media(value: Any) -> bool:
    """Whether a value is a path to a media file, or a list that begins with one; a text with white space is prose."""
    if isinstance(value, list):
        return bool(value) and not isinstance(value[0], list) and _names_media(value[0])
    return isinstance(value, str) and value[-5:].lower().endswith(_MEDIA_ENDINGS) and len(value.split(maxsplit=1)) == 1


def _path_problem(entry: Any) -> str | None:
    if isinstance(entry, StoredImage):
        return None
    if isinstance(entry, dict):
        return "is an object; write the image to a file and give its path"
    if not isinstance(entry, str) or not entry:
        return "is neither a path nor a list of paths; give the path of its file"
    if entry.startswith("data:") or len(entry) > _LONGEST_PATH:
        return "holds the image itself; write it to a file and give its path"
    if entry.startswith("file://"):
        return "is a file:// address; give the path below the image folder"
    if "://" in entry and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", entry):
        return "is an address; download the image and give its path"
    return None


def plain_path(image: Image) -> Image:
    """An image's path as it is opened below the image folder: `./coco//1.jpg` is `coco/1.jpg`."""
    return os.path.normpath(image) if isinstance(image, str) else image


def name_of_image(image: Image) -> str:
    return image if isinstance(image, str) else image.name
