"""What is asked of a selection, and how its files are named. Imports little: a script shows its help at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

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
        task_budget: what the tasks' budgets are in proportion to, one of `TASK_BUDGETS`, or several with `+` between:
            the mean of their shares.
        instance_score: what decides within a task, one of `INSTANCE_SCORES`.
        sampling: a `weighted` draw, the `top` scores, or the records nearest to the centres of `clusters`.
        rounding: of the budgets, `down` or `largest_remainder`.
        at_most_once: what a task's budget has above its records goes to the other tasks.
        from_sample: budgets from the records that have features, and a uniform draw from all.
        drop_below: leaves out the records whose visual gain is smaller; None for none.
        seed: of the draw.
        exclude_tasks: names of tasks from which nothing is drawn.

    Raises:
        UserError: a value is not one of those, or two do not go together.
    """

    p: float = 0.15
    q: float = 0.001
    task_budget: str = "difficulty"
    instance_score: str = "influence"
    sampling: str = "weighted"
    rounding: str = "down"
    at_most_once: bool = False
    from_sample: bool = False
    drop_below: float | None = None
    seed: int = 0
    exclude_tasks: tuple[str, ...] = (DEFAULT_EXCLUDED,)

    def __post_init__(self) -> None:
        _check_values(self)
        if self.sampling != "weighted" and self.instance_score == "random":
            raise UserError(f"sampling {self.sampling} has no meaning for random scores; leave one of them out")
        draws_alike = self.instance_score == "random" or (self.instance_score == "influence" and self.q <= UNIFORM_Q)
        if self.from_sample and not (draws_alike and self.sampling == "weighted" and self.drop_below is None):
            raise UserError(
                f"from_sample draws every record of a task alike, which goes with instance_score random, or influence "
                f"with q up to {UNIFORM_Q}, and neither with another sampling than weighted nor with drop_below: those "
                "need the scores of all records; leave it or them out"
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
        if self.sampling == "clusters":
            columns |= {"influence"}  # which needs the same features
        return columns | ({"visual_gain"} if self.drop_below is not None else set())

    def stem(self, task_names: Sequence[str], task_key: str) -> str:
        """`Tive_q_{q}_p_{p}`, as the release names it, and every choice that differs from the default.

        Two selections of the same data and features have the same name only where every choice is the same.
        """
        excluded = ""
        if set(self.exclude_tasks) != set(TiveOptions.exclude_tasks) & set(task_names):
            excluded = _name_part(sorted(self.exclude_tasks)) if self.exclude_tasks else "none"
        ordered = replace(self, task_budget="+".join(self.budget_rules))
        return _stem(f"Tive_q_{float(self.q)}_p_{float(self.p)}", ordered, task_key, exclude_tasks=excluded)


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
        _check_values(self)

    def stem(self, task_key: str) -> str:
        """`Less_p_{p}`, and every choice that differs from the default."""
        return _stem(f"Less_p_{float(self.p)}", self, task_key)


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


def _is_sum(text: str) -> bool:
    names = text.split("+")
    return set(names) <= set(TASK_BUDGETS) and len(set(names)) == len(names)


def _one_of(names: Sequence[str]) -> tuple[Callable[[Any], bool], str]:
    return names.__contains__, f"one of {', '.join(names)}"


# What a value must be, and how messages call that.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "p": (lambda p: 0 < p <= 1, "a share above 0 and up to 1"),
    "q": (lambda q: 0 <= q < math.inf, "a number from 0 up"),
    "task_budget": (_is_sum, f"one of {', '.join(TASK_BUDGETS)}, or some of them, each once, with + between"),
    "instance_score": _one_of(INSTANCE_SCORES),
    "sampling": _one_of(SAMPLINGS),
    "rounding": _one_of(ROUNDINGS),
    "drop_below": (lambda gain: gain is None or math.isfinite(gain), "a number, such as 0"),
    "seed": (lambda seed: seed >= 0, "a number from 0 up"),
    "over_targets": _one_of(OVER_TARGETS),
    "gradient": _one_of(GRADIENTS),
    "weights": (
        lambda weights: weights is None or (all(0 <= w < math.inf for w in weights) and any(weights)),
        "numbers from 0 up, one of them above 0",
    ),
}


def _check_values(options: TiveOptions | LessOptions) -> None:
    for name, value in vars(options).items():
        is_valid, wanted = _VALUES.get(name, (lambda _: True, ""))
        if not is_valid(value):
            raise UserError(f"{name} {value} cannot be; give {wanted}")


def _stem(first: str, options: TiveOptions | LessOptions, task_key: str, **given: str) -> str:
    """`first`, and every option that differs from its default; `given` has those that are written otherwise."""
    parts = {"p": "", "q": ""}
    for field in fields(options):
        value = getattr(options, field.name)
        text = "+".join(map(str, value)) if isinstance(value, tuple) else "yes" if value is True else str(value)
        parts.setdefault(field.name, "" if value == field.default else text)
    parts |= given | {"task_key": "" if task_key == "dataset" else _name_part([task_key])}
    named = {"task_budget": "budget", "instance_score": "score", "exclude_tasks": "exclude"}
    return "_".join([first, *(f"{named.get(name, name)}-{part}" for name, part in parts.items() if part)])


def _name_part(texts: list[str]) -> str:
    """Texts as part of a file name; eight digits of their SHA-256 where their letters do not suit one."""
    joined = "+".join(texts)
    if len(joined) <= 40 and texts != ["none"] and all(re.fullmatch(r"[A-Za-z0-9._-]+", text) for text in texts):
        return joined
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
