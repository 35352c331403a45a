"""Adam's moments of a checkpoint, for the LoRA matrices whose gradients are taken.

`MOMENTS_FILE` holds them by name, as this project's trainers write it beside each checkpoint. Of other trainers
`optimizer.pt` is read, whose numbers count through the trained parameters, FSDP's `optimizer.bin`, and the folder that
DeepSpeed's own tool makes of a ZeRO checkpoint. Nothing in a file of state runs (`weights_only=True`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.models.adapter import TRAINED_FILE, Names, adapter_file, canonical, read_tensors
from tive.models.checkpoint import loading
from tive.util.errors import UserError
from tive.util.files import read_object, read_torch, sha256_of, whole_file

MOMENTS_FILE = "adam_moments.safetensors"
_PARTS = ("exp_avg", "exp_avg_sq", "weight")
# Where DeepSpeed's tool is told to write, and where its result is looked for.
_CONVERTED = "universal"
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
# bfloat16 keeps 8 bits, and the adapter is saved in the training's precision: float32 weights are not rounded.
_RELATIVE, _ABSOLUTE = 2.0**-8, 1e-7


@dataclass(frozen=True)
class Moments:
    """Adam's moments of one parameter, and the weights that they belong to where the state holds them."""

    m: Tensor
    v: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class StoredState:
    """An optimizer's state as it is on disk."""

    path: Path
    sha256: str  # of the file, or over the moments' files of a converted DeepSpeed state
    constants: dict[str, Any]  # of Adam's step: `t` steps taken, decay rates `b1` and `b2`, `eps`
    by_name: dict[str, Moments]  # by the trainer's names of the parameters, where the state has names
    in_order: list[Moments | None]  # else those of the first group, in the trainer's order; None: never stepped


def read_trainer_state(model_path: str) -> tuple[int, dict[str, float]] | None:
    """A checkpoint's step, and of the learning rates that were logged up to it the number and the sum.

    With the same two numbers of an earlier checkpoint they give the mean since then. None where the folder holds no
    trainer's state; a `UserError` where its file is not a trainer's.
    """
    path = Path(model_path) / "trainer_state.json"
    if not path.is_file():
        return None
    content = read_object(path)
    step, history = content.get("global_step"), content.get("log_history", [])
    if type(step) is not int or step < 0 or not isinstance(history, list):
        raise UserError(f"{path} holds no step (global_step) or no log (log_history); copy the checkpoint again")
    with loading(path):
        logged = [entry.get("learning_rate") for entry in history if entry.get("step", 0) <= step]
        rates = [float(rate) for rate in logged if rate is not None]
        if not all(rate >= 0 and math.isfinite(rate) for rate in rates):
            raise ValueError("a learning rate in log_history is below zero or not finite")
    return step, {"logged": len(rates), "sum": math.fsum(rates)}


# Files


def find_optimizer_state(model_path: str, given: str | None = None) -> Path:
    """Where the optimizer's state is, given or beside the model; a `UserError` where it has to be converted first."""
    place = Path(given or model_path)
    if place.is_file() or (place / "zero").is_dir():
        return place
    if not place.is_dir():
        raise UserError(f"the optimizer's state {place} is not there; name an optimizer.pt or a checkpoint's folder")
    for name in (MOMENTS_FILE, "optimizer.pt", _CONVERTED, "optimizer.bin"):
        if (place / name).exists():
            return place / name
    parts = sorted(place.glob("*_optim_states.pt")) or sorted(place.glob("global_step*/*_optim_states.pt"))
    if parts:
        source, target = (shlex.quote(str(path.resolve())) for path in (parts[-1].parent, place / _CONVERTED))
        raise UserError(
            f"{source} is DeepSpeed's own form of the optimizer's state; convert it in the training's environment, "
            "then run this again: `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {source} --output_folder {target}`"
        )
    raise UserError(
        f"{place} holds no optimizer's state ({MOMENTS_FILE} or optimizer.pt): an output folder after training and a "
        "checkpoint with save_only_model have none, and FSDP's shards are not read (train with fsdp_state_dict_type "
        "FULL_STATE_DICT); take a checkpoint-N folder as the model (save_strategy epoch and save_total_limit N keep "
        "them), or name the place of its state"
    )


def read_optimizer_state(path: Path, step: int) -> StoredState:
    """The state at a path, of Adam after `step` steps; a `UserError` where it is damaged or another."""
    with loading(path):
        if path.is_dir():
            return _read_converted(path)
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            tensors = read_tensors(path)
            with safe_open(path, framework="pt") as file:
                stored = json.loads(file.metadata()["adam"])
            constants = {name: stored[name] for name in ("t", "b1", "b2", "eps")}
            names = [name.removesuffix(".exp_avg") for name in tensors if name.endswith(".exp_avg")]
            by_name = {name: Moments(*(tensors[f"{name}.{part}"] for part in _PARTS)) for name in names}
            return StoredState(path, sha256_of(path), constants, by_name, [])
        state = _read_optimizer_file(path)
    if state.constants["t"] != step:  # a form that holds no weights has nothing else that tells whose it is
        raise UserError(
            f"{path} is the state after step {state.constants['t']}, the checkpoint is of step {step}; name the state "
            "of this checkpoint"
        )
    return state


