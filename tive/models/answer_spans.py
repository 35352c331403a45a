"""Which tokens of a rendered conversation are an assistant's: its answers and the end of its turns, nothing else.

A template's own masks of generated text are missing in most templates and wrong where images are, so the answers are
located by rendering the conversation once more, with a mark behind each answer's last letter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from tive.models import LeftOut

Message = dict[str, Any]
Span = tuple[int, int]


def text_message(role: str, text: str) -> Message:
    """A message of one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def answer_spans(render: Callable[[list[Message]], str], messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The rendered conversation, and where each answer's characters stand in it.

    A template may strip an answer's outer white space, and print something in front of it or behind it.

    Args:
        render: applies the chat template.
        messages: the content of an assistant's message is one text part.

    Raises:
        LeftOut: the template prints an answer otherwise than it is, not at all, or more than once.
    """
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]

    def rendered(texts: Sequence[str]) -> str:
        rest = iter(texts)
        return render([text_message("assistant", next(rest)) if m["role"] == "assistant" else m for m in messages])

    whole = rendered(answers)
    marks = [f"\uf8f0{number}\uf8f1" for number in range(len(answers))]
    letters = [len(answer.rstrip()) for answer in answers]
    rest = rendered([text[:end] + mark + text[end:] for text, end, mark in zip(answers, letters, marks, strict=True)])
    pieces = []
    for mark in marks:
        piece, is_there, rest = rest.partition(mark)
        if not is_there or mark in rest:
            raise LeftOut("the chat template does not print each answer once")
        pieces.append(piece)
    if "".join([*pieces, rest]) != whole:
        raise LeftOut("the chat template changes an answer")
    if rendered([answer.lstrip() for answer in answers]) == whole:
        answers = [answer.lstrip() for answer in answers]
    if rendered([answer.rstrip() for answer in answers]) == whole:
        answers = [answer.rstrip() for answer in answers]
    spans, end = [], 0
    for piece, answer in zip(pieces, answers, strict=True):
        end += len(piece)
        start = end - len(answer.rstrip())
        spans.append((start, start + len(answer)))
        if whole[slice(*spans[-1])] != answer:
            raise LeftOut("the chat template changes an answer")
    return whole, spans


def token_spans(
    text: str, offsets: Sequence[Span], ids: Sequence[int], spans: Sequence[Span], ends: Collection[int]
) -> list[Span]:
    """Tokens that overlap each answer's characters, and the end of the turn where one follows.

    Args:
        offsets: each token's characters in `text`.
        ends: ids that can end a turn: the tokenizer's added tokens, images apart. One does where only white space
            stands between it and the answer.
    """
    tokens = []
    first = 0
    for start, stop in spans:
        while first < len(ids) and offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(ids) and offsets[last][0] < stop and offsets[last][1] > start:
            last += 1
        end = last
        while end < len(ids) and ids[end] not in ends and not text[slice(*offsets[end])].strip():
            end += 1
        if end < len(ids) and ids[end] in ends and not text[stop : offsets[end][0]].strip():
            last = end + 1
        tokens.append((first, last))
        first = last
    return tokens


def align(ids: np.ndarray, expanded: np.ndarray, spans: Sequence[Span]) -> list[Span]:
    """Where spans of tokens stand once each image's placeholder has become the image's tokens.

    Each span is searched behind the one before it, with as many of the tokens in front of it as are there: all of them,
    back to the last image. That includes the template's opening of an answer, so no other text is taken for it.

    Args:
        ids: int64 `[t]`, with placeholders.
        expanded: int64 `[T]`, as the processor returns it.

    Raises:
        LeftOut: a span is not there.
    """
    aligned = []
    behind, behind_expanded = 0, 0
    for start, stop in spans:
        if start == stop:
            continue
        lows = range(behind, start) if start > behind else range(start, start + 1)
        places = ((low, _find(expanded, ids[low:stop], behind_expanded)) for low in lows)
        low, position = next((place for place in places if place[1] >= 0), (start, -1))
        if position < 0:
            raise LeftOut("the processor changes the text around its images")
        position += start - low
        behind, behind_expanded = stop, position + stop - start
        aligned.append((position, behind_expanded))
    tail = ids[behind:]
    if len(tail) and np.array_equal(expanded[-len(tail) :], tail) and len(expanded) - len(tail) != behind_expanded:
        raise LeftOut("the processor changes the text around its images")
    return aligned


def _find(text: np.ndarray, part: np.ndarray, start: int) -> int:
    """First position of `part` in `text` from `start` on, or -1."""
    size = text.itemsize
    searched, wanted = text.tobytes(), part.astype(text.dtype).tobytes()
    position = searched.find(wanted, start * size)
    while position % size and position >= 0:
        position = searched.find(wanted, position + 1)
    return position // size if position >= 0 else -1
