"""Mistakes that a user can make end in one clear line and exit code 2, never in a traceback.

Exit codes of every script: 0 done, 2 something that the user can put right (also argparse's), 128 + N stopped by
signal N (130 for Ctrl-C). A terminal that is closed or full changes none of them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

from tive.util.terminal import one_line, safe_terminal


class UserError(Exception):
    """Something the user can put right. The text is one line: what is wrong, where, and the remedy."""


def run(main: Callable[[], None]) -> None:
    """Run a script's `main`; a `UserError` becomes one line on standard error and exit code 2."""
    with safe_terminal():
        try:
            main()
        except UserError as error:
            print(f"error: {one_line(str(error))}", file=sys.stderr)
            sys.exit(2)
        except ModuleNotFoundError as error:
            if (error.name or "tive").startswith("tive"):
                raise
            print(
                f"error: {sys.executable} has no {error.name}; `bash scripts/setup.sh` makes an environment that has, "
                "and `source .venv/bin/activate` takes it (docs/install.md)",
                file=sys.stderr,
            )
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            sys.exit(130)
