"""The selection as a function: budgets, rounding, scores, and what is said about them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tive.method.value import capped
from tive.selection.choose import choose
from tive.selection.options import TiveOptions
from tive.selection.printing import print_choice
from tive.util.errors import UserError

SUMS = ["difficulty+equal", "difficulty+size", "equal+size+difficulty", "loss+length"]


def arrays(sizes: list[int], seed: int = 0) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Tasks of these sizes, shuffled, with scores of every kind."""
    random = np.random.default_rng(seed)
    task = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    scores = {name: random.uniform(0.5, 2, len(task)) for name in ("norm", "influence", "loss", "el2n")}
    scores["supervised_tokens"] = random.integers(1, 90, len(task))
    return [f"t{number}" for number in range(len(sizes))], task, scores


def printed(capsys: pytest.CaptureFixture[str], sizes: list[int], options: TiveOptions, **changed: np.ndarray) -> str:
    names, task, scores = arrays(sizes)
    print_choice(choose(names, task, scores | changed, {}, options), options)
    return capsys.readouterr().out


@settings(max_examples=50)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.floats(0.05, 1),
    st.sampled_from(["difficulty", "size", "equal", "loss", "length", "el2n"]),
)
def test_the_largest_remainder_selects_exactly_p_of_the_records(sizes, p, task_budget):
    names, task, scores = arrays(sizes)
    options = TiveOptions(p=p, rounding="largest_remainder", task_budget=task_budget)
    total = int(p * len(task) + 1e-9)
    if not total:
        return
    choice = choose(names, task, scores, {}, options)
    assert choice.times_selected.sum() == total
    for entry in choice.tasks:
        assert abs(entry.selected - entry.budget_before_rounding) < 1 + 1e-6


def test_nothing_given_is_changed_and_nothing_returned_can_be():
    names, task, scores = arrays([9, 30])
    reasons = {4: "no image"}
    before = [array.copy() for array in (task, *scores.values())]
    choice = choose(names, task, scores, reasons, TiveOptions())
    assert all((a == b).all() for a, b in zip(before, (task, *scores.values()), strict=True)) and reasons == {
        4: "no image"
    }
    assert choice.times_selected[4] == 0 and np.isnan(choice.columns["weight"][4])
    with pytest.raises(dataclasses.FrozenInstanceError):
        choice.reasons = {}
    with pytest.raises(AttributeError):
        choice.tasks[0].budget = 3


@pytest.mark.parametrize(
    "task_budget, column", [("difficulty", "norm"), ("loss", "loss"), ("length", "supervised_tokens"), ("el2n", "el2n")]
)
def test_a_budget_by_a_score_is_in_proportion_to_its_mean(task_budget, column):
    names, task, scores = arrays([20, 35, 50])
    choice = choose(names, task, scores, {}, TiveOptions(task_budget=task_budget))
    means = np.array([scores[column][task == index].mean() for index in range(3)])
    assert [entry.budget_before_rounding for entry in choice.tasks] == pytest.approx(0.15 * 105 * means / means.sum())
    assert [entry.basis for entry in choice.tasks] == pytest.approx(means)
    assert [entry.value for entry in choice.tasks] == pytest.approx(
        [scores["norm"][task == index].mean() for index in range(3)]
    )


@pytest.mark.parametrize(
    "score, column",
    [("influence", "influence"), ("norm", "norm"), ("loss", "loss"), ("length", "supervised_tokens"), ("el2n", "el2n")],
)
def test_every_score_decides_within_a_task(score, column):
    names, task, scores = arrays([40, 60])
    top = choose(names, task, scores, {}, TiveOptions(instance_score=score, sampling="top", p=0.2))
    for index, entry in enumerate(top.tasks):
        values = scores[column][task == index]
        drawn = values[top.times_selected[task == index] == 1]
        assert len(drawn) == entry.selected and drawn.min() >= np.sort(values)[-entry.selected]
    weights = choose(names, task, scores, {}, TiveOptions(instance_score=score, q=0.5)).columns["weight"]
    for index in range(2):
        raw = np.exp(0.5 * scores[column][task == index])
        np.testing.assert_allclose(weights[task == index], raw / raw.sum(), rtol=1e-9)


def test_budgets_that_vanish_in_rounding_are_said_with_the_remedy(capsys):
    third = {"norm": np.ones(450)}
    said = printed(capsys, [3] * 150, TiveOptions(p=0.5), **third)
    assert "rounding down loses 75 of 225 records (33.3%)" in said
    assert "rounding largest_remainder selects exactly 225" in said
    assert "rounding down" not in printed(capsys, [3] * 150, TiveOptions(p=0.5, rounding="largest_remainder"), **third)
    # Less than 1% and no task without a record is not worth a word.
    assert "rounding down" not in printed(capsys, [4000, 4000], TiveOptions(), norm=np.ones(8000))


def test_tasks_that_get_nothing_are_counted_and_named(capsys):
    _, task, scores = arrays([300, 300, 300])
    scores["norm"][task == 1] = 1e-3
    said = printed(capsys, [300, 300, 300], TiveOptions(p=0.02), norm=scores["norm"])
    assert "1 of 3 tasks get nothing (t1)" in said
    both = printed(capsys, [300, 300, 300], TiveOptions(p=0.02, rounding="largest_remainder"), norm=scores["norm"])
    assert "1 of 3 tasks get nothing (t1); raise p to reach them" in both


