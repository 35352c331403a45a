"""The formulas of the selection against naive versions."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tive.method.value import (
    draw,
    draw_top,
    effective_sample_size,
    equal_shares,
    instance_weights,
    rounded,
    rounded_down,
    task_budgets,
    task_value,
)


def test_task_value_is_the_mean_norm():
    assert task_value(np.array([1.0, 2.0, 6.0])) == 3.0


def test_budgets_share_p_n_in_proportion_to_the_values():
    budgets = task_budgets(np.array([1.0, 2.0, 5.0]), p=0.15, records=1000)
    assert budgets == pytest.approx([0.15 * 1000 * 1 / 8, 0.15 * 1000 * 2 / 8, 0.15 * 1000 * 5 / 8])


@pytest.mark.parametrize("amount, whole", [(0.29 * 100, 29), (28.999, 28), (7.0, 7), (0.2, 0)])
def test_amounts_are_rounded_down_whatever_floating_point_does_to_whole_numbers(amount, whole):
    assert rounded_down(amount) == whole


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(0, 50))
def test_weights_are_the_softmax_and_the_effective_sample_size_their_inverse_sum_of_squares(scores, q):
    raw = [math.exp(q * score) for score in scores]
    weights = instance_weights(np.array(scores), q)
    assert weights == pytest.approx([one / sum(raw) for one in raw], rel=1e-9)
    assert effective_sample_size(weights) == pytest.approx(1 / sum(weight**2 for weight in weights), rel=1e-9)


def test_weights_neither_overflow_nor_become_nan_at_an_extreme_q():
    assert instance_weights(np.array([0.1, 0.9, 0.5]), 1e300).tolist() == [0, 1, 0]
    assert draw(np.array([0.1, 0.9, 0.5]), 1e300, 2, 0, "task").tolist() in ([0, 1], [1, 2])


@pytest.mark.parametrize("number", [1, 2, 3])
def test_draw_has_the_distribution_of_drawing_one_by_one_without_replacement(number):
    scores, q, trials = np.array([0.0, 1.0, 2.0, -0.5]), 1.0, 8000
    weights = instance_weights(scores, q)
    expected: dict[tuple[int, ...], float] = {}
    for order in itertools.permutations(range(4), number):
        chance, left = 1.0, 1.0
        for record in order:
            chance *= weights[record] / left
            left -= weights[record]
        expected[tuple(sorted(order))] = expected.get(tuple(sorted(order)), 0) + chance
    ours = [tuple(draw(scores, q, number, seed, "task").tolist()) for seed in range(trials)]
    random = np.random.default_rng(1)
    numpys = [tuple(sorted(random.choice(4, number, replace=False, p=weights).tolist())) for _ in range(trials)]
    for drawn in (ours, numpys):
        deviation = sum((drawn.count(key) - trials * p) ** 2 / (trials * p) for key, p in expected.items())
        assert deviation < 25, drawn  # chi-square with at most 5 degrees of freedom: below 21 in 99.9% of cases


def test_draw_depends_on_seed_and_task_alone_and_is_the_same_everywhere():
    scores = np.linspace(0, 1, 50)
    assert draw(scores, 2.0, 6, 0, "vqa").tolist() == draw(scores, 2.0, 6, 0, "vqa").tolist()
    assert draw(scores, 2.0, 6, 0, "vqa").tolist() != draw(scores, 2.0, 6, 1, "vqa").tolist()
    assert draw(scores, 2.0, 6, 0, "vqa").tolist() != draw(scores, 2.0, 6, 0, "gqa").tolist()
    # Written down once; another result on any machine or NumPy is a broken promise.
    assert draw(scores, 2.0, 6, 0, "vqa").tolist() == WRITTEN_DOWN


WRITTEN_DOWN = [28, 36, 40, 41, 46, 47]


def test_the_subset_is_independent_of_the_warm_up_sample_of_another_seed_and_holds_that_of_its_own():
    influence = np.random.default_rng(0).uniform(-1, 1, 100)
    both = {0: 0, 1: 0}
    for seed in range(300):
        warm_up = set(draw(np.zeros(100), 0.0, 10, seed, "vqa").tolist())
        for apart in both:
            subset = draw(influence, 0.001, 20, seed + 1000 * apart, "vqa")
            both[apart] += len(warm_up & set(subset.tolist()))
    # By chance a warm-up record is in the subset with 1/5, in 3,000 draws to about 0.02; with one seed it always is.
    assert both[0] == 3000 and abs(both[1] / 3000 - 0.2) < 0.03


def test_top_takes_the_best_and_the_earlier_of_equal_ones():
    assert draw_top(np.array([1.0, 3.0, 2.0, 3.0, 2.0]), 3).tolist() == [1, 2, 3]
    assert draw_top(np.zeros(4), 2).tolist() == [0, 1]


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1000), min_size=1, max_size=30))
def test_rounding_by_the_largest_remainder_holds_the_total_and_moves_no_budget_by_one(amounts):
    budgets = np.array(amounts)
    whole = rounded(budgets, "largest_remainder")
    assert whole.sum() == rounded_down(float(budgets.sum()))
    assert (np.abs(whole - budgets) < 1 + 1e-8).all()
    assert (rounded(budgets, "down") == [rounded_down(amount) for amount in amounts]).all()


def test_the_largest_remainder_gives_to_the_tasks_that_lost_most_and_to_the_earlier_of_equal_ones():
    assert rounded(np.array([1.2, 0.9, 2.4, 0.5]), "largest_remainder").tolist() == [1, 1, 2, 1]
    assert rounded(np.full(150, 1.5), "largest_remainder").tolist() == [2] * 75 + [1] * 75
    assert rounded(np.full(6, 1 / 3), "largest_remainder").tolist() == [1, 1, 0, 0, 0, 0]


@settings(max_examples=200)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=8), st.data())
def test_equal_shares_hold_the_total_and_no_task_could_give_more_evenly(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    shares = equal_shares(sizes, total, seed=0)
    assert sum(shares) == total
    assert all(0 <= share <= size for share, size in zip(shares, sizes, strict=True))
    # A task that gives less than another by more than one gives all it has.
    assert all(share == size for share, size in zip(shares, sizes, strict=True) if share < max(shares) - 1)
