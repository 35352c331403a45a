"""What holds for every test file."""

from __future__ import annotations

import ast
import functools
import gc
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.helpers import forked_python

# The models are tiny: a second thread costs more than it brings. Before torch is imported, and for what tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}

# What a test file imports tells which environment it needs (docs/native.md); what needs neither runs in both.
NEEDED = {
    "llava": ("llava", "deepspeed", "tive.models.llava", "tive.training.llava_trainer", "tests.helpers.golden_model"),
    "native": (
        "tests.helpers.golden_native",
        "tive.models.native",
        "tests.helpers.tiny_native",
        "tive.training.trl_trainer",
        "tive.models.answer_spans",
    ),
}
NEEDED["llava"] += (
    "tests.helpers.reference",
    "tests.helpers.deepspeed_on_cpu",
    "tests.helpers.training",
    "tests.helpers.less",
)
LONGEST = (
    *("features/test_slurm", "training/test_training", "features/test_launch", "features/test_resume"),
    *("training/test_trl", "models/test_smollm2", "models/test_native_losses", "features/test_adam_gradients"),
    *("models/test_optimizer_state", "features/test_left_out", "scripts/test_benchmark", "models/test_bunny"),
    *("data/test_convert", "data/test_labels", "training/test_checks", "scripts/test_setup", "tests/test_cuda"),
)


@functools.cache
def here() -> str:
    """The environment that these tests run in."""
    if importlib.util.find_spec("llava"):
        return "llava"
    newest = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 57)
    return "native" if newest else "neither"


@functools.cache
def needed_by(path: Path) -> str | None:
    """The environment that a test file needs, or None."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    needs = [
        kind
        for kind, modules in NEEDED.items()
        if any(f"{name}.".startswith(f"{module}.") for name in names for module in modules)
    ]
    return needs[0] if needs else None


def pytest_configure(config: pytest.Config) -> None:
    """Start the server of tests/helpers/forked_python.py, one for all of xdist's workers; it ends with this process."""
    if hasattr(config, "workerinput"):
        return
    program = Path(__file__).parent / "helpers" / "forked_python.py"
    folder = Path(tempfile.mkdtemp(prefix="forked_python_"))
    with open(folder / "log", "wb") as log:
        command = [sys.executable, program, "--serve", folder / "socket"]
        streams = {"stdin": subprocess.PIPE, "stdout": log, "stderr": log}
        buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        server = subprocess.Popen(command, **streams, env=buffered, start_new_session=True)
    stand_in = folder / "python"
    stand_in.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {program} {folder}/socket "$@"\n')
    stand_in.chmod(0o755)
    forked_python.PYTHON = os.environ[forked_python.VARIABLE] = str(stand_in)

    def end() -> None:
        assert server.stdin is not None
        server.stdin.close()
        server.wait()
        shutil.rmtree(folder)

    config.add_cleanup(end)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    if collection_path.suffix != ".py":
        return None
    return True if needed_by(collection_path) not in (None, here()) else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The longest files start first, so that no process works on one while the others have nothing left to do.
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(f"{item.path.parent.name}/{item.path.stem}", len(order)))


def pytest_collection_finish() -> None:
    # What is imported stays: no collection of garbage goes through it again, also where the gradient step asks for one.
    gc.collect()
    gc.freeze()
    # transformers asks for the version of Pillow several times for an image, and each time its file is read.
    importlib.metadata.version = functools.cache(importlib.metadata.version)


def pytest_report_header() -> str:
    files = [path for path in sorted(Path(__file__).parent.rglob("test_*.py")) if needed_by(path) not in (None, here())]
    names = ", ".join(path.stem for path in files)
    return f"environment: {here()}; of the other, and run there: {names}"


@pytest.fixture(autouse=True, scope="module")
def ordinary_floating_point() -> Iterator[None]:
    """Small models run with denormals as zero, a setting of the whole process; the next test file has them again."""
    yield
    if "torch" in sys.modules:
        sys.modules["torch"].set_flush_denormal(False)
