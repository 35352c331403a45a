"""Selection for a target (LESS, arXiv 2402.04333, section 3), as pure functions on arrays, one a formula.

Symbols: `u_s` the unit feature of training record s, `i` a checkpoint and `w_i` its weight, `j` a subtask of the target
and `m_ij` its mean at checkpoint i. The products `<u_s, m_ij>` come from `tive.method.influence`.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def checkpoint_weights(rates: np.ndarray) -> np.ndarray:
    """`w_i = eta_i / sum over i' of eta_i'`, from the mean learning rate since the checkpoint before, `[C]`."""
    rates = np.asarray(rates, np.float64)
    return rates / rates.sum()


def mean_rates_since(sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """`eta_i`, the mean learning rate between checkpoint i - 1 and checkpoint i, `[C]`, in the order of steps.

    `sums` and `counts` are of the rates that were logged from the start of training to each checkpoint.
    """
    return np.diff(sums, prepend=0.0) / np.diff(counts, prepend=0)


def subtask_scores(products: Iterable[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """`sum over i of w_i <u_s, m_ij>`, `[N, J]`, from the products `[N, J]` of each checkpoint, held one at a time."""
    total: np.ndarray | None = None
    for weight, product in zip(weights, products, strict=True):
        total = weight * product if total is None else total + weight * product
    assert total is not None
    return total


def best_subtask(scores: np.ndarray) -> np.ndarray:
    """`max over j` of the scores `[N, J]`: a record is as good as it is for the subtask it serves best (LESS)."""
    return scores.max(axis=1)


def mean_subtask(scores: np.ndarray) -> np.ndarray:
    """`mean over j` of the scores `[N, J]`."""
    return scores.mean(axis=1)


def votes(scores: np.ndarray, number: int) -> np.ndarray:
    """In how many subtasks a record is among the best `number`, `[N]` (ICONS's consensus, arXiv 2501.00654).

    It is NaN where the scores `[N, J]` are. Ties go to the earlier record.
    """
    counted = np.zeros(len(scores), np.float64)
    for column in scores.T:
        counted[ranking(column)[:number]] += 1
    return np.where(np.isfinite(scores).all(axis=1), counted, np.nan)


def round_robin(scores: np.ndarray) -> np.ndarray:
    """Rows in the order in which the subtasks, one after the other, each take their best record that is left.

    At small budgets it is the best rule on average (arXiv 2602.14696). Subtask k mod J takes row k of the result. Rows
    whose scores `[N, J]` are NaN are left out; ties go to the earlier record.
    """
    orders = [ranking(column).tolist() for column in scores.T]
    places, taken = [0] * len(orders), set[int]()
    rows = []
    for turn in range(len(orders[0])):
        subtask = turn % len(orders)
        while (row := orders[subtask][places[subtask]]) in taken:
            places[subtask] += 1
        taken.add(row)
        rows.append(row)
    return np.array(rows, np.int64)


def ranking(scores: np.ndarray, tie_break: np.ndarray | None = None) -> np.ndarray:
    """Rows by falling score `[N]`, then falling `tie_break`, then rising row; those of score NaN are left out."""
    keys = (-scores,) if tie_break is None else (-tie_break, -scores)
    return np.lexsort(keys)[: np.count_nonzero(~np.isnan(scores))]
