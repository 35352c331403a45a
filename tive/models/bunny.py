"""Bunny: a LoRA reference model that Bunny's trainer wrote, its language model and SigLIP tower of transformers.

Bunny's own code (BAAI-DCAI/Bunny) is on no registry and is not used; an `nn.Sequential` is the projector.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.data.problems import problem_of
from tive.models import ModelFiles, Reference, spliced
from tive.models.bunny_template import ENDS, read_template
from tive.models.checkpoint import load_pretrained, loading, read_config
from tive.models.common import base_of, decoder_layers, freeze
from tive.util.errors import UserError

LIBRARIES: tuple[str, ...] = ("transformers", "tokenizers", "peft", "pillow")
record_problem = problem_of
encode, answers, generate = spliced.encode, spliced.answers, spliced.generate
pads_images, collate, record_losses = spliced.pads_images, spliced.collate, spliced.record_losses

_IN_ONE_GO = (
    "only when training ends, and going on from a checkpoint-N starts the projector afresh: train the reference model "
    "in one go (save_strategy no) and name its output_dir"
)


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
    """What would not show at loading: files that do not fit each other, settings that are not computed."""
    folder, base = Path(files.model_path), base_of(files)
    if files.model_base is None:
        raise UserError(f"{folder}: a whole Bunny model cannot be read, only an adapter; name its base with it")
    config = spliced.check_parts(files, _IN_ONE_GO)
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
    read_processor(files)


def _language_config(base: Path) -> Any:
    """The base's config, of a language model that the installed transformers has."""
    from transformers import AutoConfig

    with loading(base):
        return AutoConfig.from_pretrained(str(base), trust_remote_code=False)


def tower_folder(files: ModelFiles) -> Path:
    """The folder of the SigLIP tower; its config says what a tower is, not its folder's name."""
    name, tower = spliced.tower_of(files)
    kind = read_config(tower).get("model_type") if tower else "not there, or a file as EVA's"
    if tower is None or kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"the vision tower {name} is {kind}, and only SigLIP towers are supported; name the folder of the one that "
            "the reference model was trained with as vision_tower"
        )
    return tower


def read_processor(files: ModelFiles, dtype: torch.dtype = torch.float32) -> spliced.SplicedProcessor:
    """Template and pixels as the files of the reference model, its base and its tower set them."""
    import transformers

    folder, tower = Path(files.model_path), tower_folder(files)
    config = read_config(folder)
    maximum = config.get("tokenizer_model_max_length")
    if not isinstance(maximum, int) or maximum < 1:
        raise UserError(
            f"{folder}/config.json: tokenizer_model_max_length is {maximum}; Bunny's trainer writes the "
            "model_max_length that it cut records at: put it there"
        )
    # transformers 5 has two, and the other one resizes otherwise than Bunny's.
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    with loading(tower):
        vision = transformers.SiglipVisionConfig.from_pretrained(str(tower))
        images = kind.from_pretrained(str(tower))
    side = vision.image_size
    if (images.size.get("height"), images.size.get("width"), images.do_resize) != (side, side, True):
        raise UserError(
            f"{tower}/preprocessor_config.json: images are not resized to the tower's {side} by {side} pixels; "
            "download the tower again"
        )
    template = read_template(base_of(files), config["model_type"], maximum)
    features = (side // vision.patch_size) ** 2
    return spliced.SplicedProcessor(template, images, pads_images(files), features, maximum, dtype)


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, tokenizer, settings, base and tower."""
    named = ("model_type", "image_aspect_ratio", "mm_projector_type", "tokenizer_model_max_length")
    config = read_config(Path(files.model_path))
    return spliced.identity_of(files, {key: config.get(key) for key in named})


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Base, adapter, tower and projector, proven to be what is on disk."""
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
    model, layers = Bunny(language_model, tower, projector), decoder_layers(language_model)
    spliced.attach_trained(model, folder, layers, dtype)
    del _vision_of(tower).encoder.layers[-1]  # features are the last but one's

    # Never .to(dtype): it would round the rotary frequencies, which transformers computes in float32, by radians.
    model.to(device).requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    return Reference(model, layers, language_model.lm_head, read_processor(files, dtype), device, dtype)


def _projector(folder: Path, width: int, hidden: int, dtype: torch.dtype) -> nn.Module:
    """The projector that the config names, without numbers."""
    kind = str(read_config(folder).get("mm_projector_type", "mlp2x_gelu"))
    named = re.fullmatch(r"linear|mlp([1-9]\d*)x_gelu", kind)
    if not named:
        raise UserError(
            f"{folder}/config.json: the projector {kind} is not supported (supported: mlpNx_gelu and linear); train "
            "the reference model with mm_projector_type mlp2x_gelu"
        )
    maps = [nn.Linear(width, hidden, dtype=dtype, device="meta")]
    if kind == "linear":
        return maps[0]
    maps += [nn.Linear(hidden, hidden, dtype=dtype, device="meta") for _ in range(int(named[1]) - 1)]
    return nn.Sequential(*[part for layer in maps for part in (nn.GELU(), layer)][1:])
