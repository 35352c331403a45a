"""What a gradient pass would cost, measured on a few of its records."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path

from tive.data.scan import Checked
from tive.gradient_pass.batches import GradientStep, compute_batch, compute_records
from tive.gradient_pass.run import padding_efficiency, peak_memory
from tive.models import Encoded
from tive.models.batches import BatchLimits
from tive.models.loading import EncodedRecords, encoded_windows
from tive.util.errors import UserError
from tive.util.stopwatch import Stopwatch
from tive.util.text import duration


def dry_run(
    count: int,
    checked: Checked,
    dataset: EncodedRecords,
    step: GradientStep,
    limits: BatchLimits,
    folder: Path,
) -> None:
    """Compute `count` records spread over the chunk and print the rate, and time, memory and disk of the whole chunk.

    Raises:
        UserError: none of them can be computed.
    """
    usable = [row for row in checked.rows if row not in checked.reasons]
    rows = usable[:: max(1, len(usable) // count)][:count]
    begin = time.perf_counter()
    with encoded_windows(dataset, [rows], num_workers=0) as windows:
        encoded = next(windows)
    encoding = time.perf_counter() - begin
    records = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    if not records:
        raise UserError(f"none of {len(rows)} records can be computed; the first: {next(iter(encoded.values()), None)}")
    # The first batch pays for what is done once: signs, kernels, memory.
    compute_batch(step, [records[min(records)]])
    stopwatch = Stopwatch(step.reference.device)
    begin = time.perf_counter()
    computed = compute_records(replace(step, measure=stopwatch.measure), records, limits)
    seconds = time.perf_counter() - begin

    rate = len(records) / seconds
    whole = len(checked.rows) / rate
    disk = len(checked.rows) * step.projector.proj_dim * 2
    longest = max(record.length for record in records.values())
    print(f"dry run: {len(records)} of {len(rows)} records, longest {longest} tokens")
    for row, reason in encoded.items():
        if isinstance(reason, str):
            print(f"  record {row} left out: {reason}")
    print(f"  {rate:.2f} records/s; this chunk's {len(checked.rows)} records take about {duration(whole)}")
    if len(checked.records) > len(checked.rows):
        print(
            f"  all {len(checked.records)} records, on one such device: about {duration(len(checked.records) / rate)}"
        )
    for name, part in sorted(stopwatch.seconds.items(), key=lambda item: -item[1]):
        print(f"    {part / seconds:6.1%}  {name}")
    print(f"  reading and encoding: {encoding / len(rows) * 1000:.0f} ms a record and process, ahead of the device")
    print(f"  padding efficiency {padding_efficiency(computed.tokens, computed.padded_tokens):.2f}")
    print(f"  peak memory {peak_memory(step.reference.device) / 2**30:.2f} GiB")
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(existing).free
    print(f"  disk: {disk / 1e9:.3g} GB for the features, twice that while they are made; {free / 1e9:.3g} GB free")
