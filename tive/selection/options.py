"""What is asked of a selection, and how its files are named. Imports little: a script shows its help at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, listed, shown

# The scores file's column of each instance score; the task budgets of these names are in proportion to its mean.
SCORE_COLUMNS = {
    "influence": "influence",
    "norm": "norm",
    "loss": "loss",
    "length": "supervised_tokens",
    "el2n": "el2n",
    "visual_gain": "visual_gain",
}
BUDGET_COLUMNS = {"difficulty": "norm", "loss": "loss", "length": "supervised_tokens", "el2n": "el2n"}
INSTANCE_SCORES = (*SCORE_COLUMNS, "random")
TASK_BUDGETS = (*BUDGET_COLUMNS, "size", "equal")
SAMPLINGS = ("weighted", "top", "clusters")
ROUNDINGS = ("down", "largest_remainder")
GRADIENTS = ("adam", "sgd")
OVER_TARGETS = ("max", "mean", "vote", "round_robin")
# Cosines span 2 at most, so up to this q no weight within a task is more than 1.02 times another.
UNIFORM_Q = 0.01
# LLaVA's captions, which the paper leaves out; other mixtures need not have them.
DEFAULT_EXCLUDED = "textcaps"


@dataclass(frozen=True)
class TiveOptions:
    """What `select_data_TIVE.py` chooses: the paper's selection, unless said otherwise.

    Attributes:
        p: share of all records to select, above 0 and up to 1.
        q: sharpness of the instance weights `softmax(q * score)`, from 0 up.
        seed: of the draw.
        exclude_tasks: names of tasks from which nothing is drawn.
        task_budget: what the tasks' budgets are in proportion to, one of `TASK_BUDGETS`, or several with `+` between:
            the mean of their shares.
        instance_score: what decides within a task, one of `INSTANCE_SCORES`.
        sampling: a `weighted` draw, the `top` scores, or the records nearest to the centres of `clusters`.
        rounding: of the budgets, `down` or `largest_remainder`.
        at_most_once: what a task's budget has above its records goes to the other tasks.
        drop_below: leaves out the records whose visual gain is smaller; None for none.
        from_sample: budgets from the records that have features, and a uniform draw from all.

    Raises:
        UserError: a value is not one of those.
    """

    p: float = 0.15
    q: float = 0.001
    seed: int = 0
    exclude_tasks: tuple[str, ...] = (DEFAULT_EXCLUDED,)
    task_budget: str = "difficulty"
    instance_score: str = "influence"
    sampling: str = "weighted"
    rounding: str = "down"
    at_most_once: bool = False
    from_sample: bool = False
    drop_below: float | None = None

    def __post_init__(self) -> None:
        _check_share(self.p)
        if not (self.q >= 0 and math.isfinite(self.q)):
            raise UserError(f"q = {self.q} is not a sharpness; give a number from 0 up")
        if self.seed < 0:
            raise UserError(f"seed {self.seed} is negative; give a number from 0 up")
        names = self.task_budget.split("+")
        for name in names:
            _check_known("task_budget", name, TASK_BUDGETS)
        if len(set(names)) < len(names):
            raise UserError(f"task_budget {self.task_budget} names one rule twice; name each once")
        _check_known("instance_score", self.instance_score, INSTANCE_SCORES)
        _check_known("sampling", self.sampling, SAMPLINGS)
        _check_known("rounding", self.rounding, ROUNDINGS)
        if self.sampling != "weighted" and self.instance_score == "random":
            raise UserError(f"sampling {self.sampling} has no meaning for random scores; leave one of them out")

        if self.drop_below is not None and not math.isfinite(self.drop_below):
            raise UserError(f"drop_below {self.drop_below} is not a visual gain; give a number, such as 0")
        if self.from_sample and self.drop_below is not None:
            raise UserError("drop_below needs the visual gain of all records; leave it out, or from_sample")
        if self.from_sample and (self.instance_score not in ("influence", "random") or self.sampling != "weighted"):
            raise UserError(
                f"instance_score {self.instance_score} with sampling {self.sampling} needs the gradients of all "
                "records; leave from_sample out, or both of these"
            )
        if self.from_sample and self.instance_score == "influence" and self.q > UNIFORM_Q:
            raise UserError(
                f"q = {self.q} makes a draw by influence, which needs the gradients of all records; from a sample the "
                f"draw is uniform, as it all but is up to q = {UNIFORM_Q}; give a smaller q, or leave from_sample out"
            )

    @property
    def budget_rules(self) -> tuple[str, ...]:
        """The names in `task_budget`, in the order of `TASK_BUDGETS`: how they are written changes nothing."""
        return tuple(name for name in TASK_BUDGETS if name in self.task_budget.split("+"))

    @property
    def columns(self) -> set[str]:
        """The columns of scores that decide."""
        columns = {BUDGET_COLUMNS[name] for name in self.budget_rules if name in BUDGET_COLUMNS}
        if not self.from_sample and self.instance_score != "random":
            columns |= {SCORE_COLUMNS[self.instance_score]}
        return columns | ({"visual_gain"} if self.drop_below is not None else set())

    @property
    def of_gradients(self) -> list[str]:
        """Of these options those that need gradient norms or features."""
        needed = [("task_budget", "difficulty")] if "difficulty" in self.budget_rules else []
        if not self.from_sample and self.instance_score in ("influence", "norm"):
            needed += [("instance_score", self.instance_score)]
        if self.sampling == "clusters":
            needed += [("sampling", "clusters")]
        return [" ".join(option) for option in needed]

    def stem(self, task_names: Sequence[str], task_key: str) -> str:
        """`Tive_q_{q}_p_{p}`, as the release names it, and every choice that differs from the default.

        Two selections of the same data and features have the same name only where every choice is the same.
        """
        parts = {
            "budget": _unless(TiveOptions.task_budget, "+".join(self.budget_rules)),
            "score": _unless(TiveOptions.instance_score, self.instance_score),
            "sampling": _unless(TiveOptions.sampling, self.sampling),
            "rounding": _unless(TiveOptions.rounding, self.rounding),
            "at_most_once": "yes" if self.at_most_once else "",
            "from_sample": "yes" if self.from_sample else "",
            "drop_below": "" if self.drop_below is None else str(float(self.drop_below)),
            "seed": _unless(TiveOptions.seed, self.seed),
        }
        if set(self.exclude_tasks) != set(TiveOptions.exclude_tasks) & set(task_names):
            parts["exclude"] = _name_part(sorted(self.exclude_tasks)) if self.exclude_tasks else "none"
        return _stem(f"Tive_q_{float(self.q)}_p_{float(self.p)}", parts, task_key)


@dataclass(frozen=True)
class LessOptions:
    """What `select_data_LESS.py` chooses: LESS's selection, unless said otherwise.

    Attributes:
        p: share of all records to select, above 0 and up to 1.
        over_targets: the best subtask (`max`), their `mean`, a `vote`: in how many a record is within the top p; or
            `round_robin`: the subtasks take turns.
        gradient: of the training records, as Adam applies it (`adam`, of either form) or as it is (`sgd`).
        weights: of the checkpoints, in their order; None for the mean logged learning rates.

    Raises:
        UserError: a value is not one of those.
    """

    p: float = 0.05
    over_targets: str = "max"
    gradient: str = "adam"
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _check_share(self.p)
        _check_known("over_targets", self.over_targets, OVER_TARGETS)
        _check_known("gradient", self.gradient, GRADIENTS)
        if self.weights is not None:
            given = " ".join(map(str, self.weights))
            if not all(math.isfinite(weight) and weight >= 0 for weight in self.weights):
                raise UserError(f"weights {given}: one is negative or not a number; give them from 0 up")
            if not any(self.weights):
                raise UserError(f"weights {given} are all zero; give one above zero")

    def stem(self, task_key: str) -> str:
        """`Less_p_{p}`, and every choice that differs from the default."""
        parts = {
            "over_targets": _unless(LessOptions.over_targets, self.over_targets),
            "gradient": _unless(LessOptions.gradient, self.gradient),
            "weights": "+".join(map(str, self.weights or ())),
        }
        return _stem(f"Less_p_{float(self.p)}", parts, task_key)


def excluded_tasks(wanted: Sequence[str], task_names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that are named for exclusion, one by one or with commas between; `none` is no task.

    Raises:
        UserError: a task that is named is not there, unless it is the default's.
    """
    known = set(task_names)
    names = {name.strip() for text in wanted for name in ([text] if text in known else text.split(","))} - {""}
    if names == {"none"}:
        names &= known
    if unknown := sorted(names - known - {DEFAULT_EXCLUDED}):
        raise UserError(
            f"the data has no task {shown(unknown[0], LABEL_LIMIT)} to exclude; its tasks are: "
            f"{listed(task_names, 40)} (put a name with spaces in quotes)"
        )
    return tuple(sorted(names & known))


def _check_share(p: float) -> None:
    if not 0 < p <= 1:
        raise UserError(f"p = {p} is not a share; give a number above 0 and up to 1")


def _check_known(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"{name} {value!r} is not known; give one of {', '.join(known)}")


def _unless(default: object, value: object) -> str:
    return "" if value == default else str(value)


def _stem(first: str, parts: dict[str, str], task_key: str) -> str:
    if task_key != "dataset":
        parts = parts | {"task_key": _name_part([task_key])}
    return "_".join([first, *(f"{name}-{part}" for name, part in parts.items() if part)])


def _name_part(texts: list[str]) -> str:
    """Texts as part of a file name; eight digits of their SHA-256 where their letters do not suit one."""
    joined = "+".join(texts)
    if len(joined) <= 40 and texts != ["none"] and all(re.fullmatch(r"[A-Za-z0-9._-]+", text) for text in texts):
        return joined
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
