"""The feature folder, read: its chunks memory-mapped, verified to be whole and to belong together.

A chunk is three files: `output_{k}.pt` (features and columns), `output_norm_{k}.json` (the norms, for people), and
`manifest_{k}.json`, written last: where it is, the chunk is whole. The paper's release wrote `output_{k}` without a
suffix, a list of `[<=16, d]` tensors, and no manifest; such folders are read too.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import threading
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tive.data.trained import HASH_BYTES
from tive.features.chunk import COLUMNS, COMMON_KEYS, CONTENT, Match, match_of_manifest
from tive.features.store import LeftOutRecord
from tive.util.device import available_memory
from tive.util.errors import UserError
from tive.util.files import read_json
from tive.util.text import listed, shown

_DAMAGED = "it may be damaged or unfinished: make this chunk again"
_READ_BYTES = 8 << 20
_NAME = re.compile(r"output_(0|[1-9]\d{0,8})(\.pt)?")
# LLaVA's own environment has torch 2.0, which reads a file into memory instead.
_CAN_MAP = "mmap" in inspect.signature(torch.load).parameters
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_COLUMN_TYPES = {name: torch.float32 if kind is np.float32 else torch.int32 for name, kind in COLUMNS.items()}


@dataclass(frozen=True)
class Chunk:
    """Features of the records `start .. stop - 1` of the data file.

    Attributes:
        content: the records' hashes (`record_hash`), uint8 `[n, 16]`; None where its version did not write them.
        blocks: the rows in order, memory-mapped: one `[n, d]` tensor, or the release's list of `[<=16, d]`; without
            gradients d is 0.
        scores: of each record by name, float64 `[n]`: the columns that its pass kept; features of the release and of
            before version 2 have `norms` alone, a pass without gradients has none.
        match: None for the release's files, which have no manifest.
        manifest: how it was made; empty for the release's files.
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


def open_chunks(folder: str | os.PathLike[str], chunk_num: int | None = None) -> list[Chunk]:
    """The chunks of a folder in order, memory-mapped, verified to cover their data file once and to belong together.

    Args:
        chunk_num: how many chunks there should be, if the caller knows.

    Raises:
        UserError: a chunk is missing, unfinished, damaged, or of another run.
    """
    folder = Path(folder)
    try:
        names = [name for entry in os.scandir(folder) if (name := _NAME.fullmatch(entry.name)) and entry.is_file()]
    except OSError as error:
        raise UserError(f"cannot read the feature folder {folder}: {error.strerror}; check the path") from error
    numbers = {suffix: sorted(int(name[1]) for name in names if name[2] == suffix) for suffix in (".pt", None)}
    if not names:
        raise UserError(f"{folder} holds no feature files (output_0.pt ...); run compute_gradient_features.py first")
    if numbers[".pt"] and numbers[None]:
        raise UserError(
            f"{folder} holds feature files of two kinds ({_chunks(numbers['.pt'], 'output_{}.pt')} and "
            f"{_chunks(numbers[None], 'output_{}')}); keep one kind in the folder"
        )
    present = numbers[".pt"] or numbers[None]
    if numbers[".pt"]:
        manifests = _read_manifests(folder, present)
        _check_complete(folder, present, manifests[present[0]][0].num_chunks, chunk_num)
        chunks = [_open_chunk(folder, number, *manifests[number]) for number in present]
    else:
        _check_complete(folder, present, present[-1] + 1, chunk_num)
        chunks = []
        for number in present:
            chunks.append(_open_release_chunk(folder, number, chunks[-1].stop if chunks else 0))
    _check_cover(folder, chunks)
    return chunks


def _read_manifests(folder: Path, numbers: list[int]) -> dict[int, tuple[Match, dict[str, Any]]]:
    """The manifest of each chunk; they agree in every common key."""
    unfinished = [number for number in numbers if not (folder / f"manifest_{number}.json").is_file()]
    if unfinished:
        raise UserError(
            f"{folder}: {_chunks(unfinished)} not finished (no manifest); run compute_gradient_features.py "
            f"again with {_chunks(unfinished, 'chunk_idx {}')}"
        )
    manifests = {number: _read_manifest(folder / f"manifest_{number}.json", number) for number in numbers}
    for key in COMMON_KEYS:
        values: dict[Any, list[int]] = {}
        for number, (match, _) in manifests.items():
            values.setdefault(getattr(match, key), []).append(number)
        if len(values) > 1:
            differing = "; ".join(f"{_chunks(those)} {shown(repr(value), 24)}" for value, those in values.items())
            raise UserError(f"{folder}: the chunks differ in `{key}`: {differing}; make them all with one command")
    return manifests


