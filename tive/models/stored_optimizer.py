"""What an optimizer's state looks like on disk: an `optimizer.pt`, and what it has in common with DeepSpeed's parts."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tive.util.errors import UserError


@dataclass(frozen=True)
class StoredParameter:
    """One parameter's moments as stored; without them where the optimizer has never stepped it.

    Attributes:
        name: as the trainer called it, None where only its place in the order is known.
        master: DeepSpeed's float32 weights.
    """

    m: Tensor | None
    v: Tensor | None
    name: str | None = None
    master: Tensor | None = None


def read_optimizer_file(path: Path) -> tuple[list[list[StoredParameter]], dict[str, Any]]:
    """The parameters of an `optimizer.pt` by group, in order and without names, and Adam's constants.

    Raises:
        UserError: it is damaged, or not Adam's state.
    """
    content = load_state(path)
    if not isinstance(content, dict) or not {"state", "param_groups"} <= content.keys():
        raise UserError(f"{path} is not an optimizer's state (state and param_groups); name a trainer's optimizer.pt")
    state, all_groups = content["state"], content["param_groups"]
    groups = [group for group in all_groups if isinstance(group, dict) and group.get("params")]
    numbers = [number for group in groups for number in group["params"]]
    if numbers != list(range(len(numbers))) or not set(state) <= set(numbers) or not state:
        raise UserError(f"{path}: the parameters' numbers do not count through the groups; copy the checkpoint again")
    group_of = {number: place for place, group in enumerate(groups) for number in group["params"]}
    constants = adam_constants(path, groups, ((state[number], group_of[number]) for number in sorted(state)))
    none: dict[str, Any] = {"exp_avg": None, "exp_avg_sq": None}
    stored = {number: state.get(number, none) for number in numbers}
    parameters = {number: StoredParameter(of["exp_avg"], of["exp_avg_sq"]) for number, of in stored.items()}
    return [[parameters[number] for number in group["params"]] for group in groups], constants


def adam_constants(path: Path, groups: Sequence[Any], states: Iterable[tuple[dict[str, Any], int]]) -> dict[str, Any]:
    """`betas`, `eps` and `step` that all of an optimizer's groups share.

    Args:
        groups: the optimizer's `param_groups` that are not empty.
        states: the state of each parameter, with the number of its group.

    Raises:
        UserError: the optimizer is not Adam, or the groups disagree.
    """
    for group in groups:
        if not isinstance(group, dict) or not {"betas", "eps"} <= group.keys() or len(group["betas"]) != 2:
            raise UserError(f"{path} is not Adam's state (no betas and eps); train with optim adamw_torch")
        for option in ("amsgrad", "maximize"):
            if group.get(option):
                raise UserError(f"{path} is of Adam with {option}, whose step is another one; train without it")
    found: dict[str, set[Any]] = {key: {_value(path, group[key]) for group in groups} for key in ("betas", "eps")}
    found["step"] = set()
    for state, number in states:
        if not isinstance(state, dict) or not {"exp_avg", "exp_avg_sq"} <= state.keys() or "max_exp_avg_sq" in state:
            kind = "8-bit" if isinstance(state, dict) and {"state1", "qmap1"} & state.keys() else "another"
            raise UserError(
                f"{path} is the state of {kind} optimizer, not Adam's (exp_avg and exp_avg_sq); train with "
                "optim adamw_torch"
            )
        found["step"].add(_value(path, state.get("step", groups[number].get("step"))))
    for key, values in found.items():
        if len(values) != 1:
            listed = ", ".join(sorted(map(str, values)))
            raise UserError(f"{path}: the groups disagree on {key} ({listed or 'none'}), so it is not one step of Adam")
    constants = {key: values.pop() for key, values in found.items()}
    b1, b2 = constants["betas"]
    if not (0 <= b1 < 1 and 0 <= b2 < 1 and constants["eps"] >= 0 and constants["step"] >= 1):
        raise UserError(f"{path}: betas {b1}, {b2}, eps {constants['eps']}, step {constants['step']} are not Adam's")
    return constants | {"step": int(constants["step"])}


def load_state(path: Path, allowed: Sequence[Any] = ()) -> Any:
    """A torch file, memory-mapped; nothing in it runs.

    Args:
        allowed: what beside plain values may be made, as `torch.serialization.safe_globals` takes it.

    Raises:
        UserError: it cannot be read, or holds what is not allowed.
    """
    # LLaVA's own environment has torch 2.0, which reads a file into memory and lets nothing be allowed.
    mapped = {"mmap": True} if "mmap" in inspect.signature(torch.load).parameters else {}
    if allowed and not hasattr(torch.serialization, "safe_globals"):
        raise UserError(f"{path}: torch {torch.__version__} cannot read DeepSpeed's state safely; install a newer one")
    try:
        with torch.serialization.safe_globals(list(allowed)) if allowed else contextlib.nullcontext():
            return torch.load(str(path), map_location="cpu", weights_only=True, **mapped)
    except Exception as error:  # damaged bytes raise nearly every kind of exception
        reason = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise UserError(f"cannot read {path} ({reason}); it is damaged or not an optimizer's state") from error


def _value(path: Path, value: Any) -> Any:
    try:
        if isinstance(value, (tuple, list)):
            return tuple(float(number) for number in value)
        return float(value)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {value!r} is not a number of Adam's; the file is damaged") from error
