"""The experiment's data, plan, statistics and words are those of its protocol."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.experiment import plan, statistics, tables
from scripts.experiment.commands import trainer_arguments
from scripts.experiment.data import make_data, with_wrong_answers
from scripts.experiment.datamodel import half_of
from scripts.experiment.plan import FULL, SMALL, Run, runs
from scripts.experiment.results import measures
from scripts.experiment.statistics import Difference, difference, holm_levels, verdict

ROOT = Path(__file__).resolve().parents[2]


# Tables of Student's t, two-sided.
@pytest.mark.parametrize(
    ("freedom", "probability", "t"),
    [(1, 0.95, 12.7062), (2, 0.95, 4.3027), (7, 0.95, 2.3646), (7, 0.99, 3.4995), (30, 0.95, 2.0423)],
)
def test_quantiles_are_those_of_students_table(freedom, probability, t):
    cell = Difference(t, 1.0, freedom)
    assert cell.half_width(1 - probability) == pytest.approx(t, abs=1e-4)
    assert cell.p == pytest.approx(1 - probability, abs=1e-5)


def test_an_interval_covers_the_mean_as_often_as_it_says():
    numbers = np.random.default_rng(0)
    cells = [difference(numbers.normal(0.3, 1.0, 8)) for _ in range(1500)]
    covered = np.mean([abs(cell.mean - 0.3) <= cell.half_width() for cell in cells])
    assert abs(covered - 0.95) < 0.02


def test_holm_stops_at_the_first_that_fails():
    assert holm_levels([0.001, 0.04, 0.02]) == pytest.approx([0.05 / 3, 0.05, 0.025])
    assert holm_levels([0.3, 0.001, 0.04]) == pytest.approx([0.0, 0.05 / 3, 0.025])


BELOW, ABOVE = difference([-1.0, -1.1, -0.9]), difference([1.0, 1.1, 0.9])
WIDE, TINY = difference([-9.0, 9.0, 1.0]), difference([0.01, -0.02, 0.015])
UNSURE = difference([-0.3, 0.3, 0.01])


@pytest.mark.parametrize(
    ("cells", "word"),
    [
        ([BELOW, BELOW], "yes"),
        ([ABOVE, ABOVE], "no"),
        ([TINY, TINY], "no"),
        ([BELOW, ABOVE], "undecided"),
        ([BELOW, WIDE], "undecided"),
        ([BELOW, TINY], "undecided"),
        ([UNSURE, UNSURE], "undecided"),
    ],
)
def test_the_answer_is_yes_or_no_only_where_every_cell_says_so(cells, word):
    assert verdict(cells, [2.0, 2.0], 0.05) == word


def test_a_hypothesis_that_holms_procedure_does_not_reach_is_not_answered_with_yes():
    assert verdict([BELOW, BELOW], [2.0, 2.0], 0.0) == "undecided"


def test_every_task_has_what_the_protocol_asks_for():
    assert set(FULL.records) == {*plan.KNOWN, *plan.NEW} and min(FULL.records.values()) >= 400
    cells = {(task in plan.KNOWN, task in plan.LONG) for task in FULL.records}
    assert len(cells) == 4
    assert FULL.references == 2
    names = [run.name for run in runs(FULL, "varied_clean")]
    assert len(names) == len(set(names))
    compared = {arm for pair in plan.HYPOTHESES for arm in pair}
    assert {FULL.clean[arm] for arm in compared} == {8} and compared <= set(SMALL.clean)
    assert set(FULL.clean) == set(plan.ARMS)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    make_data(folder, SMALL)
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_mixtures_have_the_plans_records_and_none_is_held_out(data):
    def scenes(name):
        return {record["image"] for record in data[name] if "image" in record}

    for mixture in plan.MIXTURES:
        tasks = [record["dataset"] for record in data[f"{mixture}_clean"]]
        assert {task: tasks.count(task) for task in SMALL.records} == SMALL.records
        assert scenes(f"{mixture}_clean").isdisjoint(scenes("held_out") | scenes("base"))
        assert len({record["id"] for record in data[f"{mixture}_clean"]}) == len(tasks)
    distinct = {name: len({json.dumps(r["conversations"]) for r in data[f"{name}_clean"]}) for name in plan.MIXTURES}
    assert distinct["redundant"] < distinct["varied"] / 2


def said(record, role):
    return [turn["value"] for turn in record["conversations"] if turn["from"] == role]


def test_a_noisy_mixture_is_the_clean_one_with_answers_of_other_records_of_the_task(data):
    clean, noisy = data["varied_clean"], data["varied_noisy"]
    changed = [row for row, record in enumerate(noisy) if record != clean[row]]
    assert changed == [row for row, record in enumerate(noisy) if "wrong_answers" in record]
    assert 0.05 < len(changed) / len(clean) <= 0.2
    for row in changed:
        assert said(clean[row], "human") == said(noisy[row], "human")
        assert said(clean[row], "gpt") != said(noisy[row], "gpt")
    assert with_wrong_answers(clean, "varied") == noisy


def test_measures_are_the_means_that_they_are_named_for():
    losses = {task: float(number + 1) for number, task in enumerate(FULL.records)}
    records = FULL.records
    measured = measures(
        {task: {"loss": x, "answers": 2, "exact": 1, "mixture_records": records[task]} for task, x in losses.items()}
    )
    weighted = sum(losses[task] * records[task] for task in losses) / sum(records.values())
    assert measured["weighted"] == pytest.approx(weighted)
    assert measured["mean"] == 4.0 and measured["worst"] == 7.0
    assert measured["geometric"] == pytest.approx(math.exp(sum(map(math.log, losses.values())) / 7))
    assert measured["known"] == pytest.approx(2.0) and measured["new"] == pytest.approx(5.5)
    assert measured["exact"] == 0.5


def test_differences_are_paired_by_seed_and_an_arm_without_a_reference_stands_beside_each():
    measured = {}
    for run in runs(SMALL, "varied_clean"):
        lower = {"tive": 0.5, "all_epochs": 2.0}.get(run.arm, 0.0)
        measured[run] = {"mean": 5.0 + 10 * run.seed - lower}
    cell = tables.paired(measured, "tive", "random", 0)
    assert cell.mean == pytest.approx(-0.5) and cell.error == pytest.approx(0.0, abs=1e-9)
    assert Run("random", plan.P, 0, None) in measured and Run("tive", plan.P, 0, 0) in measured
    both = {f"{mixture}_clean": measured for mixture in plan.MIXTURES}
    assert {answer.hypothesis: answer.word for answer in tables.answers(both)}["tive_q_half below tive"] != "yes"


def test_the_difference_of_equal_runs_is_no_difference():
    assert difference([0.0, 0.0]).p == 1.0 and statistics.LEVEL == 0.05


def test_of_a_single_pair_no_error_is_known():
    cell = difference([0.5])
    assert cell.mean == 0.5 and math.isnan(cell.error) and cell.freedom == 0


def tables_of_page(page: str) -> dict[str, list[list[str]]]:
    """The tables below each mixture's name, the header's cells first."""
    parts = re.split(r"^\*\*(\w+, \w+)\*\*$", page, flags=re.M)
    cells = {
        name: re.findall(r"^\| (.*) \|$", body, flags=re.M) for name, body in zip(parts[1::2], parts[2::2], strict=True)
    }
    return {name: [line.split(" | ") for line in lines] for name, lines in cells.items()}


def test_the_first_experiments_tables_are_made_again_from_its_data(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tables", str(ROOT / "docs" / "results" / "first_experiment.csv")])
    tables.main()
    made = tables_of_page(capsys.readouterr().out)
    page = tables_of_page((ROOT / "docs" / "experiment.md").read_text())
    assert made.keys() == page.keys() and len(made) == 4
    for variant, (header, _, *rows) in made.items():
        assert header[:1] + header[1:8] in page[variant]
        for arm, *cells in rows:
            assert [arm, *cells[:7]] in page[variant]
            if arm != "base":
                shown = next(row for row in page[variant] if row[0] == arm and len(row) == 10)
                wanted = [float(shown[column]) for column in (2, 3, 4, 6)]  # mean, known, new, weighted
                assert [float(cell) for cell in cells[7:]] == pytest.approx(wanted, abs=1.1e-3)


@pytest.mark.parametrize("script", ["finetune.sh", "finetune_lora.sh"])
def test_the_experiment_trains_with_what_the_scripts_start(script, tmp_path):
    settings = {"GPUS": "none", "OUTPUT_DIR": tmp_path / "a b", "EPOCHS": 7}
    module, *arguments = trainer_arguments(script, ("--seed", 3), settings)
    assert importlib.util.find_spec(module) is not None and module.startswith("tive.training")
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert given["--output_dir"] == str(tmp_path / "a b") and given["--num_train_epochs"] == "7"
    assert given["--seed"] == "3" and given["--use_cpu"] == "True"
    assert ("--lora_enable" in given) == (script == "finetune_lora.sh")


def test_a_half_has_half_of_every_tasks_records():
    tasks = [task for task, count in SMALL.records.items() for _ in range(count)]
    rows = half_of(SMALL, tasks, 3)
    drawn = [tasks[row] for row in rows]
    assert {task: drawn.count(task) for task in SMALL.records} == {t: n // 2 for t, n in SMALL.records.items()}
    assert rows == half_of(SMALL, tasks, 3) != half_of(SMALL, tasks, 4) and len(set(rows)) == len(rows)
