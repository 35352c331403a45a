"""The gradient pass over one chunk: encode, compute, write, window by window, until every record has one end.

A record ends with features, or with a reason: a bad record or image, no supervised token, template mismatch, not
finite.
"""

from __future__ import annotations

import os
import platform
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tive.features.progress import LeftOutRecord, Note, Progress
from tive.gradient_pass.batches import BatchLimits, GradientEngine
from tive.gradient_pass.loading import EncodedRecords, encoded_windows
from tive.gradient_pass.preflight import Checked, left_out_entry
from tive.models import Encoded
from tive.util.errors import UserError

UNSUPERVISED = ("no supervised token", "template mismatch")
NOT_FINITE = "not finite"
# Above this share of the chunk, and above a few, what is wrong is not the records.
_MOST_LEFT_OUT = 0.02
_FEW = 2


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


@dataclass
class Tally:
    """What was done in this run, for the manifest."""

    started: str = field(default_factory=lambda: _now())
    begun: float = field(default_factory=time.perf_counter)
    computed: int = 0
    waited: float = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.begun


def refuse_many(left_out: list[LeftOutRecord], reasons: tuple[str, ...], checked: Checked, hint: str) -> None:
    """Raise a `UserError` when so many of the chunk's records are left out for `reasons` that they are not to blame."""
    entries = [entry for entry in left_out if entry["reason"] in reasons]
    if len(entries) > max(_MOST_LEFT_OUT * len(checked.rows), _FEW):
        raise UserError(
            f"{len(entries)} records up to record {entries[-1]['row']} are left out ({' or '.join(reasons)}; the "
            f"first: record {entries[0]['row']}), above {_MOST_LEFT_OUT:.0%} of the chunk: {hint}"
        )


def compute_window(
    rows: range,
    encoded: dict[int, Encoded | str],
    engine: GradientEngine,
    limits: BatchLimits,
    checked: Checked,
    earlier: list[LeftOutRecord],
    stop_on_bad_record: bool,
    done: Callable[[int], object],
) -> tuple[np.ndarray, Note]:
    """Features (float16 `[n, d]`) and note of one window, in record order.

    Args:
        earlier: the records that earlier windows left out.
        done: is told of records as they are done.

    Raises:
        UserError: too many records are left out, or a record turned out bad and that is to stop the run.
    """
    found = {row: item for row, item in encoded.items() if isinstance(item, str)}
    for row, reason in sorted(found.items()):
        if stop_on_bad_record and reason not in UNSUPERVISED:
            raise UserError(
                f"record {row}: {reason}; repair it (--check_images full finds all such images before the run), or "
                "leave such records out with --on_bad_record skip; the run continues where it stopped"
            )

    def left_out(reasons: dict[int, str]) -> list[LeftOutRecord]:
        return [left_out_entry(row, checked.records[row], reason) for row, reason in sorted(reasons.items())]

    reasons = found | {row: checked.reasons[row] for row in rows if row in checked.reasons}
    refuse_many(
        earlier + left_out(reasons),
        UNSUPERVISED,
        checked,
        "the tokenizer or the template is not the reference model's (v1), so name the base model that it was trained "
        "from; or these records have no answer within the model's length, so remove them from the data file",
    )
    features = np.zeros((len(rows), engine.projector.proj_dim), np.float16)
    norms = np.full(len(rows), np.nan, np.float32)
    items = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    for row, (feature, norm) in engine.compute_all(items, limits, done).items():
        if torch.isfinite(norm) and torch.isfinite(feature).all():
            features[row - rows.start], norms[row - rows.start] = feature.numpy(), float(norm)
        else:
            reasons[row] = NOT_FINITE
    done(len(rows) - len(items))
    entries = left_out(reasons)
    refuse_many(
        earlier + entries,
        (NOT_FINITE,),
        checked,
        "their loss or gradient overflows, so try --dtype bfloat16 or float32; if it stays, the reference model "
        "diverged in training",
    )
    return features, Note(norms, entries, (limits.records, limits.tokens))


def run_pass(
    checked: Checked,
    dataset: EncodedRecords,
    num_workers: int,
    engine: GradientEngine,
    limits: BatchLimits,
    progress: Progress,
    stop_on_bad_record: bool,
) -> tuple[Tally, list[Note], int | None]:
    """Compute every window that is not on disk yet.

    Returns:
        What was done, the windows' notes in order, and the number of the signal that stopped the run, if one did.
    """
    windows = progress.windows()
    notes: dict[range, Note] = {}
    for rows in tqdm(windows, desc="Verifying what is on disk", unit=" windows", delay=2):
        if note := progress.note(rows):
            notes[rows] = note
            # Memory ran out before: start from the size that went well.
            limits.records, limits.tokens = min(limits.records, note.limits[0]), min(limits.tokens, note.limits[1])
    waiting = [rows for rows in windows if rows not in notes]
    done = sum(map(len, notes))
    if done:
        print(f"continuing: {done} of {len(checked.rows)} records are on disk")
    tally = Tally()
    left_out = [entry for note in notes.values() for entry in note.left_out]
    usable = [[row for row in rows if row not in checked.reasons] for rows in waiting]
    encoded_ahead = encoded_windows(dataset, usable, num_workers)
    with StopRequest() as stop, tqdm(total=len(checked.rows), initial=done, desc="Gradients", unit=" records") as bar:
        for rows in waiting:
            if stop.signal_number is not None:
                break
            start = time.perf_counter()
            encoded = next(encoded_ahead)
            tally.waited += time.perf_counter() - start
            features, note = compute_window(
                rows, encoded, engine, limits, checked, left_out, stop_on_bad_record, bar.update
            )
            progress.write(rows, features, note)
            notes[rows] = note
            left_out += note.left_out
            tally.computed += sum(isinstance(item, Encoded) for item in encoded.values())
    return tally, [notes[rows] for rows in windows if rows in notes], stop.signal_number


def describe(run: dict[str, Any], notes: list[Note], engine: GradientEngine, tally: Tally) -> dict[str, Any]:
    """The manifest of a chunk whose windows are all on disk: how it was made, and what was left out."""
    import accelerate
    import peft
    import transformers

    seconds = tally.seconds()
    return {
        "run": run,
        "left_out": [entry for note in notes for entry in note.left_out],
        "projector_about": engine.projector.about,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": peft.__version__,
            "accelerate": accelerate.__version__,
            "numpy": np.__version__,
        },
        "device": device_name(engine.reference.device),
        "dtype": run["dtype"],
        "started": tally.started,
        "finished": _now(),
        "seconds": seconds,
        "records_computed": tally.computed,
        "records_per_second": tally.computed / seconds,
        "seconds_waiting_for_data": tally.waited,
        "padding_efficiency": padding_efficiency(engine),
        "peak_memory_bytes": peak_memory(engine.reference.device),
    }


def norms_of(notes: list[Note]) -> torch.Tensor:
    """The chunk's gradient norms, float32 `[n]`."""
    return torch.from_numpy(np.concatenate([note.norms for note in notes] or [np.empty(0, np.float32)]))


def padding_efficiency(engine: GradientEngine) -> float:
    """Share of the padded tokens that were a record's own."""
    return engine.real_tokens / engine.padded_tokens if engine.padded_tokens else 1.0


def peak_memory(device: torch.device) -> int:
    """Most bytes in use at one time: of the GPU's memory, or of this process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
