"""The experiments' plan, mixture, statistics, words and tables are those of their protocols."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from scripts.experiment import mixture, plan, tables
from scripts.experiment.plan import FULL, SMALL, Run, runs
from scripts.experiment.tables import holm_levels, interval, is_below, is_equal, measures, p_value, shown
from tests.helpers.packages import write_packages
from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


# Tables of Student's t, two-sided.
@pytest.mark.parametrize(
    ("freedom", "probability", "t"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (7, 0.95, 2.3646), (7, 0.99, 3.4995), (30, 0.95, 2.0423)],
)
def test_intervals_and_p_values_are_those_of_students_table(freedom, probability, t):
    pairs = np.linspace(-1, 1, freedom + 1)
    pairs += t * pairs.std(ddof=1) / math.sqrt(len(pairs))  # so the interval ends at 0
    mean, low, high = interval(pairs, 1 - probability)
    assert low == pytest.approx(0, abs=1e-4) and high == pytest.approx(2 * mean, abs=1e-4)
    if len(pairs) >= plan.FEWEST_SEEDS:
        assert p_value(pairs) == pytest.approx(1 - probability, abs=1e-5)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    numbers = np.random.default_rng(0)
    intervals = [interval(numbers.normal(0.3, 1.0, 8)) for _ in range(1500)]
    assert abs(np.mean([low <= 0.3 <= high for _, low, high in intervals]) - 0.95) < 0.02


def test_holm_stops_at_the_first_that_fails():
    assert holm_levels([0.001, 0.04, 0.02]) == pytest.approx([0.05 / 3, 0.05, 0.025])
    assert holm_levels([0.3, 0.001, 0.04]) == pytest.approx([0.0, 0.05 / 3, 0.025])


UNSURE, TINY = [-0.3, 0.3, 0.01], [0.01, -0.02, 0.015]
BELOW, ABOVE = [-1.0, -1.1, -0.9], [1.0, 1.1, 0.9]


@pytest.mark.parametrize(
    ("pairs", "below", "equal"),
    [(BELOW, "yes", "no"), (ABOVE, "no", "no"), (TINY, "no", "yes"), (UNSURE, "undecided", "undecided")],
)
def test_the_answer_is_yes_or_no_only_where_the_whole_interval_says_so(pairs, below, equal):
    assert is_below(pairs, 0.2, 0.05) == below and is_equal(pairs, 0.2) == equal


def test_a_hypothesis_that_holms_procedure_does_not_reach_is_not_answered_with_yes():
    assert is_below(BELOW, 0.2, 0.0) == "undecided"


def test_every_compared_arm_has_the_seeds_that_an_answer_needs():
    counted = Counter(run.arm for run in runs(FULL))
    compared = {arm for pair in (*plan.BELOW, plan.EQUAL) for arm in pair}
    assert all(counted[arm] >= 4 > plan.FEWEST_SEEDS for arm in compared) and counted["all"] > 0
    assert set(counted) == set(plan.ARMS) and max(Counter(runs(FULL)).values()) == 1
    assert [run.seed for run in runs(FULL)[: len(plan.MAIN)]] == [0] * len(plan.MAIN)  # seed by seed


def test_a_mixture_has_the_plans_records_and_of_no_task_a_held_out_picture_or_question(tmp_path):
    write_packages(tmp_path / "packages")
    mixture.make_mixture(tmp_path, SMALL, lambda questions: [f"About {text}" for text in questions])
    made = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("captions", "mixture", "held_out")}
    counted = Counter(record["dataset"] for record in made["mixture"])
    assert counted == {task: SMALL.records_of(task) for task in counted} and len(counted) == 8
    assert set(Counter(record["dataset"] for record in made["held_out"]).values()) == {SMALL.held_out}
    assert len(made["captions"]) == SMALL.captions and set(plan.SHORT) < set(counted)

    def seen(name, key):
        return {key(record) for record in made[name]}

    def picture(record):
        return (tmp_path / "images" / record["image"]).read_bytes() if "image" in record else None

    def question(record):
        return (picture(record), record["conversations"][0]["value"])

    assert seen("mixture", question).isdisjoint(seen("held_out", question))
    assert (seen("mixture", picture) | seen("held_out", picture)).isdisjoint(seen("captions", picture))


def test_a_task_with_too_few_examples_is_named(tmp_path):
    write_packages(tmp_path / "packages")
    with pytest.raises(UserError, match="country"):
        mixture.make_mixture(
            tmp_path, dataclasses.replace(SMALL, records=40), lambda questions: [None for _ in questions]
        )
    assert not (tmp_path / "mixture.json").exists()


def test_measures_are_the_means_that_they_are_named_for():
    losses = {"fact": 1.0, "chat": 2.0, "digit": 3.0, "boxes": 6.0}
    records = {"fact": 100, "chat": 100, "digit": 200, "boxes": 600}
    measured = measures(
        {task: {"loss": x, "answers": 4, "exact": x, "mixture_records": records[task]} for task, x in losses.items()}
    )
    assert measured["weighted"] == pytest.approx((100 + 200 + 600 + 3600) / 1000)
    assert measured["mean"] == 3.0 and measured["worst"] == 6.0
    assert measured["known"] == 1.5 and measured["new"] == 4.5
    assert measured["exact"] == pytest.approx((1 / 4 + 3 / 4) / 2)  # of the tasks with short answers


def measured_of(seeds, **means):
    return {Run(arm, seed): {"mean": mean + 10 * seed} for arm, mean in means.items() for seed in range(seeds)}


def test_differences_are_paired_by_seed_and_too_few_give_no_answer():
    arms = {"random": 5.0, "equal": 5.0, "tive": 4.9, "tive_from_sample": 4.9, "difficulty_equal": 4.5}
    measured = measured_of(4, **arms)
    assert tables.paired(measured, "tive", "random") == pytest.approx([-0.1] * 4)
    answers = dict(row[:2] for row in tables.answer_rows(measured | {Run("all", 0): {"mean": 3.0}})[1:])
    assert answers == {
        "difficulty_equal below random": "**yes**",
        "difficulty_equal below equal": "**yes**",
        "difficulty_equal below tive": "**yes**",
        "tive_from_sample equal to tive": "**yes**",
    }
    assert {row[1] for row in tables.answer_rows(measured_of(2, **arms))[1:]} == {"**not run**"}
    assert tables.answer_rows(measured)[-1][1] == "**not run**"  # without all records there is no gap to measure by


def test_equal_runs_do_not_differ_and_of_a_single_pair_no_interval_is_shown():
    assert p_value([0.0, 0.0, 0.0]) == 1.0 and tables.LEVEL == 0.05
    assert shown([0.5]) == "+0.5000" and shown([]) == "-"


def tables_of(text: str) -> dict[str, list[list[str]]]:
    """The tables below each mixture's name, a row a list of cells."""
    parts = re.split(r"^\*\*(\w+(?:, \w+)?)\*\*$", text, flags=re.M)
    rows = {
        name: re.findall(r"^\| (.*) \|$", body, flags=re.M) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {name: [line.split(" | ") for line in lines] for name, lines in rows.items()}


def made_of(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", str(RESULTS / name)])
    tables.main()
    return capsys.readouterr().out


def test_the_first_experiments_tables_are_made_again_from_its_data(capsys, monkeypatch):
    made = tables_of(made_of("first_experiment.csv", capsys, monkeypatch))
    page = tables_of((ROOT / "docs" / "experiment.md").read_text())
    assert made.keys() == page.keys() and len(made) == 4
    for variant, rows in made.items():
        by_arm = {row[0]: row for row in page[variant] if len(row) == 10}
        compared = 0
        for row in rows:
            if len(row) == 10 and row[0] in by_arm and row[0] not in ("arm", "---"):
                shown, header = by_arm[row[0]], by_arm["arm"]
                for key in ("mean", "known", "new", "weighted"):
                    value = float(row[rows[0].index(key)])
                    assert value == pytest.approx(float(shown[header.index(key)]), abs=1.1e-3)
                    compared += 1
        assert compared == 4 * len(by_arm.keys() - {"arm", "---"}) > 0


def test_the_second_experiments_tables_are_made_again_from_its_data(capsys, monkeypatch):
    made = tables_of(made_of("smollm2_experiment.csv", capsys, monkeypatch))
    assert made == tables_of((ROOT / "docs" / "experiment_smollm2.md").read_text())
    first = [row[0] for row in made["smollm2"]]
    assert {f"{arm} below {other}" for arm, other in plan.BELOW} < set(first) and first.count("random") == 2
