"""The features of all chunks as spans of rows, for the linear passes over them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tive.features.chunks import Chunk

SPAN_ROWS = 4096
_ADVICE_BYTES = 1 << 20


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one chunk, from `start` on: `pieces` are memory-mapped `[k, d]` tensors.

    `place` is where the span starts in its file and where the next one ends, as shares of the file.
    """

    path: Path
    start: int
    pieces: list[torch.Tensor]
    place: tuple[float, float]

    @property
    def rows(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def load(self) -> torch.Tensor:
        """The features `[rows, d]`, as they are on disk."""
        _read_ahead(self)
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)


def spans_of(chunks: Sequence[Chunk]) -> list[Span]:
    """Every row of the chunks, in order, in spans of at most `SPAN_ROWS`."""
    spans = []
    for chunk in chunks:
        groups: list[list[torch.Tensor]] = []
        room = 0
        for piece in (piece for block in chunk.blocks for piece in block.split(SPAN_ROWS) if len(piece)):
            # The release's tensors of 16 rows are gathered until a span is full.
            if len(piece) > room:
                groups.append([])
                room = SPAN_ROWS
            groups[-1].append(piece)
            room -= len(piece)
        row = chunk.start
        for number, pieces in enumerate(groups):
            spans.append(Span(chunk.path, row, pieces, (number / len(groups), (number + 2) / len(groups))))
            row += sum(len(piece) for piece in pieces)
    return spans


def _read_ahead(span: Span) -> None:
    """Ask the system for this span and the next: mapped rows out of order read a cold disk in small steps."""
    if not hasattr(os, "posix_fadvise"):
        return
    with open(span.path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        for offset in range(int(size * span.place[0]), int(size * span.place[1]), _ADVICE_BYTES):
            os.posix_fadvise(file.fileno(), offset, _ADVICE_BYTES, os.POSIX_FADV_WILLNEED)
