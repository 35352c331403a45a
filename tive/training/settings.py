"""The settings of LLaVA's trainer that decide whether a training can end well and be followed by the gradient step.

LLaVA takes any word for a setting and computes something: an unknown template is `vicuna_v1`, an unknown aspect ratio
`square`. Here every such setting is one of a list. This module imports no library, so that it answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tive.data.training_record import ASPECT_RATIOS, TEMPLATES, lacks_tokenizer, model_folder
from tive.util.errors import UserError
from tive.util.files import read_json

# Under these names pip knows LLaVA: from PyPI, or from its repository.
LLAVA_DISTRIBUTIONS = ("llava-torch", "llava")
LLAVA_VERSION = "1.2"
PRETRAINED_PROJECTOR = "./checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin"
# Names of --version that LLaVA's trainer knows and that are of use to whole models alone.
_OTHER_TEMPLATES = ("v0", "v0.5", "default", "plain", "v0_plain", "mpt", "chatml_direct", "mistral_direct")
_NEEDED = ("data_path", "output_dir", "model_name_or_path")
_PARTS = ("image_folder", "vision_tower", "pretrain_mm_mlp_adapter")
# LLaVA's own defaults.
_WORDS = {
    "version": "v0",
    "image_aspect_ratio": "square",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": "-1",
    "lora_bias": "none",
    "bits": "16",
    "fsdp": "",
    "cache_dir": None,
}
_SWITCHES = {
    "lora_enable": False,
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": True,
    "tune_mm_mlp_adapter": False,
    "freeze_mm_mlp_adapter": False,
}


def read_settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings that are looked at; of a repeated argument the last one counts, as for LLaVA.

    Raises:
        UserError: a switch is neither true nor false.
    """
    parser = argparse.ArgumentParser(prog="tive.training", allow_abbrev=False, add_help=False)
    for name in _NEEDED:
        parser.add_argument(f"--{name}", required=True)
    for name in _PARTS:
        parser.add_argument(f"--{name}")
    for name, default in _WORDS.items():
        parser.add_argument(f"--{name}", default=default)
    for name, on in _SWITCHES.items():
        parser.add_argument(f"--{name}", nargs="?", const="true", default=str(on))
    settings, _ = parser.parse_known_args(arguments)
    for name in _SWITCHES:
        setattr(settings, name, _truth(name, getattr(settings, name)))
    return settings


def _truth(name: str, word: str) -> bool:
    """What transformers' parser makes of a switch."""
    if word.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if word.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise UserError(f"--{name} {word} is neither True nor False")


def check_settings(settings: argparse.Namespace) -> None:
    """Refuse what LLaVA's trainer would take for something else, or what the gradient step could not follow.

    Raises:
        UserError: such a setting; it is named with the remedy.
    """
    reference = settings.lora_enable
    if settings.version not in TEMPLATES and (reference or settings.version not in _OTHER_TEMPLATES):
        raise UserError(
            f"--version {settings.version} is not a template that a reference model can have; one of "
            f"{', '.join(TEMPLATES)}"
            if reference
            else f"--version {settings.version} is unknown to LLaVA's trainer, which would take vicuna_v1; write v1"
        )
    if settings.image_aspect_ratio not in ASPECT_RATIOS:
        raise UserError(
            f"--image_aspect_ratio {settings.image_aspect_ratio} would be trained as square by LLaVA 1.5; it is one of "
            f"{', '.join(ASPECT_RATIOS)}"
        )
    if settings.mm_patch_merge_type != "flat":
        raise UserError(
            f"--mm_patch_merge_type {settings.mm_patch_merge_type} is for images of several tiles; write flat"
        )
    if not re.fullmatch(r"linear|mlp[1-9]\d*x_gelu", settings.mm_projector_type):
        raise UserError(
            f"--mm_projector_type {settings.mm_projector_type} is neither linear nor mlpNx_gelu (LLaVA-1.5: mlp2x_gelu)"
        )
    if settings.mm_vision_select_feature not in ("patch", "cls_patch"):
        raise UserError(
            f"--mm_vision_select_feature {settings.mm_vision_select_feature} is neither patch nor cls_patch"
        )
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if getattr(settings, name):
            raise UserError(
                f"--{name} True adds tokens to the vocabulary, which neither LLaVA-1.5's projector nor the gradient "
                f"step knows; write --{name} False"
            )
    if settings.bits != "16":
        missing = "" if find_spec("bitsandbytes") else " (and bitsandbytes is not installed)"
        raise UserError(
            f"--bits {settings.bits} would train on a quantized base{missing}, and the gradient step reads the base as "
            "it is; leave --bits out"
        )
    if reference:
        _check_lora_settings(settings)


