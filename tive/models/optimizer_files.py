"""Adam's state as trainers leave it on disk: the form that this project writes, and two of others.

`MOMENTS_FILE` holds the moments of the LoRA matrices by name, beside each checkpoint. Of other trainers `optimizer.pt`
is read, whose numbers count through the trained parameters, and the folder that DeepSpeed's own tool makes of a ZeRO
checkpoint. Everything is read with `weights_only=True`: nothing in a file of state runs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tive.models.adapter import read_tensors
from tive.util.errors import UserError
from tive.util.files import whole_file

MOMENTS_FILE = "adam_moments.safetensors"
_PARTS = ("exp_avg", "exp_avg_sq", "weight")
# What the groups of torch's, transformers', DeepSpeed's, apex's and bitsandbytes' Adam say; other optimizers say more.
_OPTIONS = {"params", "lr", "initial_lr", "weight_decay", "betas", "eps", "step", "foreach", "capturable"}
_OPTIONS |= {"differentiable", "fused", "decoupled_weight_decay", "maximize", "t_alpha", "t_beta3"}
# Each has one of these, which LAMB's and RAdam's lack, and with these values its step is plain Adam's.
_PLAIN = {"amsgrad": False, "bias_correction": True, "correct_bias": True, "alpha": 0.0}
_TRAIN_AGAIN = "train with optim adamw_torch"
# DeepSpeed's classes in a state: nothing here needs them, and these stand-ins do nothing.
_DEEPSPEED = [
    (type(name, (), {}), f"deepspeed.runtime.fp16.loss_scaler.{name}") for name in ("LossScaler", "DynamicLossScaler")
] + [(int, "deepspeed.runtime.zero.config.ZeroStageEnum")]


@dataclass(frozen=True)
class Moments:
    """Adam's moments of one parameter, and the weights that they belong to where the state holds them."""

    m: Tensor
    v: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class AdamConstants:
    """What Adam's step needs beside the moments: steps taken, decay rates, epsilon."""

    t: int
    b1: float
    b2: float
    eps: float


@dataclass(frozen=True)
class StoredState:
    """An optimizer's state as it is on disk.

    Attributes:
        by_name: the moments by the trainer's names of the parameters, where the state has names.
        in_order: else those of the first group, in the trainer's order; None for a parameter never stepped.
    """

    path: Path
    constants: AdamConstants
    by_name: dict[str, Moments]
    in_order: list[Moments | None]


def read_optimizer_state(path: Path, step: int) -> StoredState:
    """Read a state and check all that can be checked without the model.

    Args:
        path: as `find_optimizer_state` returns it.
        step: the checkpoint's, as its trainer counts.

    Raises:
        UserError: it is not Adam's, is damaged, or belongs to another step.
    """
    if path.is_dir():
        return _read_converted(path)
    if path.suffix == ".safetensors":
        return _read_moments(path)
    state = _read_optimizer_file(path)
    if state.constants.t != step:  # a form that holds no weights has nothing else that tells whose it is
        raise UserError(
            f"{path} is the state after step {state.constants.t}, the checkpoint is of step {step}; name the state of "
            "this checkpoint"
        )
    return state


def write_moments(path: Path, moments: Mapping[str, Moments], constants: AdamConstants) -> None:
    """Write moments by their parameters' names, with the weights that they belong to."""
    from safetensors.torch import save

    tensors = {
        f"{name}.{part}": tensor.detach().cpu().contiguous()
        for name, of in moments.items()
        for part, tensor in zip(_PARTS, (of.m, of.v, of.weight), strict=True)
        if tensor is not None
    }
    with whole_file(path) as file:
        file.write(save(tensors, {"adam": json.dumps(vars(constants))}))


def _read_moments(path: Path) -> StoredState:
    tensors = read_tensors(path)
    try:
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            constants = AdamConstants(**json.loads(file.metadata()["adam"]))
        names = [name.removesuffix(".exp_avg") for name in tensors if name.endswith(".exp_avg")]
        by_name = {name: Moments(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in names}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not hold Adam's moments as this version writes them ({error}); train again"
        ) from error
    return StoredState(path, constants, by_name, [])


