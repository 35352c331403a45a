"""Bunny: load a LoRA reference model that Bunny's trainer wrote, encode a record, the losses of a batch.

Bunny's own code (BAAI-DCAI/Bunny) is on no registry and is not used: transformers' classes are the language model and
the SigLIP tower, an `nn.Sequential` is the projector. `bunny_encoding.py` holds template, masking and pixels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.data.conversations import problem_of
from tive.data.images import BadImage, find_image, open_image
from tive.data.media import image_of
from tive.models import Answer, Encoded, Hints, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import copy_into, load_adapter, read_tensors
from tive.models.bunny_encoding import IMAGE_ID, encode_text, pixels_of, splice
from tive.models.bunny_files import (
    TRAIN_IN_ONE_GO,
    Processor,
    check_files,
    identity,
    projector_depth,
    read_processor,
    tower_folder,
)
from tive.models.common import IGNORE, base_of, freeze, library_versions, loading, losses_at_supervised
from tive.models.generation import generate_ids, supervised_runs
from tive.util.errors import UserError
from tive.util.files import read_json

__all__ = [
    "HINTS",
    "answers",
    "check_files",
    "encode",
    "generate",
    "identity",
    "load",
    "pads_images",
    "record_losses",
    "record_problem",
    "versions",
]

HINTS = Hints(template="Bunny's", trainer="Bunny's finetune_lora.sh (docs/bunny.md)")


@dataclass(frozen=True)
class Inputs:
    """A record's arrays.

    Attributes:
        ids: int64 `[t]`; an image's features stand as one `IMAGE_ID` each.
        labels: int64 `[t]`; -100 where nothing is supervised.
        pixels: float32 `[3, side, side]`, or None where no `IMAGE_ID` stands.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None


class Bunny(nn.Module):
    """The three parts of a Bunny model; of the tower only what computes its features."""

    def __init__(self, language_model: Any, tower: Any, projector: nn.Module) -> None:
        super().__init__()
        self.language_model, self.projector = language_model, projector
        # `hidden_states[-2]`: neither the last layer nor the head is needed.
        self.patches, self.vision = tower.embeddings, tower.encoder
        del self.vision.layers[-1]

    def image_features(self, pixels: Tensor) -> Tensor:
        """Features `[B, patches, hidden]` of images `[B, 3, side, side]`."""
        features: Tensor = self.projector(self.vision(inputs_embeds=self.patches(pixels)).last_hidden_state)
        return features