def _check_lora_settings(settings: argparse.Namespace) -> None:
    if settings.lora_bias != "none":
        raise UserError(f"--lora_bias {settings.lora_bias}: biases beside the adapter are not supported; write none")
    if settings.tune_mm_mlp_adapter:
        raise UserError(
            "--tune_mm_mlp_adapter True freezes the LoRA adapter; leave it out, the projector is trained with it"
        )
    if settings.freeze_mm_mlp_adapter:
        raise UserError(
            "--freeze_mm_mlp_adapter True leaves the model without a projector file, which the gradient step needs; "
            "leave it out, or write --mm_projector_lr 0"
        )
    if settings.fsdp:
        raise UserError(f"--fsdp {settings.fsdp}: LLaVA saves only a part of the adapter under FSDP; leave it out")


def base_config(settings: argparse.Namespace) -> dict[str, Any]:
    """The base's config.json; of a name on the hub it is downloaded, which takes a moment.

    Raises:
        UserError: there is none.
    """
    name = settings.model_name_or_path
    folder = model_folder(name, settings.cache_dir)
    if folder is None:
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(name, "config.json", cache_dir=settings.cache_dir)).parent
        except (OSError, ValueError) as error:
            raise UserError(f"base model: {name} has no config.json that can be read; set MODEL to a folder") from error
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is not a JSON object; name another base")
    return config


def projector_of(settings: argparse.Namespace, base: dict[str, Any]) -> str | None:
    """The file that the projector starts from; None where it starts as the base has it, or at random without one.

    Args:
        base: the base's config.json. One with a vision tower is a LLaVA model and has a projector of its own.

    Raises:
        UserError: an empty name where the base has no projector.
    """
    named, own = settings.pretrain_mm_mlp_adapter, has_projector(base)
    if named == "auto":
        return None if own else PRETRAINED_PROJECTOR
    if named == "" and not own:
        raise UserError(
            f"{settings.model_name_or_path} has no projector of its own; set PROJECTOR to LLaVA's mm_projector.bin"
        )
    return named or None


def has_projector(base: dict[str, Any]) -> bool:
    return "mm_vision_tower" in base


def check_base(settings: argparse.Namespace, base: dict[str, Any]) -> None:
    """A base is whole and not quantized; a LLaVA model keeps its tower and projector, whatever the arguments say.

    Raises:
        UserError: it is not, or the arguments say something else.
    """
    folder = Path(settings.model_name_or_path)  # a hub's model has been downloaded in part at most
    lacking = lacks_tokenizer(folder) if folder.is_dir() else None
    if lacking:
        raise UserError(f"base model: {lacking}")
    if "quantization_config" in base:
        raise UserError(f"{settings.model_name_or_path} is quantized; name the base that it was made from")
    if not has_projector(base):
        return
    own, given = base["mm_vision_tower"], settings.vision_tower
    if not given:
        raise UserError(f"{settings.model_name_or_path} is a LLaVA model; set VISION_TOWER to its vision tower, {own}")
    if own != given and os.path.realpath(str(own)) != os.path.realpath(given):
        raise UserError(
            f"{settings.model_name_or_path} is a LLaVA model with the vision tower {own}, which LLaVA's trainer takes; "
            "set VISION_TOWER to it"
        )
    for name in ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"):
        if name in base and str(base[name]) != getattr(settings, name):
            raise UserError(
                f"{settings.model_name_or_path} is a LLaVA model with {name} {base[name]}; add --{name} {base[name]}"
            )
