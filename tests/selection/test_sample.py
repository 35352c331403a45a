"""Budgets from the gradients of a sample: near those of all records, with an error that holds what it says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import select_data_TIVE
import select_warm_up_data
from tests.helpers.feature_files import call, record, refusal, write_features
from tests.selection.test_selection import Outcome
from tive.method.value import budget_errors, records_for_error
from tive.selection.choose import choose
from tive.selection.options import TiveOptions
from tive.util.errors import UserError

main = select_data_TIVE.main
SIZES = {"vqa": 600, "chat": 250, "boxes": 90, "textcaps": 60, "tiny": 12}


def population(
    sizes: list[int], spread: float = 0.6, seed: int = 0
) -> tuple[list[str], np.ndarray, dict[str, np.ndarray]]:
    """Tasks whose norms are log-normal, of different means; `spread` is their coefficient of variation."""
    random = np.random.default_rng(seed)
    task = np.repeat(np.arange(len(sizes)), sizes)
    width = np.sqrt(np.log(1 + spread**2))
    norms, losses = ((1 + task) * np.exp(random.normal(0, width, len(task))) for _ in range(2))
    return [f"t{index}" for index in range(len(sizes))], task, {"norm": norms, "loss": 0.5 * norms + losses}


def sampled(task: np.ndarray, scores: dict[str, np.ndarray], number: int, seed: int) -> dict[str, np.ndarray]:
    """The scores of `number` records a task, NaN for the others."""
    random = np.random.default_rng(seed)
    kept = np.zeros(len(task), bool)
    for index in range(task.max() + 1):
        rows = np.flatnonzero(task == index)
        kept[random.choice(rows, min(number, len(rows)), replace=False)] = True
    return {name: np.where(kept, values, np.nan) for name, values in scores.items()}


def budgets(names, task, scores, options):
    return np.array([entry.budget_before_rounding for entry in choose(names, task, scores, {}, options).tasks])


@pytest.mark.parametrize("rule, spread", [("difficulty", 0.8), ("difficulty+equal", 0.3), ("difficulty+loss", 0.8)])
def test_the_95_percent_intervals_hold_the_budgets_of_all_records_in_95_percent_of_samples(rule, spread):
    names, task, scores = population([400, 240, 260, 280, 150, 360, 400], spread)
    options = TiveOptions(from_sample=True, task_budget=rule)
    whole = budgets(names, task, scores | {"influence": scores["norm"]}, TiveOptions(task_budget=rule))
    for number in (20, 50, 100):
        held = []
        for seed in range(200):
            some = sampled(task, scores, number, seed)
            chosen = choose(names, task, some, {}, options)
            low, high = np.array([entry.budget_interval for entry in chosen.tasks]).T
            held.append((low <= whole) & (whole <= high))
        assert 0.92 <= np.mean(held) <= 0.98, (number, np.mean(held))


def test_the_sample_of_all_records_gives_their_budgets_without_error():
    names, task, scores = population([50, 30, 20])
    options = TiveOptions(from_sample=True)
    chosen = choose(names, task, scores, {}, options)
    whole = budgets(names, task, scores | {"influence": scores["norm"]}, TiveOptions())
    assert [entry.budget_before_rounding for entry in chosen.tasks] == whole.tolist()
    assert [entry.budget_error for entry in chosen.tasks] == [0, 0, 0] and chosen.details["records_per_task"] <= 50


def test_the_error_is_that_of_many_samples_and_the_planned_number_brings_it_under_two_percent():
    names, task, scores = population([1500, 1000, 450], 0.5)
    options = TiveOptions(from_sample=True)
    drawn, errors, planned = [], [], []
    for seed in range(120):
        some = sampled(task, scores, 100, seed)
        chosen = choose(names, task, some, {}, options)
        drawn.append([entry.budget_before_rounding for entry in chosen.tasks])
        errors.append([entry.budget_error for entry in chosen.tasks])
        planned.append(chosen.details["records_per_task"])
    np.testing.assert_allclose(np.mean(errors, axis=0), np.std(drawn, axis=0), rtol=0.2)
    whole = budgets(names, task, scores | {"influence": scores["norm"]}, TiveOptions())
    number = int(np.median(planned))
    again = [budgets(names, task, sampled(task, scores, number, seed), options) / whole for seed in range(120)]
    assert 0.015 < np.std(again, axis=0).max() < 0.023


def test_a_rule_that_looks_at_no_record_has_no_error():
    means, zeros = np.array([[1.0, 1.0, 1.0]]), np.zeros((3, 1, 1))
    errors, intervals = budget_errors(means, zeros, np.array([2, 2, 2]), np.array([9, 9, 9]), 30.0)
    assert errors.tolist() == [0, 0, 0] and intervals.tolist() == [[10, 10]] * 3
    assert records_for_error(means, zeros, np.array([9, 9, 9]), 0.02) == 1


@pytest.mark.parametrize(
    "given",
    [
        {"q": 1.0},
        {"drop_below": 0.0},
        {"instance_score": "norm"},
        {"instance_score": "loss", "sampling": "top"},
        {"sampling": "top"},
    ],
)
def test_what_needs_every_records_gradient_is_refused(given):
    with pytest.raises(UserError, match="from_sample"):
        TiveOptions(from_sample=True, **given)
    TiveOptions(from_sample=True, instance_score="random", q=9.0)


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """A folder with data, a sample of it by step 1, and the sample's features."""
    rows = [(task, row) for task, size in SIZES.items() for row in range(size)]
    records = [record(place, task) for place, (task, _) in enumerate(rows)]
    (tmp_path / "data.json").write_text(json.dumps(records))
    call(
        select_warm_up_data.main,
        *("--source_path", tmp_path / "data.json", "--target_path", tmp_path / "sample.json", "--per_task", 40),
    )
    make_features(tmp_path)
    return tmp_path


