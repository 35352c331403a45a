"""Model families. A family is one module with the names of `Family`; nothing outside its file knows the family."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from tive.util.errors import UserError
from tive.util.files import read_json


class LeftOut(Exception):
    """Why a record has no gradient; the text is the reason that the manifest gives."""


@dataclass(frozen=True)
class ModelFiles:
    """Where a reference model lies: the adapter's folder, its base, and the tower if the checkpoint's is not there."""

    model_path: str
    model_base: str
    vision_tower: str | None = None


@dataclass(frozen=True)
class Encoded:
    """One record, ready to be put in a batch.

    Attributes:
        length: positions that the language model sees, images spliced in and cut at the maximum length.
        supervised: how many of them are targets, of which the record's loss is the mean.
        group: records of one group may share a batch.
        inputs: what the family's `record_losses` reads; it travels from a loader's worker process.
    """

    length: int
    supervised: int
    group: str
    inputs: Any


@dataclass(frozen=True)
class RecordLosses:
    """Of each record of a batch, float32 `[B]`: the mean cross-entropy over its supervised tokens, and EL2N if asked.

    EL2N is the mean over supervised tokens of `||p - onehot||_2`, p the predicted probabilities (Paul et al. 2021).
    """

    losses: Tensor
    el2n: Tensor | None


@dataclass(frozen=True)
class Reference:
    """A reference model in evaluation form: dropout off, nothing trainable.

    Attributes:
        model: an `nn.Module` of the family's own class, with the adapter's LoRA layers in it.
        layers: the language model's decoder layers, which the target modules lie in.
        processor: what a loader's worker needs to encode records; holds no weights.
    """

    model: Any
    layers: nn.ModuleList
    processor: Any
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True)
class Hints:
    """What messages say of a family: the template it encodes with, and what trains such a reference model."""

    template: str
    trainer: str


class Family(Protocol):
    """What a module in this folder offers; `models/llava.py` is one."""

    HINTS: Hints

    def check_files(self, files: ModelFiles) -> None:
        """What can be known without loading, in milliseconds; a `UserError` names what is missing or does not fit."""

    def identity(self, files: ModelFiles) -> str:
        """SHA-256 that tells this reference model from another one."""

    def load(
        self, files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
    ) -> Reference:
        """The reference model, proven to be what is on disk; else a `UserError` names the file."""

    def record_problem(self, record: Any) -> str | None:
        """What keeps the family from reading a record, in a few words; None when nothing does."""

    def pads_images(self, files: ModelFiles) -> bool:
        """Whether images are padded to a square, so that one long side alone can make them too large."""

    def encode(self, processor: Any, record: dict[str, Any], image_folder: str) -> Encoded:
        """One record, in a loader's worker; raises `LeftOut` with the reason why it has no gradient."""

    def record_losses(self, reference: Reference, records: Sequence[Encoded], el2n: bool = False) -> RecordLosses:
        """The losses of a batch of one group, with the graph that their gradients need."""

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that the numbers depend on."""


def family_of(model_path: str) -> Family:
    """The model family that `model_path/config.json` names (never guessed from the folder's name).

    Raises:
        UserError: there is no such folder or config, or no family is known for it.
    """
    config = Path(model_path) / "config.json"
    if not config.is_file():
        raise UserError(f"{model_path} holds no config.json; --model_path is the folder finetune_lora.sh wrote")
    content = read_json(config)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type in ("llava_llama", "llava"):
        from tive.models import llava

        return llava
    if str(model_type).startswith("bunny"):
        from tive.models import bunny

        return bunny
    raise UserError(f"{config}: the model type {model_type!r} is not supported (supported: llava_llama, bunny-...)")
