"""The gradient pass over one chunk: for each window that is not on disk, for each batch, features; then write them.

A record ends with features, or with a reason: a bad record or image, no supervised token, template mismatch, not
finite.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tive.data import problems
from tive.data.scan import Checked, Scan, check_chunk, check_image_folder
from tive.data.trained import record_hashes
from tive.features.batches import Batches, batches_for
from tive.features.chunk import CONTENT, LeftOutRecord, Match, write_chunk
from tive.features.launch import hold
from tive.features.loader import Loader, usable, workers_beside
from tive.features.step import FLOAT16_LOSS_SCALES, GradientStep
from tive.features.store import Store, begin_chunk, is_complete, refuse_full_disk, refuse_other_runs
from tive.models import NOT_FINITE, UNSUPERVISED
from tive.models.training_record import versions_of
from tive.util.device import device_name, peak_memory
from tive.util.text import shown

# Above this share of the chunk, and above a few, it is not the records that are wrong.
_MOST_LEFT_OUT, _FEW = 0.02, 2
_LONGEST_NAME = 120
# The places of a batch's records in their window, and the batch's results, on the device.
Computed = list[tuple[list[int], dict[str, Tensor]]]


@dataclass(frozen=True)
class PassOptions:
    """How chunks are computed, as far as their numbers do not depend on it.

    Attributes:
        folder: the feature folder.
        read_image: reads every image before the run, or None.
        skip_bad: leave bad records out; else the first of them stops the run.
        num_workers: processes that read and encode; None for a number by the device.
        inputs: the paths that the command named and what is known of the checkpoint, for the manifest.
    """

    folder: Path
    image_folder: str
    read_image: Callable[[str | BinaryIO], object] | None
    skip_bad: bool
    overwrite: bool
    batch_size: int
    max_batch_tokens: int | None
    window: int
    gradient_checkpointing: bool
    num_workers: int | None
    inputs: Mapping[str, object]


def compute_chunk(name: str, scan: Scan, match: Match, options: PassOptions, load: Callable[[], GradientStep]) -> None:
    """Compute a chunk, or go on with it; nothing is done where it is complete.

    Args:
        name: how messages call it.
        match: what is known before the model is loaded.
        load: loads the model; is called when there is something to compute.

    Raises:
        Held: another process is computing it.
        UserError: its files are of another run, its records are bad, or it cannot be written.
        SystemExit: a signal stopped it; what is done is on disk.
    """
    check_image_folder(scan, match.rows, options.image_folder)  # before anything is written
    with hold(options.folder / f".lock_{match.chunk_idx}", f"computing chunk {match.chunk_idx}"):
        if not options.overwrite:
            refuse_other_runs(options.folder, match)
            if is_complete(options.folder, match.chunk_idx):
                print(f"{name} is complete in {options.folder}")
                return
        refuse_full_disk(options.folder, match)
        listing = options.folder / f"bad_records_{match.chunk_idx}.json"
        checked = check_records(scan, match.rows, options, listing)
        step = load()
        projector = step.projector.kind if step.projector else "none"
        match = replace(match, counted_parameters=step.counted_parameters, projector=projector)
        store = begin_chunk(options.folder, match, options.overwrite)
        cost, stopped_by = compute_windows(store, checked, step, options, listing)
        if stopped_by:
            print(f"{name} stopped; what is done is on disk, and the same command (without overwrite) continues")
            raise SystemExit(128 + stopped_by)
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
        versions |= versions_of(*step.family.LIBRARIES)
        made = {"device": device_name(step.reference.device), "dtype": match.dtype, "versions": versions}
        made |= cost | dict(options.inputs) | ({"projector_about": step.projector.about} if step.projector else {})
        columns = store.columns | {CONTENT: record_hashes(scan.records, match.rows)}
        reasons = sorted(store.left_out.items())
        left_out = [LeftOutRecord(row, problems.identity_of(scan.records[row]), reason) for row, reason in reasons]
        write_chunk(options.folder, match, store.features(), columns, left_out, made)
        shutil.rmtree(store.folder)
    kinds = Counter(problems.kind_of(entry.reason) for entry in left_out).most_common()
    why = f" ({', '.join(f'{count} {kind}' for kind, count in kinds)})" if kinds else ""
    print(
        f"written: {options.folder / f'output_{match.chunk_idx}.pt'}, and its manifest beside it\n"
        f"{name} done: {len(match.rows) - len(left_out)} {'features' if step.projector else 'records without features'}"
        f", {len(left_out)} records left out{why}, "
        f"{cost['records_per_second']:.2f} records/s, padding efficiency {cost['padding_efficiency']:.2f}, "
        f"peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB, records in host memory at most "
        f"{cost['host_memory_of_records_bytes'] / 2**30:.2f} GiB"
    )


def check_records(scan: Scan, rows: range, options: PassOptions, listing: Path) -> Checked:
    """Check a chunk's records and images; prints what is wrong or odd, and lists what cannot be used in a file.

    Raises:
        UserError: records cannot be used, and they are not to be skipped.
    """
    checked = check_chunk(scan, rows, options.image_folder, options.read_image)
    for note in checked.notes:
        print(note)
    if checked.renamed:
        first, stand_in = next(iter(checked.renamed.items()))
        print(
            f"{len(checked.renamed)} records have their image under another extension, in other capitals or in another "
            f"Unicode form, and it is used (the first: record {first}, "
            f"{shown(problems.images_named(scan.records[first]), _LONGEST_NAME)} is "
            f"{shown(os.path.basename(stand_in), _LONGEST_NAME)}); LLaVA's trainer does not look for it: rename before "
            "step 5"
        )
    if checked.reasons and options.skip_bad:
        problems.list_bad_records(scan.records, checked.reasons, listing)
        print(f"they are left out; all are listed in {listing}")
    else:
        remedy = problems.form_remedy(scan.records, checked.reasons, len(rows))
        remedy = remedy or "repair them, or let them be left out (on_bad_record skip)"
        problems.refuse_bad_records(scan.records, checked.reasons, listing, remedy, len(rows))
    return checked


def compute_windows(
    store: Store, checked: Checked, step: GradientStep, options: PassOptions, listing: Path
) -> tuple[dict[str, Any], int | None]:
    """Compute every window that is not on disk; what it cost, and the number of the signal that stopped it, if any.

    Raises:
        UserError: too many records are left out, or a record turned out bad and that is to stop the run.
    """
    begun, started = time.perf_counter(), _now()
    windows = store.missing(options.window)
    done = len(checked.rows) - sum(map(len, windows))
    if done:
        print(f"continuing: {done} of {len(checked.rows)} records are on disk")
    batches = batches_for(step.reference, options.batch_size, options.max_batch_tokens, options.gradient_checkpointing)
    loader = loader_of(step, checked, options)
    readable_rows = [row for rows in windows for row in rows if row not in checked.reasons]
    count = 0
    bar = tqdm(total=len(checked.rows), initial=done, desc="Gradients", unit=" records")
    with stop_signals() as signals, bar, loader.read(readable_rows) as records:
        for rows in windows:
            reasons = {row: checked.reasons[row] for row in rows if row in checked.reasons}
            encoded = usable(islice(records, len(rows) - len(reasons)), reasons, options.skip_bad)
            columns = store.empty(rows) | {"features": np.zeros((len(rows), store.dimension), np.float16)}
            computed: Computed = []
            for batch, results in batches.compute(step, encoded, step.ready, in_thread=loader.num_workers > 0):
                places = [row - rows.start for row, _ in batch]
                columns["supervised_tokens"][places] = [record.supervised for _, record in batch]
                columns["tokens"][places] = [record.length for _, record in batch]
                computed.append((places, results))
                bar.update(len(batch))
            fill(columns, computed)
            compute_overflowed(columns, rows, step, batches, loader)
            count += len(rows) - len(reasons)
            bar.update(len(reasons))
            remove_not_finite(columns, rows, reasons)
            refuse_many(store.left_out | reasons, checked, listing)
            store.write(rows, columns, reasons, columns["features"])
            if signals:
                break
    seconds = time.perf_counter() - begun
    how = {"batch_size": batches.records, "max_batch_tokens": batches.tokens, "window": options.window}
    cost = {
        "how": how | {"gradient_checkpointing": batches.relief is None, "num_workers": loader.num_workers},
        "started": started,
        "finished": _now(),
        "seconds": seconds,
        "records_computed": count,
        "records_per_second": count / seconds,
        "seconds_waiting_for_data": batches.waited,
        "padding_efficiency": batches.padding_efficiency,
        "peak_memory_bytes": peak_memory(step.reference.device),
        "host_memory_of_records_bytes": (loader.ahead + batches.most_records) * batches.largest,
    }
    return cost, signals[0] if signals else None


def refuse_many(left_out: dict[int, str], checked: Checked, listing: Path) -> None:
    """Raise a `UserError` when more than 2% of the chunk, and more than two records, have nothing supervised or
    overflow: then it is rarely the records that are wrong.

    Args:
        left_out: why records are, by row, so far; they are listed in the file `listing`.
    """
    causes = {
        UNSUPERVISED: "the tokenizer or the template is not the reference model's, so name the base model that it was "
        "trained from, or its chat template; or these records have no answer within the model's length",
        (NOT_FINITE,): "their loss or gradient overflows, so try the dtype bfloat16 or float32; if it stays, the "
        "reference model diverged in training",
    }
    for reasons, cause in causes.items():
        count = sum(reason in reasons for reason in left_out.values())
        if count > max(_MOST_LEFT_OUT * len(checked.rows), _FEW):
            remedy = (
                f"{count} of them ({' or '.join(reasons)}) are above {_MOST_LEFT_OUT:.0%} of the chunk: {cause}; "
                f"{problems.drop_command(checked.records, listing)} writes the data without them"
            )
            problems.refuse_bad_records(checked.records, checked.reasons | left_out, listing, remedy, len(checked.rows))


def loader_of(step: GradientStep, checked: Checked, options: PassOptions) -> Loader:
    """What reads and encodes a chunk's records for a step."""
    workers = workers_beside(step.reference.device, options.num_workers)
    # A function and not its module, which could not be sent to a process that is not forked.
    encode = partial(step.family.encode, step.reference.processor)
    return Loader(encode, checked.records, options.image_folder, workers, text_alone=step.visual_gain)


