"""The feature files between the gradient step and the selection: write, verify, open as memory-mapped chunks.

A chunk is three files: `output_{k}.pt` (features and norms), `output_norm_{k}.json` (the norms, for people), and
`manifest_{k}.json`, written last: where it is, the chunk is whole. The paper's release wrote `output_{k}` without a
suffix, a list of `[<=16, d]` tensors, and no manifest; such folders are read too.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tive.data.records import Records
from tive.features.manifest import COMMON_KEYS, DAMAGED, LeftOutRecord, Manifest, Match, RecordScores, read_manifest
from tive.util.errors import UserError
from tive.util.files import HashingFile, read_json, whole_file, write_json
from tive.util.text import listed, shown

_NAME = re.compile(r"output_(0|[1-9]\d{0,8})(\.pt)?")
# LLaVA's own environment has torch 2.0, which reads a file into memory instead.
_CAN_MAP = "mmap" in inspect.signature(torch.load).parameters
# What a pass tells of a record beside its features, and the types that hold it.
_SCORE_TYPES = {
    "norms": torch.float32,
    "losses": torch.float32,
    "supervised_tokens": torch.int32,
    "tokens": torch.int32,
    "el2n": torch.float32,
}


@dataclass(frozen=True)
class Chunk:
    """Features of the records `start .. stop - 1` of the data file.

    Attributes:
        blocks: the rows in order, memory-mapped: one `[n, d]` tensor, or the release's list of `[<=16, d]`.
        scores: of each record by name, `[n]`: float64 `norms`, and what else its pass kept (`RecordScores`); features
            of the release and of before version 2 have norms alone.
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

    @property
    def norms(self) -> np.ndarray:
        """L2 norms of the unprojected gradients, float64 `[n]`."""
        return self.scores["norms"]


