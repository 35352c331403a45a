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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tive.data.records import RecordFile
from tive.util.errors import UserError
from tive.util.files import HashingFile, read_json, whole_file, write_json

OWN_KEYS = {"chunk_idx": int, "start": int, "stop": int}
COMMON_KEYS = {
    "data_sha256": str,
    "data_records": int,
    "num_chunks": int,
    "model": str,
    "counted_parameters": int,
    "grad_modules": str,
    "last_layers": (int, type(None)),
    "projector": str,
    "proj_seed": int,
    "proj_dim": int,
}
_NAME = re.compile(r"output_(0|[1-9]\d{0,8})(\.pt)?")
# LLaVA's own environment has torch 2.0, which reads a file into memory instead.
_CAN_MAP = "mmap" in inspect.signature(torch.load).parameters
_DAMAGED = "it may be damaged or unfinished: make this chunk again"


@dataclass(frozen=True)
class Chunk:
    """Features of the records `start .. stop - 1` of the data file.

    `blocks` are the rows in order, memory-mapped: one `[n, d]` tensor, or the release's list of `[<=16, d]`.
    `norms` is float64 `[n]`, the L2 norms of the unprojected gradients. `match` and `manifest` are empty for the
    release's files.
    """

    path: Path
    start: int
    stop: int
    blocks: list[torch.Tensor]
    norms: np.ndarray
    match: dict[str, Any]
    manifest: dict[str, Any]


def match_of(run: dict[str, Any]) -> dict[str, Any]:
    """What must agree before chunks are used together: the keys of `OWN_KEYS` and `COMMON_KEYS` among a run's."""
    return {key: run[key] for key in (*OWN_KEYS, *COMMON_KEYS)}


def write_chunk(
    folder: str | os.PathLike[str],
    match: dict[str, Any],
    features: torch.Tensor,
    norms: torch.Tensor,
    manifest: dict[str, Any],
) -> None:
    """Write the three files of chunk `match["chunk_idx"]`, each whole, the manifest last.

    The manifest is given the SHA-256 of `output_{k}.pt`.

    Args:
        match: see `match_of`.
        features: `[n, d]`, written as float16; a float16 tensor is streamed to disk without a second copy, so it may
            be memory-mapped and larger than memory. The row of a record that was left out is zero.
        norms: `[n]`, written as float32; NaN for a record that was left out.
        manifest: how the chunk was made, with `left_out`, a list of `{"row", "id", "reason"}` (rows of the data file).

    Raises:
        UserError: a file cannot be written.
    """
    folder, chunk = Path(folder), match["chunk_idx"]
    features, norms = _own_storage(features.half()), _own_storage(norms.float())
    with whole_file(folder / f"output_{chunk}.pt") as file:
        hashing = HashingFile(file)
        torch.save({"features": features, "norms": norms, "match": match}, hashing)
    write_json(
        folder / f"output_norm_{chunk}.json",
        [norm if math.isfinite(norm) else None for norm in norms.tolist()],
        indent=None,
    )
    write_json(folder / f"manifest_{chunk}.json", {"match": match, "sha256": hashing.sha256, **manifest})


