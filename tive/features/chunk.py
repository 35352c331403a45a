"""A chunk's files, written and read: `output_{k}.pt` (features and columns), `output_norm_{k}.json` (the norms, for
people), and `manifest_{k}.json`, written last: where it is, the chunk is whole.

The paper's release wrote `output_{k}` without a suffix, a list of `[<=16, d]` tensors, and no manifest; such folders
are read too.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tive.data.trained import HASH_BYTES
from tive.util.errors import UserError
from tive.util.files import HashingFile, read_json, read_torch, whole_file, write_json
from tive.util.text import first_line, listed, shown

# The column of the records' hashes, by which a feature is found again in other data; uint8 `[n, 16]`.
CONTENT = "content"
# Of each record beside its feature; EL2N and the visual gain only if they were asked for.
COLUMNS = {
    "norms": np.float32,
    "losses": np.float32,
    "supervised_tokens": np.int32,
    "tokens": np.int32,
    "el2n": np.float32,
    "visual_gain": np.float32,
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class LeftOutRecord:
    """A record without results: its row in the data file, its id if that is a text or a number, and the reason."""

    row: int
    id: str | int | None
    reason: str


@dataclass(frozen=True)
class Match:
    """What the numbers of a chunk mean: the rows, and what all chunks of a folder and a continued run must agree in.

    Attributes:
        counted_parameters, projector: None until the model is loaded; then `projector` may be the kind that was asked
            for, of which the full kind is a longer name.
        gradient: `sgd`, `adam`, `adam_release`, or `none` where there are losses but no features and no norms.
    """

    chunk_idx: int
    start: int
    stop: int
    data_sha256: str
    data_records: int
    num_chunks: int
    model: str
    grad_modules: str
    proj_seed: int
    proj_dim: int
    counted_parameters: int | None = None
    projector: str | None = None
    # Features of before version 2 are gradients as they are, of a model that has no training step to its name.
    gradient: str = "sgd"
    optimizer_state: str | None = None
    checkpoint: int | None = None
    dtype: str | None = None
    el2n: bool = False
    visual_gain: bool = False

    @property
    def rows(self) -> range:
        """The chunk's rows of the data file."""
        return range(self.start, self.stop)

    @property
    def has_features(self) -> bool:
        """Whether gradients were taken, which have features and norms."""
        return self.gradient != "none"

    def has(self, column: str) -> bool:
        """Whether one of `COLUMNS` was computed."""
        return self.has_features if column == "norms" else bool(getattr(self, column, True))


COMMON_KEYS = tuple(field.name for field in fields(Match) if field.name not in ("chunk_idx", "start", "stop"))


def match_of_manifest(content: Mapping[str, Any]) -> Match:
    """The `match` of a manifest, a part of which older versions wrote elsewhere; a `ValueError` where it is none."""
    run = content.get("run") or {}
    elsewhere = {"dtype": content.get("dtype"), "el2n": run.get("el2n", False)}
    match = msgspec.convert(elsewhere | content.get("match", {}), Match)
    if None in (match.counted_parameters, match.projector):
        raise ValueError("no `counted_parameters` or `projector`")
    return match


@dataclass(frozen=True)
class Chunk:
    """Features of the records `start .. stop - 1` of the data file.

    Attributes:
        blocks: the rows in order, memory-mapped: one `[n, d]` tensor, or the release's list of `[<=16, d]`; without
            gradients d is 0.
        scores: of each record by name, float64 `[n]`: the columns that its pass kept; features of the release and of
            before version 2 have `norms` alone, a pass without gradients has none.
        match: None for the release's files, which have no manifest.
        manifest: how it was made; empty for the release's files.
        content: the records' hashes (`record_hash`), uint8 `[n, 16]`; None where its version did not write them.
    """

    path: Path
    start: int
    stop: int
    blocks: list[torch.Tensor]
    scores: dict[str, np.ndarray]
    match: Match | None = None
    left_out: list[LeftOutRecord] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    content: np.ndarray | None = None