def _read_optimizer_file(path: Path) -> StoredState:
    """`optimizer.pt` (by number), or FSDP's `optimizer.bin` (by name)."""
    content = _load(path)
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path} is not an optimizer's state (state and param_groups); name a trainer's optimizer.pt")
    state = content["state"]
    groups = [group for group in content["param_groups"] if isinstance(group, dict) and group.get("params")]
    keys = [key for group in groups for key in group["params"]]
    by_name = any(isinstance(key, str) for key in keys)
    if not state or not set(state) <= set(keys) or not (by_name or keys == list(range(len(keys)))):
        raise UserError(f"{path}: the parameters' numbers do not count through the groups; copy the checkpoint again")
    steps = (state[key].get("step", group.get("step")) for group in groups for key in group["params"] if key in state)
    constants = adam_constants(str(path), groups, steps)
    moments = {key: moments_of(str(path), of) for key, of in state.items()}
    if by_name:
        return StoredState(path, constants, moments, [])
    return StoredState(path, constants, {}, [moments.get(key) for key in groups[0]["params"]])


def moments_of(source: str, state: Mapping[str, Any], weight: Tensor | None = None) -> Moments:
    """One parameter's moments from its state in the optimizer, under torch's names or bitsandbytes'.

    Raises:
        UserError: it has other keys than Adam's, or moments of 8 bits.
    """
    keys = set(state) - {"step"}
    if keys == {"exp_avg", "exp_avg_sq"}:
        return Moments(state["exp_avg"], state["exp_avg_sq"], weight)
    if keys == {"state1", "state2"} and state["state1"].is_floating_point():
        return Moments(state["state1"], state["state2"], weight)
    kind = "an 8-bit optimizer" if "state1" in keys else "another optimizer than Adam"
    raise UserError(f"{source} is the state of {kind} ({', '.join(sorted(keys))}); {_TRAIN_AGAIN}")


def _read_converted(path: Path) -> StoredState:
    """A folder that DeepSpeed's `ds_to_universal` wrote: each parameter's moments and float32 weights in its folder."""
    content = _load(path / "zero" / "optimizer_state.pt", _DEEPSPEED)
    by_name = {}
    steps = []
    for folder in sorted(path.glob("zero/*lora_*")):
        read = {}
        for file in (folder / f"{name}.pt" for name in ("exp_avg", "exp_avg_sq", "fp32")):
            part = _load(file)
            read[file.stem] = part["param"] if isinstance(part, dict) else part
        by_name[folder.name] = Moments(read["exp_avg"], read["exp_avg_sq"], read["fp32"])
        if (folder / "step.pt").is_file():
            steps.append(_load(folder / "step.pt"))
    groups = content["param_groups"]
    inner = content.get("optimizer_state_dict", {}).get("state", {})
    steps = steps or [of["step"] for of in inner.values() if "step" in of] or [group.get("step") for group in groups]
    return StoredState(path, adam_constants(str(path), groups, steps), by_name, [])


def adam_constants(source: str, groups: Sequence[Mapping[str, Any]], steps: Iterable[Any]) -> AdamConstants:
    """What all groups of an optimizer share; groups and steps as torch's optimizers keep them.

    Raises:
        UserError: the optimizer is not plain Adam, or the groups disagree.
    """
    for group in groups:
        keys = set(group)
        if not {"betas", "eps"} <= keys or not keys & set(_PLAIN) or keys - _OPTIONS - set(_PLAIN):
            raise UserError(f"{source} is not Adam's state (its groups have {', '.join(sorted(keys))}); {_TRAIN_AGAIN}")
        for option, value in (_PLAIN | {"maximize": False}).items():
            if group.get(option, value) != value:
                raise UserError(
                    f"{source} is of Adam with {option} {group[option]}, whose step is another one; {_TRAIN_AGAIN}"
                )
    try:
        shared = {tuple(map(float, (*group["betas"], group["eps"]))) for group in groups}
        taken = {float(step) for step in steps}
        ((b1, b2, eps),), (t,) = shared, taken
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: the parameters do not share betas, eps and step, so it is not one step of Adam; {_TRAIN_AGAIN}"
        ) from error
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and eps >= 0 and t >= 1):
        raise UserError(f"{source}: betas {b1}, {b2}, eps {eps}, step {t} are not Adam's; {_TRAIN_AGAIN}")
    return AdamConstants(int(t), b1, b2, eps)


def _load(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """A torch file, memory-mapped; nothing in it runs.

    Args:
        allowed: what beside plain values may be made, as `torch.serialization.safe_globals` takes it.

    Raises:
        UserError: it cannot be read, or holds what is not allowed.
    """
    # LLaVA's own environment has torch 2.0, which reads a file into memory and lets nothing be allowed.
    mapped = {"mmap": True} if "mmap" in inspect.signature(torch.load).parameters else {}
    try:
        with torch.serialization.safe_globals(list(allowed)) if allowed else contextlib.nullcontext():
            return torch.load(str(path), map_location="cpu", weights_only=True, **mapped)
    except Exception as error:  # damaged bytes raise nearly every kind of exception
        reason = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}); it is damaged or not an optimizer's state") from error