def _read_manifest(path: Path, number: int) -> tuple[Match, dict[str, Any]]:
    """What a manifest says: its `match`, and the rest, in which `left_out` is checked."""
    content = read_json(path)
    try:
        match = match_of_manifest(content)
        left_out = msgspec.convert(content["left_out"], list[LeftOutRecord])
    except (msgspec.ValidationError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a chunk's manifest ({error}); {_DAMAGED}") from error
    if match.chunk_idx != number or not 0 <= match.start <= match.stop <= match.data_records:
        raise UserError(
            f"{path} describes chunk {match.chunk_idx}, records {match.start} .. {match.stop}, which does not "
            "fit its name; was it renamed? make this chunk again"
        )
    if not all(entry.row in match.rows for entry in left_out):
        raise UserError(f"{path} leaves out a row outside the chunk; {_DAMAGED}")
    return match, {name: value for name, value in content.items() if name != "match"} | {"left_out": left_out}


def _check_complete(folder: Path, present: list[int], expected: int, chunk_num: int | None) -> None:
    missing = sorted(set(range(min(expected, 1 << 20))) - set(present))
    if missing:
        raise UserError(
            f"{folder}: {_chunks(missing)} of {expected} missing; run compute_gradient_features.py with "
            f"num_chunks {expected} and {_chunks(missing, 'chunk_idx {}')}"
        )
    if len(present) > expected:
        raise UserError(f"{folder} holds {len(present)} chunks of a run of {expected}; remove those of another run")
    if chunk_num is not None and chunk_num != len(present):
        raise UserError(f"{folder} holds {len(present)} chunks, not {chunk_num}; leave chunk_num out")


def _open_chunk(folder: Path, number: int, match: Match, made: dict[str, Any]) -> Chunk:
    path = folder / f"output_{number}.pt"
    content = _load(path)
    needed = {"features", "norms", "match"} if match.has_features else {"losses", "match"}
    if not isinstance(content, dict) or not needed <= content.keys():
        raise UserError(f"{path} is not a feature file (it lacks one of {', '.join(sorted(needed))}); {_DAMAGED}")
    try:
        # Older versions have fewer keys here than in the manifest.
        newer = {"dtype": match.dtype, "el2n": match.el2n, "visual_gain": match.visual_gain}
        inside = msgspec.convert(newer | content["match"], Match)
    except (msgspec.ValidationError, TypeError) as error:
        raise UserError(f"{path} has no valid `match` ({error}); {_DAMAGED}") from error
    differing = [key.name for key in fields(Match) if getattr(inside, key.name) != getattr(match, key.name)]
    if differing:
        raise UserError(f"{path} and manifest_{number}.json differ in `{differing[0]}`; make this chunk again")
    records = match.stop - match.start
    features = content.get("features", torch.empty(records, 0, dtype=torch.float16))
    _check_tensor(path, features, 2)
    scores = {}
    for name in content.keys() & _COLUMN_TYPES.keys():
        _check_tensor(path, content[name], 1, (_COLUMN_TYPES[name], torch.float32))
        scores[name] = content[name].double().numpy()
    wrong = [name for name, values in scores.items() if len(values) != records]
    if features.shape != (records, match.proj_dim) or wrong:
        sizes = ", ".join(f"{len(scores[name])} {name}" for name in wrong or scores)
        raise UserError(
            f"{path} holds features {list(features.shape)} and {sizes} where {[records, match.proj_dim]} was "
            f"announced; {_DAMAGED}"
        )
    content_hashes = None
    if CONTENT in content:
        _check_tensor(path, content[CONTENT], 2, (torch.uint8,))
        content_hashes = content[CONTENT].numpy()
        if content_hashes.shape != (records, HASH_BYTES):
            raise UserError(f"{path} holds hashes {list(content_hashes.shape)} of {records} records; {_DAMAGED}")
    left_out = made.pop("left_out")
    return Chunk(path, match.start, match.stop, [features], scores, match, left_out, made, content_hashes)


def _open_release_chunk(folder: Path, number: int, start: int) -> Chunk:
    path, norm_path = folder / f"output_{number}", folder / f"output_norm_{number}.json"
    blocks = _load(path)
    if not isinstance(blocks, list):
        raise UserError(f"{path} is not a list of feature tensors, as the release writes it; {_DAMAGED}")
    for block in blocks:
        _check_tensor(path, block, 2)
    norms = read_json(norm_path)
    if not isinstance(norms, list) or not all(norm is None or type(norm) in (int, float) for norm in norms):
        raise UserError(f"{norm_path} is not a list of numbers; {_DAMAGED}")
    records = sum(len(block) for block in blocks)
    if len(norms) != records:
        raise UserError(f"{path} holds {records} records and {norm_path.name} {len(norms)} norms; {_DAMAGED}")
    try:
        values = np.array([math.nan if norm is None else norm for norm in norms], np.float64)
    except OverflowError as error:
        raise UserError(f"{norm_path} holds a number beyond floating point; {_DAMAGED}") from error
    return Chunk(path, start, start + records, blocks, {"norms": values})


def _load(path: Path) -> Any:
    """A file of tensors, memory-mapped where its format allows; nothing in it is executed."""
    try:
        with open(path, "rb") as file:
            # Files older than PyTorch 1.6 are no zip archives and cannot be mapped.
            mappable = file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; check the path") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            mapped = {"mmap": True} if mappable and _CAN_MAP else {}
            return torch.load(str(path), map_location="cpu", weights_only=True, **mapped)
    except Exception as error:  # damaged bytes raise nearly every kind of exception
        reason = next(iter(str(error).splitlines()), "")[:120] or type(error).__name__
        raise UserError(f"{path} is not a file of plain tensors ({reason}); {_DAMAGED}") from error


def _check_tensor(path: Path, tensor: Any, dimensions: int, types: tuple[torch.dtype, ...] = _FLOATS) -> None:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dim() != dimensions or not tensor.is_contiguous():
        raise UserError(f"{path} holds something else than {dimensions}-dimensional plain tensors; {_DAMAGED}")
    if tensor.dtype not in types:
        raise UserError(f"{path} holds {tensor.dtype} numbers, not {' or '.join(map(str, types))}; {_DAMAGED}")


def _check_cover(folder: Path, chunks: list[Chunk]) -> None:
    dimensions: dict[int, list[int]] = {}
    for number, chunk in enumerate(chunks):
        for block in chunk.blocks:
            dimensions.setdefault(block.shape[1], []).append(number)
    if len(dimensions) > 1:
        differing = "; ".join(f"{_chunks(sorted(set(at)))} {size}" for size, at in dimensions.items())
        raise UserError(f"{folder}: the features differ in dimension: {differing}; make them all with one command")
    covered = 0
    for number, chunk in enumerate(chunks):
        if chunk.start != covered:
            kind = "overlaps the one before" if chunk.start < covered else "leaves a gap"
            raise UserError(
                f"{folder}: chunk {number} {kind} (it starts at {chunk.start}, not {covered}); make it again"
            )
        covered = chunk.stop
    if (match := chunks[0].match) is not None and covered != match.data_records:
        raise UserError(
            f"{folder} holds features of {covered} records of {match.data_records}; a chunk is missing: make it again"
        )


def _chunks(numbers: list[int], form: str = "chunk {}") -> str:
    return listed([form.format(number) for number in numbers])


def read_ahead(*folders: str | os.PathLike[str]) -> None:
    """Start to read folders' feature files into the page cache, as many as half of the available memory holds.

    Rows out of order, which the passes take, would read a cold disk in small steps. A file that cannot be read is left
    to the one who opens it.
    """
    paths = [path for folder in folders for path in sorted(Path(folder).glob("output_*"))]
    threading.Thread(target=_read_whole, args=(paths,), daemon=True).start()


def _read_whole(paths: list[Path]) -> None:
    room = (available_memory() or 0) // 2
    buffer = bytearray(_READ_BYTES)
    for path in paths:
        try:
            room -= path.stat().st_size
            if room < 0:
                return
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        except OSError:
            continue
