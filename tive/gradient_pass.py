"""The gradient pass over one chunk: encode, compute, write, window by window, until every record has one end.

A record ends with features, or with a reason: a bad record or image, no supervised token, template mismatch, not
finite.
"""

from __future__ import annotations

import platform
import resource
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from types import FrameType
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from tive.engine import BatchLimits, GradientEngine
from tive.errors import UserError
from tive.loading import EncodedRecords, encoded_windows
from tive.models import Encoded
from tive.preflight import Checked, left_out_entry
from tive.progress import Note, Progress

UNSUPERVISED = ("no supervised token", "template mismatch")
_MOST_UNSUPERVISED = 0.02
_FEW = 10


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
        print("\nfinishing the records at hand, then stopping ...", file=sys.stderr, flush=True)


@dataclass
class Tally:
    """What was done in this run, for the manifest."""

    started: str = field(default_factory=lambda: _now())
    begun: float = field(default_factory=time.perf_counter)
    seen: int = 0
    unsupervised: int = 0
    computed: int = 0
    waited: float = 0.0

    def seconds(self) -> float:
        return time.perf_counter() - self.begun

    def check_supervision(self, at_end: bool) -> None:
        """Raise a `UserError` when so many records have no supervised token that the template must be wrong."""
        many = self.unsupervised > max(_MOST_UNSUPERVISED * self.seen, _FEW)
        if many or (at_end and self.seen and self.unsupervised == self.seen):
            raise UserError(
                f"{self.unsupervised} of the first {self.seen} records have no supervised token; the tokenizer or the "
                "template is not the reference model's (v1): name the base model that it was trained from"
            )


def compute_window(
    rows: range,
    encoded: dict[int, Encoded | str],
    engine: GradientEngine,
    limits: BatchLimits,
    checked: Checked,
    tally: Tally,
    stop_on_bad_image: bool,
) -> tuple[np.ndarray, Note]:
    """Features (float16 `[n, d]`) and note of one window, in record order.

    Raises:
        UserError: too many records are unsupervised, or an image turned out bad and that is to stop the run.
    """
    reasons = {row: checked.reasons[row] for row in rows if row in checked.reasons}
    reasons |= {row: item for row, item in encoded.items() if isinstance(item, str)}
    tally.seen += len(rows)
    tally.unsupervised += sum(reason in UNSUPERVISED for reason in reasons.values())
    tally.check_supervision(at_end=rows.stop == checked.rows.stop)
    for row, reason in sorted(reasons.items()):
        if stop_on_bad_image and row not in checked.reasons and reason not in UNSUPERVISED:
            raise UserError(
                f"record {row}: {reason}; repair it, or leave such records out with --on_bad_record skip; the run "
                "continues where it stopped"
            )

    features = np.zeros((len(rows), engine.projector.proj_dim), np.float16)
    norms = np.full(len(rows), np.nan, np.float32)
    items = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    for row, (feature, norm) in engine.compute_all(items, limits).items():
        if torch.isfinite(norm) and torch.isfinite(feature).all():
            features[row - rows.start], norms[row - rows.start] = feature.numpy(), float(norm)
        else:
            reasons[row] = "not finite"
    tally.computed += len(items)
    left_out = [left_out_entry(checked, row, reason) for row, reason in sorted(reasons.items())]
    return features, Note(norms, left_out, (limits.records, limits.tokens))


def run_pass(
    checked: Checked,
    dataset: EncodedRecords,
    num_workers: int,
    engine: GradientEngine,
    limits: BatchLimits,
    progress: Progress,
    stop_on_bad_image: bool,
) -> tuple[Tally, list[Note]] | None:
    """Compute every window that is not on disk yet; None when a signal stopped the run between two windows."""
    notes = {rows: progress.note(rows) for rows in progress.windows()}
    waiting = [rows for rows, note in notes.items() if note is None]
    for note in notes.values():
        if note is not None:  # memory ran out before: start from the size that went well
            limits.records, limits.tokens = min(limits.records, note.limits[0]), min(limits.tokens, note.limits[1])
    done = sum(len(rows) for rows, note in notes.items() if note is not None)
    if done:
        print(f"continuing: {done} of {len(checked.rows)} records are on disk")
    usable = [[row for row in rows if row not in checked.reasons] for rows in waiting]
    windows = encoded_windows(dataset, usable, num_workers)
    tally = Tally()
    with StopRequest() as stop, tqdm(total=len(checked.rows), initial=done, desc="Gradients", unit=" records") as bar:
        for rows in waiting:
            start = time.perf_counter()
            encoded = next(windows)
            tally.waited += time.perf_counter() - start
            features, note = compute_window(rows, encoded, engine, limits, checked, tally, stop_on_bad_image)
            progress.write(rows, features, note)
            notes[rows] = note
            bar.update(len(rows))
            if stop.signal_number is not None:
                return None
    return tally, list(notes.values())


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
