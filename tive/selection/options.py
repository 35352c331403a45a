"""What is asked of a selection, and how its files are named. Imports little: a script shows its help at once."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tive.util.errors import UserError
from tive.util.text import LABEL_LIMIT, listed, shown

# The scores file's column of a score or budget that is called otherwise.
_COLUMNS = {"difficulty": "norm", "length": "supervised_tokens"}
# The budgets that look at no score.
WITHOUT_SCORES = ("size", "equal")
TASK_BUDGETS = ("difficulty", "loss", "length", "el2n", *WITHOUT_SCORES)
CHOICES: dict[str, tuple[str, ...]] = {
    "instance_score": ("influence", "norm", "loss", "length", "el2n", "visual_gain", "random"),
    "sampling": ("weighted", "top", "clusters"),
    "rounding": ("down", "largest_remainder"),
    "gradient": ("adam", "sgd"),
    "over_targets": ("max", "mean", "vote", "round_robin"),
}
# Cosines span 2 at most, so up to this q no weight within a task is more than 1.02 times another.
UNIFORM_Q = 0.01
# LLaVA's captions, which the paper leaves out; other mixtures need not have them.
DEFAULT_EXCLUDED = "textcaps"


def column_of(name: str) -> str:
    """The scores file's column of an instance score, or of what a task budget is the mean of."""
    return _COLUMNS.get(name, name)


@dataclass(frozen=True)
class TiveOptions:
    """What `select_data_TIVE.py` chooses, the paper's selection unless said otherwise; a `UserError` where a value is
    not one of those that are known, or two do not go together.
    """

    p: float = 0.15  # share of all records to select, above 0 and up to 1
    q: float = 0.001  # sharpness of the instance weights `softmax(q * score)`, from 0 up
    task_budget: str = "difficulty"  # one of `TASK_BUDGETS`, or several with `+` between: the mean of their shares
    instance_score: str = "influence"  # what decides within a task
    sampling: str = "weighted"  # a draw by weight, the `top` scores, or the nearest to the centres of `clusters`
    rounding: str = "down"  # of the budgets
    at_most_once: bool = False  # what a task's budget has above its records goes to the other tasks
    from_sample: bool = False  # budgets from the records that have features, and a uniform draw from all
    drop_below: float | None = None  # leaves out the records whose visual gain is smaller
    seed: int = 0  # of the draw
    exclude_tasks: tuple[str, ...] = (DEFAULT_EXCLUDED,)  # tasks from which nothing is drawn

    def __post_init__(self) -> None:
        _check_values(self)
        if self.sampling != "weighted" and self.instance_score == "random":
            raise UserError(f"sampling {self.sampling} has no meaning for random scores; leave one of them out")
        draws_alike = self.instance_score == "random" or (self.instance_score == "influence" and self.q <= UNIFORM_Q)
        if self.from_sample and not (draws_alike and self.sampling == "weighted" and self.drop_below is None):
            raise UserError(
                f"from_sample draws every record of a task alike; leave it out, or what needs every record's scores: "
                f"q above {UNIFORM_Q}, instance_score other than influence and random, sampling other than weighted, "
                "drop_below"
            )

    @property
    def budget_rules(self) -> tuple[str, ...]:
        """The names in `task_budget`, in the order of `TASK_BUDGETS`: how they are written changes nothing."""
        return tuple(name for name in TASK_BUDGETS if name in self.task_budget.split("+"))

    @property
    def score_column(self) -> str | None:
        """The column that decides within a task; None where all its records are alike."""
        return None if self.from_sample or self.instance_score == "random" else column_of(self.instance_score)

    @property
    def columns(self) -> set[str]:
        """All columns of scores that are needed; clusters need the features, as the influence does."""
        columns = {column_of(rule) for rule in self.budget_rules if rule not in WITHOUT_SCORES}
        if self.score_column:
            columns.add(self.score_column)
        if self.sampling == "clusters":
            columns.add("influence")
        if self.drop_below is not None:
            columns.add("visual_gain")
        return columns


