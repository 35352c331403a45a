"""The means of an evaluation are over tasks, and its files are read as they were written or refused."""

from __future__ import annotations

import numpy as np
import pytest

from tive.evaluation import results
from tive.evaluation.results import Conditions, Evaluation, HeldOutResult, ModelResult, tables
from tive.util.errors import UserError
from tive.util.text import DASH

MATCH = Conditions("sha", 4, "identity", "float32", 8, "dataset")
TASKS = ["vqa", "vqa", "vqa", "chat"]


def model(name: str, *records: HeldOutResult) -> ModelResult:
    tasks = results.task_results(TASKS, records)
    return ModelResult(name, "folder", None, MATCH, "CPU", 1.0, tasks, list(records), {"torch": "2"})


ALL = model(
    "all", *(HeldOutResult(row, loss, 2, 1) for row, loss in enumerate((1.0, 2.0, 3.0))), HeldOutResult(3, 4.0, 1, 1)
)
SOME = model("some", HeldOutResult(0, 1.0, 2, 1), *(HeldOutResult(row, left_out="missing image") for row in (1, 2, 3)))


def test_every_task_counts_the_same_whatever_its_size():
    assert results.mean_over_tasks(ALL, "loss")[0] == 3.0
    assert results.mean_over_tasks(ALL, "exact_share")[0] == 0.75


def test_a_mean_over_tasks_is_not_taken_where_a_task_is_without_a_loss():
    assert results.mean_over_tasks(SOME, "loss")[0] is None and SOME.tasks[1].left_out == 1


def test_relative_values_are_of_the_tasks_that_both_have():
    assert results.relative(ALL, ALL, "loss") == 1.0
    assert results.relative(SOME, ALL, "loss") == 0.5
    assert results.relative(ALL, ALL, "exact_share") == 1.0


def test_an_interval_is_over_records_and_covers_the_mean_as_often_as_it_says():
    draws, covered = np.random.default_rng(0), 0
    for _ in range(400):
        losses = draws.gamma(2.0, 1.0, 40)
        (task,) = results.task_results(["a"] * 40, [HeldOutResult(row, loss) for row, loss in enumerate(losses)])
        covered += abs(task.loss - 2.0) <= 1.96 * task.loss_error
    assert 0.91 < covered / 400 < 0.97
    assert results.mean_over_tasks(SOME, "loss")[1] is None


def test_answers_of_one_record_do_not_make_a_share_more_certain():
    one = [HeldOutResult(row, 1.0, 1, row % 2) for row in range(20)]
    many = [HeldOutResult(row, 1.0, 7, 7 * (row % 2)) for row in range(20)]
    (first,), (second,) = (results.task_results(["a"] * 20, records) for records in (one, many))
    expected = (0.25 / 19) ** 0.5
    assert first.exact_share_error == pytest.approx(expected) and second.exact_share_error == pytest.approx(expected)


def test_tables_say_which_way_is_better_and_how_far_a_mean_may_be_off():
    shown = tables(Evaluation("held_out.json", [ALL, SOME]))
    (losses, rows), (exact, _) = shown.items()
    assert "lower is better" in losses and "higher is better" in exact
    error = ALL.tasks[0].loss_error
    assert rows[1] == ("vqa", "3", f"2.0000 ± {1.96 * error:.4f}", "1.0000")
    assert [row[0] for row in rows[-2:]] == ["mean over tasks", "relative to all"] and rows[-2][3] == DASH


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    evaluation = Evaluation("held_out.json", [ALL, SOME])
    results.write_result(tmp_path / results.EVALUATION_FILE, evaluation)
    assert results.read_stored(tmp_path, Evaluation) == evaluation


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"data_path": "x", "models": []}', '{"data_path": 3}'])
def test_what_no_evaluation_wrote_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        results.read_stored(path, Evaluation)
