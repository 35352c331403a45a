"""Adam's moments of a checkpoint, for the LoRA matrices whose gradients are taken.

Two kinds of state are read, both with `weights_only=True`: `optimizer.pt`, as transformers' trainers write it, and
DeepSpeed's `global_stepN` folder (`tive.models.deepspeed_state`). DeepSpeed keeps the parameters' names. `optimizer.pt`
keeps an index, which counts through the groups in order, and inside a group through the model's `named_parameters()`
at training time; tive's trainer writes the names beside it, and for older states they follow from the trainers' rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tive.models.adapter import adapter_file, read_tensors
from tive.models.deepspeed_state import read_deepspeed
from tive.models.stored_optimizer import StoredParameter, read_optimizer_file
from tive.util.errors import UserError
from tive.util.files import read_json, sha256_of

NAMES_FILE = "optimizer_names.json"
# bfloat16 keeps 8 bits, and the adapter is saved in the training's precision: the master weights are not rounded.
_RELATIVE, _ABSOLUTE = 2.0**-8, 1e-7
_DROPPED = {"base_model", "module", "model", "language_model", "text_model", "modules_to_save", "default"}
_HOW_TO_KEEP = (
    "an output folder after training and a checkpoint with save_only_model have none; take a checkpoint-N folder as "
    "the model (save_strategy epoch and save_total_limit N keep them), or name the place of its state"
)


@dataclass(frozen=True)
class StoredState:
    """An optimizer's state as it is on disk: its groups that are not empty, in order, and Adam's constants."""

    path: Path
    groups: list[list[StoredParameter]]
    t: int
    b1: float
    b2: float
    eps: float


@dataclass(frozen=True)
class AdamState:
    """Adam's moments after step `t`: `m` and `v` by canonical matrix name, float32 `[out, in]` on the CPU.

    `stored_dtype` is the precision that they were kept in during training.
    """

    m: dict[str, Tensor]
    v: dict[str, Tensor]
    t: int
    b1: float
    b2: float
    eps: float
    stored_dtype: torch.dtype


def find_optimizer_state(model_path: str, given: str | None = None) -> Path:
    """Where the optimizer's state is: an `optimizer.pt`, or a DeepSpeed `global_stepN` folder.

    Args:
        given: the file, or a folder that holds it; without it the state is looked for beside the model.

    Raises:
        UserError: there is none, or there are two.
    """
    place = Path(given or model_path)
    if place.is_file():
        return place
    if not place.is_dir():
        raise UserError(f"the optimizer's state {place} is not there; name an optimizer.pt or a checkpoint's folder")
    if any(place.glob("*_optim_states.pt")):
        return place
    found = [place / "optimizer.pt"] if (place / "optimizer.pt").is_file() else []
    if (place / "latest").is_file():
        try:
            folder = place / (place / "latest").read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {place}/latest ({error}); copy the checkpoint again") from error
        if not folder.is_dir():
            raise UserError(f"{place}/latest names {folder.name}, which is not there; copy the whole checkpoint")
        found.append(folder)
    if not found:
        raise UserError(f"{place} holds no optimizer's state (optimizer.pt, or DeepSpeed's latest): {_HOW_TO_KEEP}")
    if len(found) > 1:
        raise UserError(f"{place} holds two optimizer's states, optimizer.pt and {found[1].name}; name one of them")
    return found[0]


def optimizer_state_identity(path: Path) -> str:
    """SHA-256 of the file, or over the files of a DeepSpeed folder that are read."""
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("*_optim_states.pt")):
        digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def read_optimizer_state(path: Path, step: int) -> StoredState:
    """Read a state and check all that can be checked without the model.

    Args:
        path: as `find_optimizer_state` returns it.
        step: the checkpoint's, as its trainer counts.

    Raises:
        UserError: it is not Adam's, is damaged or incomplete, or belongs to another step.
    """
    if path.is_dir():
        groups, constants, skipped = read_deepspeed(path)
    else:
        groups, constants = read_optimizer_file(path)
        skipped = 0
    if constants["step"] + skipped != step:
        taken = f"{constants['step']}" + (f" (and {skipped} skipped)" if skipped else "")
        raise UserError(
            f"{path} is the state after step {taken}, the checkpoint is of step {step}; name the state of this "
            "checkpoint"
        )
    b1, b2 = constants["betas"]
    return StoredState(path, groups, constants["step"], b1, b2, constants["eps"])


def adam_state(state: StoredState, model: nn.Module, matrices: Mapping[str, nn.Linear], model_path: str) -> AdamState:
    """The moments of `matrices` (canonical name -> LoRA matrix of `model`), found by name or by the trainers' rule.

    Raises:
        UserError: names, counts or shapes do not fit, a matrix has no moments, they are no moments (not finite, v
            below zero), or DeepSpeed's master weights are not the adapter's.
    """
    groups = state.groups
    if any(parameter.name is None for group in groups for parameter in group):
        groups = _named(state, model, Path(model_path))
    stored = {plain_name(parameter.name or ""): parameter for group in groups for parameter in group}
    names = {id(weight): plain_name(name) for name, weight in model.named_parameters()}
    m: dict[str, Tensor] = {}
    v: dict[str, Tensor] = {}
    dtype = torch.float32
    for canonical, matrix in matrices.items():
        parameter = stored.get(names[id(matrix.weight)])
        if parameter is None:
            raise UserError(
                f"{state.path} has no state of {canonical}; it belongs to another adapter than {model_path}"
            )
        if parameter.m is None or parameter.v is None:
            raise UserError(f"{state.path}: {canonical} was never stepped; train the model for some steps more")
        if parameter.m.shape != matrix.weight.shape or parameter.v.shape != matrix.weight.shape:
            raise UserError(
                f"{state.path}: the moments of {canonical} have shape {list(parameter.m.shape)}, the adapter in "
                f"{model_path} {list(matrix.weight.shape)}; name the state of this adapter"
            )
        _check_master(state.path, canonical, parameter.master, matrix.weight)
        dtype = parameter.m.dtype
        m[canonical], v[canonical] = parameter.m.float().clone(), parameter.v.float().clone()
        if not (torch.isfinite(m[canonical]).all() and torch.isfinite(v[canonical]).all()):
            raise UserError(f"{state.path}: the moments of {canonical} are not finite; training diverged, train again")
        if (v[canonical] < 0).any():
            raise UserError(f"{state.path}: the second moments of {canonical} are below zero; the file is damaged")
    return AdamState(m, v, state.t, state.b1, state.b2, state.eps, dtype)


def plain_name(name: str) -> str:
    """A parameter's name without the parts that peft, DeepSpeed, and releases of transformers add or leave out."""
    return ".".join(part for part in name.split(".") if part not in _DROPPED)


