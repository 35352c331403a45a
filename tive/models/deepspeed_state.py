"""Adam's moments from a DeepSpeed checkpoint (ZeRO-1, ZeRO-2, ZeRO-3), put together from every rank's part.

The names and shapes of a group's parameters are in the model states, in the order in which they lie in the group's flat
vectors. ZeRO-1 and ZeRO-2 cut the whole flat vector into equal parts, one a rank, with padding at the end. ZeRO-3 cuts
every parameter into `ceil(n / ranks)` numbers a rank, the last one padded, and keeps a rank's parts one after another.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tive.models.stored_optimizer import StoredParameter, adam_constants, load_state
from tive.util.errors import UserError

_PART = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_INCOMPLETE = "copy the whole folder from every machine that trained"


class _Inert:
    """Stands for a class of DeepSpeed that a state names and nothing here needs; it holds values and does nothing."""


class _Fragment(_Inert):
    pass


class _LossScaler(_Inert):
    pass


class _DynamicLossScaler(_Inert):
    pass


_ALLOWED = (
    (_Fragment, "deepspeed.utils.tensor_fragment.fragment_address"),
    (_LossScaler, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (_DynamicLossScaler, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
)


@dataclass(frozen=True)
class _Rank:
    """One rank's flat vectors, by ZeRO group or sub-group in order."""

    m: list[Tensor]
    v: list[Tensor]
    master: list[Tensor]


def read_deepspeed(folder: Path) -> tuple[list[list[StoredParameter]], dict[str, Any], int]:
    """The parameters of a `global_stepN` folder by group, Adam's constants, and the steps that were skipped.

    Raises:
        UserError: a part is missing or damaged, or it is not Adam's state.
    """
    parts = {int(part[1]): file for file in folder.iterdir() if (part := _PART.fullmatch(file.name))}
    if any(int(part[2]) for file in folder.iterdir() if (part := _PART.fullmatch(file.name))):
        raise UserError(f"{folder} is of tensor-parallel training, whose state is not supported")
    if not parts:
        raise UserError(f"{folder} holds no ZeRO part (zero_pp_rank_0_mp_rank_00_optim_states.pt); {_INCOMPLETE}")
    shapes, skipped = _read_shapes(folder)
    stage, ranks = 0, 0
    read: list[_Rank] = []
    constants: dict[str, Any] = {}
    for rank in range(max(parts) + 1):
        if rank not in parts:
            raise UserError(f"{folder} lacks the part of rank {rank} of {max(ranks, max(parts) + 1)}; {_INCOMPLETE}")
        content = load_state(parts[rank], _ALLOWED)
        optimizer = content.get("optimizer_state_dict") if isinstance(content, dict) else None
        if not isinstance(optimizer, dict) or "zero_stage" not in optimizer or "partition_count" not in optimizer:
            raise UserError(f"{parts[rank]} is not a part of a ZeRO state; {_INCOMPLETE}")
        stage, count = int(optimizer["zero_stage"]), optimizer["partition_count"]
        ranks = count if isinstance(count, int) else max(count)
        if len(parts) < ranks:
            missing = min(set(range(ranks)) - parts.keys())
            raise UserError(f"{folder} lacks the part of rank {missing} of {ranks}; {_INCOMPLETE}")
        flat, found = _read_rank(parts[rank], optimizer, stage)
        if constants and found != constants:
            raise UserError(f"{parts[rank]} and the rank before disagree on betas, eps or step; {_INCOMPLETE}")
        constants = found
        read.append(flat)
    join = _join_stage_3 if stage == 3 else _join_stage_2
    return join(folder, shapes, read), constants, skipped


