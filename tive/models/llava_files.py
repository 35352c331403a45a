"""What a LLaVA model's files say, read before any weight is loaded: configuration, and the training's record.

Every setting that changes the numbers is checked against what is computed here; an unknown one is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tive.data.training_record import (
    ASPECT_RATIOS,
    RECORD_FILE,
    TEMPLATES,
    TrainingRecord,
    difference,
    lacks_tokenizer,
    model_folder,
    read_record,
    weight_files,
)
from tive.models import ModelFiles
from tive.models.adapter import adapter_file, check_adapter, refuse_quantized
from tive.models.common import base_of, fingerprint
from tive.util.errors import UserError
from tive.util.files import read_json
from tive.util.packages import package_in_use

PROJECTOR_FILE = "non_lora_trainables.bin"
# The template of a model without a record: the one that LLaVA-1.5's own scripts name.
DEFAULT_TEMPLATE = "v1"
_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# Settings of LLaVA-1.5's models and the values that are computed; None where the key may be missing or null.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": (None, *ASPECT_RATIOS),
    "mm_patch_merge_type": (None, "flat"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "use_mm_proj": (None, True),
}
# Those that are computed whatever they are, or say how the training went.
_READ = ("mm_vision_tower", "mm_vision_select_layer", "mm_projector_type", "mm_hidden_size", "unfreeze_mm_vision_tower")
_OF_THE_TRAINING = ("mm_projector_lr", "mm_vision_tower_lr", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter")


def check_model(files: ModelFiles) -> str:
    """Read all configuration of a model; returns the template that it was trained with.

    Raises:
        UserError: a file is missing, or says what is not supported or does not fit the others.
    """
    _check_library(files.model_path)
    folder, base = Path(files.model_path), base_of(files)
    config = _read_config(folder)
    if files.model_base is None:
        _check_whole(folder)
    else:
        _check_adapter(folder)
    _check_settings(folder, config)
    _check_base(folder, config, base)
    tower = files.vision_tower or config.get("mm_vision_tower")
    if not tower or (model_folder(tower) is None and not tower.startswith(("openai/", "laion/"))):
        raise UserError(f"the vision tower {tower} is not there; name its folder as vision_tower")
    record = read_record(folder)
    if record is None:
        return DEFAULT_TEMPLATE
    _check_record(folder, config, record, None if files.model_base is None else base, model_folder(tower))
    return record.template


def _check_whole(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{folder} holds an adapter, which is no whole model; name its base with it")
    if not weight_files(folder):
        raise UserError(f"{folder} holds no weights; name a model that finetune.sh wrote, or download it again")


def _check_adapter(folder: Path) -> None:
    if not (folder / "adapter_config.json").is_file() or adapter_file(folder) is None:
        raise UserError(
            f"{folder} holds no LoRA adapter (adapter_config.json and adapter_model.safetensors or .bin); "
            "train one with finetune_lora.sh"
        )
    if not (folder / PROJECTOR_FILE).is_file():
        raise UserError(
            f"{folder} lacks {PROJECTOR_FILE}, the trained projector, which LLaVA's own trainer writes only when "
            "training ends; run finetune_lora.sh, which writes it beside every checkpoint, or go on to the end with it "
            "(the same OUTPUT_DIR) and name that OUTPUT_DIR as the model"
        )
    check_adapter(folder)


def _check_library(model_path: str) -> None:
    found = package_in_use("llava", ("llava-torch", "llava"))
    if found is None:
        raise UserError(
            f"{model_path} is a LLaVA model, and this environment has no LLaVA; make the other one with "
            "`bash scripts/setup.sh` and run the same command with .venv/bin/python"
        )
    path, version = found
    if version is None or not version.startswith("1.2."):
        raise UserError(
            f"llava is taken from {path} ({version or 'which no pip installed'}), another LLaVA than the 1.2 that is "
            "supported; is PYTHONPATH set? `bash scripts/setup.sh` installs the right one"
        )


def _read_config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise UserError(f"{folder}/config.json is not a JSON object; make or download it again")
    refuse_quantized(folder, config)
    return config


def _check_settings(folder: Path, config: dict[str, Any]) -> None:
    for key, allowed in _ALLOWED.items():
        if config.get(key) not in allowed:
            known = ", ".join(str(value) for value in allowed if value is not None)
            raise UserError(
                f"{folder}/config.json: {key} {config[key]!r} is not supported ({known}); train a reference model with "
                "finetune_lora.sh"
            )
    if not re.fullmatch(r"linear|mlp[1-9]\d*x_gelu", str(config.get("mm_projector_type", "linear"))):
        raise UserError(
            f"{folder}/config.json: mm_projector_type {config['mm_projector_type']!r} is neither linear nor mlpNx_gelu"
            "; train a reference model with finetune_lora.sh"
        )
    for key, value in config.items():
        if key.startswith("mm_") and key not in (*_ALLOWED, *_READ, *_OF_THE_TRAINING) and value not in (None, False):
            raise UserError(
                f"{folder}/config.json: {key} {value!r} is no setting of LLaVA 1.5; it is another LLaVA's model"
            )


def _check_base(folder: Path, config: dict[str, Any], base: Path) -> None:
    if not (base / "config.json").is_file():
        raise UserError(f"the base model {base} is not a model folder (no config.json); name the base's folder")
    of_base = _read_config(base)
    for key in _SHAPE_KEYS:
        if key in of_base and key in config and of_base[key] != config[key]:
            raise UserError(
                f"the base model {base} has {key} {of_base[key]}, the adapter in {folder} was trained on "
                f"{config[key]}; name the base model that finetune_lora.sh used"
            )
    lacking = lacks_tokenizer(base)
    if lacking:
        raise UserError(f"the base model {lacking}")


def _check_record(
    folder: Path, config: dict[str, Any], record: TrainingRecord, base: Path | None, tower: Path | None
) -> None:
    if record.template not in TEMPLATES:
        raise UserError(
            f"{folder / RECORD_FILE}: the template {record.template} is none of {', '.join(TEMPLATES)}; train a "
            "reference model with one of them"
        )
    if record.image_aspect_ratio != config.get("image_aspect_ratio"):
        raise UserError(
            f"{folder}/config.json: image_aspect_ratio {config.get('image_aspect_ratio')!r}, and the training used "
            f"{record.image_aspect_ratio!r} ({RECORD_FILE}); put config.json back"
        )
    differs = None if base is None else difference(record.base, base)
    if differs:
        raise UserError(
            f"the base model {base} is not the base that {folder} was trained on ({differs}); name that one: "
            f"{record.base.get('path')}"
        )
    differs = difference(record.vision_tower, tower) if record.vision_tower and tower else None
    if differs and record.vision_tower:
        raise UserError(
            f"the vision tower {tower} is not the one that {folder} was trained with ({differs}); name that one: "
            f"{record.vision_tower.get('path')}"
        )


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, base, tower, and how records are encoded."""
    folder, base = Path(files.model_path), base_of(files)
    config, record, adapter = _read_config(folder), read_record(folder), adapter_file(folder)
    adapted = [] if adapter is None else [adapter, folder / PROJECTOR_FILE]
    tower = model_folder(files.vision_tower or config["mm_vision_tower"])
    settings = {key: config.get(key) for key in (*_ALLOWED, *_READ, "tokenizer_model_max_length")}
    settings |= {"mm_vision_tower": None, "template": record.template if record else DEFAULT_TEMPLATE}
    weights = fingerprint([*adapted, base / "config.json"], [base, *([tower] if tower else [])])
    return hashlib.sha256(f"{weights} {json.dumps(settings, sort_keys=True)}".encode()).hexdigest()
