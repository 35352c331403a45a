"""The settings of LLaVA's trainer that decide whether a training can end well and be followed by the gradient step.

LLaVA takes any word for a setting and computes something: an unknown template is `vicuna_v1`, an unknown aspect ratio
`square`. Here every such setting is one of a list. This module imports no library, so that it answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from tive.data.training_record import ASPECT_RATIOS, TEMPLATES, lacks_tokenizer, model_folder
from tive.util.errors import UserError
from tive.util.files import read_json

PRETRAINED_PROJECTOR = "./checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin"
# Names of --version that LLaVA's trainer knows and that are of use to whole models alone.
_OTHER_TEMPLATES = ("v0", "v0.5", "default", "plain", "v0_plain", "mpt", "chatml_direct", "mistral_direct")
# The settings that are looked at, with LLaVA's own defaults; switches are True or False.
_DEFAULTS = {
    "data_path": None,
    "output_dir": None,
    "model_name_or_path": None,
    "image_folder": None,
    "vision_tower": None,
    "pretrain_mm_mlp_adapter": None,
    "cache_dir": None,
    "version": "v0",
    "image_aspect_ratio": "square",
    "mm_projector_type": "linear",
    "mm_patch_merge_type": "flat",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": "-1",
    "mm_use_im_start_end": "False",
    "mm_use_im_patch_token": "True",
    "bits": "16",
    "fsdp": "",
    "lora_enable": "False",
    "lora_bias": "none",
    "tune_mm_mlp_adapter": "False",
    "freeze_mm_mlp_adapter": "False",
}
_TRUE, _FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
# The values of a setting that are taken, as one pattern, and why no other is.
_TAKEN = {
    "version": ("|".join((*TEMPLATES, *_OTHER_TEMPLATES)), "LLaVA's trainer would take vicuna_v1 for an unknown one"),
    "image_aspect_ratio": ("|".join(ASPECT_RATIOS), "LLaVA 1.5 trains every other word as square"),
    "mm_patch_merge_type": ("flat", "the others are for images of several tiles"),
    "mm_projector_type": (r"linear|mlp[1-9]\d*x_gelu", "LLaVA-1.5's is mlp2x_gelu"),
    "mm_vision_select_feature": ("patch|cls_patch", "LLaVA knows no other"),
    "mm_use_im_start_end": ("False", "LLaVA-1.5's projector has no such tokens"),
    "mm_use_im_patch_token": ("False", "LLaVA-1.5's projector has no such tokens"),
    "bits": ("16", "the gradient step reads the base as it is, not quantized"),
}
_TAKEN_WITH_LORA = {
    "version": ("|".join(TEMPLATES), "a reference model can have no other template"),
    "lora_bias": ("none", "biases beside the adapter are not supported"),
    "tune_mm_mlp_adapter": ("False", "it freezes the LoRA adapter; the projector is trained with it anyway"),
    "freeze_mm_mlp_adapter": ("False", "no projector would be saved; --mm_projector_lr 0 keeps it as it is"),
    "fsdp": ("", "LLaVA saves only a part of the adapter under FSDP"),
}


def read_settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings that are looked at; of a repeated argument the last one counts, as for LLaVA.

    Raises:
        UserError: a switch is neither true nor false.
    """
    parser = argparse.ArgumentParser(prog="tive.training", allow_abbrev=False, add_help=False)
    for name, default in _DEFAULTS.items():
        needed = name in ("data_path", "output_dir", "model_name_or_path")
        parser.add_argument(f"--{name}", nargs="?", const="True", default=default, required=needed)
    settings, _ = parser.parse_known_args(arguments)
    for name, default in _DEFAULTS.items():
        if default in ("True", "False"):  # what transformers' parser makes of a switch
            word = getattr(settings, name).lower()
            if word not in (*_TRUE, *_FALSE):
                raise UserError(f"--{name} {getattr(settings, name)} is neither True nor False")
            setattr(settings, name, word in _TRUE)
    return settings