def fill(columns: Mapping[str, np.ndarray], computed: Computed) -> None:
    """Put the results of batches into a window's columns; each column is copied from the device at once."""
    index = [place for places, _ in computed for place in places]
    for name in computed[0][1] if computed else ():
        columns[name][index] = torch.cat([results[name] for _, results in computed]).cpu().numpy()


def compute_overflowed(
    columns: Mapping[str, np.ndarray], rows: range, step: GradientStep, batches: Batches, loader: Loader
) -> None:
    """Compute records whose gradients overflowed again, with smaller loss scales where there are any (float16)."""
    for scale in [scale for scale in FLOAT16_LOSS_SCALES if scale < step.loss_scale and step.projector is not None]:
        overflowed = np.flatnonzero(np.isfinite(columns["losses"]) & ~np.isfinite(columns["norms"]))
        again = usable((loader[rows[index]] for index in overflowed.tolist()), {}, skip_bad=False)
        smaller = replace(step, loss_scale=scale)
        computed = batches.compute(smaller, again, step.ready)
        fill(columns, [([row - rows.start for row, _ in batch], results) for batch, results in computed])


def remove_not_finite(columns: Mapping[str, np.ndarray], rows: range, reasons: dict[int, str]) -> None:
    """Empty the rows of computed records whose numbers are not finite, and add them to the reasons."""
    index = np.array([place for place, row in enumerate(rows) if row not in reasons], np.int64)
    deciding = columns.get("norms", columns["losses"])[index]
    bad = index[~(np.isfinite(deciding) & np.isfinite(columns["features"][index]).all(axis=1))]
    for values in columns.values():
        values[bad] = np.nan if values.ndim == 1 and values.dtype == np.float32 else 0
    reasons |= {rows[place]: NOT_FINITE for place in bad.tolist()}


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """SIGTERM and Ctrl-C so far, so that the window at hand is finished first; the second Ctrl-C does not wait."""
    caught: list[int] = []

    def catch(number: int, _frame: FrameType | None) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)
        # Not print: the signal may have come in the middle of another one.
        os.write(2, b"\nfinishing the records at hand, then stopping ...\n")

    before = {number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
