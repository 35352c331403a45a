"""The features of all chunks as spans of rows, for the linear passes over them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tive.features.chunks import Chunk

SPAN_ROWS = 4096


@dataclass(frozen=True)
class Span:
    """Consecutive rows of one chunk, from `start` on: `pieces` are memory-mapped `[k, d]` tensors."""

    start: int
    pieces: list[torch.Tensor]

    @property
    def rows(self) -> int:
        return sum(len(piece) for piece in self.pieces)

    def load(self) -> torch.Tensor:
        """The features `[rows, d]`, as they are on disk."""
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
        for pieces in groups:
            spans.append(Span(row, pieces))
            row += sum(len(piece) for piece in pieces)
    return spans
