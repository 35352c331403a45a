"""What a trainer's `trainer_state.json` tells of a checkpoint: its step, and the learning rates up to it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from tive.util.errors import UserError
from tive.util.files import read_json


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
