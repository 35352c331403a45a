"""Bunny: load a LoRA reference model that Bunny's trainer wrote, encode a record, the losses of a batch.

Bunny's own code (BAAI-DCAI/Bunny) is on no registry and is not used: transformers' classes are the language model and
the SigLIP tower, an `nn.Sequential` is the projector. `bunny_encoding.py` holds template, masking and pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.data.conversations import image_of
from tive.data.images import BadImage, read_image
from tive.data.problems import problem_of
from tive.models import Answer, Encoded, LeftOut, ModelFiles, Reference, spliced
from tive.models.adapter import check_adapter
from tive.models.bunny_encoding import (
    ENDS,
    ImageRules,
    TextRules,
    encode_text,
    pixels_of,
    read_image_rules,
    read_text_rules,
)
from tive.models.checkpoint import load_pretrained, loading, read_config, refuse_other_shape
from tive.models.common import base_folder, base_of, decoder_layers, freeze, library_versions, refuse_options
from tive.models.losses import packed
from tive.models.spliced import TRAINED_FILE
from tive.models.spliced import collate as collate
from tive.models.spliced import pads_images as pads_images
from tive.models.spliced import record_losses as record_losses
from tive.util.errors import UserError

record_problem = problem_of

TRAIN_IN_ONE_GO = (
    "Bunny writes it only when training ends, and going on from a checkpoint-N starts the projector afresh: train the "
    "reference model in one go (save_strategy no) and name its output_dir"
)


@dataclass(frozen=True)
class BunnyProcessor:
    """What a loader's worker needs to encode records; holds no weights."""

    text: TextRules
    image: ImageRules
    dtype: torch.dtype


class Bunny(nn.Module):
    """The parts of a Bunny model, by the names that Bunny's trainer gives them in its files."""

    def __init__(self, language_model: Any, tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.language_model, self.mm_projector = language_model, projector
        self.vision_tower = nn.ModuleDict({"vision_tower": tower})

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Features `[B, patches, hidden]` of images `[B, 3, side, side]`: all patches of the last but one layer."""
        vision = _vision_of(self.vision_tower["vision_tower"])
        features: Tensor = self.mm_projector(vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state)
        return features


def _vision_of(tower: Any) -> Any:
    """What computes a tower's features; transformers 5 has no model inside the model."""
    return getattr(tower, "vision_model", tower)


def check_files(files: ModelFiles) -> None:
    """What can be known about the model without loading it, and would not show when it is loaded.

    Raises:
        UserError: a file is missing or cannot serve, or adapter, base and tower do not fit together.
    """
    refuse_options(files, "chat_template", "max_length", "max_pixels", "load_in_4bit")
    folder, base = Path(files.model_path), base_of(files)
    if files.model_base is None:
        raise UserError(f"{folder}: a whole Bunny model cannot be read, only an adapter; name its base with it")
    for name in ("config.json", TRAINED_FILE):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}: {TRAIN_IN_ONE_GO}")
    check_adapter(folder)
    config = read_config(folder)
    if config.get("use_s2"):
        raise UserError(f"{folder}/config.json: use_s2 is not supported; train the reference model without use_s2")
    model_type = str(config.get("model_type"))
    if model_type not in ENDS:
        raise UserError(f"{folder}/config.json: the model type {model_type} is none of {', '.join(ENDS)}")
    of_base = read_config(base).get("model_type")
    if of_base != {"bunny-qwen": "qwen2"}.get(model_type, model_type.removeprefix("bunny-")):
        raise UserError(
            f"the base model {base} is of type {of_base}, the adapter in {folder} was trained as {model_type}; name "
            "the language model that Bunny's trainer started from (an adapter on a Bunny model is not supported)"
        )
    _language_config(base)
    refuse_other_shape(folder, base)
    read_processor(files)


def _language_config(base: Path) -> Any:
    """The base's config, of a language model that the installed transformers has."""
    from transformers import AutoConfig

    with loading(base):
        return AutoConfig.from_pretrained(str(base), trust_remote_code=False)


def tower_folder(files: ModelFiles) -> Path:
    """The folder of the SigLIP tower; its config says what a tower is, not its folder's name."""
    name = str(files.vision_tower or read_config(Path(files.model_path)).get("mm_vision_tower"))
    kind = None
    if not Path(name).is_file():  # EVA's towers are files
        try:
            tower = Path(base_folder(name))
        except UserError as error:
            raise UserError(f"the vision tower {name} is not there; name its folder as vision_tower") from error
        kind = read_config(tower).get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"the vision tower {name} is {kind or 'a file'}; only SigLIP towers are supported: train the reference "
            "model with one"
        )
    return tower