def write_chunk(
    folder: str | os.PathLike[str],
    match: Match,
    features: torch.Tensor,
    scores: RecordScores,
    left_out: list[LeftOutRecord],
    manifest: dict[str, Any],
) -> None:
    """Write the three files of a chunk, each whole, the manifest last.

    The manifest is given the SHA-256 of `output_{k}.pt`.

    Args:
        features: `[n, d]`, written as float16; a float16 tensor is streamed to disk without a second copy, so it may
            be memory-mapped and larger than memory. The row of a record that was left out is zero.
        manifest: how the chunk was made.

    Raises:
        UserError: a file cannot be written.
    """
    folder, chunk = Path(folder), match.chunk_idx
    tensors = {name: torch.from_numpy(array).to(_SCORE_TYPES[name]) for name, array in scores.arrays().items()}
    with whole_file(folder / f"output_{chunk}.pt") as file:
        hashing = HashingFile(file)
        content = {"features": _own_storage(features.half()), **tensors, "match": asdict(match)}
        torch.save(content, hashing)  # type: ignore[arg-type]  # `write` is all that it asks for
    write_json(
        folder / f"output_norm_{chunk}.json",
        [norm if math.isfinite(norm) else None for norm in scores.norms.tolist()],
        indent=None,
    )
    entries = [asdict(entry) for entry in left_out]
    write_json(
        folder / f"manifest_{chunk}.json",
        {"match": asdict(match), "sha256": hashing.sha256, "left_out": entries, **manifest},
    )


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.save` writes the whole storage that a view lies in; a part of one is copied first."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()


def open_chunks(folder: str | os.PathLike[str], records: Records, chunk_num: int | None = None) -> list[Chunk]:
    """The chunks of a folder in order, memory-mapped, verified to cover `records` once and to belong together.

    Args:
        chunk_num: how many chunks there should be, if the caller knows.

    Raises:
        UserError: a chunk is missing, unfinished, damaged, of another run, or of another data file.
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
    found = numbers[".pt"] or numbers[None]
    if numbers[".pt"]:
        manifests = _read_manifests(folder, found, records)
        _check_complete(folder, found, manifests[found[0]].match.num_chunks, chunk_num)
        chunks = [_open_chunk(folder, number, manifests[number]) for number in found]
    else:
        _check_complete(folder, found, found[-1] + 1, chunk_num)
        chunks = []
        for number in found:
            chunks.append(_open_release_chunk(folder, number, chunks[-1].stop if chunks else 0))
    _check_cover(folder, chunks, records)
    return chunks


def _read_manifests(folder: Path, found: list[int], records: Records) -> dict[int, Manifest]:
    """The manifest of each chunk; they agree in every common key, and with the data file."""
    unfinished = [number for number in found if not (folder / f"manifest_{number}.json").is_file()]
    if unfinished:
        raise UserError(
            f"{folder}: {_chunks(unfinished)} not finished (no manifest); run compute_gradient_features.py "
            f"again with {_chunks(unfinished, 'chunk_idx {}')}"
        )
    manifests = {number: read_manifest(folder / f"manifest_{number}.json", number) for number in found}
    for key in COMMON_KEYS:
        values: dict[Any, list[int]] = {}
        for number in found:
            values.setdefault(getattr(manifests[number].match, key), []).append(number)
        if len(values) > 1:
            differing = "; ".join(f"{_chunks(numbers)} {shown(repr(value), 24)}" for value, numbers in values.items())
            raise UserError(f"{folder}: the chunks differ in `{key}`: {differing}; make them all with one command")
    first = manifests[found[0]].match
    if (first.data_sha256, first.data_records) != (records.fingerprint, len(records)):
        raise UserError(
            f"{folder} holds features of another data file (SHA-256 {first.data_sha256[:12]}…, "
            f"{first.data_records} records) than {records.path} (SHA-256 {records.fingerprint[:12]}…, {len(records)} "
            "records); name the file that the gradients were taken of, or take them again"
        )
    return manifests


def _check_complete(folder: Path, found: list[int], expected: int, chunk_num: int | None) -> None:
    missing = sorted(set(range(min(expected, 1 << 20))) - set(found))
    if missing:
        raise UserError(
            f"{folder}: {_chunks(missing)} of {expected} missing; run compute_gradient_features.py with "
            f"num_chunks {expected} and {_chunks(missing, 'chunk_idx {}')}"
        )
    if len(found) > expected:
        raise UserError(f"{folder} holds {len(found)} chunks of a run of {expected}; remove those of another run")
    if chunk_num is not None and chunk_num != len(found):
        raise UserError(f"{folder} holds {len(found)} chunks, not {chunk_num}; leave chunk_num out")


def _open_chunk(folder: Path, number: int, manifest: Manifest) -> Chunk:
    path, match = folder / f"output_{number}.pt", manifest.match
    content = _load(path)
    if not isinstance(content, dict) or not {"features", "norms", "match"} <= content.keys():
        raise UserError(f"{path} is not a feature file (no features, norms and match); {DAMAGED}")
    try:
        own = msgspec.convert(content["match"], Match)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} has no valid `match` ({error}); {DAMAGED}") from error
    differing = [key.name for key in fields(Match) if getattr(own, key.name) != getattr(match, key.name)]
    if differing:
        raise UserError(f"{path} and manifest_{number}.json differ in `{differing[0]}`; make this chunk again")
    features, records = content["features"], match.stop - match.start
    _check_tensor(path, features, 2)
    scores = {}
    for name in content.keys() & _SCORE_TYPES.keys():
        _check_tensor(path, content[name], 1, (_SCORE_TYPES[name], torch.float32))
        scores[name] = content[name].double().numpy()
    wrong = [name for name, values in scores.items() if len(values) != records]
    if features.shape != (records, match.proj_dim) or wrong:
        sizes = ", ".join(f"{len(scores[name])} {name}" for name in wrong or ["norms"])
        raise UserError(
            f"{path} holds features {list(features.shape)} and {sizes} where {[records, match.proj_dim]} was "
            f"announced; {DAMAGED}"
        )
    return Chunk(path, match.start, match.stop, [features], scores, match, manifest.left_out, manifest.made)


def _open_release_chunk(folder: Path, number: int, start: int) -> Chunk:
    path, norm_path = folder / f"output_{number}", folder / f"output_norm_{number}.json"
    blocks = _load(path)
    if not isinstance(blocks, list):
        raise UserError(f"{path} is not a list of feature tensors, as the release writes it; {DAMAGED}")
    for block in blocks:
        _check_tensor(path, block, 2)
    norms = read_json(norm_path)
    if not isinstance(norms, list) or not all(norm is None or type(norm) in (int, float) for norm in norms):
        raise UserError(f"{norm_path} is not a list of numbers; {DAMAGED}")
    records = sum(len(block) for block in blocks)
    if len(norms) != records:
        raise UserError(f"{path} holds {records} records and {norm_path.name} {len(norms)} norms; {DAMAGED}")
    try:
        values = np.array([math.nan if norm is None else norm for norm in norms], np.float64)
    except OverflowError as error:
        raise UserError(f"{norm_path} holds a number beyond floating point; {DAMAGED}") from error
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
        raise UserError(f"{path} is not a file of plain tensors ({reason}); {DAMAGED}") from error


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def _check_tensor(path: Path, tensor: Any, dimensions: int, types: tuple[torch.dtype, ...] = _FLOATS) -> None:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dim() != dimensions or not tensor.is_contiguous():
        raise UserError(f"{path} holds something else than {dimensions}-dimensional plain tensors; {DAMAGED}")
    if tensor.dtype not in types:
        raise UserError(f"{path} holds {tensor.dtype} numbers, not {types[0]} or {types[-1]}; {DAMAGED}")


def _check_cover(folder: Path, chunks: list[Chunk], records: Records) -> None:
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
    if covered != len(records):
        raise UserError(
            f"{folder} holds features of {covered} records, {records.path} has {len(records)}; "
            "a chunk is missing, or this is another data file"
        )


def _chunks(numbers: list[int], form: str = "chunk {}") -> str:
    return listed([form.format(number) for number in numbers])
