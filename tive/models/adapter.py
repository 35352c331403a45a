"""Load a LoRA adapter and other trained tensors into a model, and prove that each found its place.

Tensors are read from safetensors, or with `weights_only=True`: a file can hold numbers and nothing that runs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.util.errors import UserError
from tive.util.files import read_json

# What a LoRA may start from without changing the base's weights.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Every release of peft adds keys to adapter_config.json. Those that LoRA is computed from:
_READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "init_lora_weights"}
_READ |= {"layers_to_transform", "layers_pattern"}
# Those that say how it was made, or matter only together with one that is refused:
_WITHOUT_EFFECT = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type"}
_WITHOUT_EFFECT |= {"auto_mapping", "lora_dropout", "fan_in_fan_out", "eva_config", "qalora_group_size"}
_WITHOUT_EFFECT |= {"megatron_core", "runtime_config"}
# And every other key says nothing by one of these values.
_NEUTRAL: tuple[Any, ...] = (None, False, {}, [], "", "none")
_UNSUPPORTED = {
    "use_dora": ("DoRA (use_dora)", "train with plain LoRA"),
    "use_rslora": ("rank-stabilised LoRA (use_rslora, of peft 0.8 and later)", "train with plain LoRA"),
    "use_qalora": ("QA-LoRA (use_qalora)", "train with plain LoRA on a base in full precision"),
    "loftq_config": ("LoftQ (loftq_config), which is for a quantized base", "train with plain LoRA"),
    "modules_to_save": ("modules_to_save", "train without it: LoRA and the projector alone"),
    "lora_bias": ("a bias in its matrices (lora_bias)", "train without it"),
    "bias": ("the base's biases (bias)", "train with bias none"),
}


def adapter_file(folder: Path) -> Path | None:
    """The weights of the adapter in a folder, or None."""
    files = (folder / "adapter_model.safetensors", folder / "adapter_model.bin")
    return next((file for file in files if file.is_file()), None)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file, or of a torch file that is allowed to hold nothing else."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and safetensors raise many kinds
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}; it is damaged or not trusted") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors; train the reference model again")
    return tensors


def tensor_names(path: Path) -> list[str]:
    """The names in a file of tensors, without reading them."""
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception:  # in torch's old format, or damaged, which `read_tensors` says
        return list(read_tensors(path))


def read_lora(path: Path) -> dict[str, Any]:
    """peft's configuration of an adapter: of LoRA, on the base as it is.

    Raises:
        UserError: it cannot be read, or is of another kind of adapter.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; train the reference model again")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: adapters of type {config.get('peft_type')!r} are not supported; train with LoRA")
    if config.get("init_lora_weights") not in _STARTS:
        raise UserError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights, which the adapter "
            "does not hold; train with init_lora_weights true"
        )
    return config


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, of LoRA on linear maps with nothing in it that would be passed over in silence.

    Raises:
        UserError: the configuration cannot be read, or names what is not supported; with the remedy.
    """
    path = folder / "adapter_config.json"
    config = read_lora(path)
    if not isinstance(config.get("r"), int) or config["r"] < 1:
        raise UserError(f"{path}: r {config.get('r')!r} is not a rank; train the reference model again")
    for key, value in config.items():
        if key not in _READ and key not in _WITHOUT_EFFECT and value not in _NEUTRAL:
            name, remedy = _UNSUPPORTED.get(key, (f"{key} {value!r}", f"leave {key} out"))
            raise UserError(f"{path}: the adapter was trained with {name}, which is not supported; {remedy}")
    embedding = next((name for name in tensor_names(require_adapter_file(folder)) if ".lora_embedding_" in name), None)
    if embedding:
        raise UserError(
            f"{folder}: the adapter has LoRA on an embedding ({embedding}), which is not supported; train without "
            "embed_tokens among the target modules"
        )
    return config


def refuse_quantized(folder: Path, config: dict[str, Any]) -> None:
    """Raise a `UserError` when a model's config.json says that its weights are, or were in training, quantized."""
    if config.get("quantization_config"):
        raise UserError(
            f"{folder}/config.json: quantization_config: gradients on a quantized base (QLoRA) are not supported; name "
            "the base in full precision, and train the reference model on it without bits"
        )


def require_adapter_file(folder: Path) -> Path:
    """The weights of the adapter in a folder; a `UserError` where there are none."""
    path = adapter_file(folder)
    if path is None:
        raise UserError(f"{folder} holds no adapter_model.safetensors or .bin; train the reference model again")
    return path


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the LoRA adapter of a folder into the model.

    Raises:
        UserError: it does not fit the model, or was never trained.
    """
    from peft import LoraConfig, get_peft_model

    path, config = require_adapter_file(folder), check_adapter(folder)
    known = {field.name for field in dataclasses.fields(LoraConfig)}
    # What it starts from is overwritten; keys that this peft does not know have no effect, as was checked.
    options = {key: value for key, value in config.items() if key in known and key != "peft_type"}
    options |= {"init_lora_weights": True, "inference_mode": True}
    try:
        wrapped = get_peft_model(model, LoraConfig(**options))
    except (TypeError, ValueError, KeyError, OSError) as error:
        raise UserError(f"{folder}/adapter_config.json: {str(error).splitlines()[0]}") from error
    tensors = {}
    for key, value in read_tensors(path).items():
        for half in (".lora_A.", ".lora_B."):
            key = key.replace(half + "weight", half + "default.weight")
        tensors[key] = value
    adapted = {name for name, _ in wrapped.named_parameters() if ".lora_A." in name or ".lora_B." in name}
    absent = sorted(adapted - set(tensors))
    if absent:
        raise UserError(f"{path} lacks {len(absent)} of the adapter's matrices, {absent[0]} among them")
    copy_into(wrapped, tensors, path)
    refuse_untrained(tensors, path)


def refuse_untrained(tensors: dict[str, Tensor], path: Path) -> None:
    """Raise a `UserError` when an adapter still is as it was drawn: every B matrix is zero."""
    if all(not value.any() for key, value in tensors.items() if ".lora_B." in key):
        raise UserError(f"{path}: every LoRA B matrix is zero, the adapter was never trained; train it for some steps")


def refuse_not_finite(key: str, value: Tensor, path: Path) -> None:
    """Raise a `UserError` when a trained tensor holds numbers that are not finite."""
    if not torch.isfinite(value).all():
        raise UserError(f"{path}: {key} holds numbers that are not finite; training diverged, train it again")


def copy_into(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    """Copy tensors to the parameters of the same names; each must find its place, in shape and in value."""
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        if key not in parameters:
            raise UserError(f"{path}: {key} has no place in the model; base, adapter and projector do not match")
        if parameters[key].shape != value.shape:
            raise UserError(
                f"{path}: {key} has shape {list(value.shape)}, the model wants {list(parameters[key].shape)}; "
                "base, adapter and projector do not match"
            )
        refuse_not_finite(key, value, path)
        if parameters[key].is_meta:  # the base has no projector: transformers leaves a placeholder without memory
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(value.to(parameters[key].dtype)))
        else:
            with torch.no_grad():
                parameters[key].copy_(value)
