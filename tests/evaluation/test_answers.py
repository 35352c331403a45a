"""Two answers are the same where VQA's evaluation takes them for the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tive.evaluation.answers import is_exact, normalised


@pytest.mark.parametrize(
    ("produced", "expected"),
    [
        ("Red.", "red"),
        ("The red circle", "a red circle"),
        ("two", "2"),
        ("1,000", "1000"),
        ("left-hand side", "left hand side"),
        ("[0.12, 0.5]", "0.12 0.5"),
        *[("−5", "-5"), ("1990–2000", "1990-2000"), ("yes -- no", "yes no"), ("- yes", "yes"), ("5 - √2", "5-√2")],
        ("  yes \n", "Yes!"),
    ],
)
def test_case_articles_punctuation_and_numbers_as_words_make_no_difference(produced, expected):
    assert is_exact(produced, expected)


@pytest.mark.parametrize(
    ("produced", "expected"),
    [
        *[("A", "An"), ("A", ""), ("1.5", "15"), ("it's", "its"), ("red circle", "redcircle"), ("", "no")],
        *[
            ("<", ">"),
            *[("-5", "5"), ("–5", "5"), ("-$5", "$5"), ("-x", "x"), ("-.5", ".5"), ("-∞", "∞"), ("-√2", "√2")],
            ("+", "-"),
            ("50%", "50"),
            ("$5", "5"),
            (".5", "5"),
            ("1/2", "1 2"),
            ("x < 3", "x > 3"),
        ],
        *[("", "!!!"), ("!!!", "."), ("", ""), (" ", ""), ("→", "←"), ("😀", "😁"), ("x < 3", "x > 3"), ("की", "का")],
    ],
)
def test_what_an_answer_says_makes_a_difference(produced, expected):
    assert not is_exact(produced, expected)


@given(st.text(max_size=30))
def test_an_answer_is_exactly_itself_and_is_normalised_once_for_all(text):
    assert is_exact(text, text) == bool(text.strip())
    assert normalised(normalised(text)) == normalised(text)
