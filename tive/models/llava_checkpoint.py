"""What a LLaVA model's files say, and the model that they make: base, projector, tower and adapter, or a whole model.

Every setting that changes the numbers is checked against what is computed here; an unknown one is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tive.data.training_record import (
    ASPECT_RATIOS,
    RECORD_FILE,
    TEMPLATES,
    lacks_tokenizer,
    model_folder,
    read_record,
    weight_files,
)
from tive.models import ModelFiles, Reference
from tive.models.adapter import (
    CONFIG_FILE,
    check_adapter,
    place_tensors,
    read_tensors,
    tensor_shapes,
)
from tive.models.checkpoint import (
    load_pretrained,
    loading,
    print_named_base,
    read_config,
    refuse_other,
    refuse_other_shape,
)
from tive.models.common import base_of, decoder_layers, freeze, refuse_options
from tive.models.spliced import TRAINED_FILE, attach_trained, identity_of
from tive.util.errors import UserError
from tive.util.packages import package_in_use

# The template of a model without a record: the one that LLaVA-1.5's own scripts name.
DEFAULT_TEMPLATE = "v1"
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
_TOWER = ".vision_tower."


@dataclass(frozen=True)
class LlavaProcessor:
    """What a loader's worker needs to encode records; holds no weights."""

    template: str
    tokenizer: Any
    image_processor: Any
    image_config: SimpleNamespace
    image_features: int
    max_length: int
    dtype: torch.dtype


def check_files(files: ModelFiles) -> None:
    """What can be known about the model without loading it, and would not show when it is loaded.

    Raises:
        UserError: a file is missing, says what is not computed here, or does not fit the others.
    """
    refuse_options(files, "chat_template", "max_length", "max_pixels", "load_in_4bit")
    _check_library(files.model_path)
    folder, base = Path(files.model_path), base_of(files)
    if files.model_base is not None:
        check_adapter(folder)
        if not (folder / TRAINED_FILE).is_file():
            raise UserError(
                f"{folder} lacks {TRAINED_FILE}, the trained projector, which LLaVA's own trainer writes only when "
                "training ends; run finetune_lora.sh, which writes it beside every checkpoint, or go on to the end "
                "with it (the same OUTPUT_DIR) and name that OUTPUT_DIR as the model"
            )
    elif (folder / CONFIG_FILE).is_file():
        raise UserError(f"{folder} holds an adapter, which is no whole model; name its base with it")
    _check_settings(folder)
    refuse_other_shape(folder, base)
    lacking = lacks_tokenizer(base)
    if lacking:
        raise UserError(f"the base model {lacking}")
    _check_record(files)


def _check_library(model_path: str) -> None:
    package = package_in_use("llava", ("llava-torch", "llava"))
    if package is None:
        raise UserError(
            f"{model_path} is a LLaVA model, and this environment has no LLaVA; make the other one with "
            "`bash scripts/setup.sh` and run the same command with .venv/bin/python"
        )
    path, version = package
    if version is None or not version.startswith("1.2."):
        raise UserError(
            f"llava is taken from {path} ({version or 'which no pip installed'}), another LLaVA than the 1.2 that is "
            "supported; is PYTHONPATH set? `bash scripts/setup.sh` installs the right one"
        )


def _check_settings(folder: Path) -> None:
    for key, value in read_config(folder).items():
        if value not in _ALLOWED.get(key, (value,)):
            known = ", ".join(str(allowed) for allowed in _ALLOWED[key] if allowed is not None)
            raise UserError(
                f"{folder}/config.json: {key} {value!r} is not supported ({known}); train a reference model with "
                "finetune_lora.sh"
            )
        if key.startswith("mm_") and key not in (*_ALLOWED, *_READ, *_OF_THE_TRAINING) and value not in (None, False):
            raise UserError(
                f"{folder}/config.json: {key} {value!r} is no setting of LLaVA 1.5; it is another LLaVA's model"
            )


