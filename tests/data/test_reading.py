"""What must hold of reading a data file, whatever it holds: the records that Python's json reads, or one line."""

from __future__ import annotations

import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.records import JSON_VALUES, NEAR_RECORDS, RECORDS, turn, write
from tive.data import records as reader
from tive.data.records import open_records, parse_record, write_records
from tive.data.scan import scan_records
from tive.data.trained import form_problem
from tive.util.errors import UserError


def read(path):
    return list(open_records(path))


def texts_of(path):
    """The text of each record, by its row and in one pass."""
    records = open_records(path)
    texts = [records.raw(row) for row in range(len(records))]
    assert texts == [bytes(text) for text in records.texts()]
    return texts


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
@pytest.mark.parametrize("last", [b"{}", b'{"n": NaN}', b'"\\ud800"', b"[1e999]"])
def test_the_text_of_a_record_is_that_of_the_file_whichever_reader_reads_it(tmp_path, layout, last):
    texts = [
        '{"id": "caf\u00e9 \U0001f680"}'.encode(),
        b'{ "n" : 1.50e1 ,"dup":1, "dup":2}',
        b'{"s":"\\u00e9\\\\"}',
        b'{"long": "%s"}' % (b"x" * 9000),
        last,
    ]
    path = write(tmp_path / "a.json", layout % b" ,\n".join(texts))
    assert texts_of(path) == texts
    assert open_records(path)[0] == {"id": "caf\u00e9 \U0001f680"}


def test_a_record_of_many_bytes_is_whole(tmp_path):
    long = {"id": "long", "conversations": [turn("human", "é" * (5 << 20)), turn("gpt", "end")]}
    path = write(tmp_path / "a.json", json.dumps([RECORDS[0], long, RECORDS[1]], ensure_ascii=True))
    assert read(path) == [RECORDS[0], long, RECORDS[1]]


BROKEN = {
    "empty file": (b"", "is empty"),
    "only white space": (b" \n\t ", "is empty"),
    "not a list": (b'"text"', "neither a JSON list"),
    "list breaks off in a record": (b'[{"id": 1}, {"id": 2', "record 1"),
    "list breaks off after a record": (b'[{"id": 1}', "bracket is missing"),
    "list breaks off after a comma": (b'[{"id": 1},', "record 1"),
    "trailing comma": (b'[{"id": 1},]', "record 1"),
    "missing comma": (b'[{"id": 1} {"id": 2}]', "comma"),
    "text after the list": (b'[{"id": 1}] []', "after the end"),
    "line breaks off": (b'{"id": 1}\n{"id": "x', "record 1"),
    "garbage line": (b'{"id": 1}\n<html>\n', "record 1"),
    "not UTF-8": (b'[{"id": "\xff"}]', "UTF-8"),
    "half of a surrogate pair, not escaped": (b'[{"id": 1}, {"id": "\xed\xa0\x80"}]', "UTF-8"),
    "UTF-16 in UTF-8": (b'[{"id": 1}, \xff\xfe[', "record 1"),
    "cut inside a character": ('[{"id": "é'.encode()[:-1], "breaks off"),
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


@pytest.mark.parametrize("end", [b'"}]', b'", "n": NaN}]', b""], ids=["whole", "for Python's reader", "never ends"])
def test_a_record_above_the_limit_is_refused(tmp_path, monkeypatch, end):
    monkeypatch.setattr(reader, "MAX_RECORD_BYTES", 1 << 10)
    path = write(tmp_path / "a.json", b'[{"id": 1}, {"id": "' + b"x" * (1 << 20) + end)
    with pytest.raises(UserError, match="record 1"):
        open_records(path)


def test_the_limit_counts_bytes_not_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "MAX_RECORD_BYTES", 1000)
    assert len(read(write(tmp_path / "a.json", '[{"id": "' + "e" * 900 + '"}]'))) == 1
    with pytest.raises(UserError, match="one record above"):
        read(write(tmp_path / "b.json", '[{"id": "' + "é" * 900 + '"}]'))


def test_a_file_without_records_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no records"):
        open_records(write(tmp_path / "a.json", b" [ ] "))


