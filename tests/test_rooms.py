"""Each room of `tive/` imports what its subject needs and nothing else (docs/developing.md has the table)."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"argparse", "llava", "transformers", "peft", "accelerate", "deepspeed", "safetensors", "trak"}
# room -> rooms of tive, and libraries of models, that it may import; none knows the command line but the trainer
ROOMS = {
    "method": ((), {"trak"}),
    "models": (("data", "util"), {"llava", "transformers", "peft", "accelerate", "deepspeed", "safetensors"}),
    "data": (("util",), set()),
    "features": (("method", "models", "data", "util"), set()),
    "selection": (("method", "features", "data", "util"), set()),
    "training": (
        ("models", "data", "util"),
        {"argparse", "llava", "transformers", "peft", "accelerate"},
    ),
    "evaluation": (("models", "data", "features", "util"), set()),
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


def test_no_two_modules_or_public_classes_have_one_name():
    files = [file for file in sorted((ROOT / "tive").rglob("*.py")) if file.stem != "__init__"]
    classes = [
        node.name
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    ]
    names = Counter([*(file.stem for file in files), *classes])
    assert not [name for name, count in names.items() if count > 1]


def test_a_function_takes_at_most_six_arguments():
    many = [
        f"{file.relative_to(ROOT)}: {node.name}"
        for file in sorted((ROOT / "tive").rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and len([argument for argument in node.args.args if argument.arg != "self"]) + len(node.args.kwonlyargs) > 6
    ]
    assert not many


def texts(file: Path) -> Iterator[tuple[int, str]]:
    """The line and text of every string and comment of a file; the parts of a string that stand in a row are one."""
    source = file.read_text()
    nodes = list(ast.walk(ast.parse(source)))
    parts = {part for node in nodes if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in nodes:
        if isinstance(node, ast.JoinedStr):
            yield (
                node.lineno,
                "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values),
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in parts:
            yield node.lineno, node.value
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


FLAG = re.compile(r"(?<![\w-])(?<!var\()--(?!version\b)[A-Za-z]")  # var() is a style sheet's
WHOLE_COMMAND = re.compile(r"`python [^`]*`")
# The trainer's own arguments are flags.
ROOMS_WITH_FLAGS = ("training",)


@pytest.mark.parametrize("room", sorted(set(ROOMS) - set(ROOMS_WITH_FLAGS)))
def test_below_the_scripts_nothing_names_a_flag(room):
    """Several scripts call a room, each with flags of its own; a whole command names the script that it is of."""
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in sorted((ROOT / "tive" / room).rglob("*.py"))
        for line, text in texts(file)
        if FLAG.search(WHOLE_COMMAND.sub("", text))
    ]
    assert not found
