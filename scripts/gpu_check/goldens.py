"""The golden models of the tests: loaded, and the norms and cosines that the step gives of their records."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from scripts.benchmark.whole import whole_gradients
from tive.models import Encoded, Family, ModelFiles, Reference, family_of

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
# Adapter, base, and the data's folder.
GOLDENS = {
    "llava": ("reference_model/llava-lora", "reference_model/vicuna", "reference_model"),
    "qwen2_5_vl": ("native/qwen2_5_vl/adapter", "native/qwen2_5_vl/base", "native/qwen2_5_vl"),
    "llava_hf": ("native/llava_hf/adapter", "native/llava_hf/base", "native/llava_hf"),
    "internvl": ("native/internvl/adapter", "native/internvl/base", "native/internvl"),
}
_OLDEST_TRANSFORMERS = (4, 57)


class NotHere(Exception):
    """Why a check cannot run on this machine."""


@dataclass(frozen=True)
class Golden:
    """A golden model and its records, encoded; what the published code computes of them."""

    family: Family
    reference: Reference
    records: list[Encoded]
    norms: np.ndarray
    cosines: np.ndarray

    def norms_and_cosines(self, size: int, loss_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Norms `[n]` and cosines `[n, n]` of the unprojected gradients, in batches of `size` records."""
        norms, gradients = whole_gradients(self.family, self.reference, self.records, size, loss_scale)
        return norms.numpy(), (gradients.double() @ gradients.double().T).numpy()


def lacks_library(name: str) -> str:
    """Why a golden model cannot be loaded here; empty where it can."""
    if name == "llava":
        return "" if importlib.util.find_spec("llava") else "the library llava is not installed"
    old = tuple(map(int, version("transformers").split(".")[:2])) < _OLDEST_TRANSFORMERS
    return f"transformers {version('transformers')} does not have its class" if old else ""


def golden(name: str, device: torch.device, dtype: torch.dtype, load_in_4bit: bool = False) -> Golden:
    """Load a golden model; a `NotHere` where its library is not here."""
    if reason := lacks_library(name):
        raise NotHere(reason)
    adapter, base, data = (GOLDEN / part for part in GOLDENS[name])
    tower = data / "clip"
    files = ModelFiles(str(adapter), str(base), str(tower) if tower.is_dir() else None, load_in_4bit=load_in_4bit)
    family = family_of(files)
    reference = family.load(files, device, dtype)
    content = json.loads((data / "data.json").read_text())
    records = [family.encode(reference.processor, record, str(data / "images")) for record in content]
    expected = json.loads((data / "expected.json").read_text())
    if "image_backends" in expected:
        bases = {base.__name__ for base in type(reference.processor.library.image_processor).__mro__}
        fast = bases & {"TorchvisionBackend", "BaseImageProcessorFast"}
        expected = expected["image_backends"]["torchvision" if fast else "pil"]
    return Golden(family, reference, records, np.array(expected["norms"]), np.array(expected["cosines"]))


def first_here() -> str:
    """The first golden model whose library is here; a `NotHere` where there is none."""
    names = [name for name in GOLDENS if not lacks_library(name)]
    if not names:
        raise NotHere("; ".join(f"{name}: {lacks_library(name)}" for name in GOLDENS))
    return names[0]
