"""The formulas of TIVE (arXiv 2403.09559, section 3) as pure functions on arrays, one a formula.

Symbols: N records, `p` the share of them to select, `V_t` the value of task t, `n_t` its records, `I_s` the influence
of record s, `q` the sharpness of the instance weights.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtrit
from torch import Tensor


def task_value(norms: np.ndarray) -> float:
    """Task difficulty `V_t = mean over s in t of ||g_s||`, from the gradient norms `[n_t]` of its records."""
    return float(np.mean(norms, dtype=np.float64))


def value_error(norms: np.ndarray, size: int) -> float:
    """Standard error of `V_t` from a sample's norms `[n_t]`, drawn from `size` records without replacement."""
    if len(norms) == size:
        return 0.0
    return float(np.std(norms, ddof=1) * math.sqrt((1 - len(norms) / size) / len(norms)))


def task_budgets(values: np.ndarray, p: float, records: int) -> np.ndarray:
    """Records each task is given, `p * N * V_t / sum over t' of V_t'`, before rounding down.

    Args:
        values: `V_t`, or what else the budgets are in proportion to: `[T]`, not negative, not all zero.
        records: N, every record of the data file, those of excluded tasks too.
    """
    values = np.asarray(values, np.float64)
    return p * records * values / values.sum()


def mean_budgets(values: Sequence[np.ndarray], p: float, records: int) -> np.ndarray:
    """`p * N * mean over k of (values_k,t / sum over t' of values_k,t')`: each of K rules spends its K-th part."""
    return np.mean([task_budgets(one, p, records) for one in values], axis=0)


