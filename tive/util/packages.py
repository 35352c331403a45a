"""Which LLaVA an import takes."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse

from tive.util.errors import UserError


def check_llava() -> tuple[Path, str]:
    """The folder and the version of the LLaVA that an import takes.

    Raises:
        UserError: there is none, it is of another version than this project knows, or it is not the installed one:
            PYTHONPATH or the working folder holds another package of that name.
    """
    spec = importlib.util.find_spec("llava")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{sys.executable} has no LLaVA; `bash scripts/setup.sh` makes an environment that has: run the same "
            "command with .venv/bin/python"
        )
    folder, version = Path(next(iter(spec.submodule_search_locations))).resolve(), None
    for name in ("llava-torch", "llava"):  # from PyPI, or from its repository
        with contextlib.suppress(PackageNotFoundError):
            installed = distribution(name)
            version = version or (installed.version if folder.parent in _places_of(installed) else None)
    if version is None or not version.startswith("1.2."):
        raise UserError(
            f"llava is taken from {folder} ({version or 'which no pip installed'}), another LLaVA than the 1.2 that is "
            "supported; is PYTHONPATH set? `bash scripts/setup.sh` installs the right one"
        )
    return folder, version


def _places_of(installed: Distribution) -> list[Path]:
    """Where a distribution's packages lie: beside its metadata, or in the checkout that an editable install names."""
    places = [Path(str(installed.locate_file(""))).resolve()]
    direct = installed.read_text("direct_url.json")
    if direct:
        url = urlparse(json.loads(direct).get("url", ""))
        if url.scheme == "file":
            places.append(Path(unquote(url.path)).resolve())
    return places
