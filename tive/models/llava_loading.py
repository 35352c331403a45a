"""Load a LLaVA model: base, projector and LoRA adapter, or a whole model; proven to be what is on disk."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tive.data.training_record import RECORD_FILE, read_record, weight_files
from tive.models import ModelFiles, Reference
from tive.models.adapter import adapter_file, copy_into, load_adapter, read_tensors, tensor_names
from tive.models.common import base_of, freeze, loading
from tive.models.llava_files import DEFAULT_TEMPLATE, PROJECTOR_FILE, check_model
from tive.util.errors import UserError
from tive.util.files import read_json

TOWER = ".vision_tower."


@dataclass(frozen=True)
class Processor:
    """What a loader's worker needs to encode records; holds no weights."""

    template: str
    tokenizer: Any
    image_processor: Any
    image_config: SimpleNamespace
    image_features: int
    max_length: int


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base, projector and LoRA adapter, or a whole model, into LLaVA's own class, proven to be what is on disk.

    Raises:
        UserError: a part is missing or does not fit the others; the file is named.
    """
    template = check_model(files)
    folder, base = Path(files.model_path), base_of(files)
    if read_record(folder) is None and files.model_base is None:
        print(f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE}")
    elif read_record(folder) is None:
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        print(
            f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE} on {files.model_base} "
            f"(its adapter_config.json names the base {named})"
        )
    from llava.model.language_model.llava_llama import LlavaConfig
    from transformers import AutoTokenizer

    config = LlavaConfig.from_pretrained(files.model_path)
    if files.vision_tower is not None:
        config.mm_vision_tower = files.vision_tower
    config.tokenizer_padding_side = "right"
    # LLaVA would load the tower with the model; its weights come last here, from where the training had them.
    tower_in_base, config.unfreeze_mm_vision_tower = getattr(config, "unfreeze_mm_vision_tower", False), False
    with loading(f"the tokenizer of {base}"):
        tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False, trust_remote_code=False)
    tokenizer.model_max_length = getattr(config, "tokenizer_model_max_length", None) or 2048
    tokenizer.pad_token = tokenizer.unk_token

    model = _load_language_model(base, config, dtype)
    adapter = None if files.model_base is None else adapter_file(folder)
    if adapter is None:
        _load_tower(model.get_vision_tower())
        if tower_in_base:
            copy_into(model, _tower_of_base(base), base)
    else:
        _load_trained(model, folder, adapter, base if tower_in_base else None)
    placeholders = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if placeholders:
        raise UserError(f"no file of {folder} or {base} holds {placeholders[0]}; train the model again")
    model.to(device=device, dtype=dtype)

    freeze(model, gradient_checkpointing)
    model.config.use_cache = False
    image_config = SimpleNamespace(image_aspect_ratio=getattr(config, "image_aspect_ratio", None))
    tower = model.get_vision_tower()
    features = tower.num_patches + (tower.select_feature == "cls_patch")
    processor = Processor(
        template, tokenizer, tower.image_processor, image_config, features, tokenizer.model_max_length
    )
    return Reference(model, model.model.layers, processor, device, dtype)


def _load_trained(model: Any, folder: Path, adapter: Path, tower_base: Path | None) -> None:
    """Put projector, tower and adapter into the base's model, in the order of the training.

    Args:
        tower_base: where the tower's weights are, if the base's tower was tuned.
    """
    beside = _trained_beside_lora(folder / PROJECTOR_FILE)
    copy_into(model, {name: value for name, value in beside.items() if TOWER not in name}, folder / PROJECTOR_FILE)
    tower_has_lora = any(TOWER in name for name in tensor_names(adapter))
    if not tower_has_lora:  # else the tower's q_proj, k_proj ... would get adapters that were not trained
        load_adapter(model, folder)
    _load_tower(model.get_vision_tower())
    if tower_base is not None:
        copy_into(model, _tower_of_base(tower_base), tower_base)
    copy_into(model, {name: value for name, value in beside.items() if TOWER in name}, folder / PROJECTOR_FILE)
    if tower_has_lora:
        load_adapter(model, folder)


def _load_language_model(base: Path, config: Any, dtype: torch.dtype) -> Any:
    """LLaVA's model with the weights of a base or a whole model; of a base, projector and tower are still to come."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers.utils import is_torch_sdpa_available, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the projector is reported missing here because it comes from its own file
    warnings.filterwarnings("ignore", message=".*do_sample.*")  # Vicuna's generation config, which is not used here
    try:
        with loading(str(base)):
            model, found = LlavaLlamaForCausalLM.from_pretrained(
                base,
                config=config,
                torch_dtype=dtype,
                low_cpu_mem_usage=True,
                attn_implementation="sdpa" if is_torch_sdpa_available() else "eager",
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
    missing = [key for key in found["missing_keys"] if not key.startswith("model.mm_projector.")]
    if missing:
        raise UserError(f"{base} lacks {len(missing)} weights, {missing[0]} among them")
    return model


def _trained_beside_lora(path: Path) -> dict[str, Tensor]:
    """The projector and whatever else was trained whole, by the names that the model without LoRA has."""
    tensors = {}
    for key, value in read_tensors(path).items():
        key = key.removeprefix("base_model.")
        tensors[key.removeprefix("model.") if key.startswith("model.model.") else key] = value
    if not any("mm_projector" in key for key in tensors):
        raise UserError(f"{path} holds no mm_projector weights; train the reference model again")
    return tensors


def _load_tower(tower: Any) -> None:
    """LLaVA's `load_model` for the vision tower, which would start what its files lack from random numbers."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    with loading(f"the vision tower {tower.vision_tower_name}"):
        tower.image_processor = CLIPImageProcessor.from_pretrained(tower.vision_tower_name)
        tower.vision_tower, found = CLIPVisionModel.from_pretrained(tower.vision_tower_name, output_loading_info=True)
    missing = found["missing_keys"]
    if missing:
        raise UserError(
            f"the vision tower {tower.vision_tower_name} lacks {len(missing)} weights, {missing[0]} among them; "
            "download it again"
        )
    tower.is_loaded = True


def _tower_of_base(base: Path) -> dict[str, Tensor]:
    """The tuned tower that a LLaVA base holds."""
    found: dict[str, Tensor] = {}
    for path in weight_files(base):
        if any(TOWER in name for name in tensor_names(path)):
            found |= {name: value for name, value in read_tensors(path).items() if TOWER in name}
    if not found:
        raise UserError(f"{base} says that its vision tower was tuned and holds no weights of it; name the whole model")
    return found