def read_processor(files: ModelFiles, dtype: torch.dtype = torch.float32) -> BunnyProcessor:
    """Template and pixels as the files of the reference model, its base and its tower set them.

    Raises:
        UserError: a file is missing, or says what is not computed here.
    """
    from transformers import SiglipVisionConfig

    folder = Path(files.model_path)
    config = read_config(folder)
    maximum = config.get("tokenizer_model_max_length")
    if not isinstance(maximum, int) or maximum < 1:
        raise UserError(
            f"{folder}/config.json: tokenizer_model_max_length is {maximum}; Bunny's trainer writes the "
            "model_max_length that it cut records at: put it there"
        )
    tower = tower_folder(files)
    with loading(tower):
        vision = SiglipVisionConfig.from_pretrained(str(tower))
    return BunnyProcessor(
        read_text_rules(base_of(files), config["model_type"], maximum),
        read_image_rules(tower, pads_images(files), vision.image_size, vision.patch_size),
        dtype,
    )


def identity(files: ModelFiles) -> str:
    """SHA-256 over what a reference model is: adapter, projector, tokenizer, settings, the files of base and tower."""
    named = ("model_type", "image_aspect_ratio", "mm_projector_type", "tokenizer_model_max_length")
    config = read_config(Path(files.model_path))
    return spliced.identity_of(files, tower_folder(files), {key: config.get(key) for key in named})


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
    from transformers import AutoModelForCausalLM, SiglipVisionModel

    folder, base = Path(files.model_path), base_of(files)
    config = _language_config(base)
    # A function's argument and no module, so eval mode of modules does not reach it under gradient checkpointing.
    config.attention_dropout = 0.0
    config.use_cache = False
    language_model = load_pretrained(
        AutoModelForCausalLM, base, (device, dtype), config=config, trust_remote_code=False
    )
    if language_model.lm_head.bias is not None:
        language_model.lm_head.bias = None  # Bunny's Phi has none
    # A whole SigLIP has a text model beside the tower.
    tower = load_pretrained(SiglipVisionModel, tower_folder(files), (device, dtype), ("text_model.", "logit_"))
    projector = _projector(folder, tower.config.hidden_size, config.hidden_size, dtype)
    model = Bunny(language_model, tower, projector)
    layers = decoder_layers(language_model)
    spliced.attach_trained(model, folder, layers, dtype)
    del _vision_of(tower).encoder.layers[-1]  # features are the last but one's

    # Never .to(dtype): it would round the rotary frequencies, which transformers computes in float32, by radians.
    model.to(device).requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    return Reference(model, layers, language_model.lm_head, read_processor(files, dtype), device, dtype)


def _projector(folder: Path, width: int, hidden: int, dtype: torch.dtype) -> nn.Module:
    """The projector that the config names, without numbers."""
    kind = read_config(folder).get("mm_projector_type", "mlp2x_gelu")
    maps = [nn.Linear(width, hidden, dtype=dtype, device="meta")]
    if kind == "linear":
        return maps[0]
    depth = str(kind).removeprefix("mlp").removesuffix("x_gelu")
    if not depth.isdecimal() or int(depth) < 1 or kind != f"mlp{depth}x_gelu":
        raise UserError(
            f"{folder}/config.json: the projector {kind} is not supported (supported: mlpNx_gelu and linear); train "
            "the reference model with mm_projector_type mlp2x_gelu"
        )
    maps += [nn.Linear(hidden, hidden, dtype=dtype, device="meta") for _ in range(int(depth) - 1)]
    return nn.Sequential(*[part for layer in maps for part in (nn.GELU(), layer)][1:])


def encode(processor: BunnyProcessor, record: dict[str, Any], image_folder: str) -> Encoded:
    """Encode one record as Bunny's trainer does.

    Raises:
        LeftOut: the record's image cannot be used, or nothing in it is supervised.
    """
    image, picture = image_of(record), None
    if image is not None:
        try:
            picture = read_image(image_folder, image, padded=processor.image.pad)
        except BadImage as error:
            raise LeftOut(str(error)) from error
        height = max(picture.size) if processor.image.pad else picture.height
        if height in (1, 3):
            raise LeftOut(f"unreadable image: {height} pixels high, which Bunny's image processor takes for channels")
    ids, labels = encode_text(processor.text, record["conversations"], has_image=picture is not None)
    ids, labels = spliced.splice(ids, labels, processor.image.patches, processor.text.maximum)
    pixels = None if picture is None else packed(pixels_of(processor.image, picture), processor.dtype)
    return spliced.spliced_record(ids, labels, pixels)


def answers(processor: BunnyProcessor, record: Encoded) -> list[Answer]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it."""
    tokenizer = processor.text.tokenizer
    return spliced.answers_of(
        record, processor.text.maximum, lambda ids: tokenizer.decode(ids).strip(), lambda _, start: start
    )


def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, with an image or without."""
    text = reference.processor.text
    ends = text.tokenizer.encode(text.end, add_special_tokens=False).ids[:1]
    return [text.tokenizer.decode(ids).strip() for ids in spliced.generate(reference, prompts, ends, max_new_tokens)]
