"""The golden models of the tests: loaded, and the norms and cosines that the step gives of their records."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from scripts.gpu_check.results import NotHere
from tive.features.batches import Batches
from tive.method.gradients import gradient_features
from tive.models import Encoded, Family, ModelFiles, Reference, family_of
from tive.models.common import target_modules

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
# Goldens by the library that their family needs: adapter, base, and the data's folder.
GOLDENS = {
    "llava": ("reference_model/llava-lora", "reference_model/vicuna", "reference_model"),
    "qwen2_5_vl": ("native/qwen2_5_vl/adapter", "native/qwen2_5_vl/base", "native/qwen2_5_vl"),
    "llava_hf": ("native/llava_hf/adapter", "native/llava_hf/base", "native/llava_hf"),
    "internvl": ("native/internvl/adapter", "native/internvl/base", "native/internvl"),
}
_OLDEST_TRANSFORMERS = (4, 57)


@dataclass(frozen=True)
class Golden:
    """A golden model and its records, encoded; what the published code computes of them."""

    family: Family
    reference: Reference
    records: list[Encoded]
    norms: np.ndarray
    cosines: np.ndarray


def refuse_missing_library(name: str) -> None:
    """See that the library of a golden model is here.

    Raises:
        NotHere: it is not.
    """
    if name == "llava" and importlib.util.find_spec("llava") is None:
        raise NotHere("the library llava is not installed")
    if name != "llava" and tuple(map(int, version("transformers").split(".")[:2])) < _OLDEST_TRANSFORMERS:
        raise NotHere(f"transformers {version('transformers')} does not have its class")


def golden(name: str, device: torch.device, dtype: torch.dtype, load_in_4bit: bool = False) -> Golden:
    """Load a golden model.

    Raises:
        NotHere: its library is not here.
    """
    refuse_missing_library(name)
    adapter, base, data = (GOLDEN / part for part in GOLDENS[name])
    before = os.getcwd()
    os.chdir(data)  # the config of one names its vision tower from there
    try:
        files = ModelFiles(str(adapter), str(base), load_in_4bit=load_in_4bit)
        family = family_of(files)
        reference = family.load(files, device, dtype)
        content = json.loads((data / "data.json").read_text())
        records = [family.encode(reference.processor, record, str(data / "images")) for record in content]
    finally:
        os.chdir(before)
    expected = json.loads((data / "expected.json").read_text())
    if "image_backends" in expected:
        bases = {base.__name__ for base in type(reference.processor.library.image_processor).__mro__}
        fast = bases & {"TorchvisionBackend", "BaseImageProcessorFast"}
        expected = expected["image_backends"]["torchvision" if fast else "pil"]
    return Golden(family, reference, records, np.array(expected["norms"]), np.array(expected["cosines"]))


def here() -> list[str]:
    """The golden models whose library is here.

    Raises:
        NotHere: none is.
    """
    names, reasons = [], []
    for name in GOLDENS:
        try:
            refuse_missing_library(name)
            names.append(name)
        except NotHere as reason:
            reasons.append(f"{name}: {reason}")
    if not names:
        raise NotHere("; ".join(reasons))
    return names


class WholeGradients:
    """A projector that keeps every number: features are the gradients themselves."""

    kind = about = "whole"

    def __init__(self, step_matrices: dict[str, torch.nn.Linear]) -> None:
        sizes = [matrix.weight.numel() for matrix in step_matrices.values()]
        self.starts = dict(zip(step_matrices, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.proj_dim = sum(sizes)

    def add(self, sketch: torch.Tensor, matrix_name: str, gradients: torch.Tensor) -> None:
        start = self.starts[matrix_name]
        sketch[:, start : start + gradients.shape[1]] = gradients


def norms_and_cosines(of: Golden, size: int, loss_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Norms `[n]` and cosines `[n, n]` of the unprojected gradients, in batches of `size` records."""
    matrices = target_modules(of.reference)
    projector = WholeGradients(matrices)
    norms, features = np.zeros(len(of.records)), np.zeros((len(of.records), projector.proj_dim))

    def losses(batch: Sequence[Encoded]) -> torch.Tensor:
        return of.family.record_losses(of.reference, batch).losses

    for batch in Batches(size, 16384).cut(list(enumerate(of.records))):
        rows = [row for row, _ in batch]
        computed = gradient_features(
            partial(losses, [item for _, item in batch]), matrices, projector, loss_scale=loss_scale
        )
        norms[rows], features[rows] = computed.norms.cpu().numpy(), computed.features.cpu().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return norms, features @ features.T
