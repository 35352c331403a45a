"""What is done of a model's evaluation, on disk, so that one that was killed goes on where it stopped."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tive.evaluation.results import Conditions, HeldOutResult, differing
from tive.util.errors import UserError
from tive.util.files import take_lock


@dataclass(frozen=True)
class Partial:
    """The results that are on disk, of the first rows, and what writes the next."""

    done: list[HeldOutResult]
    add: Callable[[Sequence[HeldOutResult]], None]


@contextlib.contextmanager
def partial_results(path: Path, conditions: Conditions) -> Iterator[Partial]:
    """Open the file of a model's results so far, a line a record behind a line of what they depend on.

    Results of something else are dropped with a word. Held while the block runs; the caller removes the file when the
    whole result is written.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as file:
            try:
                locked = take_lock(file)
            except BlockingIOError as error:
                raise UserError(f"{path} is written by another process; wait for it, or name another model") from error
            if not locked:
                print(f"{path} is on a file system without locks: see that no other process writes it")
            file.seek(0)
            done = _read(file.read(), path, conditions)
            # Anew, without the line that a kill cut in two.
            file.truncate(0)
            _write(file.fileno(), [conditions, *done])
            yield Partial(done, lambda results: _write(file.fileno(), results))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; free space or name another folder") from error


def _read(content: bytes, path: Path, conditions: Conditions) -> list[HeldOutResult]:
    lines = content.split(b"\n")[:-1]
    try:
        found = msgspec.json.decode(lines[0], type=Conditions) if lines else None
        done = [msgspec.json.decode(line, type=HeldOutResult) for line in lines[1:]]
    except msgspec.MsgspecError as error:
        raise UserError(f"{path} is damaged ({error}); remove it") from error
    if found is None:
        return []
    if differs := differing(found, conditions):
        print(f"{path} holds {len(done)} results with {differs}: begun anew")
        return []
    if [result.row for result in done] != list(range(len(done))) or len(done) > conditions.data_records:
        raise UserError(f"{path} is damaged (rows are missing); remove it")
    return done


def _write(descriptor: int, entries: Sequence[Conditions | HeldOutResult]) -> None:
    content = b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)
    while content:
        content = content[os.write(descriptor, content) :]
    os.fsync(descriptor)
