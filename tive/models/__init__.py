"""Model families. A family is one module with the names of `Family`; nothing outside its file knows the family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from tive.util.errors import UserError
from tive.util.files import read_object

if TYPE_CHECKING:  # the check before a training reads this room's records of trainings, and answers at once
    import torch
    from torch import Tensor, nn


class LeftOut(Exception):
    """Why a record has no gradient; the text is the reason that the manifest gives."""


# Reasons that are rarely the record's own fault, and the one of a loss or a gradient that overflowed.
UNSUPERVISED = ("no supervised token", "template mismatch")
NOT_FINITE = "not finite"


@dataclass(frozen=True)
class ModelFiles:
    """Where a model lies, and what a user may set of how it reads records."""

    model_path: str  # the adapter's folder, of a reference model; or a whole model's
    model_base: str | None  # what the adapter was trained from; None for a whole model, as `finetune.sh` writes it
    vision_tower: str | None = None  # its folder, where the checkpoint names one that is not there (LLaVA's, Bunny's)
    # Of transformers' models:
    chat_template: str | None = None  # a file that takes the place of the model's own template
    max_length: int | None = None  # longer records are left out
    max_pixels: int | None = None  # larger images are made smaller first
    load_in_4bit: bool = False  # quantise the base to NF4, as QLoRA trains on it

    @property
    def folder(self) -> Path:
        return Path(self.model_path)

    @property
    def base(self) -> Path:
        """Where language model and tokenizer come from: the adapter's base, or a whole model's own folder."""
        return Path(self.model_base or self.model_path)


@dataclass(frozen=True)
class Encoded:
    """One record, ready to be put in a batch."""

    length: int  # positions that the language model sees, images spliced in and cut at the maximum length
    supervised: int  # how many of them are targets, of which the record's loss is the mean
    group: str  # records of one group may share a batch
    inputs: Any  # what the family's `collate` reads; it travels from a loader's worker process
    text_alone: Encoded | None = None  # the record without its images, where it has any and that was asked for


@dataclass(frozen=True)
class Collated:
    """The records of a batch `[B, T]` as tensors, on the CPU or on a device, with its S supervised tokens."""

    inputs: dict[str, Tensor]  # the family's own
    positions: Tensor  # int64 `[S]`: where each supervised token is predicted, one before it, in the flattened batch
    targets: Tensor  # int64 `[S]`: their ids
    owners: Tensor  # int64 `[S]`: their records
    counts: Tensor  # float32 `[B]`: how many each record has

    def each(self, change: Callable[[Tensor], Tensor]) -> Collated:
        """The same with every tensor changed."""
        inputs, *supervised = vars(self).values()
        return Collated({name: change(part) for name, part in inputs.items()}, *map(change, supervised))

    def to(self, device: torch.device) -> Collated:
        """The same on a device; from pinned memory nothing waits for the copy."""
        return self.each(lambda part: part.to(device, non_blocking=True))


@dataclass(frozen=True)
class RecordLosses:
    """Of each record of a batch, float32 `[B]`: the mean cross-entropy over its supervised tokens, and EL2N if asked.

    EL2N is the mean over supervised tokens of `||p - onehot||_2`, p the predicted probabilities (Paul et al. 2021).
    """

    losses: Tensor
    el2n: Tensor | None


@dataclass(frozen=True)
class Reference:
    """A reference model, or a whole model, in evaluation form: dropout off, nothing trainable."""

    model: Any  # an `nn.Module` of the family's own class, with the adapter's LoRA layers in it
    layers: nn.ModuleList  # the language model's decoder layers, which the target modules lie in
    # Last hidden states to logits; None where the model does more than is known.
    head: Callable[[Tensor], Tensor] | None
    processor: Any  # what a loader's worker needs to encode records; holds no weights
    device: torch.device
    dtype: torch.dtype


class Family(Protocol):
    """What a module in this folder offers; `llava.py` is one. Libraries: those that the numbers depend on."""

    LIBRARIES: tuple[str, ...]

    def check_files(self, files: ModelFiles) -> None:
        """What can be known without loading, in milliseconds; a `UserError` names what is missing or does not fit."""

    def identity(self, files: ModelFiles) -> str:
        """SHA-256 that tells this reference model from another one."""

    def load(
        self, files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
    ) -> Reference:
        """The reference model, proven to be what is on disk; else a `UserError` names the file."""

    def record_problem(self, record: Any) -> str | None:
        """What keeps the family from reading a record, in a few words; None when nothing does.

        It is not asked about a plain record (`tive.data.trained.plain_images`), which every family reads.
        """

    def encode(self, processor: Any, record: dict[str, Any], image_folder: str) -> Encoded:
        """One record, in a loader's worker; raises `LeftOut` with the reason why it has no gradient."""

    def collate(self, reference: Reference, records: Sequence[Encoded]) -> Collated:
        """Records of one group as tensors of the CPU; touches no device, so that another thread may do it ahead."""

    def record_losses(
        self, reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False
    ) -> RecordLosses:
        """The losses of a batch, collated or not, with the graph that their gradients need; reads nothing back."""

    def answers(self, processor: Any, record: Encoded) -> list[tuple[Encoded, str]]:
        """Each answer of a record that can be asked for: all that stands before it, as a record, and its text.

        One that was cut at the maximum length cannot be, nor one before an image that a later turn brings.
        """

    def generate(self, reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
        """What the model answers to prompts of one group, greedily, cut after `max_new_tokens` tokens."""


def pads_images(files: ModelFiles) -> bool:
    """Whether a model's images are padded to a square, so that one long side alone can make them too large."""
    config = files.folder / "config.json"
    return config.is_file() and read_object(config).get("image_aspect_ratio") == "pad"


def family_of(files: ModelFiles) -> Family:
    """The family of a model, by what its files say (never guessed from a folder's name).

    LLaVA's trainer and its kin name the vision tower in the config that they write. Other trainers leave an adapter,
    mostly without a config, and the base's config has a vision part.

    Raises:
        UserError: there is no such folder, or no family is known for it.
    """
    from tive.models import bunny, llava, native

    folder, config = files.folder, files.folder / "config.json"
    is_adapter = (folder / "adapter_config.json").is_file()
    content = read_object(config) if config.is_file() else {}
    if not is_adapter and not content:
        raise UserError(f"{folder} holds no model, neither adapter_config.json nor config.json; check the path")
    if is_adapter and files.model_base is None:
        raise UserError(f"{folder} holds an adapter, which is no whole model; name its base with it")
    model_type = str(content.get("model_type"))
    if model_type == "llava_llama" or (model_type == "llava" and "mm_vision_tower" in content):
        return llava
    if model_type.startswith("bunny"):
        return bunny
    whole = files.base / "config.json"
    if "mm_vision_tower" not in content and whole.is_file() and "vision_config" in read_object(whole):
        return native
    raise UserError(
        f"{folder} is of no family that is known: neither LLaVA's nor Bunny's (model type {model_type!r} in its "
        f"config.json), and {whole.parent} is no vision-language model of transformers; name the folder that "
        "finetune_lora.sh writes when training ends, or an adapter and its base"
    )
