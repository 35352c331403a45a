"""What must hold of checking, chunking and writing records."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.records import GOOD_TURNS, JSON_VALUES, NEAR_RECORDS, RECORDS, record_with, write
from tive.data.conversations import image_of
from tive.data.records import chunk_range, name_of, open_records, write_records, write_texts
from tive.data.scan import refuse_problems, scan_records
from tive.data.trained import form_problem, problem_of
from tive.util.errors import UserError


@settings(max_examples=150, deadline=None)
@given(record=NEAR_RECORDS | JSON_VALUES)
def test_any_value_is_either_a_record_without_a_problem_or_has_one_that_is_told_in_one_line(record):
    problem = problem_of(record)
    assert name_of(0, record).startswith("record 0")
    if problem is None:
        assert image_of(record) is None or isinstance(image_of(record), str)
        assert {one["from"] for one in record["conversations"]} <= {"human", "gpt"}
    else:
        assert "\n" not in problem
        assert len(problem) < 200


def test_a_record_nested_as_deep_as_the_reader_takes_still_has_a_short_name_and_problem(tmp_path):
    depth = 900
    deep = "[" * depth + "]" * depth
    path = write(tmp_path / "a.json", f'[{{"id": {deep}, "conversations": [{{"from": {deep}, "value": "x"}}]}}]')
    with pytest.raises(UserError, match="a turn 0 whose") as caught:
        refuse_problems(scan_records(open_records(path), form_problem, "dataset"), "dataset", tmp_path / "bad.json")
    assert len(str(caught.value)) < 800


# Checking


PROBLEMS = {
    "a list": ([], "is not an object"),
    "no conversations": ({"id": 1}, "has no `conversations`"),
    "empty conversations": ({"conversations": []}, "has no turns"),
    "conversations as text": ({"conversations": "hello"}, "not a list of turns"),
    "a turn that is text": ({"conversations": ["hello"]}, "a turn 0 that is not an object"),
    "a value that is a number": (record_with(("human", 3)), "a turn 0 without"),
    "an unknown role": (
        record_with(("human", "x"), ("assistant", "y")),
        "not in LLaVA's form; convert",
    ),
    "a system turn": (record_with(("system", "x"), ("human", "y")), "not in LLaVA's form; convert"),
    "a role that nobody knows": (record_with(("human", "x"), ("robot", "y")), "'robot'"),
    "half a surrogate pair": (record_with(("human", "\ud800")), "not valid Unicode"),
    "only gpt": (record_with(("gpt", "x")), "no human turn"),
    "two human turns": (record_with(("human", "x"), ("human", "y")), "two human turns in a row (turn 1)"),
    "two gpt turns": (record_with(("gpt", "x"), ("human", "y"), ("gpt", "z"), ("gpt", "z")), "turns in a row (turn 3)"),
    "two images": (record_with(*GOOD_TURNS, image=["a", "b"]), "has 2 images"),
    "an image that is a number": (record_with(*GOOD_TURNS, image=3), "neither a path"),
    "two images under images": (record_with(*GOOD_TURNS, images=["a", "b"]), "has 2 images"),
    "a video": (record_with(*GOOD_TURNS, video="a.mp4"), "`video`"),
    "an image under another key": (record_with(*GOOD_TURNS, image_path="a.jpg"), "`image_path`"),
    "tags in two turns": (
        record_with(*GOOD_TURNS, ("human", "<image>\nAnd here?"), image="a.jpg"),
        "has <image> in 2 turns and one image",
    ),
}


@pytest.mark.parametrize(("record", "said"), PROBLEMS.values(), ids=PROBLEMS)
def test_a_record_that_cannot_be_trained_on_says_why(record, said):
    assert said in problem_of(record)


@pytest.mark.parametrize(
    "record",
    [
        *RECORDS[:2],
        record_with(*GOOD_TURNS, image=["a.jpg"]),
        record_with(("gpt", "Hello."), *GOOD_TURNS, image="a.jpg"),
        record_with(("human", "What does <image> mean in HTML?"), ("gpt", "A tag, <image>.")),
        record_with(*GOOD_TURNS, images=["a.jpg"]),
        record_with(("gpt", "Hello, you sent <image>"), *GOOD_TURNS, image="a.jpg"),
        record_with(*GOOD_TURNS, image="a.jpg", images=None, video=[], messages=None, tools=[], objects={}),
        record_with(*GOOD_TURNS, image=None),
        record_with(*GOOD_TURNS, image=[""]),
    ],
    ids=[
        "image",
        "text only",
        "image in a list",
        "starts with gpt",
        "tags without an image",
        "images, as convert_data writes it",
        "a tag in the turn that LLaVA drops",
        "keys that an export filled",
        "an image that is null",
        "a list without an image",
    ],
)
def test_a_record_that_can_be_trained_on_has_no_problem(record):
    assert problem_of(record) is None


def test_an_image_is_its_path_in_either_form():
    for media in ({"image": "a.jpg"}, {"image": ["a.jpg"]}, {"images": ["a.jpg"]}, {"images": "a.jpg"}):
        assert image_of(media) == "a.jpg"
    assert image_of({}) is None


# Chunks and writing


@given(count=st.integers(0, 5000), num_chunks=st.integers(1, 70))
def test_chunks_cover_every_record_once_in_order(count, num_chunks):
    chunks = [chunk_range(count, num_chunks, index) for index in range(num_chunks)]
    assert [row for chunk in chunks for row in chunk] == list(range(count))
    assert all(len(chunk) <= -(-count // num_chunks) for chunk in chunks)


@pytest.mark.parametrize(("num_chunks", "chunk_idx"), [(0, 0), (4, 4), (4, -1), (-1, 0)])
def test_a_chunk_that_does_not_exist_is_refused(num_chunks, chunk_idx):
    with pytest.raises(UserError, match=rf"chunk_idx {chunk_idx} is not one of .*num_chunks {num_chunks}"):
        chunk_range(10, num_chunks, chunk_idx)


def test_chosen_records_are_written_as_they_came_repeated_and_in_the_order_asked(tmp_path):
    texts = ['{"b":1,  "a" : 1.50}', '{"é": "\\u00e9"}', '{"x": [ ]}']
    records = open_records(write(tmp_path / "a.jsonl", "\n".join(texts)))
    write_records(tmp_path / "b.json", records, [2, 0, 0, 1])
    assert (tmp_path / "b.json").read_text() == "[\n" + ",\n".join(texts[row] for row in (2, 0, 0, 1)) + "\n]\n"
    write_records(tmp_path / "c.json", records, [])
    assert json.loads((tmp_path / "c.json").read_text()) == []


def test_json_lines_keep_one_record_a_line_however_it_was_laid_out(tmp_path):
    write_texts(tmp_path / "a.jsonl", (json.dumps(record, indent=1).encode() for record in RECORDS), lines=True)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_nothing_is_written_when_the_records_break_off(tmp_path):
    def breaks_off():
        yield b'{"id": 1}'
        raise UserError("the disk is gone")

    target = write(tmp_path / "b.json", b"what was there")
    with pytest.raises(UserError, match="gone"):
        write_texts(target, breaks_off())
    assert target.read_bytes() == b"what was there"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["b.json"]
