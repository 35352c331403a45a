"""What a script writes to its terminal: always readable text, never the end of a run.

A terminal is closed (`| head`), its disk is full, or it has another encoding than UTF-8; a label brings control
characters or a message a whole image. None of this is a reason to lose a run, so every script's standard output and
error go through `SafeStream`, and all text through `harmless`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from tive.util.text import shown

# The longest line that is shown whole, in characters: longer ones are data that got into a message.
LINE_LIMIT = 2000


def harmless(text: str, limit: int = LINE_LIMIT) -> str:
    """`text` with characters that act on a terminal written as escapes, and no line longer than `limit` characters.

    Line ends and tabs stay, and so does a carriage return at the start, with which progress bars draw.
    """
    start = "\r" if text.startswith("\r") else ""
    return start + "\n".join(_harmless_line(line, limit) for line in text[len(start) :].split("\n"))


def _harmless_line(line: str, limit: int) -> str:
    if not line.isprintable():
        # Escaped whole before it is cut (an escape has at most ten characters), so that its end is kept.
        line = "\t".join(shown(part, 10 * len(part)) for part in line.split("\t"))
    return line if len(line) <= limit else shown(line, limit)


def one_line(text: str) -> str:
    """`text` as `harmless` gives it, its line ends written as escapes: an error is one line whatever it quotes."""
    return harmless(text.replace("\r", "\\r").replace("\n", "\\n"))


class SafeStream:
    """A text stream whose writes cannot fail: what cannot be shown is dropped, and the program goes on.

    Everything but `write` and `flush` is the stream's own.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `harmless(text)`; a closed or full stream drops it."""
        try:
            self._stream.write(harmless(text))
        except (OSError, ValueError) as error:
            self._lost(error)
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._lost(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lost(self, error: Exception) -> None:
        """A reader that is gone does not come back; a disk may have room again."""
        if isinstance(error, OSError) and error.errno == errno.EPIPE:
            self.discard()

    def discard(self) -> None:
        """Send what is still to be written, also at the interpreter's own end, to nowhere."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


@contextlib.contextmanager
def safe_terminal() -> Iterator[None]:
    """Standard output and error that cannot end the program while the block runs, nor when it exits."""
    before = sys.stdout, sys.stderr
    if any(stream is None for stream in before):
        # Closed at the start (`>&-`): a file that is opened next would get the number 1 or 2, and what libraries
        # write to it with it.
        _occupy_standard_descriptors()
    safe = [SafeStream(stream if stream is not None else open(os.devnull, "w")) for stream in before]  # noqa: SIM115
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = safe
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in safe:
            _finish(stream)


def _occupy_standard_descriptors() -> None:
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return


def _finish(stream: SafeStream) -> None:
    """Write what is buffered, or drop it: the interpreter ends with exit code 120 where its own flush fails."""
    try:
        stream._stream.flush()
    except (OSError, ValueError):
        stream.discard()
