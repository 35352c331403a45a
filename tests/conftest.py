"""What holds for every test file."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def ordinary_floating_point() -> Iterator[None]:
    """Small models run with denormals as zero, a setting of the whole process; the next test file has them again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
