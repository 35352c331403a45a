"""Put a LoRA adapter into a model of transformers, whatever release wrote it; each tensor finds its one place.

Releases of transformers nest a model's parts differently, and peft's own loader leaves out what it finds no name for.
So tensors and parameters are matched by canonical path, in which the names that come and go are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.models.adapter import adapter_file, read_lora, refuse_not_finite, refuse_untrained, require_adapter_file
from tive.util.errors import UserError

_DROPPED = frozenset(
    ("base_model", "model", "language_model", "text_model", "vision_model", "modules_to_save", "default", "base_layer")
)
_READ = {"peft_type", "r", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "modules_to_save"}
_READ |= {"target_modules", "exclude_modules", "layers_to_transform", "lora_bias"}
# Of no consequence for the trained weights, or seen in the file of weights itself.
_IGNORED = {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"}
_IGNORED |= {"lora_dropout", "rank_pattern", "layers_pattern", "bias", "eva_config", "qalora_group_size"}
_IGNORED |= {"megatron_core", "megatron_config", "runtime_config", "ensure_weight_tying"}


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter's configuration.

    Raises:
        UserError: a file is missing, or the configuration says what is not LoRA on linear maps.
    """
    path = folder / "adapter_config.json"
    if not path.is_file() or adapter_file(folder) is None:
        raise UserError(
            f"{folder} holds no LoRA adapter (adapter_config.json and adapter_model.safetensors or .bin); the "
            "model is the folder or checkpoint-N that the trainer wrote, before any merging"
        )
    config = read_lora(path)
    for key, value in config.items():
        if key not in _READ | _IGNORED and value not in (None, False, {}, []):
            name = "DoRA" if key == "use_dora" else f"{key} {value!r}"
            raise UserError(f"{path}: {name} is not supported; train with plain LoRA (rsLoRA is supported)")
    return config


def attach_adapter(model: nn.Module, folder: Path, tensors: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Put LoRA layers into the model where the tensors have them, and every tensor in its place.

    Args:
        tensors: the adapter's file; it also holds what was trained whole (`modules_to_save`, biases).
        dtype: of the LoRA matrices; what was trained whole gets its parameter's.

    Raises:
        UserError: a tensor has no place or not one, a place no tensor, a shape differs, or nothing was trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    path, config = require_adapter_file(folder), check_adapter(folder)
    embedded = next((key for key in tensors if ".lora_embedding_" in key), None)
    if embedded:
        raise UserError(f"{path}: {embedded}: LoRA on embeddings is not supported; train without it")
    modules = _by_path(
        name for name, module in model.named_modules() if isinstance(getattr(module, "weight", None), Tensor)
    )
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for key, value in tensors.items():
        trained, is_lora, _ = key.partition(".lora_A.")
        if is_lora:
            name = _place(modules, trained, f"{path}: {key}")
            ranks[name] = value.shape[0]
            alphas[name] = _alpha(config, trained)
    if not ranks:
        raise UserError(f"{path} holds no LoRA matrices; train the reference model with LoRA")
    for name in modules_of_pattern(model, config):
        if name not in ranks:
            raise UserError(f"{path} lacks the LoRA matrices of {name}, which its configuration names")
    named = list(ranks)
    options: dict[str, Any] = {"lora_alpha": alphas[named[0]]}
    if config.get("lora_bias"):
        options["lora_bias"] = True
    inject_adapter_in_model(
        LoraConfig(
            r=ranks[named[0]],
            target_modules=named,
            rank_pattern={re.escape(name): rank for name, rank in ranks.items() if rank != ranks[named[0]]},
            alpha_pattern={re.escape(name): alpha for name, alpha in alphas.items() if alpha != alphas[named[0]]},
            use_rslora=bool(config.get("use_rslora")),
            **options,
        ),
        model,
    )
    _fill(model, tensors, path, dtype)
    for name in config.get("modules_to_save") or []:
        if not any(f".{name}." in key for key in tensors):
            raise UserError(f"{path} lacks the weights of {name}, which adapter_config.json lists in modules_to_save")
    refuse_untrained(tensors, path)


def _fill(model: nn.Module, tensors: dict[str, Tensor], path: Path, dtype: torch.dtype) -> None:
    # Parameters that are tied stand under both names: what was trained apart has to get a place of its own.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places = _by_path(parameters)
    unfilled = {name for name in parameters if ".lora_" in name}
    for key, value in tensors.items():
        name = _place(places, key, f"{path}: {key}")
        if parameters[name].shape != value.shape:
            raise UserError(
                f"{path}: {key} has shape {list(value.shape)}, the model wants {list(parameters[name].shape)}; name "
                "the base that the adapter was trained on"
            )
        refuse_not_finite(key, value, path)
        owner, _, attribute = name.rpartition(".")
        kind = dtype if ".lora_" in name else parameters[name].dtype
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value.to(kind), requires_grad=False))
        unfilled.discard(name)
    if unfilled:
        raise UserError(f"{path} lacks {len(unfilled)} of the adapter's matrices, {min(unfilled)} among them")


def modules_of_pattern(model: nn.Module, config: dict[str, Any]) -> list[str]:
    """Linear maps that the configuration's target modules name in this model; those of another release, none.

    Not looked for where the configuration leaves out layers or modules again.
    """
    wanted, whole = config.get("target_modules") or [], config.get("modules_to_save") or []
    if config.get("layers_to_transform") is not None or config.get("exclude_modules") or wanted == "all-linear":
        return []

    def matches(name: str) -> bool:
        if set(whole) & set(name.split(".")):
            return False
        if isinstance(wanted, str):
            return re.fullmatch(wanted, name) is not None
        return any(name == end or name.endswith(f".{end}") for end in wanted)

    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and matches(name)]


def _alpha(config: dict[str, Any], trained: str) -> float:
    """The scale's numerator of one module: that of the pattern that its name in training ends with, or of all."""
    name = trained.removeprefix("base_model.model.")
    for pattern, alpha in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return float(alpha)
    return float(config["lora_alpha"])


def _canonical(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _DROPPED)


def _by_path(names: Iterable[str]) -> dict[str, list[str]]:
    places: dict[str, list[str]] = {}
    for name in names:
        places.setdefault(_canonical(name), []).append(name)
    return places


def _place(places: dict[str, list[str]], name: str, what: str) -> str:
    found = places.get(_canonical(name), [])
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{what} has {len(found)} places in the model, {found[0]} and {found[1]} among them")
    raise UserError(f"{what} has no place in the model; name the base that the adapter was trained on")