def check_settings(settings: argparse.Namespace) -> None:
    """Refuse what LLaVA's trainer would take for something else, or what the gradient step could not follow.

    Raises:
        UserError: such a setting, with the values that are taken.
    """
    for name, (taken, why) in [*_TAKEN.items(), *(_TAKEN_WITH_LORA.items() if settings.lora_enable else ())]:
        value = str(getattr(settings, name))
        if not re.fullmatch(taken, value):
            remedy = f"write --{name} {taken.replace('|', ' or ')}" if taken else f"leave --{name} out"
            raise UserError(f"--{name} {value}: {why}; {remedy}")


def model_config(name: str, what: str, variable: str, cache_dir: str | None = None) -> tuple[dict[str, Any], str]:
    """A model's config.json, and where the model comes from: a folder, or the hub, which is asked for the file.

    Args:
        what, variable: the model's part in the training, and the variable that sets it, for messages.

    Raises:
        UserError: there is no such model, or it is an adapter.
    """
    folder, source = model_folder(name, cache_dir), "folder" if os.path.isdir(name) else "downloaded before"
    if folder is None:
        if name.startswith((".", "/", "~")) or name.count("/") != 1:
            raise UserError(f"{what}: {name} is not there; set {variable} to a folder or to a name on huggingface.co")
        from huggingface_hub import hf_hub_download

        source = "to be downloaded from huggingface.co"
        try:
            folder = Path(hf_hub_download(name, "config.json", cache_dir=cache_dir)).parent
        except (OSError, ValueError) as error:
            raise UserError(
                f"{what}: {name} is neither a folder nor downloaded, and huggingface.co gives no config.json of it; "
                f"set {variable} to a folder"
            ) from error
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{what}: {name} is a LoRA adapter, not a whole model; merge it into its base with LLaVA's "
            f"merge_lora_weights.py, and set {variable} to the result"
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{what}: {folder}/config.json is not a JSON object; set {variable} to another model")
    return config, source


def base_config(settings: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """The config.json of the base, which is whole and not quantized, and where it comes from.

    A base that is a LLaVA model keeps its tower and projector, whatever the arguments say.

    Raises:
        UserError: it is another kind of model, or the arguments say something else than it.
    """
    name = settings.model_name_or_path
    base, source = model_config(name, "base model", "MODEL", settings.cache_dir)
    folder = Path(name)  # a hub's model has been downloaded in part at most
    lacking = lacks_tokenizer(folder) if folder.is_dir() else None
    if lacking:
        raise UserError(f"base model: {lacking}")
    if base.get("quantization_config"):
        raise UserError(f"{name} is quantized; name the base that it was made from")
    if has_projector(base):
        tower, given = str(base["mm_vision_tower"]), settings.vision_tower
        if not given or (tower != given and os.path.realpath(tower) != os.path.realpath(given)):
            raise UserError(f"{name} is a LLaVA model, whose vision tower is trained with; set VISION_TOWER={tower}")
        for key in ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"):
            if key in base and str(base[key]) != getattr(settings, key):
                raise UserError(f"{name} is a LLaVA model with {key} {base[key]}; add --{key} {base[key]}")
    return base, source


def has_projector(base: dict[str, Any]) -> bool:
    """Whether a base is a LLaVA model, with a projector of its own."""
    return "mm_vision_tower" in base


def projector_of(settings: argparse.Namespace, base: dict[str, Any]) -> str | None:
    """The file that the projector starts from; None where it starts as the base has it, or at random without one.

    Raises:
        UserError: an empty name where the base has no projector, or a file that is not there.
    """
    named = settings.pretrain_mm_mlp_adapter
    if named == "auto":
        named = None if has_projector(base) else PRETRAINED_PROJECTOR
    if named == "" and not has_projector(base):
        raise UserError(
            f"{settings.model_name_or_path} has no projector of its own; set PROJECTOR to LLaVA's mm_projector.bin"
        )
    if named and not os.path.isfile(named):
        raise UserError(
            f"projector: {named} is not there; set PROJECTOR to LLaVA's mm_projector.bin (docs/training.md)"
        )
    return named or None
