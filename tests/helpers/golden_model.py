"""The gradient step on the golden reference model: in this process, or in one of its own that can be killed."""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

import compute_gradient_features
from tests.helpers.in_process import run_here
from tive.util.errors import run

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "reference_model"
SCRIPT = ROOT / "compute_gradient_features.py"
RECORDS = json.loads((GOLDEN / "data.json").read_text())
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tests.helpers.golden_model", "peft", "accelerate", "llava.train.train", "tive.models.llava"]
)


@dataclass
class Finished:
    """How a run ended: its exit code, and what it printed."""

    code: int
    out: str
    err: str


def step_arguments(output: Path, *more: object) -> list[str]:
    """Arguments of a small run: 48 records, 512 numbers a feature, windows of 8. Those in `more` win."""
    return [
        *("--input_file", str(GOLDEN / "data.json"), "--image_folder", str(GOLDEN / "images")),
        *("--model_path", str(GOLDEN / "llava-lora"), "--model_base", str(GOLDEN / "vicuna")),
        *("--vision_tower", str(GOLDEN / "clip"), "--output_file", str(output)),
        *("--proj_dim", "512", "--window", "8", "--num_workers", "0", "--device", "cpu"),
        *map(str, more),
    ]


def run_step(output: Path, *more: object) -> Finished:
    """Run the step in this process, which saves the seconds that the imports take."""
    done = run_here(compute_gradient_features.main, *step_arguments(output, *more))
    return Finished(done.returncode, done.stdout, done.stderr)


def fork_step(output: Path, *more: object, die_at: int | str | None = None) -> BaseProcess:
    """Run the step in a process of its own, forked from one that has done the imports; it logs to `OUTPUT.log`.

    Args:
        die_at: the process kills itself where it calls this function (`tive.features.gradient_pass.write_chunk`), or
            before its nth call that changes the disk, counted from 1.
    """
    process = FORKS.Process(target=_in_fork, args=(output, more, die_at))
    process.start()
    return process


def log_of(output: Path) -> str:
    return output.with_suffix(".log").read_text(errors="replace")


def _in_fork(output: Path, more: tuple[object, ...], die_at: int | str | None) -> None:
    os.setsid()
    log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if isinstance(die_at, str):
        module, _, function = die_at.rpartition(".")
        setattr(importlib.import_module(module), function, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
    elif die_at is not None:
        _die_at_call(die_at)
    sys.argv = [str(SCRIPT), *step_arguments(output, *more)]
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # as it is where the step is run by itself
    run(compute_gradient_features.main)


def _die_at_call(call: int) -> None:
    calls = itertools.count(1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if next(calls) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return wrapped

    for name in ("pwrite", "fsync", "replace", "unlink", "posix_fallocate"):
        setattr(os, name, counted(getattr(os, name)))


def start_step(output: Path, *more: object, **environment: str) -> subprocess.Popen[str]:
    """Start the step in a process group of its own, as a terminal or torchrun does."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *step_arguments(output, *more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def write_records(path: Path, records: list) -> Path:
    path.write_text(json.dumps(records))
    return path
