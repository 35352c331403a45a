"""From paired differences to the words of the protocol: t intervals, Holm's correction, yes, no or undecided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.05
# An interval within this part of the gap between random and all records is no difference.
NEGLIGIBLE = 0.1


@dataclass(frozen=True)
class Difference:
    """Paired differences in one cell: their mean, standard error and degrees of freedom."""

    mean: float
    error: float
    freedom: int

    @property
    def p(self) -> float:
        """Two-sided."""
        if self.error == 0:
            return 1.0 if self.mean == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.mean / self.error), self.freedom))

    def half_width(self, level: float = LEVEL) -> float:
        return float(stats.t.ppf(1 - level / 2, self.freedom)) * self.error


def difference(pairs: Sequence[float]) -> Difference:
    """Of the differences of pairs; of a single one the error is not known."""
    values = np.asarray(pairs, np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Difference(float(values.mean()), error, len(values) - 1)


def holm_levels(p_values: Sequence[float]) -> list[float]:
    """The level that Holm's procedure tests each hypothesis at, in their order.

    The smallest p-value at 0.05 by their number, the next at 0.05 by one less, and so on; once one fails, those behind
    it fail too, and their level is 0.
    """
    levels, failed = [0.0] * len(p_values), False
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        level = LEVEL / (len(p_values) - rank)
        levels[index] = 0.0 if failed else level
        failed = failed or p_values[index] > level
    return levels


def verdict(cells: Sequence[Difference], gaps: Sequence[float], level: float) -> str:
    """`yes`, `no` or `undecided`, as the protocol says.

    Args:
        cells: of each mixture and reference, of the arm that is said to be lower.
        gaps: of each cell, between random and all records.
        level: of Holm's step, at which `yes` is said; 0 where the step was not reached. `no` is said at 0.05.
    """
    if level > 0 and all(cell.mean + cell.half_width(level) < 0 for cell in cells):
        return "yes"
    widths = [cell.half_width() for cell in cells]
    if all(cell.mean - width > 0 for cell, width in zip(cells, widths, strict=True)):
        return "no"
    if all(abs(cell.mean) + width <= NEGLIGIBLE * gap for cell, width, gap in zip(cells, widths, gaps, strict=True)):
        return "no"
    return "undecided"