def pads_images(files: ModelFiles) -> bool:
    """Whether images are padded to a square."""
    return read_json(Path(files.model_path) / "config.json").get("image_aspect_ratio") == "pad"


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return library_versions("transformers", "tokenizers", "peft", "pillow")


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base, adapter, tower and projector, and prove that they are what is on disk.

    Raises:
        UserError: a part is missing or does not fit the others; the file is named.
    """
    check_files(files)
    folder, base = Path(files.model_path), base_of(files)
    config = read_json(folder / "config.json")
    language_model = _load_language_model(base, dtype)
    load_adapter(language_model, folder)
    from transformers import SiglipVisionModel

    siglip = _from_pretrained(SiglipVisionModel, tower_folder(files, config), "the vision tower", dtype)
    tower = getattr(siglip, "vision_model", siglip)  # transformers 5 has no model inside the model
    projector = _projector(config, language_model.config.hidden_size, dtype)
    _load_trained(folder / "non_lora_trainables.bin", projector, tower, bool(config.get("unfreeze_vision_tower")))

    for parameter in language_model.parameters():  # newer peft keeps the adapter in float32
        parameter.data = parameter.data.to(dtype)
    # Never .to(dtype): it would round the rotary frequencies, which transformers computes in float32, by radians.
    model = Bunny(language_model, tower, projector).to(device)
    model.requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    return Reference(model, language_model.model.layers, read_processor(files, config), device, dtype)


def _load_language_model(base: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(f"the config of the base model {base}"):
        config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    # A function's argument and no module, so eval mode of modules does not reach it under gradient checkpointing.
    config.attention_dropout = 0.0
    config.use_cache = False
    model = _from_pretrained(
        AutoModelForCausalLM, base, "the base model", dtype, config=config, trust_remote_code=False
    )
    if model.lm_head.bias is not None:
        model.lm_head.bias = None  # Bunny's Phi has none
    return model


def _from_pretrained(kind: Any, folder: Path, what: str, dtype: torch.dtype, **options: Any) -> Any:
    """A model of transformers in `dtype`, every weight of which is in the folder."""
    with _quiet(), loading(f"{what} {folder}"):
        model, found = kind.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True, **options)
    for problem in ("missing_keys", "mismatched_keys"):
        if found[problem]:
            raise UserError(
                f"{what} {folder} lacks {len(found[problem])} weights, {min(map(str, found[problem]))} among them; "
                "download it again"
            )
    return model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' warnings of weights that are not used: a whole SigLIP has a text model beside the tower."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def _projector(config: dict[str, Any], hidden: int, dtype: torch.dtype) -> nn.Module:
    kind, width = config.get("mm_projector_type", "mlp2x_gelu"), config["mm_hidden_size"]
    if kind == "linear":
        return nn.Linear(width, hidden, dtype=dtype)
    layers: list[nn.Module] = [nn.Linear(width, hidden, dtype=dtype)]
    for _ in range((projector_depth(kind) or 1) - 1):
        layers += [nn.GELU(), nn.Linear(hidden, hidden, dtype=dtype)]
    return nn.Sequential(*layers)


def _load_trained(path: Path, projector: nn.Module, tower: nn.Module, has_tower: bool) -> None:
    """Copy what Bunny trained beside the adapter: the projector, and the tower where it was not frozen."""
    parts: dict[str, dict[str, Tensor]] = {"mm_projector.": {}, "vision_tower.vision_tower.vision_model.": {}}
    for key, value in read_tensors(path).items():
        part = next((part for part in parts if part in key), None)
        if part is None:
            raise UserError(f"{path}: {key} is neither the projector's nor the vision tower's; it is not supported")
        parts[part][key.partition(part)[2]] = value
    for (part, tensors), module, wanted in zip(parts.items(), (projector, tower), (True, has_tower), strict=True):
        absent = sorted({name for name, _ in module.named_parameters()} - tensors.keys()) if wanted else []
        if absent:
            raise UserError(f"{path} lacks {len(absent)} weights, {part}{absent[0]} among them: {TRAIN_IN_ONE_GO}")
        copy_into(module, tensors, path)


def record_problem(record: Any) -> str | None:
    """What keeps Bunny from training on a record; None when nothing does."""
    return problem_of(record)


def encode(processor: Processor, record: dict[str, Any], image_folder: str) -> Encoded:
    """Encode one record as Bunny's trainer does.

    Raises:
        LeftOut: the record's image cannot be used, or nothing in it is supervised.
    """
    image, picture = image_of(record), None
    if image is not None:
        try:
            picture = open_image(find_image(image_folder, image), padded=processor.image.pad)
        except BadImage as error:
            raise LeftOut(str(error)) from error
        height = max(picture.size) if processor.image.pad else picture.height
        if height in (1, 3):
            raise LeftOut(f"unreadable image: {height} pixels high, which Bunny's image processor takes for channels")
    ids, labels = encode_text(processor.text, record["conversations"], has_image=picture is not None)
    ids, labels = splice(ids, labels, processor.image.patches, processor.text.maximum)
    supervised = int(np.count_nonzero(labels[1:] != IGNORE))
    if not supervised:
        raise LeftOut("no supervised token")
    pixels = pixels_of(processor.image, picture) if picture is not None and IMAGE_ID in ids else None
    # A batch may hold records with an image and records without: one group.
    return Encoded(len(ids), supervised, "records", Inputs(ids, labels, pixels))


def record_losses(reference: Reference, records: Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, and EL2N if asked for.

    The records are padded on the right and attention is causal, so no position of a record sees the padding and no
    mask is needed.
    """
    language_model = reference.model.language_model
    embeddings, labels = _embed(reference, [record.inputs for record in records])
    hidden = language_model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return losses_at_supervised(hidden, language_model.lm_head, labels, el2n)


@torch.no_grad()
def _embed(reference: Reference, records: Sequence[Inputs]) -> tuple[Tensor, Tensor]:
    """Input embeddings `[B, T, hidden]` with image features in place, and labels `[B, T]`."""
    width = max(len(record.ids) for record in records)
    ids = torch.zeros(len(records), width, dtype=torch.long)
    labels = torch.full((len(records), width), IGNORE)
    for row, record in enumerate(records):
        ids[row, : len(record.ids)] = torch.from_numpy(record.ids)
        labels[row, : len(record.ids)] = torch.from_numpy(record.labels)
    places = [(ids[row] == IMAGE_ID).nonzero()[:, 0] for row in range(len(records))]
    model, device = reference.model, reference.device
    embeddings = model.language_model.model.embed_tokens(ids.clamp(min=0).to(device))
    pictures = {row: record.pixels for row, record in enumerate(records) if record.pixels is not None}
    if pictures:
        pixels = torch.from_numpy(np.stack(list(pictures.values()))).to(device, reference.dtype)
        for row, features in zip(pictures, model.image_features(pixels), strict=True):
            place = places[row].to(device)
            embeddings[row, place] = features[: len(place)]
    return embeddings, labels.to(device)


def answers(processor: Processor, record: Encoded) -> list[Answer]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it."""
    inputs, found = record.inputs, []
    for start, stop in supervised_runs(inputs.labels):
        if stop == processor.text.maximum:
            continue
        before = replace(inputs, ids=inputs.ids[:start], labels=inputs.labels[:start])
        expected = processor.text.tokenizer.decode(inputs.ids[start:stop].tolist()).strip()
        found.append(Answer(Encoded(start, 0, record.group, before), expected))
    return found


def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, which may have an image or none."""
    text = reference.processor.text
    ends = text.tokenizer.encode(text.end, add_special_tokens=False).ids[:1]
    embeddings, _ = _embed(reference, [prompt.inputs for prompt in prompts])
    lengths = [prompt.length for prompt in prompts]
    found = generate_ids(reference.model.language_model, embeddings, lengths, ends, max_new_tokens)
    return [text.tokenizer.decode(ids).strip() for ids in found]