def _named(state: StoredState, model: nn.Module, model_path: Path) -> list[list[StoredParameter]]:
    """The groups of an `optimizer.pt` with each parameter's name, from the file beside it or by the trainers' rule."""
    names_path = state.path.with_name(NAMES_FILE)
    if names_path.is_file():
        layouts = [_names_beside(names_path)]
        source = f"{names_path} names"
    else:
        layouts = _layouts(model, model_path)
        source = f"the adapter in {model_path} and what was trained beside it give"
    shapes = {plain_name(name): parameter.shape for name, parameter in model.named_parameters()}
    sizes = [len(group) for group in state.groups]
    for layout in layouts:
        if [len(names) for names in layout] == sizes:
            named = [
                [replace(parameter, name=name) for parameter, name in zip(group, names, strict=True)]
                for group, names in zip(state.groups, layout, strict=True)
            ]
            for parameter in (parameter for group in named for parameter in group):
                expected = shapes.get(plain_name(parameter.name or ""))
                if parameter.m is not None and expected is not None and parameter.m.shape != expected:
                    raise UserError(
                        f"{state.path}: where {parameter.name} should be, the moments have shape "
                        f"{list(parameter.m.shape)}, not {list(expected)}; name the state of this adapter"
                    )
            return named
    counts = " or ".join(str([len(names) for names in layout]) for layout in layouts)
    raise UserError(
        f"{state.path} holds groups of {sizes} parameters, {source} {counts}; name the state of this adapter, or train "
        f"it with finetune_lora.sh, which writes the names ({NAMES_FILE}) beside the state"
    )


def _names_beside(path: Path) -> list[list[str]]:
    groups = read_json(path)
    if not isinstance(groups, list) or not all(
        isinstance(names, list) and all(isinstance(name, str) for name in names) for names in groups
    ):
        raise UserError(f"{path} is not a list of each group's parameter names; copy the checkpoint again")
    return [names for names in groups if names]


def _layouts(model: nn.Module, model_path: Path) -> list[list[list[str]]]:
    """The groups that the trainers' rule gives: with and without decay, LLaVA's projector by itself or not."""
    # LLaVA's and Bunny's models hold what is trained beside the adapter after the layers.
    files = (adapter_file(model_path), model_path / "non_lora_trainables.bin")
    decayed: list[str] = []
    undecayed: list[str] = []
    for file in files:
        trained = {plain_name(name) for name in read_tensors(file)} if file and file.is_file() else set()
        for name, parameter in model.named_parameters():
            if plain_name(name) in trained:
                (decayed if parameter.ndim > 1 else undecayed).append(name)

    def split(names: list[str], projector: bool) -> list[str]:
        return [name for name in names if ("mm_projector" in name) == projector]

    by_itself = [split(names, projector) for projector in (False, True) for names in (decayed, undecayed)]
    return [[names for names in layout if names] for layout in ([decayed, undecayed], by_itself)]


def _check_master(path: Path, name: str, master: Tensor | None, weight: Tensor) -> None:
    if master is None:
        return
    weight = weight.detach().float().cpu()
    if master.shape != weight.shape or not torch.allclose(master.float(), weight, rtol=_RELATIVE, atol=_ABSOLUTE):
        raise UserError(
            f"{path}: the float32 weights of {name} are not the adapter's, so its moments are not either; name the "
            "state of this checkpoint"
        )
