"""Load a LoRA adapter, and other trained tensors, into any model; each tensor has its one place.

Releases of transformers nest a model's parts differently, trainers write prefixes, and peft's own loader leaves out
tensors that it has no name for. So tensors and parameters are matched by canonical path: the names that come and go
are dropped. LoRA layers stand where the file has matrices, with the rank and scale of the training. Tensors are read
from safetensors, or with `weights_only=True`: a file can hold numbers and nothing that runs.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from os.path import commonprefix
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.models import ModelFiles
from tive.models.checkpoint import loading, stored_tensors
from tive.util.errors import UserError
from tive.util.files import read_object, sha256_of
from tive.util.text import first_line

CONFIG_FILE = "adapter_config.json"
# What LLaVA and Bunny train beside the LoRA matrices: the projector, and the vision tower where it was tuned.
TRAINED_FILE = "non_lora_trainables.bin"
# Names that come and go between releases, trainers, DeepSpeed, FSDP and torch.compile.
_DROPPED = frozenset(("base_model", "module", "model", "language_model", "text_model", "vision_model"))
_DROPPED |= {"modules_to_save", "default", "base_layer"}
_DROPPED |= {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Every release of peft adds keys to adapter_config.json. These are read here:
_KNOWN_KEYS = {"peft_type", "lora_alpha", "alpha_pattern", "use_rslora", "init_lora_weights", "modules_to_save"}
_KNOWN_KEYS |= {"target_modules", "exclude_modules", "layers_to_transform"}
# These are seen in the tensors themselves, or say how the training went:
_KNOWN_KEYS |= {"r", "rank_pattern", "layers_pattern", "bias", "lora_bias", "lora_dropout", "fan_in_fan_out"}
_KNOWN_KEYS |= {"peft_version", "base_model_name_or_path", "revision", "inference_mode", "task_type", "auto_mapping"}
_KNOWN_KEYS |= {"eva_config", "qalora_group_size", "megatron_core", "megatron_config", "runtime_config"}
_KNOWN_KEYS.add("ensure_weight_tying")
# Every other key says nothing by one of these values.
_NEUTRAL: tuple[Any, ...] = (None, False, {}, [], "", "none")
# What a LoRA may start from without changing the base's weights.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
_ANOTHER_BASE = "name the base that the adapter was trained on"


def adapter_file(folder: Path) -> Path:
    """The file with the adapter's tensors; a `UserError` where it or the adapter's configuration is not there."""
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        if (folder / name).is_file() and (folder / CONFIG_FILE).is_file():
            return folder / name
    raise UserError(
        f"{folder} holds no LoRA adapter ({CONFIG_FILE} and adapter_model.safetensors or .bin); name the folder or the "
        "checkpoint-N that the trainer wrote, before any merging, or train one with finetune_lora.sh"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, or of a torch file; a `UserError` where it holds anything else."""
    with loading(path):
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{path} is not a dictionary of tensors; train the reference model again")
    return tensors


