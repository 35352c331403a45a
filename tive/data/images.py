"""Find and read the images of records, trusting neither the path nor the file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import stat
import unicodedata
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import BinaryIO

from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from tive.data.media import StoredImage
from tive.util.files import whole_file

EXTENSIONS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif")
# Of the formats that the trainer's Pillow reads, those whose readers run no other program (as that of PostScript
# does) and need no other handler.
_FORMATS = (
    *("AVIF", "BMP", "CUR", "DCX", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "MSP", "PCX", "PNG"),
    *("PPM", "PSD", "QOI", "SGI", "SUN", "TGA", "TIFF", "WEBP", "XBM", "XPM"),
)
# The most pixels that Pillow reads in a file, and LLaVA's trainer with it. An image that is padded to a square is held
# to it as a square, on every machine: 6 x 30,000 pixels of a few KB would take 12 GiB in the trainer.
MOST_PIXELS = 178_956_970
# Pixels of the padded square that are in memory at one time.
_STRIP_PIXELS = 1 << 22
# Asking for one file after the other would wait for a network's answer each time.
_THREADS = 16
# Pillow warns above half of MOST_PIXELS; LLaVA's trainer takes what is only warned of.
Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
warnings.filterwarnings("ignore", message="Palette images with Transparency")


class BadImage(Exception):
    """Why an image cannot be used; the text is the reason."""


def path_of(folder: str, image: str) -> str:
    """Where a record's image should lie; `BadImage` where the path leaves the image folder (`..`, an absolute path)."""
    inside = os.path.normpath(image)
    if os.path.isabs(inside):
        leaves = not inside.startswith(os.path.join(os.path.abspath(folder), ""))
    else:
        leaves = inside == ".." or inside.startswith("../")
    if leaves:
        raise BadImage("image path leaves the image folder")
    return os.path.join(folder, inside)


def find_image(folder: str, image: str) -> str:
    """Path of a record's image file; `BadImage` as of `path_of`, or where there is no such file, or an empty one.

    A file stands in for one that is not there if their names differ in the extension (LLaVA issue 593) or, where it is
    the only one, in capitals or in the Unicode form of the letters.
    """
    path = path_of(folder, image)
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        path = _stand_in(folder, path) or ""
        if not path:
            backslashes = ": its path has backslashes, write it with /" if "\\" in image else ""
            raise BadImage(f"missing image{backslashes}") from None
        status = os.stat(path)
    except OSError as error:
        raise BadImage(f"unreadable image: {error.strerror}") from error
    except ValueError as error:  # a NUL byte, or half of a surrogate pair
        raise BadImage("image path is no file name") from error
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("missing image")
    if not status.st_size:
        raise BadImage("unreadable image: the file is empty")
    return path


def _stand_in(folder: str, path: str) -> str | None:
    place = folder
    *folders, name = os.path.relpath(path, folder).split(os.sep)
    for part in folders:
        names = [part]
        if not os.path.isdir(os.path.join(place, part)):
            names = _names_alike(place).get((False, _alike(part)), [])
        if len(names) != 1:
            return None
        place = os.path.join(place, names[0])
    stem, alike = os.path.splitext(name)[0], _names_alike(place)
    others = [other for extension in EXTENSIONS for other in alike.get((True, _alike(stem + extension)), ())]
    same_stem = sorted(other for other in others if os.path.splitext(other)[0] == stem)
    names = same_stem[:1] or alike.get((True, _alike(name)), []) or others
    # Of two images whose names differ in capitals alone either may be meant.
    return os.path.join(place, names[0]) if len(names) == 1 else None


