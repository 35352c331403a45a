"""Find and read the images of records, trusting neither the path nor the file."""

from __future__ import annotations

import os
import warnings
from functools import lru_cache

from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG", ".GIF")


class BadImage(Exception):
    """Why an image cannot be used; the text is the reason."""


def path_of(folder: str, image: str) -> str:
    """Where a record's image should lie.

    Raises:
        BadImage: the path leaves the image folder (`..`, an absolute path) or is no path at all.
    """
    root = os.path.normpath(folder)
    path = os.path.normpath(os.path.join(root, image))
    if "\0" in image:
        raise BadImage("image path holds a NUL byte")
    if root != "." and os.path.commonpath([os.path.abspath(root), os.path.abspath(path)]) != os.path.abspath(root):
        raise BadImage("image path leaves the image folder")
    if root == "." and (os.path.isabs(path) or path.startswith("..")):
        raise BadImage("image path leaves the image folder")
    return path


def find_image(folder: str, image: str) -> str:
    """Path of a record's image file; one with another extension stands in for one that is not there (LLaVA issue 593).

    Raises:
        BadImage: as `path_of`, or there is no such file.
    """
    path = path_of(folder, image)
    if os.path.isfile(path):
        return path
    for name in sorted(other_names(path)):
        other = os.path.join(os.path.dirname(path), name)
        if os.path.isfile(other):
            return other
    raise BadImage("missing image")


def other_names(path: str) -> frozenset[str]:
    """File names that an image may have when its extension is not the one in the data."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return frozenset(stem + extension for extension in EXTENSIONS)


def open_image(path: str) -> Image.Image:
    """Read an image whole, as RGB.

    Raises:
        BadImage: it is empty, truncated, no image, or unreasonably large.
    """
    try:
        with warnings.catch_warnings():
            # Above PIL's limit an image is a decompression bomb until shown otherwise.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                return image.convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"unreadable image: above {Image.MAX_IMAGE_PIXELS} pixels") from error
    except Exception as error:  # PIL's decoders raise many kinds
        reason = str(error).replace(str(path), "the file").splitlines()
        raise BadImage(f"unreadable image: {reason[0] if reason else type(error).__name__}") from error


@lru_cache(maxsize=4096)
def names_in(folder: str) -> frozenset[str]:
    """File names of a folder; empty when it is not there. One listing answers for thousands of records."""
    try:
        return frozenset(entry.name for entry in os.scandir(folder))
    except OSError:
        return frozenset()