def _read_shapes(folder: Path) -> tuple[list[dict[str, torch.Size]], int]:
    """Each group's names and shapes, and the steps that were skipped because a gradient overflowed."""
    files = (folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    path = next((file for file in files if file.is_file()), None)
    if path is None:
        raise UserError(f"{folder} lacks {files[0].name} or {files[1].name}, which name the parameters; {_INCOMPLETE}")
    content = load_state(path, _ALLOWED)
    shapes = content.get("param_shapes") if isinstance(content, dict) else None
    if not isinstance(shapes, list) or not shapes or not all(isinstance(group, dict) for group in shapes):
        raise UserError(f"{path} does not name the parameters (param_shapes); {_INCOMPLETE}")
    return [dict(group) for group in shapes if group], int(content.get("skipped_steps", 0))


def _read_rank(path: Path, optimizer: dict[str, Any], stage: int) -> tuple[_Rank, dict[str, Any]]:
    inner = optimizer.get("optimizer_state_dict" if stage == 3 else "base_optimizer_state")
    master = optimizer.get("fp32_flat_groups" if stage == 3 else "single_partition_of_fp32_groups")
    if not isinstance(inner, dict) or not isinstance(master, list) or not {"state", "param_groups"} <= inner.keys():
        raise UserError(f"{path} is of a form of ZeRO that is not supported (offloaded to NVMe, or elastic)")
    if any(padding for group in optimizer.get("param_alignment_paddings", []) for padding in group):
        raise UserError(f"{path} is of training with ZeRO's parameter_alignment, which is not supported; train without")
    state = [inner["state"][key] for key in sorted(inner["state"])]
    if len(state) != len(master):
        raise UserError(
            f"{path} holds the state of {len(state)} flat vectors and weights of {len(master)}; {_INCOMPLETE}"
        )
    groups = [group for group in inner["param_groups"] if group.get("params")]
    group_of = [place for place, group in enumerate(groups) for _ in group["params"]]
    constants = adam_constants(path, groups, zip(state, group_of, strict=True))
    return _Rank([of["exp_avg"] for of in state], [of["exp_avg_sq"] for of in state], master), constants


def _join_stage_2(folder: Path, shapes: list[dict[str, torch.Size]], ranks: list[_Rank]) -> list[list[StoredParameter]]:
    if any(len(rank.m) != len(shapes) for rank in ranks):
        raise UserError(f"{folder} names {len(shapes)} groups of parameters and holds other ones; {_INCOMPLETE}")
    groups = []
    for number, group in enumerate(shapes):
        flat = [torch.cat([getattr(rank, part)[number] for rank in ranks]) for part in ("m", "v", "master")]
        for vector in flat:  # the weights are kept without the padding, the moments with it
            _check_size(folder, sum(shape.numel() for shape in group.values()), vector.numel(), padded=True)
        parameters, start = [], 0
        for name, shape in group.items():
            m, v, master = (vector[start : start + shape.numel()].view(shape) for vector in flat)
            parameters.append(StoredParameter(m, v, name, master))
            start += shape.numel()
        groups.append(parameters)
    return groups


def _join_stage_3(folder: Path, shapes: list[dict[str, torch.Size]], ranks: list[_Rank]) -> list[list[StoredParameter]]:
    # Sub-groups cut a group between two parameters: joined they are the group.
    whole = [[torch.cat(getattr(rank, part)) for rank in ranks] for part in ("m", "v", "master")]
    share = {name: math.ceil(shape.numel() / len(ranks)) for group in shapes for name, shape in group.items()}
    for vector in (vector for part in whole for vector in part):
        _check_size(folder, sum(share.values()), vector.numel(), padded=False)
    groups, start = [], 0
    for group in shapes:
        parameters = []
        for name, shape in group.items():
            stop = start + share[name]
            m, v, master = (
                torch.cat([rank[start:stop] for rank in part])[: shape.numel()].view(shape) for part in whole
            )
            parameters.append(StoredParameter(m, v, name, master))
            start = stop
        groups.append(parameters)
    return groups


def _check_size(folder: Path, wanted: int, found: int, padded: bool) -> None:
    if found < wanted or (found > wanted and not padded):
        raise UserError(f"{folder} holds {found:,} numbers where its parameters have {wanted:,}; {_INCOMPLETE}")
