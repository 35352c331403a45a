"""The training scripts, run on the quickstart's tiny model; and a stand-in for Python that writes its command down."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.helpers.forked_python import PYTHON

ROOT = Path(__file__).resolve().parents[2]


def make(script: str, *arguments: object) -> None:
    subprocess.run([PYTHON, ROOT / "scripts" / script, *map(str, arguments)], check=True, capture_output=True)


def complete_settings(parts: Path, folder: Path) -> dict[str, str]:
    """The environment of a training run that lacks nothing and goes to `folder`/trained."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "PYTHON": PYTHON,
        "MODEL": f"{parts}/model/vicuna",
        "VISION_TOWER": f"{parts}/model/clip",
        "PROJECTOR": f"{parts}/model/mm_projector.bin",
        "DATA_PATH": f"{parts}/mixed.json",
        "IMAGE_FOLDER": f"{parts}/images",
        "OUTPUT_DIR": f"{folder}/trained",
        "GPUS": "none",
        "WORKERS": "0",
        "BATCH_SIZE": "3",
        "LORA_R": "4",
        "LORA_ALPHA": "8",
        "LEARNING_RATE": "1e-2",
        "PROJECTOR_LEARNING_RATE": "1e-2",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def launch(script: str, settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, cwd=Path(settings["OUTPUT_DIR"]).parent
    )


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **beside}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)


def assert_refused(ended: subprocess.CompletedProcess[str], reason: str) -> str:
    """Exit code 2 and one line, which names the file, the record, the argument or the remedy; returns the line."""
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and reason in lines[0], ended.stderr
    return lines[0]


def stand_in(folder: Path, gpus: str, check: bool = False) -> str:
    """A program that says which GPUs there are, and writes down the command that it gets otherwise.

    Args:
        check: the check before the training is really run.
    """
    python = folder / "python"
    checked = f'exec {PYTHON} "$@"' if check else ":"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
    *scripts/shell/gpus.py) echo {gpus} ;;
    *" tive.training.checks "*) {checked} ;;
    *) printf "%s\\n" "$@" >{folder}/command ;;
esac
"""
    )
    python.chmod(0o755)
    return str(python)


def command_on(gpus: str, settings: dict[str, str], script: str, *arguments: str) -> list[str]:
    folder = Path(settings["OUTPUT_DIR"]).parent
    launch(script, settings | {"PYTHON": stand_in(folder, gpus)}, *arguments).check_returncode()
    return (folder / "command").read_text().splitlines()


def value_of(command: list[str], name: str) -> str:
    return command[len(command) - command[::-1].index(name)]