def check_adapter(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, of LoRA on the base as it is; a `UserError` names what is anything else."""
    path, weights = folder / CONFIG_FILE, adapter_file(folder)
    config = read_object(path)
    if weights.suffix == ".safetensors":
        shapes = {name: shape for name, (shape, _) in stored_tensors(weights).items()}
    else:
        shapes = {name: tuple(value.shape) for name, value in read_tensors(weights).items()}
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}: adapters of type {config.get('peft_type')!r} are not supported; train with LoRA")
    if config.get("init_lora_weights") not in _STARTS:
        raise UserError(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base's weights, which the adapter "
            "does not hold; train with init_lora_weights true"
        )
    for key, value in config.items():
        if key not in _KNOWN_KEYS and value not in _NEUTRAL:
            name = "DoRA (use_dora)" if key == "use_dora" else f"{key} {value!r}"
            raise UserError(f"{path}: {name} is not supported; train with plain LoRA (rsLoRA is supported)")
    ranks = {shape[0] for name, shape in shapes.items() if ".lora_A." in name}
    for name, shape in shapes.items():
        if ".lora_embedding_" in name:
            raise UserError(f"{weights}: {name}: LoRA on an embedding is not supported; train without embed_tokens")
        if 0 in shape:
            raise UserError(
                f"{weights}: {name} is empty, as ZeRO-3 writes it where nothing is gathered; save the adapter again "
                "with stage3_gather_16bit_weights_on_model_save true"
            )
    if not ranks:
        raise UserError(f"{weights} holds no LoRA matrices; train the reference model with LoRA")
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{path}: lora_alpha {config.get('lora_alpha')!r} is not a number; train the adapter again")
    if not ranks <= {config.get("r"), *(config.get("rank_pattern") or {}).values()}:
        raise UserError(f"{path}: r {config.get('r')!r} is not the rank of {weights.name}; train the adapter again")
    return config


def fingerprint(files: ModelFiles, read: Iterable[Path], folders: Iterable[Path], *texts: str) -> str:
    """SHA-256 over the adapter, other files that may be there, folders' weights, and texts.

    Of weight files name, size and sampled content count: two bases of one shape differ in nothing but the content, and
    hashing 14 GB of it at each start would cost minutes.
    """
    adapter = [] if files.model_base is None else [adapter_file(files.folder), files.folder / CONFIG_FILE]
    digest = hashlib.sha256()
    for file in [*adapter, *(file for file in read if file.is_file())]:
        digest.update(sha256_of(file).encode())
    for folder in folders:
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("pytorch_model*.bin")]):
            digest.update(f"{file.name} {file.stat().st_size} {sha256_of(file, sampled=True)}\n".encode())
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()


def attach_adapter(model: nn.Module, folder: Path, layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Put LoRA layers into the model where the adapter's file has matrices, and every tensor in its place.

    A `UserError` as of `place_tensors`; or the configuration names a module that has no tensor, or every B is zero.

    Args:
        layers: the language model's decoder layers.
        dtype: of the LoRA matrices; what was trained whole (`modules_to_save`, biases) gets its parameter's.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config, path = check_adapter(folder), adapter_file(folder)
    tensors = read_tensors(path)
    modules = Names(name for name, module in model.named_modules() if hasattr(module, "weight"))
    keys = [key.partition(".lora_A.")[0] for key in tensors if ".lora_A." in key]
    trained = {modules.one(key, path): key.removeprefix("base_model.model.") for key in keys}
    whole = config.get("modules_to_save") or []
    missing = [name for name in whole if not any(f".{name}." in key for key in tensors)]
    missing += _named_without_tensor(model, config, set(trained), layers)
    if missing:
        raise UserError(f"{path} lacks the weights of {missing[0]}, which {CONFIG_FILE} names; train the adapter again")
    if all(not value.any() for key, value in tensors.items() if ".lora_B." in key):
        raise UserError(f"{path}: every LoRA B matrix is zero, the adapter was never trained; train it for some steps")
    # LoRA layers of rank 1, whose matrices those of the training replace. A pattern, since a name in a list also means
    # all that end with it; lora_bias is of peft 0.14 and later.
    options: dict[str, Any] = {"target_modules": "|".join(map(re.escape, trained))}
    options |= {"lora_bias": True} if config.get("lora_bias") else {}
    try:
        inject_adapter_in_model(LoraConfig(r=1, lora_alpha=1, **options), model)
    except (TypeError, ValueError) as error:
        raise UserError(f"LoRA on a module of the adapter is not supported: {first_line(error)}") from error
    filled = place_tensors(model, tensors, path, dtype)
    unfilled = [name for name, _ in model.named_parameters() if ".lora_" in name and name not in filled]
    if unfilled:
        raise UserError(f"{path} lacks {len(unfilled)} of the adapter's matrices, {unfilled[0]} among them")
    for name, key in trained.items():
        layer: Any = model.get_submodule(name)
        first, second = layer.lora_A["default"], layer.lora_B["default"]
        rank, patterns = len(first.weight), (config.get("alpha_pattern") or {}).items()
        if second.weight.shape[1] != rank:
            raise UserError(f"{path}: the two matrices of {key} have different ranks; train the adapter again")
        alpha = next((of for part, of in patterns if re.search(rf"(^|\.)({part})$", key)), config["lora_alpha"])
        first.out_features, second.in_features, layer.r["default"] = rank, rank, rank
        layer.scaling["default"] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def place_tensors(model: nn.Module, tensors: dict[str, Tensor], path: Path, lora_dtype: torch.dtype) -> set[str]:
    """Make each tensor of a file the parameter of its canonical path; returns the names of these parameters.

    A LoRA matrix may have another rank than the parameter and gets `lora_dtype`, others get the parameter's dtype. A
    `UserError` where a tensor has no place or more than one, a shape differs, or a number is not finite.
    """
    # Parameters that are tied stand under both names: what was trained apart has to get a place of its own.
    parameters = dict(model.named_parameters(remove_duplicate=False))
    places, filled = Names(parameters), set()
    for key, value in tensors.items():
        name = places.one(key, path)
        parameter, wanted = parameters[name], list(parameters[name].shape)
        if ".lora_" in name and value.ndim > 1:
            wanted[".lora_B." in name] = value.shape[".lora_B." in name]
        if list(value.shape) != wanted:
            raise UserError(f"{path}: {key} has shape {list(value.shape)}, the model wants {wanted}; {_ANOTHER_BASE}")
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds numbers that are not finite; training diverged, train it again")
        owner, _, attribute = name.rpartition(".")
        kind = lora_dtype if ".lora_" in name else parameter.dtype
        device = "cpu" if parameter.is_meta else parameter.device
        setattr(model.get_submodule(owner), attribute, nn.Parameter(value.to(device, kind), requires_grad=False))
        filled.add(name)
    return filled


def _named_without_tensor(
    model: nn.Module, config: dict[str, Any], trained: set[str], layers: nn.ModuleList
) -> list[str]:
    """The linear maps that `target_modules` names and that have no tensor in the adapter's file.

    The patterns that trainers write name modules as another release nests them, and then the vision tower too. So
    outside of the language model a part of which no map was trained was not meant. Not looked for where the
    configuration leaves out layers or modules again.
    """
    wanted, whole = config.get("target_modules") or [], set(config.get("modules_to_save") or [])
    if config.get("layers_to_transform") is not None or config.get("exclude_modules") or wanted == "all-linear":
        return []
    pattern = wanted if isinstance(wanted, str) else rf"(.*\.)?({'|'.join(map(re.escape, wanted))})"
    inside = next(name for name, module in model.named_modules() if module is layers)

    def part_of(name: str) -> str:
        """What a module belongs to (the tower, the projector): its path to where it leaves the language model's."""
        parts = name.split(".")
        return ".".join(parts[: len(commonprefix([parts, inside.split(".")])) + 1])

    parts = {part_of(name) for name in trained}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and name not in trained
        and not whole & set(name.split("."))
        and (name.startswith(f"{inside}.") or name == "lm_head" or part_of(name) in parts)
        and re.fullmatch(pattern, name)
    ]