def test_a_budget_that_is_all_lost_is_refused_with_the_remedy():
    names, task, scores = arrays([2] * 5000)
    with pytest.raises(UserError, match=r"5,000 tasks is less than one record for every task; .*largest_remainder"):
        choose(names, task, scores, {}, TiveOptions(p=0.3))
    assert (
        choose(names, task, scores, {}, TiveOptions(p=0.3, rounding="largest_remainder")).times_selected.sum() == 3000
    )


def test_a_budget_far_below_the_tasks_share_of_the_records_is_said(capsys):
    _, task, scores = arrays([1000, 40, 40])
    scores["norm"][task == 0] = 0.1
    said = printed(capsys, [1000, 40, 40], TiveOptions(), norm=scores["norm"])
    line = next(line for line in said.splitlines() if line.startswith("budget below a fifth"))
    assert "t0 (" in line and "by its records 150;" in line and "t1" not in line
    assert "above the records" in said
    assert "budget below" not in printed(capsys, [1000, 40, 40], TiveOptions(task_budget="size"), norm=scores["norm"])


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.floats(0.05, 1), st.sampled_from(SUMS))
def test_a_sum_of_rules_is_the_mean_of_what_each_gives_and_spends_the_same(sizes, p, rules):
    names, task, scores = arrays(sizes)

    def budgets(rule):
        options = TiveOptions(p=p, task_budget=rule, rounding="largest_remainder")
        return [entry.budget_before_rounding for entry in choose(names, task, scores, {}, options).tasks]

    if p * len(task) < 1:
        return
    assert budgets(rules) == pytest.approx(np.mean([budgets(rule) for rule in rules.split("+")], axis=0))
    assert sum(budgets(rules)) == pytest.approx(p * len(task))
    assert budgets("+".join(reversed(rules.split("+")))) == budgets(rules)


def test_the_table_shows_each_part_of_a_sum_and_the_sum(capsys):
    said = printed(capsys, [50, 150], TiveOptions(task_budget="equal+size", p=0.2)).splitlines()
    assert said[0].split("  ")[-1] and "by size" in said[0] and "by equal" in said[0]
    assert said[1].split()[3:6] == ["10.0", "20.0", "15.0"] and said[2].split()[3:6] == ["30.0", "20.0", "25.0"]


@settings(max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=9), st.floats(0.05, 1), st.sampled_from(["equal", "loss"]))
def test_at_most_once_no_record_is_taken_twice_and_the_total_holds(sizes, p, rule):
    names, task, scores = arrays(sizes)
    options = TiveOptions(p=p, task_budget=rule, rounding="largest_remainder", at_most_once=True)
    total = int(p * len(task) + 1e-9)
    if total:
        chosen = choose(names, task, scores, {}, options)
        assert chosen.times_selected.max() <= 1 and chosen.times_selected.sum() == total


def test_what_a_small_task_has_over_goes_to_the_others_in_proportion():
    names, task, scores = arrays([5, 100, 200])
    scores["norm"] = np.array([4.0, 1.0, 2.0])[task]
    budgets = [
        entry.budget_before_rounding
        for entry in choose(names, task, scores, {}, TiveOptions(p=0.2, at_most_once=True)).tasks
    ]
    assert budgets == pytest.approx([5, 56 / 3, 2 * 56 / 3])
    # Where that fills another task too, it goes on to the rest.
    assert capped(np.array([50.0, 20.0, 10.0]), np.array([10, 40, 100])).tolist() == pytest.approx([10, 40, 30])


def test_a_starved_task_is_told_what_other_rules_would_give_it(capsys):
    _, task, scores = arrays([1000, 40, 40])
    scores["norm"][task == 0] = 0.1
    means = np.array([scores["norm"][task == index].mean() for index in range(3)])
    said = printed(capsys, [1000, 40, 40], TiveOptions(), norm=scores["norm"])
    difficulty = 162 * means[0] / means.sum()
    assert f"with equal 54, with difficulty+equal {(54 + difficulty) / 2:.0f})" in said


def test_the_table_shows_what_the_budgets_are_in_proportion_to(capsys):
    assert "mean loss" in printed(capsys, [50, 60], TiveOptions(task_budget="loss")).splitlines()[0]
    assert "mean loss" not in printed(capsys, [50, 60], TiveOptions())


def test_names_of_tasks_are_printed_short_and_harmless(capsys):
    _, task, scores = arrays([300, 300, 3])
    scores["norm"][task == 0] = 1e-3
    names = ["\x1b[31mred\nline\u202e", "x" * 5000, "small" + "\r" * 90]
    options = TiveOptions(p=0.05)
    print_choice(choose(names, task, scores, {}, options), options)
    said = capsys.readouterr().out
    assert said.replace("\n", "").isprintable() and len(said) < 3000
    assert "get nothing" in said and "above the records" in said


@pytest.mark.parametrize(
    "given",
    [
        {"p": 0.0},
        {"q": float("nan")},
        {"seed": -1},
        {"task_budget": "loudness"},
        {"task_budget": "equal+equal"},
        {"task_budget": "difficulty+"},
        {"instance_score": "gut feeling"},
        {"sampling": "bottom"},
        {"rounding": "up"},
        {"sampling": "top", "instance_score": "random"},
    ],
)
def test_options_that_are_not_known_are_refused_wherever_they_come_from(given):
    with pytest.raises(UserError):
        TiveOptions(**given)
