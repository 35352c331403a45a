"""How a script ends: a mistake that a user can make is one clear line and exit code 2, never a traceback.

Exit codes of every script: 0 done, 2 something that the user can put right (also argparse's), 128 + N stopped by
signal N (130 for Ctrl-C). A terminal that is closed, full or not UTF-8 changes none of them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib.metadata import version
from shlex import quote
from types import FrameType
from typing import Any, TextIO

from tive.util.text import of_project, shown

# The longest line that is shown whole, in characters: longer ones are data that got into a message.
LINE_LIMIT = 2000


class UserError(Exception):
    """Something the user can put right. The text is one line: what is wrong, where, and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on standard error and exit code 2.

    With `--version` alone it prints the project's version instead. A path whose `~` the shell left is refused: it would
    be a folder of that name.
    """
    if sys.argv[1:] == ["--version"]:
        print(f"tive {version('tive')}")
        return
    for word in sys.argv[1:]:
        if (path := re.sub("^--[^=]+=", "", word)).startswith("~/"):
            _fail(
                f"{word}: a shell keeps ~ as it is within quotes and after =; write {quote(os.path.expanduser(path))}"
            )
    # A file that is opened next must not get the number of a closed terminal (`>&-`), and what is written to it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout, sys.stderr = _terminal(sys.stdout, 1), _terminal(sys.stderr, 2)
    stops: list[int] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        stops.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    try:
        main()
    except (Exception, KeyboardInterrupt) as error:
        # A library that is stopped while it is imported may catch that, and fail later for what it then lacks.
        if stops or isinstance(error, KeyboardInterrupt):
            print("stopped", file=sys.stderr)
            sys.exit(130)
        if isinstance(error, UserError):
            _fail(str(error))
        if isinstance(error, ModuleNotFoundError) and not (error.name or "tive").startswith("tive"):
            refuse_python(str(error.name))
        raise


def refuse_python(lacking: str) -> None:
    """End the script: this Python lacks a library."""
    _fail(
        f"{sys.executable} has no {lacking}; `bash {of_project('scripts/setup.sh')}` makes an environment that has, "
        f"and `source {of_project('.venv/bin/activate')}` takes it (docs/install.md)"
    )


def _fail(message: str) -> None:
    message = message.replace("\r", "\\r").replace("\n", "\\n")
    print(f"error: {harmless(message)}", file=sys.stderr)
    sys.exit(2)


def harmless(text: str) -> str:
    """`text` with characters that act on a terminal written as escapes, and no part of a line above `LINE_LIMIT`.

    Line ends and tabs stay, and so does a carriage return at the start, with which progress bars draw.
    """
    parts = re.split("(^\r|[\n\t])", text)
    return "".join(part if index % 2 else shown(part, LINE_LIMIT) for index, part in enumerate(parts))


class _Terminal(io.TextIOWrapper):
    """Standard output or error: text is `harmless`, letters that the encoding lacks are escapes."""

    def write(self, text: str) -> int:
        super().write(harmless(text))
        return len(text)


class _Lasting(io.FileIO):
    """A descriptor whose reader may go and whose disk may fill: what cannot be written is dropped."""

    def write(self, data: Any) -> int:
        with contextlib.suppress(OSError):
            if (written := super().write(data)) is not None:
                return written
        return memoryview(data).nbytes


def _terminal(stream: TextIO | None, descriptor: int) -> TextIO:
    """A stream that cannot end the program. What stands in for the terminal already (a test's) is left as it is."""
    if stream is not (sys.__stdout__ if descriptor == 1 else sys.__stderr__):
        return stream  # type: ignore[return-value]  # not None: that is what a closed terminal is
    if stream is not None:
        with contextlib.suppress(OSError):
            stream.flush()
    encoding = "utf-8" if stream is None else stream.encoding
    file = io.BufferedWriter(_Lasting(descriptor, "w", closefd=False))
    lines = descriptor == 2 or os.isatty(descriptor)
    return _Terminal(file, encoding=encoding, errors="backslashreplace", line_buffering=lines, write_through=lines)
