"""LESS's golden model of 11 layers: its two checkpoints, loaded or given to the gradient step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.helpers.golden_model import ROOT, Finished, run_step
from tive.models import ModelFiles, Reference, llava

GOLDEN = ROOT / "tests" / "golden" / "less"
DEEPSPEED = ROOT / "tests" / "golden" / "deepspeed"
EXPECTED: dict[str, Any] = json.loads((GOLDEN / "expected.json").read_text())
CHECKPOINTS = {checkpoint["step"]: GOLDEN / checkpoint["folder"] for checkpoint in EXPECTED["checkpoints"]}


def load_less(model_path: Path) -> Reference:
    """A reference model on the golden base, in float32 on the CPU."""
    torch.set_flush_denormal(True)
    files = ModelFiles(str(model_path), str(GOLDEN / "vicuna"), str(GOLDEN / "clip"))
    return llava.load(files, torch.device("cpu"), torch.float32)


def less_arguments(model_path: Path, data: str | Path, *more: object) -> list[object]:
    """What the golden step of `run_step` is to be given for one of LESS's checkpoints. Those in `more` win."""
    return [
        *("--model_path", model_path, "--model_base", GOLDEN / "vicuna", "--vision_tower", GOLDEN / "clip"),
        *("--input_file", GOLDEN / data, "--image_folder", GOLDEN / "images"),
        *more,
    ]


def run_less(output: Path, model_path: Path, data: str | Path, *more: object) -> Finished:
    torch.set_flush_denormal(True)
    return run_step(output, *less_arguments(model_path, data, *more))
