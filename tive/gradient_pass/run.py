"""The gradient pass over one chunk: encode, compute, write, window by window, until every record has one end.

A record ends with features, or with a reason: a bad record or image, no supervised token, template mismatch, not
finite.
"""

from __future__ import annotations

import os
import platform
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tive.data.scan import Checked
from tive.features.chunks import write_chunk
from tive.features.manifest import LeftOutRecord, RecordScores, Run
from tive.features.progress import Progress, WindowState, remove_progress
from tive.gradient_pass.batches import GradientStep, RecordResult, compute_records
from tive.gradient_pass.preflight import Tolerance, count_reasons, left_out_entry, list_file, refuse_many
from tive.models import NOT_FINITE, UNSUPERVISED, Encoded, Family
from tive.models.batches import BatchLimits, Computed
from tive.models.loading import EncodedRecords, encoded_windows
from tive.util import memory
from tive.util.device import device_name
from tive.util.errors import UserError


@dataclass
class StopRequest:
    """Catches SIGTERM and Ctrl-C, so that the window at hand is finished first; the second Ctrl-C does not wait."""

    signal_number: int | None = None
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> StopRequest:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
        # Not print: the signal may have come in the middle of another one.
        os.write(2, b"\nfinishing the records at hand, then stopping ...\n")


@dataclass(frozen=True)
class Outcome:
    """What a call has done of a chunk.

    Attributes:
        states: of all the windows that are on disk, in order.
        stopped_by: the number of the signal that stopped the run, None when the chunk is whole.
        cost: what it took, for the manifest.
    """

    states: list[WindowState]
    stopped_by: int | None
    cost: dict[str, Any]


def run_pass(
    checked: Checked,
    dataset: EncodedRecords,
    num_workers: int,
    step: GradientStep,
    limits: BatchLimits,
    progress: Progress,
    tolerance: Tolerance,
) -> Outcome:
    """Compute every window that is not on disk yet.

    Raises:
        UserError: too many records are left out, or a record turned out bad and that is to stop the run.
    """
    started, begun = _now(), time.perf_counter()
    windows = progress.windows()
    states: dict[range, WindowState] = {}
    for rows in tqdm(windows, desc="Verifying what is on disk", unit=" windows", delay=2):
        if found := progress.state(rows):
            states[rows] = found
            # Memory ran out before: start from the size that went well.
            records, tokens = found.limits
            limits = BatchLimits(min(limits.records, records), min(limits.tokens, tokens))
    waiting = [rows for rows in windows if rows not in states]
    if states:
        print(f"continuing: {sum(map(len, states))} of {len(checked.rows)} records are on disk")
    left_out = [entry for state in states.values() for entry in state.left_out]
    listed = list_file(progress.folder.parent, progress.run.chunk_idx)
    usable = [[row for row in rows if row not in checked.reasons] for rows in waiting]
    waited, count, tokens, padded_tokens = 0.0, 0, 0, 0
    bar = tqdm(total=len(checked.rows), initial=sum(map(len, states)), desc="Gradients", unit=" records")
    with StopRequest() as stop, bar, encoded_windows(dataset, usable, num_workers) as encoded_ahead:
        for rows in waiting:
            if stop.signal_number is not None:
                break
            start = time.perf_counter()
            encoded = next(encoded_ahead)
            waited += time.perf_counter() - start
            features, states[rows], computed = compute_window(
                rows, encoded, step, limits, checked, left_out, tolerance, listed, bar.update
            )
            progress.write(rows, features, states[rows])
            left_out += states[rows].left_out
            limits, count = computed.limits, count + len(computed.results)
            tokens, padded_tokens = tokens + computed.tokens, padded_tokens + computed.padded_tokens
    seconds = time.perf_counter() - begun
    cost = {
        "started": started,
        "finished": _now(),
        "seconds": seconds,
        "records_computed": count,
        "records_per_second": count / seconds,
        "seconds_waiting_for_data": waited,
        "padding_efficiency": padding_efficiency(tokens, padded_tokens),
        "peak_memory_bytes": peak_memory(step.reference.device),
    }
    return Outcome([states[rows] for rows in windows if rows in states], stop.signal_number, cost)