def _read_optimizer_file(path: Path) -> StoredState:
    """`optimizer.pt` (by number), or FSDP's `optimizer.bin` (by name)."""
    content = _torch_file(path)
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path} is not an optimizer's state (state and param_groups); name a trainer's optimizer.pt")
    state = content["state"]
    groups = [group for group in content["param_groups"] if group.get("params")]
    keys = [key for group in groups for key in group["params"]]
    by_name = any(isinstance(key, str) for key in keys)
    if not state or not set(state) <= set(keys) or not (by_name or keys == list(range(len(keys)))):
        raise UserError(f"{path}: the parameters' numbers do not count through the groups; copy the checkpoint again")
    steps = (state[key].get("step", group.get("step")) for group in groups for key in group["params"] if key in state)
    constants = adam_constants(str(path), groups, steps)
    moments = {key: moments_of(str(path), of) for key, of in state.items()}
    if by_name:
        return StoredState(path, sha256_of(path), constants, moments, [])
    return StoredState(path, sha256_of(path), constants, {}, [moments.get(key) for key in groups[0]["params"]])


def _read_converted(path: Path) -> StoredState:
    """A folder that DeepSpeed's `ds_to_universal` wrote: each parameter's moments and float32 weights in its folder."""
    content = _torch_file(path / "zero" / "optimizer_state.pt", _DEEPSPEED)
    by_name, steps = {}, []
    for folder in sorted(path.glob("zero/*lora_*")):
        parts = [_torch_file(folder / f"{name}.pt") for name in ("exp_avg", "exp_avg_sq", "fp32")]
        by_name[folder.name] = Moments(*(part["param"] if isinstance(part, dict) else part for part in parts))
        if (folder / "step.pt").is_file():
            steps.append(_torch_file(folder / "step.pt"))
    groups = content["param_groups"]
    inner = content.get("optimizer_state_dict", {}).get("state", {})
    steps = steps or [of["step"] for of in inner.values() if "step" in of] or [group.get("step") for group in groups]
    files = sorted(path.glob("zero/*lora_*/exp_avg*.pt"))
    hashes = "".join(f"{file.relative_to(path)} {sha256_of(file)}\n" for file in files)
    digest = hashlib.sha256(hashes.encode()).hexdigest()
    return StoredState(path, digest, adam_constants(str(path), groups, steps), by_name, [])


def _torch_file(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """`read_torch`; `allowed` is made of what the file names beside plain values, which torch 2.0 knows no way to."""
    with loading(path), torch.serialization.safe_globals(list(allowed)) if allowed else contextlib.nullcontext():
        return read_torch(path)


# What an optimizer holds


def moments_of(source: str, state: Mapping[str, Any], weight: Tensor | None = None) -> Moments:
    """One parameter's moments from its state in the optimizer, under torch's names or bitsandbytes'."""
    keys = set(state) - {"step"}
    if keys == {"exp_avg", "exp_avg_sq"}:
        return Moments(state["exp_avg"], state["exp_avg_sq"], weight)
    if keys == {"state1", "state2"} and state["state1"].is_floating_point():
        return Moments(state["state1"], state["state2"], weight)
    kind = "an 8-bit optimizer" if "state1" in keys else "another optimizer than Adam"
    raise UserError(f"{source} is the state of {kind} ({', '.join(sorted(keys))}); {_TRAIN_AGAIN}")


def adam_constants(source: str, groups: Sequence[Mapping[str, Any]], steps: Iterable[Any]) -> dict[str, Any]:
    """What the groups of an optimizer share; a `UserError` where it is not plain Adam, or they disagree."""
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
        ((b1, b2, eps),) = {tuple(map(float, (*group["betas"], group["eps"]))) for group in groups}
        (t,) = {float(step) for step in steps}
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: the parameters do not share betas, eps and step, so it is not one step of Adam; {_TRAIN_AGAIN}"
        ) from error
    return {"t": int(t), "b1": b1, "b2": b2, "eps": eps}


# Moments to matrices


def moments_of_matrices(
    state: StoredState, model: nn.Module, matrices: Mapping[str, nn.Linear], model_path: str
) -> dict[str, Moments]:
    """The moments of `matrices` (canonical name -> LoRA matrix `[out, in]` of `model`), on the CPU, as they were kept.

    A `UserError` where names, counts or shapes do not fit, a matrix has no moments, they are no moments (not finite, v
    below zero), or the state's weights are not the adapter's.
    """
    stored = state.by_name or _named(state, model, Path(model_path))
    places, names = Names(stored), {id(weight): name for name, weight in model.named_parameters()}
    checked = {}
    for matrix_name, matrix in matrices.items():
        weight, kept = matrix.weight.detach().float().cpu(), places.of(names[id(matrix.weight)])
        wrong = "there are none: it is of another adapter, or the matrix was never stepped"
        if len(kept) == 1:
            moments = stored[kept[0]]
            wrong = _problem_of(moments, weight)
        if wrong:
            raise UserError(
                f"{state.path}, moments of {matrix_name}: {wrong}; name the state of the adapter in {model_path}"
            )
        checked[matrix_name] = Moments(moments.m.reshape(weight.shape), moments.v.reshape(weight.shape), moments.weight)
    return checked


