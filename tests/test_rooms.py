"""Each room of `tive/` imports what its subject needs and nothing else (docs/developing.md has the table)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"argparse", "llava", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "trak"}
# room -> rooms of tive, and libraries of models, that it may import; none knows the command line but the trainer
ROOMS = {
    "method": ((), {"trak"}),
    "models": (("data", "util"), {"llava", "transformers", "peft", "accelerate", "safetensors"}),
    "data": (("util",), set()),
    "features": (("data", "util"), set()),
    "gradient_pass": (("method", "models", "data", "features", "util"), set()),
    "selection": (("method", "features", "data", "util"), set()),
    "training": (
        ("data", "util"),
        {"argparse", "llava", "transformers", "peft", "accelerate", "deepspeed", "safetensors"},
    ),
    "evaluation": (("models", "data", "util"), set()),
    "report": (("selection", "evaluation", "method", "data", "util"), set()),
    "util": ((), set()),
}


def imported(file: Path) -> set[str]:
    """`tive.ROOM`, and the names of libraries, that a file imports anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    rooms = {".".join(name.split(".")[:2]) for name in names if name.startswith("tive.")}
    return rooms | ({name.split(".")[0] for name in names} & LIBRARIES)


@pytest.mark.parametrize(
    "room", sorted(path.name for path in (ROOT / "tive").iterdir() if (path / "__init__.py").exists())
)
def test_a_room_imports_what_the_table_allows(room):
    rooms, libraries = ROOMS[room]
    allowed = {f"tive.{name}" for name in (room, *rooms)} | libraries
    files = sorted((ROOT / "tive" / room).rglob("*.py"))
    wrong = {str(file.relative_to(ROOT)): found for file in files if (found := imported(file) - allowed)}
    assert files and not wrong
