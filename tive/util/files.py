"""Files that are whole or not there: write beside, flush to disk, rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO

from tive.util.errors import UserError

_HASHED_WHOLE = 64 << 20
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10


@contextlib.contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file that takes its final name only when the block ends well.

    Raises:
        UserError: the folder cannot be made or written, or the disk is full; nothing stays behind.
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
        _flush_folder(path.parent)
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


def _flush_folder(folder: Path) -> None:
    """Make a rename last through a power cut; some file systems cannot, and that is no error."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], content: Any, indent: int | None = 2) -> None:
    """Write `content` as strict JSON (no NaN), whole or not at all."""
    with whole_file(path) as file:
        file.write(json.dumps(content, indent=indent, allow_nan=False, ensure_ascii=False).encode())
        file.write(b"\n")


def take_lock(file: IO[Any]) -> bool:
    """Lock an open file for this process until it is closed; False where the file system has no locks.

    Raises:
        BlockingIOError: another process holds it.
    """
    try:
        # Not flock: loader processes would inherit it, and outlive a killed parent by some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror) from error
        return False
    return True


def refuse_same_file(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Raise a `UserError` when the target is the source, by whatever path."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise UserError(f"the target {target} is the source itself; name another file")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a small JSON file.

    Raises:
        UserError: the file is not there, cannot be read, or is not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({error}); it may be damaged: make or download it again") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a small JSON file that holds an object.

    Raises:
        UserError: as `read_json`; or it holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a JSON object; make or download it again")
    return content


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal.

    Raises:
        UserError: the file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return digest.hexdigest()


def sampled_sha256(path: Path) -> str:
    """SHA-256 of a file, of one above 64 MB at 64 places of 64 KB: a base of 14 GB costs a moment.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        size = path.stat().st_size
        if size <= _HASHED_WHOLE:
            return sha256_of(path)
        digest = hashlib.sha256()
        with open(path, "rb") as file:
            for sample in range(_SAMPLES):
                offset = sample * (size - _SAMPLE_BYTES) // (_SAMPLES - 1)
                digest.update(os.pread(file.fileno(), _SAMPLE_BYTES, offset))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    return digest.hexdigest()
