"""When an answer counts as produced: two texts that are the same after VQA's normalisation."""

from __future__ import annotations

import re

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_SEPARATOR_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")
# Apostrophes belong to words; a full stop between digits belongs to a number.
_PUNCTUATION = re.compile(r"(?!')[^\w\s.]|_|(?<!\d)\.|\.(?!\d)")


def normalised(text: str) -> str:
    """An answer without what VQA's evaluation does not look at: case, punctuation, articles, numbers as words.

    An answer that is nothing but an article keeps it: `A` is an option's letter.
    """
    words = _PUNCTUATION.sub(" ", _SEPARATOR_IN_NUMBER.sub("", text.lower())).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in kept)


def is_exact(produced: str, expected: str) -> bool:
    """Whether an answer was produced exactly."""
    return normalised(produced) == normalised(expected)