class Names:
    """Dotted names of a model's modules or parameters, looked up by what trainers and other releases call them."""

    def __init__(self, names: Iterable[str]) -> None:
        self.by_path: dict[str, list[str]] = {}
        for name in names:
            self.by_path.setdefault(canonical(name), []).append(name)

    def of(self, other: str) -> list[str]:
        """The names that may be meant, of which more than one is a fault.

        Where shortened names meet, the exact one decides, else the one whose end agrees longest.
        """
        names = self.by_path.get(canonical(other), [])
        exact = [name for name in names if name == other.removeprefix("base_model.model.")]
        agreed = {name: len(commonprefix([name.split(".")[::-1], other.split(".")[::-1]])) for name in names}
        return exact or [name for name in names if agreed[name] == max(agreed.values())]

    def one(self, key: str, path: Path) -> str:
        """The one name that a tensor of `path` is for; else a `UserError`."""
        names = self.of(key)
        if len(names) == 1:
            return names[0]
        if names:
            raise UserError(f"{path}: {key} has {len(names)} places in the model, {names[0]} and {names[1]} among them")
        remedy = _ANOTHER_BASE
        if re.search(r"\.experts\.\d+\.", key):
            remedy = (
                "it belongs to one expert, and newer releases of transformers keep a layer's experts as one tensor: "
                "take transformers 4.57 for this adapter, or train one with target_modules of the attention"
            )
        raise UserError(f"{path}: {key} has no place in the model; {remedy}")


def canonical(name: str) -> str:
    """A name without the parts that come and go."""
    return ".".join(part for part in name.split(".") if part not in _DROPPED)
