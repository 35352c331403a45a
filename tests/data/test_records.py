"""What must hold of reading, checking, chunking and writing records, whatever the file holds."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tive.data import stream as json_stream
from tive.data.records import (
    chunk_range,
    image_of,
    name_of,
    open_records,
    problem_of,
    read_tasks,
    task_of,
    write_records,
)
from tive.data.stream import stream_records, write_raw
from tive.util.errors import UserError


def turn(role, value):
    return {"from": role, "value": value}


RECORDS = [
    {"id": "a", "image": "coco/1.jpg", "conversations": [turn("human", "<image>\nWhere?"), turn("gpt", "Là-bas.")]},
    {"id": 7, "conversations": [turn("human", "你好 \U0001f680"), turn("gpt", "é\u2028\n")], "dataset": "日本"},
    {
        "id": "lone \ud800",
        "conversations": [turn("human", "x"), turn("gpt", "y")],
        "extra": {"deep": [1.50, None, True]},
    },
]


def read(path):
    return [record for _, _, record in stream_records(path)]


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# Reading


@pytest.mark.parametrize("ascii_only", [True, False])
@pytest.mark.parametrize("indent", [None, 1])
def test_json_and_json_lines_hold_the_same_records(tmp_path, ascii_only, indent):
    records = RECORDS if ascii_only else RECORDS[:1]
    listed = write(tmp_path / "a.json", json.dumps(records, ensure_ascii=ascii_only, indent=indent))
    lines = "\r\n".join(json.dumps(record, ensure_ascii=ascii_only) for record in records)
    assert read(listed) == read(write(tmp_path / "a.jsonl", lines)) == records


LAYOUTS = {
    "list": b"[%s]",
    "spaced list": b"\r\n\t [ \n %s \n ] \n\n",
    "byte order mark": b"\xef\xbb\xbf[%s]",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7, 64, 4 << 20])
def test_offsets_and_raw_bytes_are_those_of_the_file_wherever_a_read_ends(tmp_path, monkeypatch, layout, read_bytes):
    monkeypatch.setattr(json_stream, "READ_BYTES", read_bytes)
    texts = [
        '{"id": "caf\u00e9 \U0001f680"}'.encode(),
        b'{ "n" : 1.50e1 ,"dup":1, "dup":2}',
        b'{"s":"\\u00e9\\\\"}',
        b"{}",
    ]
    path = write(tmp_path / "a.json", layout % b" ,\n".join(texts))
    content = path.read_bytes()
    found = list(stream_records(path))
    assert [raw for _, raw, _ in found] == texts
    assert [content[offset : offset + len(raw)] for offset, raw, _ in found] == texts
    records = open_records(path)
    assert [records.raw(row) for row in range(len(records))] == texts
    assert records[0] == {"id": "caf\u00e9 \U0001f680"}


def test_a_record_across_the_real_read_boundary_is_whole(tmp_path):
    long = {"id": "long", "conversations": [turn("human", "é" * (5 << 20)), turn("gpt", "end")]}
    path = write(tmp_path / "a.json", json.dumps([RECORDS[0], long, RECORDS[1]], ensure_ascii=True))
    assert read(path) == [RECORDS[0], long, RECORDS[1]]


BROKEN = {
    "empty file": (b"", "is empty"),
    "only white space": (b" \n\t ", "is empty"),
    "not a list": (b'"text"', "neither a JSON list"),
    "a table": (b"id,image\n1,a.jpg\n", "neither a JSON list"),
    "list breaks off in a record": (b'[{"id": 1}, {"id": 2', "record 1"),
    "list breaks off after a record": (b'[{"id": 1}', "bracket is missing"),
    "list breaks off after a comma": (b'[{"id": 1},', "record 1"),
    "trailing comma": (b'[{"id": 1},]', "record 1"),
    "missing comma": (b'[{"id": 1} {"id": 2}]', "comma"),
    "text after the list": (b'[{"id": 1}] []', "after the end"),
    "line breaks off": (b'{"id": 1}\n{"id": "x', "record 1"),
    "garbage line": (b'{"id": 1}\n<html>\n', "record 1"),
    "not UTF-8": (b'[{"id": "\xff"}]', "UTF-8"),
    "UTF-16": ('[{"id": 1}]'.encode("utf-16"), "UTF-8"),
    "cut inside a character": ('[{"id": "é'.encode()[:-1], "UTF-8"),
    "bare line break in a string": (b'[{"id": "a\nb"}]', "not JSON"),
    "an integer of 5000 digits": (b'[{"id": ' + b"9" * 5000 + b"}]", "record 0"),
    "nested 100,000 deep": (b"[" * 100_000, "nested too deeply"),
    "an object nested 100,000 deep": (b'{"a":' * 100_000, "nested too deeply"),
}


@pytest.mark.parametrize(("content", "said"), BROKEN.values(), ids=BROKEN)
def test_a_damaged_file_ends_in_one_line_that_names_the_file_and_the_place(tmp_path, content, said):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError, match=said) as caught:
        read(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_path_that_is_no_file_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="cannot read"):
        read(tmp_path / name)


@pytest.mark.parametrize("end", [b'"}]', b""], ids=["whole", "never ends"])
def test_a_record_above_the_limit_is_refused_before_the_file_is_read_through(tmp_path, monkeypatch, end):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1 << 10)
    monkeypatch.setattr(json_stream, "READ_BYTES", 1 << 8)
    path = write(tmp_path / "a.json", b'[{"id": 1}, {"id": "' + b"x" * (1 << 20) + end)
    digest = CountingDigest()
    with pytest.raises(UserError, match="one record above"):
        list(stream_records(path, digest))
    assert digest.count < 1 << 13


class CountingDigest:
    count = 0

    def update(self, block):
        self.count += len(block)


def test_the_limit_counts_bytes_not_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(json_stream, "MAX_RECORD_BYTES", 1000)
    assert len(read(write(tmp_path / "a.json", '[{"id": "' + "e" * 900 + '"}]'))) == 1
    with pytest.raises(UserError, match="one record above"):
        read(write(tmp_path / "b.json", '[{"id": "' + "é" * 900 + '"}]'))


def test_a_file_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no records"):
        open_records(write(tmp_path / "a.json", b" [ ] "))


# Fuzzing: a `UserError` or records, nothing else

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=20,
)
TURNS = st.fixed_dictionaries(
    {}, optional={"from": st.sampled_from(["human", "gpt", "system"]) | JSON_VALUES, "value": JSON_VALUES}
)
NEAR_RECORDS = st.fixed_dictionaries(
    {},
    optional={
        "id": JSON_VALUES,
        "image": st.text(max_size=8) | JSON_VALUES,
        "images": st.lists(st.text(max_size=8), max_size=2) | JSON_VALUES,
        "video": JSON_VALUES,
        "image_path": JSON_VALUES,
        "conversations": st.lists(TURNS, max_size=4) | JSON_VALUES,
        "dataset": st.text(max_size=8) | JSON_VALUES,
    },
)


def mutated(content: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for place, length, new in edits:
        start = place % (len(content) + 1)
        content = content[:start] + new + content[start + length :]
    return content


VALID_FILES = st.builds(
    lambda records, lines: ("\n".join(map(json.dumps, records)) if lines else json.dumps(records)).encode(),
    st.lists(NEAR_RECORDS | JSON_VALUES, max_size=5),
    st.booleans(),
)
EDITS = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 30), st.binary(max_size=6)), max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=150, deadline=None)
@given(
    content=st.binary(max_size=400) | VALID_FILES | st.builds(mutated, VALID_FILES, EDITS),
    read_bytes=st.integers(1, 50),
)
def test_whatever_the_bytes_are_reading_ends_in_records_or_one_line(folder, content, read_bytes):
    path = write(folder / "a.json", content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_stream, "READ_BYTES", read_bytes)
        try:
            records, tasks = read_tasks(path)
        except UserError as error:
            assert str(error).startswith((str(path), f"cannot read {path}")), str(error)
            assert "\n" not in str(error)
        else:
            assert len(records) == len(tasks) > 0
    assert [file.name for file in folder.iterdir()] == ["a.json"]


@settings(max_examples=100, deadline=None)
@given(records=st.lists(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4), min_size=1), lines=st.booleans())
def test_records_that_json_can_hold_are_read_as_they_are_and_written_byte_for_byte(folder, records, lines):
    texts = [json.dumps(record) for record in records]
    path = write(folder / "a.json", "\n".join(texts) if lines else "[" + ",".join(texts) + "]")
    found = open_records(path)
    assert [found.raw(row).decode() for row in range(len(found))] == texts
    target = folder / "b.json"
    write_records(target, found, range(len(found)))
    assert [raw.decode() for _, raw, _ in stream_records(target)] == texts
    target.unlink()


@settings(max_examples=150, deadline=None)
@given(record=NEAR_RECORDS | JSON_VALUES)
def test_any_value_is_either_a_record_without_a_problem_or_has_one_that_is_told_in_one_line(record):
    problem = problem_of(record)
    assert name_of("a.json", 0, record).startswith("a.json: record 0")
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
    with pytest.raises(UserError, match="unknown role") as caught:
        read_tasks(path)
    assert len(str(caught.value)) < 400


# Checking


def record_with(*turns, **keys):
    return {"id": "a", "conversations": [turn(role, text) for role, text in turns], **keys}


GOOD_TURNS = (("human", "<image>\nWhere?"), ("gpt", "There."))
PROBLEMS = {
    "a list": ([], "is not an object"),
    "no conversations": ({"id": 1}, "has no `conversations`"),
    "empty conversations": ({"conversations": []}, "not a list of turns"),
    "conversations as text": ({"conversations": "hello"}, "not a list of turns"),
    "a turn that is text": ({"conversations": ["hello"]}, "a turn 0 without"),
    "a value that is a number": (record_with(("human", 3)), "a turn 0 without"),
    "an unknown role": (record_with(("human", "x"), ("assistant", "y")), "unknown role 'assistant' in turn 1"),
    "a system turn": (record_with(("system", "x"), ("human", "y")), "unknown role 'system' in turn 0"),
    "half a surrogate pair": (record_with(("human", "\ud800")), "not valid Unicode"),
    "only gpt": (record_with(("gpt", "x")), "no human turn"),
    "two human turns": (record_with(("human", "x"), ("human", "y")), "two human turns in a row (turn 1)"),
    "two gpt turns": (record_with(("gpt", "x"), ("human", "y"), ("gpt", "z"), ("gpt", "z")), "turns in a row (turn 3)"),
    "two images": (record_with(*GOOD_TURNS, image=["a", "b"]), "has 2 images"),
    "two images under the other key": (record_with(*GOOD_TURNS, images=["a", "b"]), "has 2 images"),
    "an image under a key that is not read": (record_with(*GOOD_TURNS, image_path="a.jpg"), "under `image_path`"),
    "a video": (record_with(*GOOD_TURNS, image="a.jpg", video="a.mp4"), "under `video`"),
    "an image that is a number": (record_with(*GOOD_TURNS, image=3), "neither a path"),
    "an image that is null": (record_with(*GOOD_TURNS, image=None), "neither a path"),
    "an empty image": (record_with(*GOOD_TURNS, image=""), "neither a path"),
    "an empty list of images": (record_with(*GOOD_TURNS, image=[]), "neither a path"),
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
        record_with(*GOOD_TURNS, images=["a.jpg"]),
        record_with(("human", "Where?"), ("gpt", "There."), images=[], video=None),
        record_with(("gpt", "Hello."), *GOOD_TURNS, image="a.jpg"),
        record_with(("human", "What does <image> mean in HTML?"), ("gpt", "A tag, <image>.")),
    ],
    ids=["image", "text only", "image in a list", "images", "empty media", "starts with gpt", "tags without an image"],
)
def test_a_record_that_can_be_trained_on_has_no_problem(record):
    assert problem_of(record) is None


def test_an_image_is_its_path_in_either_form():
    assert image_of({"image": "a.jpg"}) == image_of({"image": ["a.jpg"]}) == image_of({"images": ["a.jpg"]}) == "a.jpg"
    assert image_of({"image": "./a.jpg"}) == "a.jpg"
    assert image_of({}) is None


# Tasks


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
        ({"dataset": True}, "dataset", None),
        ({"dataset": ["a", "b"]}, "dataset", None),
        ({"meta": "text"}, "meta.source", None),
        ({"image": "./coco/train2017/1.jpg"}, "image:/", "coco"),
        ({"image": ".//coco/1.jpg"}, "image:/", "coco"),
        ({"images": ["./coco/1.jpg"]}, "image:/", "coco"),
        ({"image": "coco/1.jpg"}, "images:/", "coco"),
        ({"image": "1.jpg"}, "image:/", None),
        ({"image": "/1.jpg"}, "image:/", None),
        ({}, "image:/", None),
        ({"dataset": "half a pair \ud800"}, "dataset", None),
    ],
)
def test_the_task_of_a_record_is_read_from_a_key_a_path_or_a_prefix(record, task_key, task):
    assert task_of(record, task_key) == task


def test_a_task_key_that_ends_in_its_colon_is_refused():
    with pytest.raises(UserError, match="--task_key image: "):
        task_of({"image": "coco/1.jpg"}, "image:")


def test_every_record_gets_its_task_and_a_record_without_one_is_named(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([record_with(*GOOD_TURNS, dataset=name) for name in "abca"]))
    assert read_tasks(path)[1] == list("abca")
    with pytest.raises(UserError, match=r"record 0 \(id 'a'\) names no task under `source`.*label_tasks"):
        read_tasks(path, "source")


# Chunks and writing


@given(count=st.integers(0, 5000), num_chunks=st.integers(1, 70))
def test_chunks_cover_every_record_once_in_order(count, num_chunks):
    chunks = [chunk_range(count, num_chunks, index) for index in range(num_chunks)]
    assert [row for chunk in chunks for row in chunk] == list(range(count))
    assert all(len(chunk) <= -(-count // num_chunks) for chunk in chunks)


@pytest.mark.parametrize(("num_chunks", "chunk_idx"), [(0, 0), (4, 4), (4, -1), (-1, 0)])
def test_a_chunk_that_does_not_exist_is_refused(num_chunks, chunk_idx):
    with pytest.raises(UserError, match="--chunk_idx"):
        chunk_range(10, num_chunks, chunk_idx)


def test_chosen_records_are_written_as_they_came_repeated_and_in_the_order_asked(tmp_path):
    texts = ['{"b":1,  "a" : 1.50}', '{"é": "\\u00e9"}', '{"x": [ ]}']
    records = open_records(write(tmp_path / "a.jsonl", "\n".join(texts)))
    write_records(tmp_path / "b.json", records, [2, 0, 0, 1])
    assert (tmp_path / "b.json").read_text() == "[\n" + ",\n".join(texts[row] for row in (2, 0, 0, 1)) + "\n]\n"
    write_records(tmp_path / "c.json", records, [])
    assert json.loads((tmp_path / "c.json").read_text()) == []


def test_json_lines_keep_one_record_a_line_however_it_was_laid_out(tmp_path):
    write_raw(tmp_path / "a.jsonl", (json.dumps(record, indent=1).encode() for record in RECORDS), lines=True)
    lines = (tmp_path / "a.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == RECORDS


def test_nothing_is_written_when_the_records_break_off(tmp_path):
    path = write(tmp_path / "a.json", b'[{"id": 1}, {"id":')
    target = write(tmp_path / "b.json", b"what was there")
    with pytest.raises(UserError, match="breaks off"):
        write_raw(target, (raw for _, raw, _ in stream_records(path)))
    assert target.read_bytes() == b"what was there"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.json", "b.json"]