def make_features(folder: Path) -> None:
    import torch

    records = json.loads((folder / "sample.json").read_text())
    generator = torch.Generator().manual_seed(0)
    norms = 0.2 + torch.rand(len(records), generator=generator)
    features = torch.randn(len(records), 16, generator=generator).half()
    write_features(folder / "features", folder / "sample.json", features, norms, 2)


def arguments(folder: Path) -> list[str | Path]:
    paths = ("--data_path", folder / "data.json", "--gradient_path", folder / "features", "--save_path", folder / "out")
    return [*paths, "--from_sample"]


def test_from_a_samples_features_to_a_subset_of_all_records(drawn, capsys):
    call(main, *arguments(drawn))
    outcome = Outcome(drawn / "out", "Tive_q_0.001_p_0.15_from_sample-yes")
    assert {name: task["sampled"] for name, task in outcome.tasks.items()} == {
        "vqa": 40, "chat": 40, "boxes": 40, "textcaps": None, "tiny": 12
    }  # fmt: skip
    norms = outcome.column("norm")
    for name, size in (("vqa", 600), ("chat", 250), ("boxes", 90), ("tiny", 12)):
        rows = [row for row, line in enumerate(outcome.scores) if line["task"] == name]
        have = norms[rows][np.isfinite(norms[rows])]
        entry = outcome.tasks[name]
        assert entry["value"] == pytest.approx(have.mean())
        wanted = have.std(ddof=1) / np.sqrt(len(have)) * np.sqrt(1 - len(have) / size)
        assert entry["value_error"] == pytest.approx(wanted, abs=1e-12)
        low, high = entry["budget_interval"]
        assert low <= entry["budget_before_rounding"] <= high
    # Drawn from all, not from the sample.
    lacking = [line for line in outcome.scores if line["times_selected"] == "1" and line["norm"] == ""]
    assert len(lacking) > len(outcome.subset) / 2
    said = capsys.readouterr().out
    assert "132 of 952 records have features" in said and "records a task bring all under 2%" in said


def test_tasks_with_few_records_in_the_sample_are_named(drawn, capsys):
    records = json.loads((drawn / "sample.json").read_text())
    few = [one for one in records if one["dataset"] != "boxes"] + [one for one in records if one["dataset"] == "boxes"][
        :9
    ]
    (drawn / "sample.json").write_text(json.dumps(few))
    make_features(drawn)
    call(main, *arguments(drawn))
    said = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fewer than 30"))
    assert "boxes (9)" in said and "vqa" not in said and "tiny" not in said


def test_a_task_that_the_sample_lacks_is_refused_unless_it_is_excluded(drawn, capsys):
    records = [one for one in json.loads((drawn / "sample.json").read_text()) if one["dataset"] != "chat"]
    (drawn / "sample.json").write_text(json.dumps(records))
    make_features(drawn)
    line = refusal(capsys, main, *arguments(drawn))
    assert "task chat" in line and "--per_task" in line
    call(main, *arguments(drawn), "--exclude_tasks", "chat", "textcaps")


def test_without_the_option_records_without_features_stop_the_selection(drawn, capsys):
    line = refusal(capsys, main, *arguments(drawn)[:-1])
    assert "no features of" in line and "compute_gradient_features.py" in line
