"""Which task a record names, whatever stands there; and what is said where records cannot be used."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings

from tests.helpers.records import GOOD_TURNS, JSON_VALUES, NEAR_RECORDS, record_with, write
from tive.data.records import open_records
from tive.data.scan import refuse_problems, scan_records
from tive.data.tasks import task_of, task_or_problem
from tive.data.trained import form_problem
from tive.util.errors import UserError


def read_tasks(path, task_key="dataset"):
    """What step 1 does with a data file before it draws."""
    scan = scan_records(open_records(path), form_problem, task_key)
    refuse_problems(scan, task_key, path.with_name("bad.json"))
    return scan


@pytest.mark.parametrize(
    ("record", "task_key", "task"),
    [
        ({"dataset": "VQAv2"}, "dataset", "VQAv2"),
        ({"dataset": 3}, "dataset", "3"),
        ({"dataset": ["VQAv2"]}, "dataset", "VQAv2"),
        ({"task_name": "PACS+dog"}, "task_name", "PACS+dog"),
        ({"meta": {"source": {"name": "GQA"}}}, "meta.source.name", "GQA"),
        ({"meta.source": "a", "meta": {"source": "b"}}, "meta.source", "a"),
        ({"image": "coco/train2017/1.jpg"}, "image:/", "coco"),
        ({"image": ["gqa/images/1.jpg"]}, "image:/", "gqa"),
        ({"id": "aokvqa_123_4"}, "id:_", "aokvqa"),
        ({"meta": {"name": "PACS+dog+1"}}, "meta.name:+", "PACS"),
        ({}, "dataset", None),
        ({"dataset": ""}, "dataset", None),
        ({"dataset": None}, "dataset", None),
        ({"dataset": True}, "dataset", "true"),
        ({"dataset": 1.5}, "dataset", "1.5"),
        ({"dataset": {"name": "a"}}, "dataset", None),
        ({"image": "./coco/1.jpg"}, "image:/", "coco"),
        ({"images": ["coco//1.jpg"]}, "image:/", "coco"),
        ({"image": "coco/../gqa/1.jpg"}, "images:/", "gqa"),
        ({"image": ".//coco/1.jpg"}, "images:/", "coco"),
        ({"image": ["a/1.jpg", "b/2.jpg"]}, "image:/", "a"),
        ({"dataset": ["a", "b"]}, "dataset", None),
        ({"meta": "text"}, "meta.source", None),
        ({"image": "1.jpg"}, "image:/", None),
        ({"image": "/1.jpg"}, "image:/", None),
        ({}, "image:/", None),
        ({"dataset": "half a pair \ud800"}, "dataset", None),
    ],
)
def test_the_task_of_a_record_is_read_from_a_key_a_path_or_a_prefix(record, task_key, task):
    assert task_of(record, task_key) == task


def test_a_task_key_that_ends_in_its_colon_is_refused():
    with pytest.raises(UserError, match="the task key image: "):
        task_of({"image": "coco/1.jpg"}, "image:")


def test_every_record_gets_its_task(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([record_with(*GOOD_TURNS, dataset=name) for name in "abca"]))
    assert read_tasks(path).tasks == list("abca")
    with pytest.raises(UserError, match=r"no record names a task under `source`.*label_tasks"):
        read_tasks(path, "source")
    assert not (tmp_path / "bad.json").exists()


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (["a", "b"], "a list under `dataset`"),
        ([], "a list under `dataset`"),
        ({"name": "a"}, "an object under `dataset`"),
        ("\ud800", "not valid Unicode"),
        (None, "names no task under `dataset`"),
    ],
)
def test_a_label_that_is_no_task_is_refused_as_what_it_is(label, said):
    task, problem = task_or_problem(record_with(*GOOD_TURNS, dataset=label))
    assert task is None and said in problem


@settings(max_examples=150, deadline=None)
@given(record=NEAR_RECORDS, label=JSON_VALUES)
def test_a_label_is_a_task_that_can_be_written_or_a_problem_of_one_line(record, label):
    for key in ("dataset", "image:/"):
        task, problem = task_or_problem({**record, "dataset": label}, key)
        assert (task is None) == bool(problem)
        assert "\n" not in problem and len(problem) < 200
        if task is not None:
            assert task.encode()
    if label is not None and not isinstance(label, (list, dict, str)):
        assert task_of({"dataset": label}) == json.dumps(label)


BAD = [
    record_with(*GOOD_TURNS, dataset="a"),
    record_with(("human", "x"), ("human", "y"), dataset="a"),
    record_with(*GOOD_TURNS, dataset="a", video="v.mp4"),
    record_with(*GOOD_TURNS, dataset=["a", "b"]),
    record_with(*GOOD_TURNS, image="a.jpg"),
]


def test_all_bad_records_are_counted_and_listed_the_first_ten_shown(tmp_path, capsys):
    path, listing = write(tmp_path / "a.json", json.dumps(BAD + [BAD[1]] * 20 + [BAD[0]] * 30)), tmp_path / "bad.json"
    with pytest.raises(
        UserError,
        match=r"a.json: 24 of 55 records cannot be used \(the first: record 1.*\), all are listed .*bad.json;.* "
        "them: `.*scripts/convert_data.py .*--drop .*bad.json`",
    ):
        read_tasks(path)
    entries = json.loads(listing.read_text())
    assert [entry["row"] for entry in entries] == list(range(1, 25))
    assert entries[3] == {"row": 4, "id": "a", "reason": "names no task under `dataset`", "image": "a.jpg"}
    lines = capsys.readouterr().out.splitlines()
    assert ["21", "has two human turns in a row (turn 1)"] in [line.split(maxsplit=1) for line in lines]
    assert sum(line.startswith("  record ") for line in lines) == 10


def test_the_list_of_an_earlier_call_goes_when_all_is_well(tmp_path):
    path, listing = write(tmp_path / "a.json", json.dumps(BAD[:1])), write(tmp_path / "bad.json", "[]")
    assert read_tasks(path).tasks == ["a"]
    assert not listing.exists()


def test_tags_without_an_image_are_counted(tmp_path):
    records = [record_with(*GOOD_TURNS, dataset="a"), record_with(*GOOD_TURNS, dataset="a", images=["a.jpg"])]
    assert read_tasks(write(tmp_path / "a.json", json.dumps(records))).tags_alone == [0]