def budget_errors(
    means: np.ndarray, covariances: np.ndarray, counts: np.ndarray, sizes: np.ndarray, total: float
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors `[T]` and 95% intervals `[T, 2]` of `mean_budgets` whose values are means over a sample.

    With `S_k = sum over t of V_kt`, the budget is `b_t = B/K sum over k of V_kt / S_k`. The delta method takes it for
    linear near the means: a change of V_ku moves it by `a_tuk = B/K ([t = u] - V_kt / S_k) / S_k`. Samples of different
    tasks are independent, and the means of n_u of N_u records, drawn without replacement, have the covariances
    `(1 - n_u / N_u) / n_u C_u`. So

        `Var b_t = sum over u of w_tu,   w_tu = (1 - n_u / N_u) / n_u  a_tu' C_u a_tu`.

    A budget is positive and its error is in proportion to it, so the interval is even in its logarithm:
    `b_t exp(+-q s_t / b_t)`, q the 97.5% point of Student's t with Welch and Satterthwaite's degrees of freedom,
    `(sum over u of w_tu)^2 / sum over u of w_tu^2 / (n_u - 1)`.

    Args:
        means: `[K, T]`, V_kt of each rule and task.
        covariances: `[T, K, K]`, C_u of the records' values; zero where a rule looks at no record's value.
        counts, sizes: int `[T]`, n_u above 1 (or all), and N_u.
        total: B, the records to spend.
    """
    sums = means.sum(axis=1, keepdims=True)
    budgets = total * (means / sums).mean(axis=0)
    slopes = total / len(means) * (np.eye(means.shape[1]) - (means / sums)[:, :, None]) / sums[:, :, None]
    parts = np.einsum("ktu,ukl,ltu,u->tu", slopes, covariances, slopes, (1 - counts / sizes) / counts)
    variances = parts.sum(axis=1)
    spread = (parts**2 / np.maximum(counts - 1, 1)).sum(axis=1)
    freedom = np.divide(variances**2, spread, out=np.full(len(budgets), np.inf), where=spread > 0)
    errors = np.sqrt(variances)
    widths = np.exp(stdtrit(np.minimum(freedom, 1e6), 0.975) * errors / budgets)
    return errors, np.stack([budgets / widths, budgets * widths], axis=1)


def records_for_error(means: np.ndarray, covariances: np.ndarray, sizes: np.ndarray, error: float) -> int:
    """The fewest records a task, or all of a smaller one, that bring the error of every budget under a share of it."""
    budgets = (means / means.sum(axis=1, keepdims=True)).mean(axis=0)
    low, high = 1, int(sizes.max())  # the error falls with the number, and is 0 for all records
    while low < high:
        number = (low + high) // 2
        if (budget_errors(means, covariances, np.minimum(sizes, number), sizes, 1.0)[0] <= error * budgets).all():
            high = number
        else:
            low = number + 1
    return low


def capped(budgets: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Budgets `[T]` of which none is above its task's size: what is over goes to the others in proportion to theirs."""
    result, full = np.array(budgets, np.float64), np.zeros(len(budgets), bool)
    while (over := ~full & (result > sizes)).any():
        full |= over
        result[full] = sizes[full]
        left, rest = float(np.sum(budgets)) - float(result[full].sum()), ~full
        if budgets[rest].sum() > 0:
            result[rest] = budgets[rest] * left / budgets[rest].sum()
    return result


def rounded_down(amount: float) -> int:
    """The whole records in an amount; 0.29 * 100 is 29 although floating point puts it a hair below."""
    return math.floor(amount + 1e-9)


def rounded(amounts: np.ndarray, rounding: str) -> np.ndarray:
    """Whole records for each task, int64 `[T]`, from amounts that are not negative.

    `down` is the paper's rounding. By the `largest_remainder` (Hamilton's method) what it leaves of the total goes one
    each to the tasks that lost most, the earlier ones where they lost the same.
    """
    whole = np.array([rounded_down(amount) for amount in amounts.tolist()], np.int64)
    if rounding == "largest_remainder":
        left = rounded_down(float(amounts.sum())) - int(whole.sum())
        # Rounded, so that floating point decides between no two equal tasks.
        whole[np.argsort(-np.round(amounts - whole, 9), kind="stable")[:left]] += 1
    return whole


def instance_weights(scores: np.ndarray, q: float) -> np.ndarray:
    """Instance weights `softmax(q * I)` over the records of one task, `[n_t]`; they sum to 1."""
    weights = np.exp(_logits(scores, q))
    return weights / weights.sum()


def visual_gain(without_images: Tensor, with_images: Tensor) -> Tensor:
    """What its images take off a record's loss, `[n]`, over the same supervised tokens (VisNec, arXiv 2603.01195).

    Around 0 the model answers as well without the images; below 0 they mislead it, as those of another record do.
    """
    return without_images - with_images


def effective_sample_size(weights: np.ndarray) -> float:
    """`(sum w)^2 / sum w^2`: as many records, equally weighted, would leave as much choice. From 1 to `n_t`."""
    weights = np.asarray(weights, np.float64)
    return float(weights.sum() ** 2 / np.square(weights).sum())


def draw(scores: np.ndarray, q: float, number: int, seed: int, task: str) -> np.ndarray:
    """Draw `number` of a task's records without replacement with weights `softmax(q * score)`; their indices, sorted.

    Each record gets the key `q * score + Gumbel noise`, and the largest keys win: the same distribution as drawing
    one by one (Efraimidis and Spirakis, 2006, in logarithms), and right even where the softmax itself underflows. Ties
    go to the earlier record. The noise depends on the seed and the task's name alone.
    """
    noise = -np.log(-np.log(uniform(len(scores), seed, task)))
    return draw_top(_logits(scores, q) + noise, number)


def draw_top(scores: np.ndarray, number: int) -> np.ndarray:
    """The indices of the `number` largest of `scores` `[n_t]`, sorted; ties go to the earlier record."""
    return np.sort(np.argsort(-np.asarray(scores, np.float64), kind="stable")[:number])


def equal_shares(sizes: list[int], total: int, seed: int) -> list[int]:
    """`total` spread equally over tasks of `sizes`; a small task gives all it has and the rest goes to the others.

    What does not divide goes one each to tasks drawn by the seed from those that have records left.
    """
    level, left = 0, total
    for index, size in enumerate(sorted(sizes)):
        level = left // (len(sizes) - index)
        if size > level:
            break
        left -= size
    shares = np.minimum(sizes, level)
    unfilled = np.flatnonzero(np.array(sizes) > level)
    rest = min(total - int(shares.sum()), len(unfilled))
    shares[unfilled[draw(np.zeros(len(unfilled)), 0.0, rest, seed, "rest of the equal shares")]] += 1
    return shares.tolist()


def _logits(scores: np.ndarray, q: float) -> np.ndarray:
    """`q * score`, shifted so that the largest is 0, which changes no weight and cannot overflow."""
    scores = np.asarray(scores, np.float64)
    with np.errstate(over="ignore"):
        return q * (scores - scores.max(initial=-np.inf))


def uniform(count: int, seed: int, task: str) -> np.ndarray:
    """`count` random numbers strictly between 0 and 1, by seed and name.

    NumPy keeps PCG64's raw output fixed, not its distributions.
    """
    name = np.frombuffer(hashlib.sha256(task.encode("utf-8", "surrogatepass")).digest(), "<u4").tolist()
    raw = np.random.PCG64(np.random.SeedSequence([seed, *name])).random_raw(count)
    return ((raw >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
