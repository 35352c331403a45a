"""Whatever a data file holds, what is printed of it is short and cannot steer a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tive.util.text import duration, listed, print_table, shown, shown_value

TEXTS = st.text(st.characters()) | st.text(st.sampled_from("ab\x1b\n\r\x00\ud800\u202e\u2028é"), max_size=90)


@given(text=TEXTS, limit=st.integers(8, 60))
def test_any_text_is_shown_on_one_harmless_line_of_at_most_the_limit(text, limit):
    line = shown(text, limit)
    assert len(line) <= limit
    assert line.isprintable()
    line.encode()


@given(text=st.text(st.characters(categories=("L", "N", "P"))))
def test_a_text_that_is_harmless_and_short_is_shown_as_it_is(text):
    assert shown(text, len(text)) == text


def test_a_long_message_keeps_its_beginning_and_its_remedy():
    line = shown(f"a.json: record 3 has an image data:{'x' * 80_000}; write it to a file", 200)
    assert line.startswith("a.json: record 3 has an image data:")
    assert line.endswith("; write it to a file")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("a", "'a'"),
        (7, "7"),
        (None, "None"),
        (["x"] * 100, "a list"),
        ({"x": 1}, "an object"),
        ("\x1b[2J", "'\\x1b[2J'"),
        ("x" * 50, "'" + "x" * 26 + "..." + "x" * 9 + "'"),
    ],
)
def test_a_value_is_shown_as_what_it_is(value, line):
    assert shown_value(value) == line


@given(value=st.text() | st.integers() | st.floats() | st.lists(st.text()) | st.dictionaries(st.text(), st.text()))
def test_any_value_is_short(value):
    assert len(shown_value(value)) <= 40


def test_a_list_of_many_names_the_first_and_counts_the_others():
    assert listed(["a", "b"]) == "a, b"
    assert listed([f"chunk {number}" for number in range(1500)], limit=2) == "chunk 0, chunk 1 and 1,498 more"


@pytest.mark.parametrize(
    ("seconds", "line"), [(0.04, "0.0 s"), (89.9, "89.9 s"), (90, "1.5 min"), (5399, "90.0 min"), (5400, "1.5 h")]
)
def test_a_duration_has_the_unit_that_suits_it(seconds, line):
    assert duration(seconds) == line


def test_a_table_holds_its_columns_whatever_the_labels_are(capsys):
    print_table([("task", "records"), ("\x1b[31mred", "7"), ("x" * 5000, "1,234")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["records", "7", "1,234"]
    assert len({len(line) for line in lines}) == 1
    assert len(lines[0]) < 80
    assert "\x1b" not in "".join(lines)
