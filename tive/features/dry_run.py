"""What a gradient pass would cost, measured on a few of its records."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace

from tive.data.scan import Scan, check_chunk
from tive.features.batches import Batches
from tive.features.chunk import Match
from tive.features.gradient_pass import PassOptions, loader_of
from tive.features.left_out import list_file, report_bad_records
from tive.features.step import GradientStep
from tive.models import Encoded
from tive.util.device import peak_memory
from tive.util.errors import UserError
from tive.util.stopwatch import Stopwatch
from tive.util.text import duration


def dry_run(count: int, scan: Scan, match: Match, options: PassOptions, load: Callable[[], GradientStep]) -> None:
    """Compute `count` records spread over the chunk; print the rate, and time, memory and disk of the whole chunk.

    Raises:
        UserError: records are bad, or none can be computed.
    """
    checked = check_chunk(scan, match.rows, options.image_folder, options.read_image)
    report_bad_records(checked, list_file(options.folder, match.chunk_idx), options.skip_bad)
    step = load()
    usable = [row for row in checked.rows if row not in checked.reasons]
    rows = usable[:: max(1, len(usable) // count)][:count]
    loader = loader_of(step, checked, replace(options, num_workers=0))
    with loader.read(rows) as items:
        encoded = dict(items)
    records = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    if not records:
        raise UserError(f"none of {len(rows)} records can be computed; the first: {next(iter(encoded.values()), None)}")
    # The first batch pays for what is done once: signs, kernels, memory.
    step([records[min(records)]])
    stopwatch = Stopwatch(step.reference.device)
    batches = Batches(options.batch_size, options.max_batch_tokens)
    begin = time.perf_counter()
    for _ in batches.compute(replace(step, measure=stopwatch.measure), records.items()):
        pass
    seconds = time.perf_counter() - begin

    rate = len(records) / seconds
    disk = len(checked.rows) * step.projector.proj_dim * 2
    longest = max(record.length for record in records.values())
    print(f"dry run: {len(records)} of {len(rows)} records, longest {longest} tokens")
    for row, reason in encoded.items():
        if isinstance(reason, str):
            print(f"  record {row} left out: {reason}")
    whole = duration(len(checked.rows) / rate)
    print(f"  {rate:.2f} records/s; this chunk's {len(checked.rows)} records take about {whole}")
    if len(checked.records) > len(checked.rows):
        print(
            f"  all {len(checked.records)} records, on one such device: about {duration(len(checked.records) / rate)}"
        )
    for name, part in sorted(stopwatch.seconds.items(), key=lambda item: -item[1]):
        print(f"    {part / seconds:6.1%}  {name}")
    print(f"  reading and encoding: {loader.waited / len(rows) * 1000:.0f} ms a record and process")
    print(f"  padding efficiency {batches.padding_efficiency:.2f}")
    print(f"  peak memory {peak_memory(step.reference.device) / 2**30:.2f} GiB")
    folder = options.folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    print(f"  disk: {disk / 1e9:.3g} GB for the features, twice that while they are made; {free / 1e9:.3g} GB free")