# Fuzzing: a `UserError` or records, nothing else


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
@given(content=st.binary(max_size=400) | VALID_FILES | st.builds(mutated, VALID_FILES, EDITS))
def test_whatever_the_bytes_are_reading_ends_in_records_or_one_line(folder, content):
    path = write(folder / "a.json", content)
    try:
        scan = scan_records(open_records(path), form_problem, "dataset")
    except UserError as error:
        assert str(error).startswith((str(path), f"cannot read {path}")), str(error)
        assert "\n" not in str(error)
    else:
        assert len(scan.records) == len(scan.tasks) == len(scan.ids) == len(scan.images) > 0
    assert [file.name for file in folder.iterdir()] == ["a.json"]


@settings(max_examples=100, deadline=None)
@given(records=st.lists(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4), min_size=1), lines=st.booleans())
def test_records_that_json_can_hold_are_read_as_they_are_and_written_byte_for_byte(folder, records, lines):
    texts = [json.dumps(record) for record in records]
    path = write(folder / "a.json", "\n".join(texts) if lines else "[" + ",".join(texts) + "]")
    assert [text.decode() for text in texts_of(path)] == texts
    target = folder / "b.json"
    write_records(target, open_records(path), range(len(texts)))
    assert [text.decode() for text in texts_of(target)] == texts
    target.unlink()


# What stands between two records stands within them too: in lists of objects, in texts.
GAPS = st.sampled_from([",", ", ", " ,\n", "\n", "\r\n ", ""])
ALIKE = st.recursive(
    st.sampled_from(['"}, {\\"id\\": 1"', '"a"', "1", "NaN", '"\\ud800"', "1e999", "-0", '"é"', '"\\u00e9"', "[]"]),
    lambda inner: st.lists(inner, max_size=2).map(lambda items: f"[{', '.join(items)}]")
    | st.builds(lambda key, value: f'{{"{key}": {value}}}', st.sampled_from(["id", "a", "x}, {"]), inner),
    max_leaves=4,
)
TEXTS = st.lists(
    st.builds(
        lambda key, values: "{"
        + ", ".join(f'"{key}{index or ""}": {value}' for index, value in enumerate(values))
        + "}",
        st.sampled_from(["id", "id", "id", "image"]),
        st.lists(ALIKE, min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=200, deadline=None)
@given(texts=TEXTS, gap=GAPS)
def test_records_end_where_they_end_whatever_stands_within_them(folder, texts, gap):
    path = write(folder / "a.json", f"[{gap.join(texts)}]" if "," in gap else gap.join(texts))
    assert [text.decode() for text in texts_of(path)] == texts
    assert [repr(record) for record in read(path)] == [repr(json.loads(text)) for text in texts]


@settings(max_examples=200, deadline=None)
@given(value=JSON_VALUES | st.binary(max_size=30))
def test_a_record_is_what_json_makes_of_it(value):
    raw = value if isinstance(value, bytes) else json.dumps(value).encode()
    try:
        expected = json.loads(raw)
    except ValueError:
        with pytest.raises(ValueError):
            parse_record(raw)
    else:
        assert repr(parse_record(raw)) == repr(expected)


def test_a_number_or_text_that_only_python_reads_is_read(tmp_path):
    records = read(write(tmp_path / "a.json", '[{"n": NaN}, {"n": 1e999}, {"n": "\\ud800"}, {"n": -Infinity}]'))
    assert repr(records) == repr([{"n": float("nan")}, {"n": float("inf")}, {"n": "\ud800"}, {"n": float("-inf")}])


def test_a_reader_travels_to_another_process_as_two_numbers_a_record(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join('{"id": "%s"}' % ("x" * 200) for _ in range(1000)))
    sent = pickle.dumps(open_records(path))
    assert len(sent) < 1000 * 16 + 1000
    assert pickle.loads(sent)[999] == {"id": "x" * 200}


def test_a_file_that_shrank_since_it_was_opened_is_said(tmp_path):
    path = write(tmp_path / "a.json", '[{"id": 1}, {"id": 2}]')
    records = open_records(path)
    write(path, '[{"id": 1}]')
    with pytest.raises(UserError, match="record 1"):
        records[1]
    with pytest.raises(UserError, match="record 1"):
        list(records)