def write_chunk(
    folder: Path,
    match: Match,
    features: np.ndarray,
    columns: dict[str, np.ndarray],
    left_out: list[LeftOutRecord],
    made: dict[str, Any],
) -> None:
    """Write the three files of a chunk, each whole, the manifest last; without gradients there are no norms.

    Args:
        features: float16 `[n, d]`, streamed to disk without a second copy, so it may be memory-mapped and larger than
            memory. The row of a record that was left out is zero.
        columns: of `COLUMNS`, `[n]` each, and perhaps `CONTENT`.
        made: how the chunk was made, for the manifest.

    Raises:
        UserError: a file cannot be written.
    """
    chunk = match.chunk_idx
    arrays = columns | ({"features": features} if match.has_features else {})
    tensors = {name: torch.from_numpy(np.require(array, requirements=["C", "W"])) for name, array in arrays.items()}
    with whole_file(folder / f"output_{chunk}.pt") as file:
        hashing = HashingFile(file)
        torch.save(tensors | {"match": asdict(match)}, hashing)  # type: ignore[arg-type]  # `write` is all it asks for
    if match.has_features:
        norms = [norm if math.isfinite(norm) else None for norm in columns["norms"].tolist()]
        write_json(folder / f"output_norm_{chunk}.json", norms, indent=None)
    entries = [asdict(entry) for entry in left_out]
    content = {"match": asdict(match), "sha256": hashing.sha256, "left_out": entries, **made}
    write_json(folder / f"manifest_{chunk}.json", content)


