"""Text for the terminal: made harmless, shortened, laid out in tables; commands that can be pasted."""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

LABEL_LIMIT = 60
DASH = "–"
_PROJECT = Path(__file__).resolve().parents[2]


def shown(text: str, limit: int) -> str:
    """A text as it may be printed: on one line, harmless to a terminal, of `limit` characters at most.

    What Python's `repr` escapes (control characters, line breaks, halves of surrogate pairs, marks that turn the
    direction of writing) is escaped here too. A longer text loses its middle, so that a message keeps its remedy.
    """
    text = _without_middle(text, limit)
    if text.isprintable():
        return text
    escaped = (
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
    return _without_middle("".join(escaped), limit)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its kind where it has no text."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_unicode(text: str) -> bool:
    """Whether a text can be written: JSON's escapes can hold half of a surrogate pair."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _without_middle(text: str, limit: int) -> str:
    tail = limit // 4
    return text if len(text) <= limit else text[: limit - tail - 3] + "..." + text[len(text) - tail :]


def shown_value(value: Any, limit: int = 40) -> str:
    """A value of a data file in a message: a text in quotes, a number as it is, a list or an object by its kind."""
    if isinstance(value, list):
        return "a list"
    if isinstance(value, dict):
        return "an object"
    return f"'{shown(value, limit - 2)}'" if isinstance(value, str) else shown(str(value), limit)


def listed(items: Sequence[Any], limit: int = 8) -> str:
    """The first of some items, and how many more there are."""
    first = ", ".join(shown(str(item), LABEL_LIMIT) for item in items[:limit])
    return first + (f" and {len(items) - limit:,} more" if len(items) > limit else "")


def duration(seconds: float) -> str:
    """A time span in the unit that suits it: `12.3 s`, `45.0 min`, `3.2 h`."""
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(size: float) -> str:
    """A number of bytes in the unit that suits it: `512 MiB`, `3.0 GiB`."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def print_table(rows: Iterable[tuple[str, ...]]) -> None:
    """Print a table whose first row is its header: the first column to the left, the others to the right."""
    lines = [[shown(cell, LABEL_LIMIT) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        print("  ".join(cells).rstrip())


def short(value: float | None) -> str:
    """A number with three digits that count, a whole one below a million as it is; a dash where there is none."""
    if value is None or math.isnan(value):
        return DASH
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    digits = 0 if value == round(value) else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def of_project(path: str) -> str:
    """A path below the project's folder as it can be pasted into a command, in any folder."""
    return shlex.quote(str(_PROJECT / path))


def command(script: str, **options: str | os.PathLike[str]) -> str:
    """The command line that runs one of the project's scripts in this environment, between backquotes.

    Args:
        script: below the project's folder, as `scripts/convert_data.py`.
        options: of the script; a path is made absolute, a text stays as it is.
    """
    words = [sys.executable or "python", str(_PROJECT / script)]
    for name, value in options.items():
        words += ["--" + name, value if isinstance(value, str) else os.path.abspath(value)]
    return f"`{shlex.join(words)}`"
