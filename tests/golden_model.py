"""The gradient step on the golden reference model: in this process, or in one of its own that can be killed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import compute_gradient_features
from tive.errors import run

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden" / "reference_model"
SCRIPT = ROOT / "compute_gradient_features.py"
RECORDS = json.loads((GOLDEN / "data.json").read_text())


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
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [str(SCRIPT), *step_arguments(output, *more)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(compute_gradient_features.main)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return Finished(code, out.getvalue(), err.getvalue())


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
