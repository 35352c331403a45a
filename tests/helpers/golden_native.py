"""The golden models of transformers' own classes: loaded, encoded, and copied for a test that changes them."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tive.models import Encoded, ModelFiles, Reference, native

GOLDEN = Path(__file__).parents[1] / "golden" / "native"
MODELS = ("llava_hf", "qwen2_5_vl", "internvl")
CPU = torch.device("cpu")


def files_of(model: str, **options: Any) -> ModelFiles:
    return ModelFiles(str(GOLDEN / model / "adapter"), str(GOLDEN / model / "base"), **options)


@functools.cache
def expected(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / model / "expected.json").read_text())


@functools.cache
def records_of(model: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / model / "data.json").read_text())


@functools.cache
def loaded(model: str, gradient_checkpointing: bool = False) -> Reference:
    torch.set_flush_denormal(True)
    return native.load(files_of(model), CPU, torch.float32, gradient_checkpointing)


@functools.cache
def encoded(model: str) -> tuple[Encoded, ...]:
    processor = loaded(model).processor
    return tuple(native.encode(processor, record, str(GOLDEN / model / "images")) for record in records_of(model))


def backend_of(reference: Reference) -> str:
    """Which of the library's two image processors was loaded, by what it is built on in every release."""
    bases = {base.__name__ for base in type(reference.processor.library.image_processor).__mro__}
    return "torchvision" if bases & {"TorchvisionBackend", "BaseImageProcessorFast"} else "pil"


def conversation(*turns: str, **more: Any) -> dict[str, Any]:
    """Turns of human and gpt in order."""
    names = ("human", "gpt")
    return {"conversations": [{"from": names[row % 2], "value": text} for row, text in enumerate(turns)], **more}


def ids_of(item: Encoded) -> list[int]:
    return item.inputs.arrays["input_ids"][0].tolist()


def copied(model: str, tmp_path: Path) -> ModelFiles:
    """A copy of a golden whose files a test may change."""
    for part in ("adapter", "base"):
        shutil.copytree(GOLDEN / model / part, tmp_path / part)
    return ModelFiles(str(tmp_path / "adapter"), str(tmp_path / "base"))


def change_config(folder: str, name: str = "adapter_config.json", **values: Any) -> None:
    path = Path(folder) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = Path(folder) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


def change_base(files: ModelFiles, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = Path(str(files.model_base)) / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})
