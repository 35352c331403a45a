"""Files that are whole or not there: write beside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from tive.util.errors import UserError

_HASHED_WHOLE = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that takes its final name only when the block ends well; nothing stays behind, and a
    `UserError`, where the folder cannot be made or written, or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # a rename lasts through a power cut, where the file system can flush it
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or name another folder") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


class HashingFile:
    """A file that is written from front to back, and the SHA-256 of what was written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._digest = file, hashlib.sha256()

    def write(self, data: Any) -> int:
        self._digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write `content` as strict JSON (no NaN), whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False).encode())
        file.write(b"\n")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Try to write where results will go, before anything is computed; a `UserError` where that fails."""
    path = Path(os.path.abspath(folder))
    nearest = next(parent for parent in (path, *path.parents) if os.path.lexists(parent))
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(f"cannot write {folder}: {nearest}: {error.strerror}; name another folder") from error


def refuse_target(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise a `UserError` when the file to write is the source, by whatever path, or is a folder."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"the target {target} is the source itself; name another file")
    if os.path.isdir(target):
        raise UserError(f"the target {target} is a folder; name a file in it")


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a small JSON file; a `UserError` where it cannot be read, or is not JSON."""
    try:
        with _reading(path):
            return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it may be damaged: make or download it again") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small JSON file that holds an object; a `UserError` as of `read_json`, or where it holds another thing."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; make or download it again")
    return content


def read_torch(path: str | os.PathLike[str]) -> Any:
    """What a torch file holds, memory-mapped where that can be; nothing in it runs. Errors are torch's."""
    import torch

    # The torch of LLaVA's own environment, 2.0, maps none; a file older than PyTorch 1.6 is no zip archive.
    with open(path, "rb") as file:
        can_map = file.read(4) == b"PK\x03\x04" and "mmap" in inspect.signature(torch.load).parameters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mapped = {"mmap": True} if can_map else {}
        return torch.load(os.fspath(path), map_location="cpu", weights_only=True, **mapped)


def sha256_of(path: str | os.PathLike[str], sampled: bool = False) -> str:
    """SHA-256 of a file, in hexadecimal; sampled, of a file above 64 MB at 64 places: a base of 14 GB costs a moment. A
    `UserError` where the file cannot be read.
    """
    digest = hashlib.sha256()
    with _reading(path), open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if sampled and size > _HASHED_WHOLE:
            for sample in range(_SAMPLES):
                offset = sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
        else:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
