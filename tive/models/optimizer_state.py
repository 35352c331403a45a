"""Adam's moments of a checkpoint, for the LoRA matrices whose gradients are taken."""

from __future__ import annotations

import hashlib
import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tive.models.adapter import adapter_file, read_tensors
from tive.models.optimizer_files import MOMENTS_FILE, Moments, StoredState
from tive.util.errors import UserError
from tive.util.files import read_json, sha256_of

# Where DeepSpeed's tool is told to write, and where its result is looked for.
_CONVERTED = "universal"
# bfloat16 keeps 8 bits, and the adapter is saved in the training's precision: float32 weights are not rounded.
_RELATIVE, _ABSOLUTE = 2.0**-8, 1e-7
_DROPPED = {"base_model", "module", "model", "language_model", "text_model", "modules_to_save", "default"}


def find_optimizer_state(model_path: str, given: str | None = None) -> Path:
    """Where the optimizer's state is.

    Args:
        given: the file, or a folder that holds it; without it the state is looked for beside the model.

    Raises:
        UserError: there is none, or only one that has to be converted first.
    """
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
            f"{parts[-1].parent} is DeepSpeed's own form of the optimizer's state; convert it in the training's "
            "environment, then run this again: `python -m deepspeed.checkpoint.ds_to_universal --inject_missing_state "
            f"--input_folder {source} --output_folder {target}`"
        )
    if any(place.glob("optimizer_*/.metadata")):
        raise UserError(
            f"{place} holds the optimizer's state in FSDP's shards, which are not read; train the reference model "
            "without FSDP, or with fsdp_state_dict_type FULL_STATE_DICT"
        )
    raise UserError(
        f"{place} holds no optimizer's state ({MOMENTS_FILE} or optimizer.pt): an output folder after training and a "
        "checkpoint with save_only_model have none; take a checkpoint-N folder as the model (save_strategy epoch and "
        "save_total_limit N keep them), or name the place of its state"
    )


def optimizer_state_identity(path: Path) -> str:
    """SHA-256 of the file, or over the moments' files of a converted DeepSpeed state."""
    if path.is_file():
        return sha256_of(path)
    digest = hashlib.sha256()
    for file in sorted(path.glob("zero/*lora_*/exp_avg*.pt")):
        digest.update(f"{file.relative_to(path)} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def moments_of_matrices(
    state: StoredState, model: nn.Module, matrices: Mapping[str, nn.Linear], model_path: str
) -> dict[str, Moments]:
    """The moments of `matrices` (canonical name -> LoRA matrix `[out, in]` of `model`), on the CPU, as they were kept.

    Raises:
        UserError: names, counts or shapes do not fit, a matrix has no moments, they are no moments (not finite, v
            below zero), or the state's weights are not the adapter's.
    """
    named = state.by_name or _named(state, model, Path(model_path))
    stored = {plain_name(name): moments for name, moments in named.items()}
    names = {id(weight): plain_name(name) for name, weight in model.named_parameters()}
    checked = {}
    for canonical, matrix in matrices.items():
        moments, weight = stored.get(names[id(matrix.weight)]), matrix.weight.detach().float().cpu()
        absent = "there are none: it is of another adapter, or the matrix was never stepped"
        wrong = _problem_of(moments, weight) if moments else absent
        if wrong or not moments:
            raise UserError(
                f"{state.path}, moments of {canonical}: {wrong}; name the state of the adapter in {model_path}"
            )
        checked[canonical] = Moments(moments.m.reshape(weight.shape), moments.v.reshape(weight.shape), moments.weight)
    return checked


def _problem_of(moments: Moments, weight: Tensor) -> str | None:
    """Why moments cannot be those of a matrix, in a few words. DeepSpeed's tool flattens some."""
    for part in (moments.m, moments.v, moments.weight):
        if part is not None and part.shape not in (weight.shape, (weight.numel(),)):
            return f"they have shape {list(part.shape)}, the matrix {list(weight.shape)}"
    if not (torch.isfinite(moments.m).all() and torch.isfinite(moments.v).all()):
        return "they are not finite: the training diverged or the file is damaged"
    if (moments.v < 0).any():
        return "second moments are below zero: the file is damaged"
    if moments.m.any() and torch.equal(moments.m, moments.v):  # as FSDP writes them from a CPU
        return "both moments are the same numbers: the file was written wrongly"
    if moments.weight is not None:
        kept = moments.weight.detach().float().reshape(weight.shape)
        if not torch.allclose(kept, weight, rtol=_RELATIVE, atol=_ABSOLUTE):
            return "the weights beside them are not the adapter's"
    return None


def plain_name(name: str) -> str:
    """A parameter's name without the parts that peft, DeepSpeed, and releases of transformers add or leave out."""
    return ".".join(part for part in name.split(".") if part not in _DROPPED)


def _named(state: StoredState, model: nn.Module, model_path: Path) -> dict[str, Moments]:
    """The first group of an `optimizer.pt` with its parameters' names.

    Trainers put the parameters with weight decay first, in the model's order; the adapter's matrices are among them.
    LLaVA's projector is trained beside them, or in groups of its own that follow.
    """
    files = [adapter_file(model_path), model_path / "non_lora_trainables.bin"]
    trained = {plain_name(name) for file in files if file and file.is_file() for name in read_tensors(file)}
    decayed = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if plain_name(name) in trained and "bias" not in name and "norm" not in name
    ]
    for order in (decayed, [(name, parameter) for name, parameter in decayed if "mm_projector" not in name]):
        if len(order) == len(state.in_order):
            break
    else:
        raise UserError(
            f"{state.path} begins with a group of {len(state.in_order)} parameters, and {len(decayed)} are trained "
            f"with weight decay in {model_path}; name the state of this adapter, or train with this project's scripts, "
            f"which keep the moments by name ({MOMENTS_FILE})"
        )
    named = {}
    for (name, parameter), moments in zip(order, state.in_order, strict=True):
        if moments is not None and moments.m.shape != parameter.shape:
            raise UserError(
                f"{state.path}: where {name} should be, the moments have shape {list(moments.m.shape)}, not "
                f"{list(parameter.shape)}; name the state of this adapter"
            )
        if moments is not None:
            named[name] = moments
    return named


@dataclass(frozen=True)
class TrainerState:
    """A checkpoint's place in its training run.

    Attributes:
        step: optimizer steps taken.
        logged: learning rates that were logged up to that step.
        learning_rate_sum: their sum. With the same two numbers of an earlier checkpoint they give the mean since then.
    """

    step: int
    logged: int
    learning_rate_sum: float


def read_trainer_state(model_path: str) -> TrainerState | None:
    """The trainer's state in a model's folder, or None where no trainer left one.

    Raises:
        UserError: the file is not what a trainer writes.
    """
    path = Path(model_path) / "trainer_state.json"
    if not path.is_file():
        return None
    content = read_json(path)
    step = content.get("global_step") if isinstance(content, dict) else None
    history = content.get("log_history", []) if isinstance(content, dict) else None
    if type(step) is not int or step < 0 or not isinstance(history, list):
        raise UserError(f"{path} holds no step (global_step) or no log (log_history); copy the checkpoint again")
    rates = []
    for entry in history:
        rate = entry.get("learning_rate") if isinstance(entry, dict) else None
        if rate is not None and entry.get("step", 0) <= step:
            if not isinstance(rate, (int, float)) or not (rate >= 0 and math.isfinite(rate)):
                raise UserError(f"{path} holds the learning rate {rate!r}, which is none; copy the checkpoint again")
            rates.append(float(rate))
    return TrainerState(step, len(rates), math.fsum(rates))
