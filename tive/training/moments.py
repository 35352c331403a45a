"""Adam's moments by the parameters' names beside a trainer's checkpoints, also under DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tive.models.optimizer_state import (
    MOMENTS_FILE,
    AdamConstants,
    Moments,
    adam_constants,
    moments_of,
    write_moments,
)
from tive.util.errors import UserError


def save_moments(trainer: Any, folder: str) -> None:
    """Write the moments of the LoRA matrices that a trainer of transformers trains into a checkpoint.

    Every process must call it: under DeepSpeed each holds a part, and they are gathered. Of an optimizer that is not
    Adam nothing is written, and a line says so. FSDP writes its state by name itself.
    """
    matrices = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in name}
    if not matrices or trainer.is_fsdp_enabled:
        return
    try:
        moments, constants = (_gathered if trainer.is_deepspeed_enabled else _in_memory)(trainer, matrices)
    except UserError as error:
        if trainer.is_world_process_zero():
            print(f"no {MOMENTS_FILE} is written: {error}")
        return
    if trainer.is_world_process_zero():
        write_moments(Path(folder) / MOMENTS_FILE, moments, constants)


def _in_memory(trainer: Any, matrices: Mapping[str, nn.Parameter]) -> tuple[dict[str, Moments], AdamConstants]:
    # A matrix without a gradient so far has no state: one of the vision tower, where no record had an image.
    states = {name: of for name, parameter in matrices.items() if (of := trainer.optimizer.state.get(parameter))}
    groups = [group for group in trainer.optimizer.param_groups if group["params"]]
    moments = {name: moments_of("the optimizer", of, matrices[name]) for name, of in states.items()}
    steps = [of["step"] if "step" in of else groups[0].get("step") for of in states.values()]
    return moments, adam_constants("the optimizer", groups, steps)


def _gathered(trainer: Any, matrices: Mapping[str, nn.Parameter]) -> tuple[dict[str, Moments], AdamConstants]:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = trainer.model_wrapped
    # Steps whose gradients overflowed in float16 are counted by the trainer and not taken by Adam.
    constants = adam_constants(
        "the optimizer", trainer.optimizer.param_groups, [engine.global_steps - engine.skipped_steps]
    )
    moments = {}
    for name, parameter in matrices.items():
        m, v = (safe_get_full_optimizer_state(parameter, key).cpu() for key in ("exp_avg", "exp_avg_sq"))
        moments[name] = Moments(m, v, safe_get_full_fp32_param(parameter).to(parameter.dtype).cpu())
    return moments, constants
