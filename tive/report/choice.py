"""How much choice the instance weights make, as a function of q."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tive.method.value import effective_sample_size, instance_weights
from tive.selection.files import Selection
from tive.selection.options import SCORE_COLUMNS

Q_GRID = np.logspace(-4, 5, 91)


def effective_sample_sizes(scores: np.ndarray, qs: np.ndarray) -> np.ndarray:
    """Effective sample size of the weights `softmax(q * score)`, for each q.

    Args:
        scores: float `[n]`, n > 0.
        qs: float `[k]`.

    Returns:
        float64 `[k]`, between 1 (one record has all the weight) and n (all weigh the same).
    """
    return np.array([effective_sample_size(instance_weights(scores, q)) for q in qs])


@dataclass(frozen=True)
class Choice:
    """The curve over q of the tasks that take part.

    Attributes:
        q: the selection's own.
        score: the column of the scores file that the weights are made of.
        tasks: indices into the selection's tasks.
        qs: float64 `[k]`.
        sizes: int64 `[tasks]`, the records that have a score.
        curves: float64 `[tasks, k]`, effective sample sizes.
        at_q: float64 `[tasks]`, effective sample size at the selection's q.
        ranges: float64 `[tasks]`, largest minus smallest score.
    """

    q: float
    score: str
    tasks: list[int]
    qs: np.ndarray
    sizes: np.ndarray
    curves: np.ndarray
    at_q: np.ndarray
    ranges: np.ndarray

    @property
    def shares(self) -> np.ndarray:
        """Effective sample size by task size, all tasks together, `[k]`."""
        return self.curves.sum(0) / self.sizes.sum()

    @property
    def share_at_q(self) -> float:
        return float(self.at_q.sum() / self.sizes.sum())

    def q_where(self, share: float, task: int | None = None) -> float | None:
        """The q at which the effective sample size has fallen to `share` of the size; None beyond the curve.

        Args:
            task: position in `tasks`; None for all together.
        """
        shares = self.shares if task is None else self.curves[task] / self.sizes[task]
        if not shares[-1] < share < shares[0]:
            return None
        return float(10 ** np.interp(-share, -shares, np.log10(self.qs)))

    def largest_ratio(self, task: int | None = None) -> float:
        """Largest weight by smallest weight within a task (of any task, when None); infinity when it overflows."""
        spread = abs(self.q) * float(self.ranges.max() if task is None else self.ranges[task])
        return math.exp(spread) if spread < 700 else math.inf


def choice_of(selection: Selection) -> Choice | None:
    """The curve of TIVE's selection, from the scores of its records; None when no task has any.

    The weights are made of the score that the selection asked for; of the influence where it drew at random.
    """
    score = SCORE_COLUMNS.get(str(selection.summary.arguments.get("instance_score")), "influence")
    values = selection.column(score)
    q = float(selection.summary.arguments["q"])
    tasks, sizes, curves, ranges = [], [], [], []
    for index, task in enumerate(selection.tasks):
        scores = values[selection.rows_of(index)]
        scores = scores[np.isfinite(scores)]
        if task.excluded or not len(scores):
            continue
        tasks.append(index)
        sizes.append(len(scores))
        curves.append(effective_sample_sizes(scores, np.append(Q_GRID, q)))
        ranges.append(np.ptp(scores))
    if not tasks:
        return None
    curve = np.array(curves)
    return Choice(q, score, tasks, Q_GRID, np.array(sizes), curve[:, :-1], curve[:, -1], np.array(ranges))
