"""Held-out records are drawn equally from every task, and no record is lost, doubled or changed."""

from __future__ import annotations

import json
import sys

import pytest

from scripts import split_data
from tive.util.errors import UserError

SIZES = {"vqa": 30, "chat": 7, "boxes": 12}


@pytest.fixture
def source(tmp_path):
    turns = [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Là."}]
    records = [
        {"id": f"{task}-{number}", "dataset": task, "conversations": turns, "more": [1.50, None]}
        for task, size in SIZES.items()
        for number in range(size)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=1))
    return path


def split(monkeypatch, source, target, *more):
    arguments = ["--source_path", source, "--target_path", target, "--per_task", "3", *more]
    monkeypatch.setattr(sys, "argv", ["split_data.py", *map(str, arguments)])
    split_data.main()
    return [json.loads((target / name).read_text()) for name in ("held_out.json", "train.json")]


def test_every_task_gives_the_same_number_and_every_record_is_in_one_file(monkeypatch, source, tmp_path):
    held_out, train = split(monkeypatch, source, tmp_path / "split")
    tasks = [record["dataset"] for record in held_out]
    assert {task: tasks.count(task) for task in SIZES} == dict.fromkeys(SIZES, 3)
    records = json.loads(source.read_text())
    assert sorted(held_out + train, key=records.index) == records
    assert all(part == sorted(part, key=records.index) for part in (held_out, train))
    whole = source.read_text()
    first = json.dumps(held_out[0]["id"])
    assert whole[whole.index(first) :][:80] in (tmp_path / "split" / "held_out.json").read_text()


def test_the_same_seed_draws_the_same_records_and_another_draws_others(monkeypatch, source, tmp_path):
    drawn = [split(monkeypatch, source, tmp_path / name, "--seed", name[0])[0] for name in ("0a", "0b", "1")]
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_task_that_would_keep_no_record_is_named_and_nothing_is_written(monkeypatch, source, tmp_path):
    with pytest.raises(UserError, match="chat"):
        split(monkeypatch, source, tmp_path / "split", "--per_task", "7")
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]


def test_a_split_that_is_there_is_left_as_it_is(monkeypatch, source, tmp_path):
    split(monkeypatch, source, tmp_path / "split")
    with pytest.raises(UserError, match="there already"):
        split(monkeypatch, source, tmp_path / "split")


def test_nothing_is_there_where_the_second_file_cannot_be_written(monkeypatch, source, tmp_path):
    from tive.data import records

    write = records.write_records

    def full_disk(path, *arguments):
        if path.name == "train.json":
            raise UserError("no space")
        write(path, *arguments)

    monkeypatch.setattr(records, "write_records", full_disk)
    with pytest.raises(UserError, match="no space"):
        split(monkeypatch, source, tmp_path / "split")
    assert [path.name for path in tmp_path.iterdir()] == ["data.json"]
