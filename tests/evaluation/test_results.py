"""The means of an evaluation are over tasks, and its files are read as they were written or refused."""

from __future__ import annotations

import pytest

from tive.evaluation import results
from tive.evaluation.results import Conditions, Evaluation, HeldOutResult, ModelResult
from tive.util.errors import UserError

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
    assert results.mean_over_tasks(ALL, "loss") == 3.0
    assert results.mean_over_tasks(ALL, "exact_share") == 0.75


def test_a_mean_over_tasks_is_not_taken_where_a_task_is_without_a_loss():
    assert results.mean_over_tasks(SOME, "loss") is None and SOME.tasks[1].left_out == 1


def test_relative_values_are_of_the_tasks_that_both_have():
    assert results.relative(ALL, ALL, "loss") == 1.0
    assert results.relative(SOME, ALL, "loss") == 0.5
    assert results.relative(ALL, ALL, "exact_share") == 1.0


def test_an_evaluation_is_read_as_it_was_written(tmp_path):
    evaluation = Evaluation("held_out.json", [ALL, SOME])
    results.write_result(tmp_path / results.EVALUATION_FILE, evaluation)
    assert results.read_evaluation(tmp_path) == evaluation


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"data_path": "x", "models": []}', '{"data_path": 3}'])
def test_what_no_evaluation_wrote_is_refused_by_its_name(tmp_path, content):
    path = tmp_path / "evaluation.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"evaluation\.json"):
        results.read_evaluation(path)
