"""A script's `main`, called in this process as from the command line: no start of an interpreter."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from tive.util.errors import run


def run_here(main: Callable[[], None], *arguments: object) -> CompletedProcess[str]:
    """How a script ended: its exit code, and what it printed."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    command = ["script", *map(str, arguments)]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", command)
        try:
            run(main)
        except SystemExit as end:
            code = int(end.code or 0)
    return CompletedProcess(command, code, out.getvalue(), err.getvalue())