def open_chunks(folder: str | os.PathLike[str], chunk_num: int | None = None) -> list[Chunk]:
    """The chunks of a folder in order, memory-mapped, verified to cover their data file once and to belong together.

    Args:
        chunk_num: how many chunks there should be, if the caller knows.

    Raises:
        UserError: a chunk is missing, unfinished, damaged, or of another run.
    """
    folder = Path(folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot read the feature folder {folder}: {error.strerror}; check the path") from error
    present, of_release = (
        sorted(int(parts[1]) for name in names if (parts := re.fullmatch(form, name)))
        for form in (r"output_(0|[1-9]\d{0,8})\.pt", r"output_(0|[1-9]\d{0,8})")
    )
    finished = [number for number in present if f"manifest_{number}.json" in names]
    if not finished and not of_release:
        below = sorted(folder.glob("*/manifest_*.json"))
        remedy = f"name one below it, as {below[0].parent}" if below else "run compute_gradient_features.py first"
        raise UserError(f"{folder} holds no finished chunk (output_0.pt ...); {remedy}")
    if present and of_release:
        raise UserError(
            f"{folder} holds feature files of two kinds (output_{present[0]}.pt and output_{of_release[0]}); keep one "
            "kind in the folder"
        )
    manifests = {number: read_manifest(folder / f"manifest_{number}.json", number) for number in finished}
    for key in COMMON_KEYS:
        values: dict[Any, list[int]] = {}
        for number, (match, _) in manifests.items():
            values.setdefault(getattr(match, key), []).append(number)
        if len(values) > 1:
            differing = "; ".join(f"{_chunks(those)} {shown(repr(value), 24)}" for value, those in values.items())
            raise UserError(f"{folder}: the chunks differ in `{key}`: {differing}; make them all with one command")
    first = manifests[finished[0]][0] if finished else None
    numbers, expected = (finished, first.num_chunks) if first else (of_release, of_release[-1] + 1)
    if missing := sorted(set(range(min(expected, 1 << 20))) - set(numbers)):
        raise UserError(
            f"{folder}: {_chunks(missing)} of {expected} missing or not finished; run compute_gradient_features.py "
            f"with num_chunks {expected} and {_chunks(missing, 'chunk_idx {}')}"
        )
    if chunk_num is not None and chunk_num != len(numbers):
        raise UserError(f"{folder} holds {len(numbers)} chunks, not {chunk_num}; leave chunk_num out")
    chunks = [_open_chunk(folder / f"output_{number}.pt", *manifest) for number, manifest in manifests.items()]
    for number in of_release:
        chunks.append(_open_release_chunk(folder / f"output_{number}", chunks[-1].stop if chunks else 0))
    ends = [0, *(chunk.stop for chunk in chunks)]
    starts = [*(chunk.start for chunk in chunks), first.data_records if first else ends[-1]]
    for number, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start != end:
            kind = "overlaps the one before" if start < end else "leaves a gap before it"
            raise UserError(f"{folder}: chunk {number} {kind} (records {start} and {end}); make these chunks again")
    if len(sizes := {block.shape[1] for chunk in chunks for block in chunk.blocks}) > 1:
        raise UserError(f"{folder}: the features differ in dimension ({sorted(sizes)}); make them all with one command")
    return chunks


def _chunks(numbers: Sequence[int], form: str = "chunk {}") -> str:
    return listed([form.format(number) for number in numbers])


def read_manifest(path: Path, number: int) -> tuple[Match, dict[str, Any]]:
    """What a chunk's manifest says: its match, and all, of which `left_out` is checked."""
    with _errors_name(path):
        content = read_json(path)
        match = match_of_manifest(content)
        left_out = msgspec.convert(content["left_out"], list[LeftOutRecord])
        if match.chunk_idx != number or not 0 <= match.start <= match.stop <= match.data_records:
            raise ValueError(f"it describes chunk {match.chunk_idx}, records {match.start} .. {match.stop}")
        if not all(entry.row in match.rows for entry in left_out):
            raise ValueError("it leaves out a row outside the chunk")
    return match, content | {"left_out": left_out}


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Turn every error in the block into a `UserError` that names the file: damaged bytes raise nearly every kind."""
    try:
        yield
    except UserError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    except Exception as error:  # an OSError too: a file that was cut cannot be mapped
        raise UserError(
            f"{path} is not what a gradient step writes ({first_line(error)[:120]}); it may be damaged or "
            "renamed: make this chunk again"
        ) from error


def _open_chunk(path: Path, match: Match, made: dict[str, Any]) -> Chunk:
    with _errors_name(path):
        content = read_torch(path)
        # Older versions have fewer keys here than in the manifest.
        inside = msgspec.convert(asdict(match) | content["match"], Match)
        if differing := [key.name for key in fields(Match) if getattr(inside, key.name) != getattr(match, key.name)]:
            raise ValueError(f"it differs from manifest_{match.chunk_idx}.json in `{differing[0]}`")
        records = len(match.rows)
        names = {*COLUMNS} & {*content} | ({"norms"} if match.has_features else {"losses"})
        for name in names:
            _check_tensor(name, content[name], (torch.float32, torch.int32), (records,))
        features = content["features"] if match.has_features else torch.empty(records, 0)
        _check_tensor("features", features, _FLOATS, (records, match.proj_dim))
        if CONTENT in content:
            _check_tensor(CONTENT, content[CONTENT], (torch.uint8,), (records, HASH_BYTES))
    scores = {name: content[name].double().numpy() for name in names}
    hashes = content[CONTENT].numpy() if CONTENT in content else None
    manifest = {name: value for name, value in made.items() if name not in ("match", "left_out")}
    return Chunk(path, match.start, match.stop, [features], scores, match, made["left_out"], manifest, hashes)


def _open_release_chunk(path: Path, start: int) -> Chunk:
    with _errors_name(path):
        blocks = list(read_torch(path))
        for block in blocks:
            _check_tensor("features", block, _FLOATS, (None, None))
    records = sum(map(len, blocks))
    with _errors_name(norm_path := path.with_name(path.name.replace("output_", "output_norm_") + ".json")):
        norms = msgspec.convert(read_json(norm_path), list[float | None])
        if len(norms) != records:
            raise ValueError(f"{len(norms)} norms of {records} records")
    values = np.array([math.nan if norm is None else norm for norm in norms], np.float64)
    return Chunk(path, start, start + records, blocks, {"norms": values})


def _check_tensor(name: str, tensor: Any, dtypes: Sequence[torch.dtype], shape: tuple[int | None, ...]) -> None:
    """Raise a `ValueError` where it is no plain tensor of such a dtype and shape; None stands for any size."""
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"its {name} are no plain tensor")
    fits = len(tensor.shape) == len(shape) and all(
        size in (None, actual) for size, actual in zip(shape, tensor.shape, strict=True)
    )
    if not fits or not tensor.is_contiguous() or tensor.dtype not in dtypes:
        raise ValueError(f"its {name} are {list(tensor.shape)} {tensor.dtype} where {list(shape)} was announced")