def compute_window(
    rows: range,
    encoded: dict[int, Encoded | str],
    step: GradientStep,
    limits: BatchLimits,
    checked: Checked,
    earlier: list[LeftOutRecord],
    tolerance: Tolerance,
    listed: Path,
    done: Callable[[int], object],
) -> tuple[np.ndarray, WindowState, Computed[int, RecordResult]]:
    """Features (float16 `[n, d]`) and state of one window, in record order, and what was computed for it.

    Args:
        earlier: the records that earlier windows left out.
        listed: where the records are listed when too many are left out.
        done: is told of records as they are done.

    Raises:
        UserError: too many records are left out, or a record turned out bad and that is to stop the run.
    """
    found = {row: item for row, item in encoded.items() if isinstance(item, str)}
    for row, reason in sorted(found.items()):
        if not tolerance.bad and reason not in UNSUPERVISED:
            raise UserError(
                f"record {row}: {reason}; repair it (check_images full finds all such images before the run), or "
                "let such records be left out (on_bad_record skip); the run continues where it stopped"
            )

    def left_out(reasons: dict[int, str]) -> list[LeftOutRecord]:
        return [left_out_entry(row, checked.records[row], reason) for row, reason in sorted(reasons.items())]

    reasons = found | {row: checked.reasons[row] for row in rows if row in checked.reasons}
    refuse_many(
        earlier + left_out(reasons),
        UNSUPERVISED,
        checked,
        tolerance,
        listed,
        "the tokenizer or the template is not the reference model's, so name the base model that it was trained from, "
        "or its chat template; or these records have no answer within the model's length, so remove them from the data "
        "file",
    )
    features = np.zeros((len(rows), step.projector.proj_dim), np.float16)
    scores = RecordScores.of_left_out(len(rows), step.el2n)
    items = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    computed = compute_records(step, items, limits, done)
    for row, result in computed.results.items():
        if not (np.isfinite(result.norm) and torch.isfinite(result.feature).all()):
            reasons[row] = NOT_FINITE
            continue
        index = row - rows.start
        features[index], scores.norms[index], scores.losses[index] = result.feature.numpy(), result.norm, result.loss
        scores.supervised_tokens[index], scores.tokens[index] = items[row].supervised, items[row].length
        if scores.el2n is not None and result.el2n is not None:
            scores.el2n[index] = result.el2n
    done(len(rows) - len(items))
    entries = left_out(reasons)
    refuse_many(
        earlier + entries,
        (NOT_FINITE,),
        checked,
        tolerance,
        listed,
        "their loss or gradient overflows, so try the dtype bfloat16 or float32; if it stays, the reference model "
        "diverged in training",
    )
    limits = computed.limits
    return features, WindowState(scores, entries, (limits.records, limits.tokens)), computed


def finish_chunk(
    name: str,
    folder: Path,
    run: Run,
    outcome: Outcome,
    progress: Progress,
    step: GradientStep,
    inputs: Mapping[str, object],
) -> None:
    """Write the chunk's files, whose windows are all on disk, remove what it does not need any more, and say so.

    Args:
        inputs: the paths that the command named and what is known of the checkpoint, for the manifest.
    """
    left_out = [entry for state in outcome.states for entry in state.left_out]
    manifest = {
        "run": asdict(run),
        "projector_about": step.projector.about,
        "versions": versions(step.family),
        "device": device_name(step.reference.device),
        "dtype": run.dtype,
        **outcome.cost,
        **inputs,
    }
    scores = RecordScores.joined([state.scores for state in outcome.states], run.el2n)
    write_chunk(folder, run.match, progress.features(), scores, left_out, manifest)
    remove_progress(folder, run.chunk_idx)
    print(
        f"written: {folder}/output_{run.chunk_idx}.pt, output_norm_{run.chunk_idx}.json, "
        f"manifest_{run.chunk_idx}.json\n"
        f"{name} done: {len(run.rows) - len(left_out)} features, {count_reasons(left_out)}, "
        f"{outcome.cost['records_per_second']:.2f} records/s, padding efficiency "
        f"{outcome.cost['padding_efficiency']:.2f}, peak memory {outcome.cost['peak_memory_bytes'] / 2**30:.2f} GiB"
    )


def versions(family: Family) -> dict[str, str]:
    """Versions of everything that the numbers depend on."""
    own = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    return own | family.versions()


def padding_efficiency(tokens: int, padded_tokens: int) -> float:
    """Share of the padded tokens that were a record's own."""
    return tokens / padded_tokens if padded_tokens else 1.0


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at one time: of the GPU's memory, or of this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return memory.peak_memory()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
