"""What the tests of the training share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.training import complete_settings, make


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's data and images, its model of two layers, and small data files cut from it."""
    folder = tmp_path_factory.mktemp("parts")
    make("quickstart/data.py", "--folder", folder)
    make("quickstart/model.py", "--data", folder / "data.json", "--folder", folder / "model", "--layers", 2)
    records = json.loads((folder / "data.json").read_text())
    text = [record for record in records if "image" not in record][:5]
    images = [record for record in records if "image" in record][:7]
    for name, chosen in (("text", text), ("images", images), ("mixed", text[:2] + images)):
        (folder / f"{name}.json").write_text(json.dumps(chosen))
    return folder


@pytest.fixture
def settings(parts: Path, tmp_path: Path) -> dict[str, str]:
    return complete_settings(parts, tmp_path)
