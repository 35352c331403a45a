"""Commands in messages: they work when they are pasted, from any folder and whatever a file is called."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

_PROJECT = Path(__file__).resolve().parents[2]


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