def _own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.save` writes the whole storage that a view lies in; a part of one is copied first."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()


def open_chunks(folder: str | os.PathLike[str], records: RecordFile, chunk_num: int | None = None) -> list[Chunk]:
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
            f"{folder} holds feature files of two kinds ({_listed(numbers['.pt'], 'output_{}.pt')} and "
            f"{_listed(numbers[None], 'output_{}')}); keep one kind in the folder"
        )
    found = numbers[".pt"] or numbers[None]
    if numbers[".pt"]:
        matches, manifests = _read_manifests(folder, found, records)
        _check_complete(folder, found, matches[found[0]]["num_chunks"], chunk_num)
        chunks = [_open_chunk(folder, number, matches[number], manifests[number]) for number in found]
    else:
        _check_complete(folder, found, found[-1] + 1, chunk_num)
        chunks = []
        for number in found:
            chunks.append(_open_release_chunk(folder, number, chunks[-1].stop if chunks else 0))
    _check_cover(folder, chunks, records)
    return chunks


def _read_manifests(folder: Path, found: list[int], records: RecordFile) -> tuple[dict[int, Any], dict[int, Any]]:
    """`(match, manifest)` of each chunk; they agree in every common key, and with the data file."""
    unfinished = [number for number in found if not (folder / f"manifest_{number}.json").is_file()]
    if unfinished:
        raise UserError(
            f"{folder}: {_listed(unfinished)} not finished (no manifest); run compute_gradient_features.py "
            f"again with {_listed(unfinished, '--chunk_idx {}')}"
        )
    manifests, matches = {}, {}
    for number in found:
        path = folder / f"manifest_{number}.json"
        manifest = read_json(path)
        match = manifest.pop("match", None) if isinstance(manifest, dict) else None
        _check_match(path, match, number)
        _check_left_out(path, match, manifest)
        manifests[number], matches[number] = manifest, match
    for key in COMMON_KEYS:
        values: dict[Any, list[int]] = {}
        for number in found:
            values.setdefault(matches[number][key], []).append(number)
        if len(values) > 1:
            differing = "; ".join(f"{_listed(numbers)} {_shown(value)}" for value, numbers in values.items())
            raise UserError(f"{folder}: the chunks differ in `{key}`: {differing}; make them all with one command")
    first = matches[found[0]]
    if (first["data_sha256"], first["data_records"]) != (records.sha256, len(records)):
        raise UserError(
            f"{folder} holds features of another data file (SHA-256 {first['data_sha256'][:12]}…, "
            f"{first['data_records']} records) than {records.path} (SHA-256 {records.sha256[:12]}…, {len(records)} "
            "records); name the file that the gradients were taken of, or take them again"
        )
    return matches, manifests


def _check_match(path: Path, match: Any, number: int) -> None:
    for key, kind in {**OWN_KEYS, **COMMON_KEYS}.items():
        value = match.get(key, ...) if isinstance(match, dict) else ...
        if value is ... or isinstance(value, bool) or not isinstance(value, kind):
            raise UserError(f"{path} has no valid `match.{key}`; {_DAMAGED}")
    if match["chunk_idx"] != number or not 0 <= match["start"] <= match["stop"] <= match["data_records"]:
        raise UserError(
            f"{path} describes chunk {match['chunk_idx']}, records {match['start']} .. {match['stop']}, which does not "
            "fit its name; was it renamed? make this chunk again"
        )


def _check_left_out(path: Path, match: dict[str, Any], manifest: dict[str, Any]) -> None:
    left_out = manifest.get("left_out")
    for entry in left_out if isinstance(left_out, list) else [None]:
        row, reason = (entry.get("row"), entry.get("reason")) if isinstance(entry, dict) else (None, None)
        if type(row) is not int or not match["start"] <= row < match["stop"] or not isinstance(reason, str):
            raise UserError(f"{path} has no valid `left_out`; {_DAMAGED}")


def _check_complete(folder: Path, found: list[int], expected: int, chunk_num: int | None) -> None:
    missing = sorted(set(range(min(expected, 1 << 20))) - set(found))
    if missing:
        raise UserError(
            f"{folder}: {_listed(missing)} of {expected} missing; run compute_gradient_features.py with "
            f"--num_chunks {expected} and {_listed(missing, '--chunk_idx {}')}"
        )
    if len(found) > expected:
        raise UserError(f"{folder} holds {len(found)} chunks of a run of {expected}; remove those of another run")
    if chunk_num is not None and chunk_num != len(found):
        raise UserError(f"{folder} holds {len(found)} chunks, not --chunk_num {chunk_num}; leave the option out")


def _open_chunk(folder: Path, number: int, match: dict[str, Any], manifest: dict[str, Any]) -> Chunk:
    path = folder / f"output_{number}.pt"
    content = _load(path)
    if not isinstance(content, dict) or not {"features", "norms", "match"} <= content.keys():
        raise UserError(f"{path} is not a feature file (no features, norms and match); {_DAMAGED}")
    differing = [key for key in match if not _same(content["match"], match, key)]
    if differing:
        raise UserError(f"{path} and manifest_{number}.json differ in `{differing[0]}`; make this chunk again")
    norms = content["norms"]
    _check_tensor(path, content["features"], 2)
    _check_tensor(path, norms, 1)
    records = match["stop"] - match["start"]
    if content["features"].shape != (records, match["proj_dim"]) or len(norms) != records:
        raise UserError(
            f"{path} holds features {list(content['features'].shape)} and {len(norms)} norms where "
            f"{[records, match['proj_dim']]} was announced; {_DAMAGED}"
        )
    return Chunk(path, match["start"], match["stop"], [content["features"]], norms.double().numpy(), match, manifest)


def _same(other: Any, match: dict[str, Any], key: str) -> bool:
    # Types are compared too: a damaged file may hold a tensor there, whose == is not a truth value.
    value = other.get(key, ...) if isinstance(other, dict) else ...
    return type(value) is type(match[key]) and value == match[key]


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
    return Chunk(path, start, start + records, blocks, values, {}, {})


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


def _check_tensor(path: Path, tensor: Any, dimensions: int) -> None:
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.dim() != dimensions or not tensor.is_contiguous():
        raise UserError(f"{path} holds something else than {dimensions}-dimensional plain tensors; {_DAMAGED}")
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise UserError(f"{path} holds {tensor.dtype} numbers, not float16 or float32; {_DAMAGED}")


def _check_cover(folder: Path, chunks: list[Chunk], records: RecordFile) -> None:
    dimensions: dict[int, list[int]] = {}
    for number, chunk in enumerate(chunks):
        for block in chunk.blocks:
            dimensions.setdefault(block.shape[1], []).append(number)
    if len(dimensions) > 1:
        differing = "; ".join(f"{_listed(sorted(set(at)))} {size}" for size, at in dimensions.items())
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


def _listed(numbers: list[int], form: str = "chunk {}") -> str:
    shown = ", ".join(form.format(number) for number in numbers[:8])
    return shown + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 24 else text[:16] + "…" + text[-5:]
