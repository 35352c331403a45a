"""When an answer is exact: it and the expected one are the same once both are normalised."""

from __future__ import annotations

import re
import unicodedata

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {word: str(number) for number, word in enumerate(_NUMBERS)}
_SEPARATOR_IN_NUMBER = re.compile(r"(?<=\d),(?=\d{3})")
# What is no part of a word or number. `0.5`, `.5`, `10:30`, `1/2`, `-5`, `-$5`, `-x` and `-∞` are, `it's` is a word.
_SIGN = re.compile(r"\.(?!\d)|(?<!\d)[:/]|[:/](?!\d)|(?<=[\w-])-|-(?!\.?\w)|[^\w\s.:/'-]|_")
_DASHES = str.maketrans("−–‐‑", "----")
_PUNCTUATION_THAT_COUNTS = "%&#@*"


def is_exact(produced: str, expected: str) -> bool:
    """Whether an answer was produced exactly: both texts are the same once they are normalised."""
    return bool(produced.strip()) and normalised(produced) == normalised(expected)


def normalised(text: str) -> str:
    """An answer without what is not looked at: case, punctuation, articles, numbers as words.

    After VQA's evaluation, without its list of contractions. Its rule was made for words, so this one departs from it
    where signs carry meaning: `<`, `+`, `%`, emoji and the like stay, and so does a minus before a number or letter,
    whichever dash is written; an answer of nothing but an article or punctuation keeps it.
    """
    text = " ".join(text.lower().translate(_DASHES).split())
    words = _SIGN.sub(_apart, _SEPARATOR_IN_NUMBER.sub("", text)).split()
    kept = [word for word in words if word not in _ARTICLES] or words
    return " ".join(_DIGITS.get(word, word) for word in kept) or text


def _apart(sign: re.Match[str]) -> str:
    """Punctuation, and what could not be decoded, parts words; a mark on a letter stays; a symbol is a word, with the
    minus before it."""
    before, behind = sign.string[: sign.start()][-1:], sign.string[sign.end() :][:1]
    kind = unicodedata.category(sign[0])[0]
    if kind == "M":
        return sign[0]
    if sign[0] == "-" and behind and unicodedata.category(behind)[0] == "S" and not re.match(r"\w", before):
        return " -"
    parts = kind in "PC" and sign[0] not in _PUNCTUATION_THAT_COUNTS
    return " " if parts or sign[0] == "\ufffd" else f"{sign[0]} " if before == "-" else f" {sign[0]} "
