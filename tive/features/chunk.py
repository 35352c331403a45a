"""A chunk under way: held by one process, of the same run as its folder, computed window by window, finished."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from tive.features.store import LeftOutRecord, Store, hold
from tive.util.errors import UserError
from tive.util.files import HashingFile, sha256_of, whole_file, write_json
from tive.util.text import shown

FINAL_FILES = ("manifest_{}.json", "output_{}.pt", "output_norm_{}.json")
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


_UNTIL_LOADED = ("counted_parameters", "projector")
COMMON_KEYS = tuple(field.name for field in fields(Match) if field.name not in ("chunk_idx", "start", "stop"))


def match_of_manifest(content: Mapping[str, Any]) -> Match:
    """The `match` of a manifest; what older versions wrote elsewhere in it is read there.

    Raises:
        msgspec.ValidationError: it is none.
    """
    run = content.get("run") or {}
    elsewhere = {"dtype": content.get("dtype"), "el2n": run.get("el2n", False)}
    match = msgspec.convert(elsewhere | content.get("match", {}), Match)
    if None in (match.counted_parameters, match.projector):
        raise msgspec.ValidationError("no `counted_parameters` or `projector`")
    return match


class OpenChunk:
    """The files of a chunk that is not finished, in a feature folder.

    Attributes:
        store: the windows on disk, from `begin` on.
    """

    store: Store

    def __init__(self, folder: Path, match: Match) -> None:
        self.folder, self.match = folder, match
        self.progress = folder / f"progress_{match.chunk_idx}"

    def path(self, form: str) -> Path:
        """The path of one of the `FINAL_FILES`."""
        return self.folder / form.format(self.match.chunk_idx)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the chunk from other processes while the block runs, and remove what killed ones left half-written.

        Raises:
            Held: another process computes it.
            UserError: the folder cannot be made or written.
        """
        chunk = self.match.chunk_idx
        with hold(self.folder / f".lock_{chunk}", f"computing chunk {chunk}"):
            for name in FINAL_FILES:
                for left_behind in self.folder.glob(f".{name.format(chunk)}.*.tmp"):
                    left_behind.unlink(missing_ok=True)
            yield

    def is_complete(self) -> bool:
        """Whether the final files are there, whole, and of the same run.

        Raises:
            UserError: they are of a run that differs.
        """
        manifest_path, output = map(self.path, FINAL_FILES[:2])
        if not manifest_path.is_file():
            return False
        try:
            content = json.loads(manifest_path.read_bytes())
            made, checksum = match_of_manifest(content), content["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            print(f"{manifest_path} is damaged: computed again")
            return False
        self._refuse(made, manifest_path)
        if not output.is_file() or sha256_of(output) != checksum:
            print(f"{output} is missing or damaged: computed again")
            return False
        if self.progress.is_dir():
            shutil.rmtree(self.progress)
        return True

    def refuse_other_runs(self) -> None:
        """Refuse to go on with a chunk of a run that differs, and to put chunks of different runs in one folder.

        Raises:
            UserError: what differs.
        """
        for path in sorted([*self.folder.glob("progress_*/match.json"), *self.folder.glob("manifest_*.json")]):
            try:
                content = json.loads(path.read_bytes())
                is_manifest = path.name.startswith("manifest")
                other = match_of_manifest(content if is_manifest else {"match": content})
            except (OSError, ValueError, TypeError, AttributeError):
                continue  # removed meanwhile, or damaged: the checksums of its windows tell what is still of use
            self._refuse(other, path)

    def _refuse(self, other: Match, path: Path) -> None:
        names = []
        for name in COMMON_KEYS if other.chunk_idx != self.match.chunk_idx else [key.name for key in fields(Match)]:
            there, here = getattr(other, name), getattr(self.match, name)
            unknown = here is None and name in _UNTIL_LOADED
            if there != here and not unknown and not (name == "projector" and there.startswith(here)):
                names.append(name)
        if names:
            differences = ", ".join(
                f"{name} {shown(str(getattr(other, name)), 24)}, now {shown(str(getattr(self.match, name)), 24)}"
                for name in names
            )
            raise UserError(
                f"{path} is of a run that differs: {differences}; give the same arguments, name another folder, or "
                "start afresh (overwrite)"
            )

    def begin(self, counted_parameters: int, projector: str, overwrite: bool) -> None:
        """Go on with the windows that are on disk, or start.

        Args:
            projector: its full kind.

        Raises:
            UserError: the folder's files are of another run, or the disk is too small.
        """
        self.match = replace(self.match, counted_parameters=counted_parameters, projector=projector)
        if overwrite:
            shutil.rmtree(self.progress, ignore_errors=True)
        else:
            self.refuse_other_runs()
        # A chunk under way has no final files: those of an earlier run could be taken for its own.
        for name in FINAL_FILES:
            self.path(name).unlink(missing_ok=True)
        types = {name: kind for name, kind in COLUMNS.items() if self.match.has(name)}
        self.store = Store(self.progress, self.match.rows, asdict(self.match), types, self.match.proj_dim)

    def finish(self, made: dict[str, Any], content: np.ndarray) -> None:
        """Write the chunk's files, whose windows are all on disk, and remove what it does not need any more.

        Args:
            made: how it was made, for the manifest.
            content: of each record, what `record_hashes` returns.
        """
        store = self.store
        columns = store.columns() | {CONTENT: content}
        write_chunk(self.folder, self.match, store.features(), columns, store.left_out(), made)
        store.remove()


def write_chunk(
    folder: str | os.PathLike[str],
    match: Match,
    features: torch.Tensor,
    columns: dict[str, np.ndarray],
    left_out: list[LeftOutRecord],
    made: dict[str, Any],
) -> None:
    """Write the three files of a chunk, each whole, the manifest last; without gradients there are no norms.

    Args:
        features: `[n, d]`, written as float16; a float16 tensor is streamed to disk without a second copy, so it may
            be memory-mapped and larger than memory. The row of a record that was left out is zero.
        columns: of `COLUMNS`, `[n]` each, and perhaps `CONTENT`.
        made: how the chunk was made, for the manifest.

    Raises:
        UserError: a file cannot be written.
    """
    folder, chunk = Path(folder), match.chunk_idx
    tensors = {
        name: torch.from_numpy(values.astype(COLUMNS.get(name, np.uint8), copy=False))
        for name, values in columns.items()
    }
    if match.has_features:
        tensors["features"] = _alone(features.half())
    with whole_file(folder / f"output_{chunk}.pt") as file:
        hashing = HashingFile(file)
        torch.save(tensors | {"match": asdict(match)}, hashing)  # type: ignore[arg-type]  # `write` is all it asks for
    if match.has_features:
        norms = [norm if math.isfinite(norm) else None for norm in columns["norms"].tolist()]
        write_json(folder / f"output_norm_{chunk}.json", norms, indent=None)
    entries = [asdict(entry) for entry in left_out]
    write_json(
        folder / f"manifest_{chunk}.json",
        {"match": asdict(match), "sha256": hashing.sha256, "left_out": entries, **made},
    )


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`torch.save` writes the whole storage that a view lies in; a part of one is copied first."""
    tensor = tensor.detach().cpu().contiguous()
    size = tensor.numel() * tensor.element_size()
    return tensor if tensor.untyped_storage().nbytes() == size else tensor.clone()