def _alike(name: str) -> str:
    """What is left of a name without capitals and Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


@lru_cache(maxsize=64)
def _names_alike(folder: str) -> dict[tuple[bool, str], list[str]]:
    """The names in a folder, by whether each is a file and what it is alike. Kept: a folder answers for many."""
    alike: dict[tuple[bool, str], list[str]] = {}
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            alike.setdefault((entry.is_file(), _alike(entry.name)), []).append(entry.name)
    return alike


def look_for(
    folder: str, images: Iterable[str], read: Callable[[str | BinaryIO], object] | None = None
) -> tuple[dict[str, str], dict[str, str]]:
    """Why images cannot be used, by image; and the files that stand in for others, as `find_image` says.

    Args:
        images: paths below the folder, as the records write them.
        read: also called with the path of each file, to read it whole (`open_image`).
    """

    bad: dict[str, str] = {}
    renamed: dict[str, str] = {}

    def look(block: list[str]) -> None:
        for image in block:
            try:
                path = find_image(folder, image)
                if read is not None:
                    read(path)
                if path != path_of(folder, image):
                    renamed[image] = path
            except BadImage as reason:
                bad[image] = str(reason)

    # In the order of their folders, whose listings are kept; many at a time, since a thread costs more than a look.
    names = sorted(set(images))
    size = 1000 if read is None else 8
    blocks = [names[start : start + size] for start in range(0, len(names), size)]
    title = "Looking for images" if read is None else "Opening images"
    with ThreadPoolExecutor(_THREADS) as threads, tqdm(total=len(names), desc=title, unit=" images", delay=2) as bar:
        for block, _ in zip(blocks, threads.map(look, blocks), strict=True):
            bar.update(len(block))
    return bad, renamed


@lru_cache(maxsize=1)
def _formats() -> list[str]:
    """The formats that are read, in the order in which Pillow tries them."""
    Image.init()
    return [name for name in Image.ID if name in _FORMATS]


def read_image(folder: str, image: str | StoredImage, padded: bool = False, upright: bool = False) -> Image.Image:
    """`open_image` of a record's image: a path below the image folder (`find_image`), or the image itself."""
    if isinstance(image, str):
        return open_image(find_image(folder, image), padded, upright)
    if not image.content:
        raise BadImage("unreadable image: the row holds no bytes of it")
    return open_image(io.BytesIO(image.content), padded, upright)


def store_image(folder: str, image: StoredImage) -> str:
    """Write an image that lies in its row to a file below the folder, unless it is there; its path below the folder.

    Equal bytes are one file, whose name is their hash and whose suffix is that of their format; a `ValueError` where
    they are no image.
    """
    content = image.content or b""
    try:
        suffix, _ = format_and_size(io.BytesIO(content))
    except BadImage as error:
        raise ValueError(f"has an image that cannot be used: {error} ({image.name})") from error
    digest = hashlib.blake2b(content, digest_size=16).hexdigest()
    name = f"{digest[:2]}/{digest}.{suffix}"
    path = os.path.join(folder, name)
    if not os.path.exists(path):
        with whole_file(path) as file:
            file.write(content)
    return name


def format_and_size(path: str | BinaryIO) -> tuple[str, tuple[int, int]]:
    """The suffix of an image's format (`jpg`), its width and height, by its first bytes; `BadImage` if it is none."""
    try:
        with Image.open(path, formats=_formats()) as image:
            return {"JPEG": "jpg"}.get(image.format or "", (image.format or "").lower()), image.size
    except Exception as error:  # Pillow raises many kinds
        raise BadImage("unreadable image: no image format that is known") from error


def open_image(path: str | BinaryIO, padded: bool = False, upright: bool = False) -> Image.Image:
    """Read an image whole, as RGB, the first frame of an animation; `BadImage` where it is truncated, no image,
    unreasonably large, or of one pixel.

    Args:
        padded: the image is to be padded to a square, and that is held to `MOST_PIXELS`.
        upright: turn it as its EXIF orientation says, as TRL's images are; LLaVA's trainer takes it as it lies.
    """
    try:
        with Image.open(path, formats=_formats()) as image:
            if image.size == (1, 1):
                raise BadImage("unreadable image: one pixel, which LLaVA's trainer cannot take either")
            if padded and max(image.size) ** 2 > MOST_PIXELS:
                raise BadImage(f"unreadable image: above {MOST_PIXELS} pixels when it is padded to a square")
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except (BadImage, MemoryError):  # whether memory is short is not the image's fault
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"unreadable image: above {MOST_PIXELS} pixels") from error
    except UnidentifiedImageError as error:
        raise BadImage("unreadable image: no image format that is known") from error
    except Exception as error:  # Pillow's decoders raise many kinds
        reason = str(error).replace(str(path), "the file").splitlines()
        raise BadImage(f"unreadable image: {reason[0] if reason else type(error).__name__}") from error


def resize_padded(
    image: Image.Image, background: tuple[int, int, int], edge: int, resample: Image.Resampling
) -> Image.Image:
    """An RGB image in the middle of a square of `background`, resized to `edge` x `edge`.

    Pixel for pixel what resizing the square gives, without the square: Pillow resizes every row by itself and then
    every column, so a strip of rows is padded and made narrow at a time.
    """
    width, height = image.size
    side = max(width, height)
    left, top = (side - width) // 2, (side - height) // 2
    narrow = Image.new("RGB", (edge, side), background)
    rows = max(1, _STRIP_PIXELS // side)
    for start in range(0, height, rows):
        part = image.crop((0, start, width, min(start + rows, height)))
        strip = Image.new("RGB", (side, part.height), background)
        strip.paste(part, (left, 0))
        narrow.paste(strip.resize((edge, part.height), resample), (0, top + start))
    return narrow.resize((edge, edge), resample)