def _problem_of(moments: Moments, weight: Tensor) -> str:
    """Why moments cannot be those of a matrix, in a few words, or nothing. DeepSpeed's tool flattens some."""
    m, v = moments.m, moments.v
    for part in (m, v, moments.weight):
        if part is not None and part.shape not in (weight.shape, (weight.numel(),)):
            return f"they have shape {list(part.shape)}, the matrix {list(weight.shape)}"
    same = m.any() and torch.equal(m, v)  # as FSDP writes them from a CPU
    if same or not (torch.isfinite(m).all() and torch.isfinite(v).all() and (v >= 0).all()):
        return (
            "they are not finite, v is below zero, or both are the same: the training diverged or the file is damaged"
        )
    if moments.weight is not None:
        kept = moments.weight.detach().float().reshape(weight.shape)
        if not torch.allclose(kept, weight, rtol=_RELATIVE, atol=_ABSOLUTE):
            return "the weights beside them are not the adapter's"
    return ""


def _named(state: StoredState, model: nn.Module, model_path: Path) -> dict[str, Moments]:
    """The first group of an `optimizer.pt` with its parameters' names.

    Trainers put the parameters with weight decay first, in the model's order; the adapter's matrices are among them.
    LLaVA's projector is trained beside them, or in groups of its own that follow.
    """
    files = [adapter_file(model_path), model_path / TRAINED_FILE]
    trained = {canonical(name) for file in files if file.is_file() for name in read_tensors(file)}
    decayed = {
        name: parameter.shape
        for name, parameter in model.named_parameters()
        if canonical(name) in trained and "bias" not in name and "norm" not in name
    }
    apart = {name: shape for name, shape in decayed.items() if "mm_projector" not in name}
    order = decayed if len(decayed) == len(state.in_order) else apart
    shapes = [None if moments is None else moments.m.shape for moments in state.in_order]
    if len(order) != len(shapes) or any(
        here not in (None, wanted) for here, wanted in zip(shapes, order.values(), strict=True)
    ):
        raise UserError(
            f"{state.path} begins with a group of {len(shapes)} parameters, and they are not the {len(decayed)} that "
            f"are trained with weight decay in {model_path}; name the state of this adapter, or train with this "
            f"project's scripts, which keep the moments by name ({MOMENTS_FILE})"
        )
    return {name: moments for name, moments in zip(order, state.in_order, strict=True) if moments is not None}


# Beside a training's checkpoints


def save_moments(trainer: Any, folder: str) -> None:
    """Write the moments of the LoRA matrices that a trainer of transformers trains into a checkpoint, by name.

    Every process must call it: under DeepSpeed each holds a part, and they are gathered. Of an optimizer that is not
    Adam nothing is written, and a line says so. FSDP writes its state by name itself.
    """
    from safetensors.torch import save

    matrices = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
    if not matrices or trainer.is_fsdp_enabled:
        return
    source, groups = "the optimizer", trainer.optimizer.param_groups
    try:
        if trainer.is_deepspeed_enabled:
            from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

            # Steps whose gradients overflowed in float16 are counted by the trainer and not taken by Adam.
            steps = [trainer.model_wrapped.global_steps - trainer.model_wrapped.skipped_steps]
            constants = adam_constants(source, groups, steps)  # first: another optimizer has nothing to gather
            moments = {}
            for name, parameter in matrices.items():
                m, v = (safe_get_full_optimizer_state(parameter, key).cpu() for key in _PARTS[:2])
                moments[name] = Moments(m, v, safe_get_full_fp32_param(parameter).to(parameter.dtype).cpu())
        else:
            groups = [group for group in groups if group["params"]]  # DeepSpeed's hold their parameters elsewhere
            # A matrix without a gradient so far has no state: one of the vision tower, where no record had an image.
            states = {name: trainer.optimizer.state.get(parameter) for name, parameter in matrices.items()}
            moments = {name: moments_of(source, of, matrices[name]) for name, of in states.items() if of}
            steps = [of["step"] if "step" in of else groups[0].get("step") for of in states.values() if of]
            constants = adam_constants(source, groups, steps)
    except UserError as error:
        if trainer.is_world_process_zero():
            print(f"no {MOMENTS_FILE} is written: {error}")
        return
    if trainer.is_world_process_zero():
        tensors = {
            f"{name}.{part}": tensor.detach().cpu().contiguous()
            for name, of in moments.items()
            for part, tensor in zip(_PARTS, vars(of).values(), strict=True)
        }
        with whole_file(Path(folder) / MOMENTS_FILE) as file:
            file.write(save(tensors, {"adam": json.dumps(constants)}))
