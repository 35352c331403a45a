"""What is asked of LESS's selection. Imports little, so that a script can show its options at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tive.util.errors import UserError

GRADIENTS = ("adam", "sgd")
WITHIN = ("mean", "mean_gradient")
OVER_TARGETS = ("max", "mean", "vote")


@dataclass(frozen=True)
class Options:
    """What is chosen: LESS's selection, unless said otherwise.

    Attributes:
        p: share of all records to select, above 0 and up to 1.
        within: a subtask's `mean` of cosines, or the cosine with its `mean_gradient`.
        over_targets: the best subtask (`max`), their `mean`, or a `vote`: in how many a record is within the top p.
        gradient: of the training records, as Adam applies it (`adam`, of either form) or as it is (`sgd`).
        weights: of the checkpoints, in their order; None for the mean logged learning rates.

    Raises:
        UserError: a value is not one of those.
    """

    p: float = 0.05
    within: str = "mean"
    over_targets: str = "max"
    gradient: str = "adam"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"p = {self.p} is not a share; give a number above 0 and up to 1")
        known = {"within": WITHIN, "over_targets": OVER_TARGETS, "gradient": GRADIENTS}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r} is not known; give one of {', '.join(values)}")
        if self.weights is not None:
            if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
                raise UserError(f"weights {self._listed}: one is negative or not a number; give them from 0 up")
            if not any(self.weights):
                raise UserError(f"weights {self._listed} are all zero; give one above zero")

    @property
    def _listed(self) -> str:
        return " ".join(map(str, self.weights or ()))