@dataclass(frozen=True)
class LessOptions:
    """What `select_data_LESS.py` chooses, LESS's selection unless said otherwise; a `UserError` as of `TiveOptions`.

    Over the subtasks, `max` is the best one and `mean` their mean; a `vote` counts in how many a record is within the
    top p; in `round_robin` the subtasks take turns.
    """

    p: float = 0.05  # share of all records to select, above 0 and up to 1
    over_targets: str = "max"
    gradient: str = "adam"  # of the training records, as Adam applies it, in either form, or as it is (`sgd`)
    weights: tuple[float, ...] | None = None  # of the checkpoints, in order; None for the mean logged learning rates

    def __post_init__(self) -> None:
        _check_values(self)


# What a value must be, and how messages call that.
_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "p": (lambda p: 0 < p <= 1, "a share above 0 and up to 1"),
    "q": (lambda q: 0 <= q < math.inf, "a number from 0 up"),
    "task_budget": (
        lambda text: Counter(text.split("+")) <= Counter(TASK_BUDGETS),
        f"one of {', '.join(TASK_BUDGETS)}, or some of them, each once, with + between",
    ),
    "drop_below": (lambda gain: gain is None or math.isfinite(gain), "a number, such as 0"),
    "seed": (lambda seed: seed >= 0, "a number from 0 up"),
    "weights": (
        lambda weights: weights is None or (all(0 <= w < math.inf for w in weights) and any(weights)),
        "numbers from 0 up, one of them above 0",
    ),
}
_VALUES |= {name: (choices.__contains__, f"one of {', '.join(choices)}") for name, choices in CHOICES.items()}


def _check_values(options: TiveOptions | LessOptions) -> None:
    for name, (is_valid, wanted) in _VALUES.items():
        if hasattr(options, name) and not is_valid(value := getattr(options, name)):
            raise UserError(f"{name} {value} cannot be; give {wanted}")


def excluded_tasks(wanted: Sequence[str], task_names: Sequence[str]) -> tuple[str, ...]:
    """The tasks that are named for exclusion, one by one or with commas between; `none` is no task. A `UserError` where
    the data has no such task, unless it is the default's.
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


def stem_of(options: TiveOptions | LessOptions, task_key: str, task_names: Sequence[str]) -> str:
    """`Tive_q_{q}_p_{p}`, as the release names it, or `Less_p_{p}`; and every choice that differs from the default.

    Two selections of the same data and features have the same name only where every choice is the same.
    """
    parts = {}
    for field in fields(options):
        value = getattr(options, field.name)
        if value != field.default and field.name not in ("p", "q"):
            text = "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
            parts[field.name] = "yes" if value is True else text
    stem = f"Less_p_{float(options.p)}"
    if isinstance(options, TiveOptions):
        stem, excluded = f"Tive_q_{float(options.q)}_p_{float(options.p)}", sorted(options.exclude_tasks)
        if "task_budget" in parts:
            parts["task_budget"] = "+".join(options.budget_rules)
        is_default = excluded == [name for name in (DEFAULT_EXCLUDED,) if name in task_names]
        parts["exclude_tasks"] = "" if is_default else _name_part(excluded) if excluded else "none"
    parts["task_key"] = "" if task_key == "dataset" else _name_part([task_key])
    named = {"task_budget": "budget", "instance_score": "score", "exclude_tasks": "exclude"}
    return "_".join([stem, *(f"{named.get(name, name)}-{part}" for name, part in parts.items() if part)])


def _name_part(texts: list[str]) -> str:
    """Texts as part of a file name; eight digits of their SHA-256 where their letters do not suit one."""
    joined = "+".join(texts)
    if len(joined) <= 40 and texts != ["none"] and all(re.fullmatch(r"[A-Za-z0-9._-]+", text) for text in texts):
        return joined
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:8]
