"""What a gradient pass is, what must agree between the chunks of a folder, and what is known of each record."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tive.util.errors import UserError
from tive.util.files import read_json

DAMAGED = "it may be damaged or unfinished: make this chunk again"


@dataclass(frozen=True)
class Match:
    """What tells whether a chunk belongs to others and to a data file; `OWN_KEYS` are the chunk's own."""

    chunk_idx: int
    start: int
    stop: int
    data_sha256: str
    data_records: int
    num_chunks: int
    model: str
    counted_parameters: int
    grad_modules: str
    last_layers: int | None
    projector: str
    proj_seed: int
    proj_dim: int
    # Features of before version 2 are gradients as they are, of a model that has no training step to its name.
    gradient: str = "sgd"
    optimizer_state: str | None = None
    checkpoint: int | None = None


OWN_KEYS = ("chunk_idx", "start", "stop")
COMMON_KEYS = tuple(field.name for field in dataclasses.fields(Match) if field.name not in OWN_KEYS)


@dataclass(frozen=True)
class Run:
    """Everything that the features of a chunk depend on: a chunk is continued by the same run alone.

    `counted_parameters` and `projector` are None until the model is loaded.
    """

    data_sha256: str
    data_records: int
    num_chunks: int
    chunk_idx: int
    start: int
    stop: int
    model: str
    gradient: str
    optimizer_state: str | None
    checkpoint: int | None
    grad_modules: str
    last_layers: int | None
    proj_seed: int
    proj_dim: int
    dtype: str
    batch_size: int
    max_batch_tokens: int
    gradient_checkpointing: bool
    window: int
    el2n: bool
    counted_parameters: int | None = None
    projector: str | None = None

    @property
    def rows(self) -> range:
        """The chunk's rows of the data file."""
        return range(self.start, self.stop)

    @property
    def match(self) -> Match:
        """The part that chunks must agree in; the model is loaded."""
        return msgspec.convert({field.name: getattr(self, field.name) for field in dataclasses.fields(Match)}, Match)

    def known(self, common: bool = False) -> dict[str, Any]:
        """What is known so far by name, of all or of what the chunks of a folder have in common."""
        values = dataclasses.asdict(self)
        if values["projector"] is None:
            del values["projector"], values["counted_parameters"]
        return {name: value for name, value in values.items() if not common or name in COMMON_KEYS}


@dataclass(frozen=True)
class LeftOutRecord:
    """A record without features: its row in the data file, its id if that is a text or a number, and the reason."""

    row: int
    id: str | int | None
    reason: str


@dataclass(frozen=True)
class RecordScores:
    """What one pass tells of records beside their features, `[n]`; left out records have NaN and 0.

    Attributes:
        norms: float32, L2 norms of the unprojected gradients.
        losses: float32, mean cross-entropy over the supervised tokens.
        supervised_tokens: int32.
        tokens: int32, what the language model sees.
        el2n: float32, if it was asked for.
    """

    norms: np.ndarray
    losses: np.ndarray
    supervised_tokens: np.ndarray
    tokens: np.ndarray
    el2n: np.ndarray | None

    @staticmethod
    def of_left_out(count: int, el2n: bool) -> RecordScores:
        """Arrays of `count` records of which none is computed yet."""

        def nothing() -> np.ndarray:
            return np.full(count, np.nan, np.float32)

        zeros = np.zeros((2, count), np.int32)
        return RecordScores(nothing(), nothing(), zeros[0], zeros[1], nothing() if el2n else None)

    @staticmethod
    def joined(parts: list[RecordScores], el2n: bool) -> RecordScores:
        """Consecutive parts as one."""
        arrays = zip(*(part.arrays().values() for part in parts or [RecordScores.of_left_out(0, el2n)]), strict=True)
        return RecordScores(*(np.concatenate(part) for part in arrays), *(() if el2n else (None,)))

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, without EL2N where it was not asked for."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: array for name, array in named.items() if array is not None}


@dataclass(frozen=True)
class Manifest:
    """A chunk's manifest, read: `made` is all of it beside `match` and `left_out`."""

    match: Match
    left_out: list[LeftOutRecord]
    made: dict[str, Any]


def read_manifest(path: Path, chunk_idx: int) -> Manifest:
    """Read and check the manifest of a chunk.

    Raises:
        UserError: it is damaged, or another chunk's.
    """
    content = read_json(path)
    made = dict(content) if isinstance(content, dict) else {}
    match = _checked(path, "match", made.pop("match", None), Match)
    if match.chunk_idx != chunk_idx or not 0 <= match.start <= match.stop <= match.data_records:
        raise UserError(
            f"{path} describes chunk {match.chunk_idx}, records {match.start} .. {match.stop}, which does not "
            "fit its name; was it renamed? make this chunk again"
        )
    left_out = _checked(path, "left_out", made.pop("left_out", None), list[LeftOutRecord])
    if not all(match.start <= entry.row < match.stop for entry in left_out):
        raise UserError(f"{path} has no valid `left_out` (a row outside the chunk); {DAMAGED}")
    return Manifest(match, left_out, made)


def _checked(path: Path, key: str, content: Any, kind: Any) -> Any:
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} has no valid `{key}` ({error}); {DAMAGED}") from error
