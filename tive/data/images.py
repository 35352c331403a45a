"""Find and read the images of records, trusting neither the path nor the file."""

from __future__ import annotations

import os
import stat
import warnings
from functools import lru_cache

from PIL import Image, UnidentifiedImageError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".JPG", ".JPEG", ".PNG", ".GIF", ".WEBP", ".BMP")
# Formats whose readers run no other program, as the one of PostScript does.
_FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000")
# Pillow warns above 89 million pixels and refuses above 179 million; LLaVA's trainer takes what is only warned of.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency")


class BadImage(Exception):
    """Why an image cannot be used; the text is the reason."""


def path_of(folder: str, image: str) -> str:
    """Where a record's image should lie.

    Raises:
        BadImage: the path leaves the image folder (`..`, an absolute path).
    """
    inside = os.path.normpath(image)
    if os.path.isabs(inside):
        leaves = not inside.startswith(os.path.join(os.path.abspath(folder), ""))
    else:
        leaves = inside == ".." or inside.startswith("../")
    if leaves:
        raise BadImage("image path leaves the image folder")
    return os.path.join(folder, inside)


def find_image(folder: str, image: str) -> str:
    """Path of a record's image file; one with another extension stands in for one that is not there (LLaVA issue 593).

    Raises:
        BadImage: as `path_of`, or there is no such file, or it is empty.
    """
    path = path_of(folder, image)
    try:
        found = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        others = other_names(path) & names_in(os.path.dirname(path))
        if not others:
            raise BadImage("missing image") from None
        path = os.path.join(os.path.dirname(path), min(others))
        found = os.stat(path)
    except OSError as error:
        raise BadImage(f"unreadable image: {error.strerror}") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise BadImage("image path is no file name") from error
    if not stat.S_ISREG(found.st_mode):
        raise BadImage("missing image")
    if not found.st_size:
        raise BadImage("unreadable image: the file is empty")
    return path


def other_names(path: str) -> frozenset[str]:
    """File names that an image may have when its extension is not the one in the data."""
    stem = os.path.splitext(os.path.basename(path))[0]
    return frozenset(stem + extension for extension in EXTENSIONS)


@lru_cache(maxsize=64)
def names_in(folder: str) -> frozenset[str]:
    """Names of the files in a folder that can be opened; none when it is not there. Kept: a folder answers for many."""
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if entry.is_file())
    except OSError:
        return frozenset()


def open_image(path: str) -> Image.Image:
    """Read an image whole, as RGB; the first frame of an animation.

    Raises:
        BadImage: it is truncated, no image, unreasonably large, or of one pixel.
    """
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.size == (1, 1):
                raise BadImage("unreadable image: one pixel, which LLaVA's trainer cannot take either")
            return image.convert("RGB")
    except BadImage:
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"unreadable image: above {2 * Image.MAX_IMAGE_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("unreadable image: no image format that is known") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error).replace(str(path), "the file").splitlines()
        raise BadImage(f"unreadable image: {reason[0] if reason else type(error).__name__}") from error
