"""Which copy of a package an import takes, and its version."""

from __future__ import annotations

import importlib.util
import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from urllib.parse import unquote, urlparse


def package_in_use(name: str, distributions: tuple[str, ...]) -> tuple[Path, str | None] | None:
    """The folder that `import name` takes, and its version; None when there is no such package.

    Args:
        distributions: names under which the package may be installed.

    The version is None when the folder belongs to none of them: it is another package of the same name, from
    PYTHONPATH or the working folder.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    folder = Path(next(iter(spec.submodule_search_locations))).resolve()
    for candidate in distributions:
        try:
            installed = distribution(candidate)
        except PackageNotFoundError:
            continue
        if folder.parent in _places_of(installed):
            return folder, installed.version
    return folder, None


def _places_of(installed: Distribution) -> list[Path]:
    """Where a distribution's packages lie: beside its metadata, or in the checkout that an editable install names."""
    places = [Path(str(installed.locate_file(""))).resolve()]
    direct = installed.read_text("direct_url.json")
    if direct:
        url = urlparse(json.loads(direct).get("url", ""))
        if url.scheme == "file":
            places.append(Path(unquote(url.path)).resolve())
    return places
