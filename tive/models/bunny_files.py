"""What can be known of a Bunny reference model from its files alone: which model it is, and whether it can serve."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from tive.models import ModelFiles
from tive.models.adapter import adapter_file, check_adapter, refuse_quantized
from tive.models.bunny_encoding import ImageRules, TextRules, read_image_rules, read_text_rules
from tive.models.common import base_of, fingerprint, library_versions, loading, refuse_options
from tive.util.errors import UserError
from tive.util.files import read_json

_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
TRAIN_IN_ONE_GO = (
    "Bunny writes it only when training ends, and going on from a checkpoint-N starts the projector afresh: train the "
    "reference model in one go (save_strategy no) and name its output_dir"
)


@dataclass(frozen=True)
class LanguageModel:
    """A language model that Bunny trains.

    Attributes:
        base: the `model_type` of the base's config.
        end: what ends an answer in the template of this model type, which is stored nowhere.
        since: the first release of transformers that has it; None where none has.
        pads_with_end: whether Bunny makes `end` the padding, whatever the tokenizer says.
    """

    base: str
    end: str
    since: str | None
    pads_with_end: bool = False


LANGUAGE_MODELS = {
    "bunny-phi": LanguageModel("phi", "<|endoftext|>", "4.37.0"),
    "bunny-qwen2": LanguageModel("qwen2", "<|endoftext|>", "4.37.0"),
    "bunny-qwen": LanguageModel("qwen2", "<|endoftext|>", "4.37.0"),
    "bunny-llama": LanguageModel("llama", "<|end_of_text|>", "4.37.0", pads_with_end=True),
    "bunny-stablelm": LanguageModel("stablelm", "<|endoftext|>", "4.38.0"),
    "bunny-phi3": LanguageModel("phi3", "<|endoftext|>", "4.41.0"),
    "bunny-minicpm": LanguageModel("minicpm", "</s>", None),
}


@dataclass(frozen=True)
class Processor:
    """What a loader's worker needs to encode records; holds no weights."""

    text: TextRules
    image: ImageRules


def check_files(files: ModelFiles) -> None:
    """What can be known about the model without loading it.

    Raises:
        UserError: a file is missing or cannot serve, or adapter, base and tower do not fit together.
    """
    refuse_options(files, "chat_template", "max_length", "max_pixels")
    refuse_options(files, "chat_template", "max_length", "max_pixels")
    if files.model_base is None:
        raise UserError(
            f"{files.model_path}: a whole Bunny model cannot be read, only an adapter; name its base with it"
        )
    folder, base = Path(files.model_path), base_of(files)
    for name in ("config.json", "non_lora_trainables.bin"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} lacks {name}: {TRAIN_IN_ONE_GO}")
    if not (folder / "adapter_config.json").is_file() or adapter_file(folder) is None:
        raise UserError(
            f"{folder} holds no LoRA adapter (adapter_config.json and adapter_model.safetensors or .bin); a merged or "
            "fully trained Bunny model cannot serve: train one with Bunny's finetune_lora.sh"
        )
    config = read_json(folder / "config.json")
    refuse_quantized(folder, config)
    check_adapter(folder)
    _check_language_model(folder, config, base)
    if config.get("use_s2"):
        raise UserError(f"{folder}/config.json: use_s2 is not supported; train the reference model without use_s2")
    projector = config.get("mm_projector_type", "mlp2x_gelu")
    if projector_depth(projector) is None:
        raise UserError(
            f"{folder}/config.json: the projector {projector} is not supported (supported: mlpNx_gelu and linear); "
            "train the reference model with mm_projector_type mlp2x_gelu"
        )
    tower = tower_folder(files, config)
    width = _tower_config(tower).hidden_size
    if config.get("mm_hidden_size") != width:
        raise UserError(
            f"{folder}/config.json has mm_hidden_size {config.get('mm_hidden_size')}, the tower {tower} has {width}; "
            "name the tower that the adapter was trained with as vision_tower (one with S2 is not supported)"
        )
    read_processor(files, config)