def _check_record(files: ModelFiles) -> None:
    """Compare what the training recorded beside the model, if anything, with what is used now."""
    folder = Path(files.model_path)
    config, record = read_config(folder), read_record(folder)
    name = files.vision_tower or str(config.get("mm_vision_tower"))
    tower = model_folder(name)
    if tower is None and not name.startswith(("openai/", "laion/")):
        raise UserError(f"the vision tower {name} is not there; name its folder as vision_tower")
    if record is None:
        return
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
    refuse_other(folder, "base model", record.base, None if files.model_base is None else Path(files.model_base))
    refuse_other(folder, "vision tower", record.vision_tower, tower)


def template_of(folder: Path) -> str:
    """The template that a model was trained with, as far as the training recorded it."""
    record = read_record(folder)
    return DEFAULT_TEMPLATE if record is None else record.template


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, base, tower, and how records are encoded."""
    folder = Path(files.model_path)
    settings = {key: read_config(folder).get(key) for key in (*_ALLOWED, *_READ, "tokenizer_model_max_length")}
    tower = model_folder(files.vision_tower or str(settings["mm_vision_tower"]))
    settings |= {"mm_vision_tower": None, "template": template_of(folder)}
    return identity_of(files, tower, settings)


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base, projector and LoRA adapter, or a whole model, into LLaVA's own class, proven to be what is on disk.

    Raises:
        UserError: a part is missing or does not fit the others; the file is named.
    """
    check_files(files)
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils import is_torch_sdpa_available

    folder, base = Path(files.model_path), base_of(files)
    if read_record(folder) is None:
        print(f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE}")
        if files.model_base is not None:
            print_named_base(folder, base)
    with loading(folder):
        config = LlavaConfig.from_pretrained(files.model_path)
    if files.vision_tower is not None:
        config.mm_vision_tower = files.vision_tower
    config.tokenizer_padding_side = "right"
    # LLaVA would load the tower with the model; its weights come from where the training had them.
    tower_in_base, config.unfreeze_mm_vision_tower = getattr(config, "unfreeze_mm_vision_tower", False), False
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False, trust_remote_code=False)
    tokenizer.model_max_length = getattr(config, "tokenizer_model_max_length", None) or 2048
    tokenizer.pad_token = tokenizer.unk_token

    model = load_pretrained(
        LlavaLlamaForCausalLM,
        base,
        (device, dtype),
        ("model.vision_tower.", *([] if files.model_base is None else ["model.mm_projector."])),
        config=config,
        low_cpu_mem_usage=True,
        attn_implementation="sdpa" if is_torch_sdpa_available() else "eager",
    )
    tower = model.get_vision_tower()
    _load_tower(tower, device)
    if tower_in_base:
        place_tensors(model, _tower_of_base(base), base, dtype)
    if files.model_base is not None:
        attach_trained(model, folder, decoder_layers(model), dtype)
    # A base has no projector: transformers leaves placeholders without memory.
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise UserError(f"{base} lacks {lacking[0]}; name a model that finetune.sh wrote, or train it again")
    model.to(device=device, dtype=dtype)

    freeze(model, gradient_checkpointing)
    model.config.use_cache = False
    image_config = SimpleNamespace(image_aspect_ratio=getattr(config, "image_aspect_ratio", None))
    features = tower.num_patches + (tower.select_feature == "cls_patch")
    processor = LlavaProcessor(
        template_of(folder), tokenizer, tower.image_processor, image_config, features, tokenizer.model_max_length, dtype
    )
    return Reference(model, decoder_layers(model), model.lm_head, processor, device, dtype)


def _load_tower(tower: Any, device: torch.device) -> None:
    """LLaVA's `load_model` for the vision tower, which would start what its files lack from random numbers."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    name = tower.vision_tower_name
    with loading(name):
        tower.image_processor = CLIPImageProcessor.from_pretrained(name)
    # A whole CLIP has a text model beside the tower.
    apart = ("text_", "logit_", "visual_projection")
    tower.vision_tower = load_pretrained(CLIPVisionModel, name, (device, torch.float32), apart)
    tower.is_loaded = True


def _tower_of_base(base: Path) -> dict[str, Tensor]:
    """The tuned tower that a LLaVA base holds."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(base):
        if any(_TOWER in name for name in tensor_shapes(path)):
            tensors |= {name: value for name, value in read_tensors(path).items() if _TOWER in name}
    if not tensors:
        raise UserError(f"{base} says that its vision tower was tuned and holds no weights of it; name the whole model")
    return tensors
