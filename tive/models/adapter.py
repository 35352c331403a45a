"""Load a LoRA adapter and other trained tensors into a model, and prove that each found its place.

Tensors are read from safetensors, or with `weights_only=True`: a file can hold numbers and nothing that runs.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from tive.util.errors import UserError


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


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put the LoRA adapter of a folder into the model.

    Raises:
        UserError: it does not fit the model, or was never trained.
    """
    from peft import LoraConfig, get_peft_model

    path = adapter_file(folder)
    assert path is not None
    try:
        config = LoraConfig.from_pretrained(str(folder))
        wrapped = get_peft_model(model, config)
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
    if all(not value.any() for key, value in tensors.items() if ".lora_B." in key):
        raise UserError(f"{path}: every LoRA B matrix is zero, the adapter was never trained; train it for some steps")


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
        if not torch.isfinite(value).all():
            raise UserError(f"{path}: {key} holds numbers that are not finite; training diverged, train it again")
        if parameters[key].is_meta:  # the base has no projector: transformers leaves a placeholder without memory
            owner, _, name = key.rpartition(".")
            setattr(model.get_submodule(owner), name, nn.Parameter(value.to(parameters[key].dtype)))
        else:
            with torch.no_grad():
                parameters[key].copy_(value)