def _check_language_model(folder: Path, config: dict[str, Any], base: Path) -> None:
    model_type = config.get("model_type")
    language_model = LANGUAGE_MODELS.get(str(model_type))
    if language_model is None:
        raise UserError(f"{folder}/config.json: the model type {model_type!r} is none of {', '.join(LANGUAGE_MODELS)}")
    if language_model.since is None:
        raise UserError(
            f"{folder}/config.json: {model_type} cannot be computed, no release of transformers has the language model "
            f"{language_model.base}; train a reference model on another base"
        )
    installed = library_versions("transformers")["transformers"]
    if Version(installed) < Version(language_model.since):
        raise UserError(
            f"{folder}/config.json: {model_type} needs transformers {language_model.since} or later, this is "
            f"{installed}; use an environment that has it (bash scripts/setup.sh native)"
        )
    if not (base / "config.json").is_file():
        raise UserError(f"the base model {base} is not a model folder (no config.json); name the base's folder")
    found = read_json(base / "config.json")
    kind = found.get("model_type") if isinstance(found, dict) else None
    if str(kind).startswith("bunny") or (isinstance(found, dict) and "mm_vision_tower" in found):
        raise UserError(
            f"the base model {base} is itself a Bunny model; an adapter that was trained on a Bunny model is not "
            "supported: train the reference model from the language model"
        )
    if kind != language_model.base:
        raise UserError(
            f"the base model {base} is of type {kind}, the adapter in {folder} ({model_type}) was trained on a "
            f"{language_model.base}; name the base that Bunny's trainer used"
        )
    for key in _SHAPE_KEYS:
        if key in found and key in config and found[key] != config[key]:
            raise UserError(
                f"the base model {base} has {key} {found[key]}, the adapter in {folder} was trained on {config[key]}; "
                "name the base that Bunny's trainer used"
            )


def projector_depth(kind: Any) -> int | None:
    """How many linear maps a projector has; None for a kind that is not supported."""
    if kind == "linear":
        return 1
    found = re.fullmatch(r"mlp([1-9]\d*)x_gelu", str(kind))
    return int(found[1]) if found else None


def tower_folder(files: ModelFiles, config: dict[str, Any]) -> Path:
    name = files.vision_tower or config.get("mm_vision_tower")
    if isinstance(name, str) and os.path.isdir(name):
        return Path(name)
    if isinstance(name, str) and os.path.isfile(name):
        raise UserError(f"the vision tower {name} is a file; only SigLIP towers are supported, which are folders")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(name), local_files_only=True))
    except (OSError, ValueError) as error:
        raise UserError(
            f"the vision tower {name} is neither a folder nor a downloaded model; name its folder as vision_tower"
        ) from error


def _tower_config(tower: Path) -> Any:
    """The vision part of a SigLIP's config; the config says what a tower is, not its folder's name."""
    from transformers import SiglipVisionConfig

    content = read_json(tower / "config.json")
    kind = content.get("model_type") if isinstance(content, dict) else None
    if kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"{tower}/config.json: the vision tower is of type {kind}; only SigLIP towers are supported: train the "
            "reference model with one"
        )
    with loading(f"the vision tower's {tower}/config.json"):
        return SiglipVisionConfig.from_pretrained(str(tower))


def read_processor(files: ModelFiles, config: dict[str, Any]) -> Processor:
    maximum = config.get("tokenizer_model_max_length")
    if not isinstance(maximum, int) or maximum < 1:
        raise UserError(
            f"{files.model_path}/config.json: tokenizer_model_max_length is {maximum}; Bunny's trainer writes the "
            "model_max_length that it cut records at: put it there"
        )
    language_model = LANGUAGE_MODELS[config["model_type"]]
    text = read_text_rules(base_of(files), language_model.end, language_model.pads_with_end, maximum)
    tower = tower_folder(files, config)
    vision = _tower_config(tower)
    pad = config.get("image_aspect_ratio") == "pad"
    return Processor(text, read_image_rules(tower, pad, vision.image_size, vision.patch_size))


def identity(files: ModelFiles) -> str:
    """SHA-256 over what a reference model is: adapter, projector, tokenizer, settings, the files of base and tower."""
    folder, base = Path(files.model_path), base_of(files)
    config = read_json(folder / "config.json")
    tower = tower_folder(files, config)
    adapter = adapter_file(folder)
    assert adapter is not None  # check_files has seen it
    hashed = (
        *(adapter, folder / "adapter_config.json", folder / "non_lora_trainables.bin"),
        *(base / "config.json", base / "tokenizer.json", base / "tokenizer_config.json"),
        *base.glob("special_tokens_map.json"),
        *(tower / "config.json", tower / "preprocessor_config.json"),
    )
    named = ("model_type", "image_aspect_ratio", "mm_projector_type", "tokenizer_model_max_length")
    settings = json.dumps({key: config.get(key) for key in named})
    return hashlib.sha256((fingerprint(hashed, (base, tower)) + settings).encode()).hexdigest()
