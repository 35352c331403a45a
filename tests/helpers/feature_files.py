"""A small mixture and its feature files, and the scripts of steps 1 and 4 called as from the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tive.data.records import chunk_range, open_records
from tive.data.trained import record_hashes
from tive.features.chunk import LeftOutRecord, Match, write_chunk
from tive.util.errors import run
from tive.util.files import sha256_of

SIZES = {"vqa": 40, "textcaps": 9, "boxes": 23, "chat": 6}


def record(row: int, task: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"Frage {row}: was ist zu sehen? 图"}, {"from": "gpt", "value": 'a  "b" \\ c'}]
    return {"id": f"{task}/{row}", "extra": {"nested": [row, None]}, "conversations": turns, "dataset": task}


def mixture(sizes: dict[str, int] = SIZES) -> list[dict[str, Any]]:
    """Records of all tasks, shuffled (always the same way)."""
    tasks = [task for task, size in sizes.items() for _ in range(size)]
    return [record(row, tasks[place]) for row, place in enumerate(np.random.default_rng(0).permutation(len(tasks)))]


def random_features(count: int, dimension: int = 24, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float16 features `[count, dimension]` with a common direction, and norms `[count]`."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, dimension, generator=generator) + 0.5
    return features.half(), torch.rand(count, generator=generator) + 0.1


def match_for(data: Path, records: int, num_chunks: int, chunk: int, dimension: int) -> dict[str, Any]:
    rows = chunk_range(records, num_chunks, chunk)
    return {
        "data_sha256": sha256_of(data),
        "data_records": records,
        "num_chunks": num_chunks,
        "chunk_idx": chunk,
        "start": rows.start,
        "stop": rows.stop,
        "model": "a" * 64,
        "counted_parameters": 1000,
        "grad_modules": "self_attn",
        "projector": "rademacher",
        "proj_seed": 0,
        "proj_dim": dimension,
    }


def write_features(
    folder: Path,
    data: Path,
    features: torch.Tensor,
    norms: torch.Tensor,
    num_chunks: int = 3,
    left_out: dict[int, str] | None = None,
    change: Callable[[dict[str, Any]], None] = lambda match: None,
    manifest: dict[str, Any] | None = None,
    content: bool = True,
) -> None:
    """Write chunks as step 3 does; `change` may alter a chunk's match before, `manifest` says what else is known.

    Without `content` they are as versions wrote them that did not store the records' hashes.
    """
    for chunk in range(num_chunks):
        match = match_for(data, len(features), num_chunks, chunk, features.shape[1])
        rows = slice(match["start"], match["stop"])
        entries = [
            LeftOutRecord(row, None, reason)
            for row, reason in (left_out or {}).items()
            if match["start"] <= row < match["stop"]
        ]
        change(match)
        made = {"image_folder": "images", "records_per_second": 2.5} | (manifest or {})
        columns = scores_of(norms[rows])
        if content:
            records = open_records(data)
            hashes = record_hashes(records) if len(records) == len(features) else None
            columns |= {} if hashes is None else {"content": hashes[rows]}
        write_chunk(Path(folder), Match(**match), features[rows].numpy(), columns, entries, made)


def scores_of(norms: torch.Tensor) -> dict[str, np.ndarray]:
    """Columns of records whose norms are known; the others follow from them."""
    tokens = (100 * norms.nan_to_num()).int().numpy()
    values = norms.float().numpy()
    return {"norms": values, "losses": values + 1, "supervised_tokens": tokens, "tokens": 2 * tokens}


def write_release_features(folder: Path, features: torch.Tensor, norms: torch.Tensor, num_chunks: int, **save) -> None:
    """Write chunks as the paper's release does: lists of at most 16 rows, and norms."""
    folder.mkdir(exist_ok=True)
    for chunk in range(num_chunks):
        rows = chunk_range(len(features), num_chunks, chunk)
        part = features[rows.start : rows.stop]
        torch.save([block.clone() for block in part.split(16) if len(block)], folder / f"output_{chunk}", **save)
        (folder / f"output_norm_{chunk}.json").write_text(json.dumps(norms[rows.start : rows.stop].tolist()))


def call(main: Callable[[], None], *arguments: str | Path | float) -> None:
    """Run a script's `main` with these command-line arguments; it may end in SystemExit as the script would."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script", *map(str, arguments)])
        run(main)


def refusal(capsys: pytest.CaptureFixture[str], main: Callable[[], None], *arguments: str | Path | float) -> str:
    """The one line that a script refuses these arguments with; it ends with exit code 2."""
    with pytest.raises(SystemExit) as end:
        call(main, *arguments)
    assert end.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and line.count("\n") == 1, line
    return line
