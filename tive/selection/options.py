"""What is asked of a selection. Imports little, so that a script can show its options at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tive.util.errors import UserError

# The scores file's column of each instance score; the task budgets of these names are in proportion to its mean.
SCORE_COLUMNS = {
    "influence": "influence",
    "norm": "norm",
    "loss": "loss",
    "length": "supervised_tokens",
    "el2n": "el2n",
}
BUDGET_COLUMNS = {"difficulty": "norm", "loss": "loss", "length": "supervised_tokens", "el2n": "el2n"}
INSTANCE_SCORES = (*SCORE_COLUMNS, "random")
TASK_BUDGETS = (*BUDGET_COLUMNS, "size", "equal")
SAMPLINGS = ("weighted", "top", "middle")
ROUNDINGS = ("down", "largest_remainder")


@dataclass(frozen=True)
class Options:
    """What is chosen: the paper's selection, unless said otherwise.

    Attributes:
        p: share of all records to select, above 0 and up to 1.
        q: sharpness of the instance weights `softmax(q * score)`, from 0 up.
        seed: of the draw.
        exclude_tasks: names of tasks from which nothing is drawn.
        task_budget: what the tasks' budgets are in proportion to, one of `TASK_BUDGETS`.
        instance_score: what decides within a task, one of `INSTANCE_SCORES`.
        sampling: a `weighted` draw, the `top` scores, or those in the `middle` of a task.
        rounding: of the budgets, `down` or `largest_remainder`.

    Raises:
        UserError: a value is not one of those.
    """

    p: float = 0.15
    q: float = 0.001
    seed: int = 0
    exclude_tasks: tuple[str, ...] = ("textcaps",)
    task_budget: str = "difficulty"
    instance_score: str = "influence"
    sampling: str = "weighted"
    rounding: str = "down"

    def __post_init__(self) -> None:
        if not 0 < self.p <= 1:
            raise UserError(f"p = {self.p} is not a share; give a number above 0 and up to 1")
        if not (self.q >= 0 and math.isfinite(self.q)):
            raise UserError(f"q = {self.q} is not a sharpness; give a number from 0 up")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative; give a number from 0 up")
        known = {
            "task_budget": TASK_BUDGETS,
            "instance_score": INSTANCE_SCORES,
            "sampling": SAMPLINGS,
            "rounding": ROUNDINGS,
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise UserError(f"{name} {getattr(self, name)!r} is not known; give one of {', '.join(values)}")
        if self.sampling != "weighted" and self.instance_score == "random":
            raise UserError(f"sampling {self.sampling} has no meaning for random scores; leave one of them out")

    @property
    def columns(self) -> set[str]:
        """The columns of scores that these options need."""
        columns = {"norm", "influence"}
        columns |= {SCORE_COLUMNS[name] for name in (self.instance_score,) if name in SCORE_COLUMNS}
        return columns | {BUDGET_COLUMNS[name] for name in (self.task_budget,) if name in BUDGET_COLUMNS}
