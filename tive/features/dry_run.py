"""What a gradient pass would cost, measured on a few of its records."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch

from tive.data.records import Records
from tive.data.scan import Scan
from tive.data.tasks import task_of
from tive.features.batches import Batches, batches_for
from tive.features.chunk import Match
from tive.features.gradient_pass import PassOptions, check_records, loader_of
from tive.features.loader import usable
from tive.features.step import GradientStep
from tive.method.projection import is_gpu, make_projector
from tive.method.value import budget_errors, records_for_error
from tive.models import Encoded
from tive.util.device import peak_memory
from tive.util.errors import UserError
from tive.util.text import duration

# What is a good error of a budget (docs/selection.md).
_PLANNED_ERROR = 0.02
# The release's: the share of the records that the reference model is trained on, and the share that is selected.
_WARM_UP, _SELECTED = 0.08, 0.15


def dry_run(count: int, scan: Scan, match: Match, options: PassOptions, load: Callable[[], GradientStep]) -> None:
    """Compute `count` records spread over the chunk; print the rate, and time, memory and disk of the whole chunk.

    Raises:
        UserError: records are bad, or none can be computed.
    """
    checked = check_records(scan, match.rows, options, options.folder / f"bad_records_{match.chunk_idx}.json")
    step = load()
    device, projector = step.reference.device, step.projector
    readable = [row for row in checked.rows if row not in checked.reasons]
    rows = readable[:: max(1, len(readable) // count)][:count]
    batches = batches_for(step.reference, options.batch_size, options.max_batch_tokens, options.gradient_checkpointing)
    loader = loader_of(step, checked, options)
    records: dict[int, Encoded] = {}
    reasons: dict[int, str] = {}

    def noted(items: Iterator[tuple[int, Encoded]]) -> Iterator[tuple[int, Encoded]]:
        for row, record in items:
            records[row] = record
            yield row, record

    with loader.read(rows) as items:
        encoded = noted(usable(items, reasons, skip_bad=True))
        first = next(encoded, None)
        if first is None:
            raise UserError(f"none of {len(rows)} records can be computed; look at them, or at the model's template")
        step(step.ready([first[1]]))  # pays for what is done once: signs, kernels, memory
        wait_for(device)
        begin = time.perf_counter()
        computed = list(batches.compute(step, encoded, step.ready, in_thread=loader.num_workers > 0))
        wait_for(device)
        seconds = time.perf_counter() - begin
    waited, peak = batches.waited, peak_memory(device)
    rate = max(1, len(records) - 1) / seconds
    parts = seconds_of_parts(step, records, batches)
    for row, reason in reasons.items():
        print(f"  record {row} left out: {reason}")
    longest = max(record.length for record in records.values())
    print(f"dry run: {len(records)} of {len(rows)} records, {longest} tokens at most")
    print(f"  {rate:.2f} records/s; this chunk's {len(checked.rows)} records take {duration(len(checked.rows) / rate)}")
    if len(scan.records) > len(checked.rows):
        print(f"  all {len(scan.records)} records, on one such device: {duration(len(scan.records) / rate)}")
    print(f"  waiting for data: {waited / seconds:.1%} of the time, {loader.num_workers} processes reading")
    for name, part in sorted(parts.items(), key=lambda item: -item[1]):
        print(f"    {part / sum(parts.values()):6.1%}  {name}")
    # Training costs three forward passes a record, of a reference model two: its frozen weights have no gradients.
    gradients = 1 / rate / (3 * parts["forward"] / len(records))
    net = {"warm-up": _WARM_UP * 2 / 3, "gradients": gradients, "training": _SELECTED}
    print(
        f"  net cost of a selection of {_SELECTED:.0%}: {sum(net.values()):.0%} of one epoch of full training on the "
        f"same device ({', '.join(f'{name} {share:.0%}' for name, share in net.items())}; an estimate from the forward "
        "pass)"
    )
    for kind in ("sparse", "trak") if projector is not None and is_gpu(device) else ():
        try:
            other = make_projector(kind, 0, match.proj_dim, device)
            cost = seconds_of_parts(replace(step, projector=other), records, batches)["projection"] / len(records)
            print(f"    projector {kind}: {cost * 1000:.2f} ms a record")
        except ValueError as error:
            print(f"    projector {kind}: {error}")
    most = loader.ahead + batches.most_records
    print(
        f"  padding efficiency {batches.padding_efficiency:.2f}\n"
        f"  peak memory {peak / 2**30:.2f} GiB\n"
        f"  host memory: at most {most} records at a time, {most * batches.largest / 2**30:.2f} GiB if all are as "
        "large as the largest of these"
    )
    if projector is not None:
        norms = {row: n for batch, made in computed for (row, _), n in zip(batch, made["norms"].tolist(), strict=True)}
        print_plan(scan.records, norms, rate)
    disk, folder = len(checked.rows) * match.proj_dim * 2, options.folder.absolute()
    free = shutil.disk_usage(next(parent for parent in (folder, *folder.parents) if parent.is_dir())).free
    print(f"  disk: {disk / 1e9:.3g} GB for the features, twice that while they are made; {free / 1e9:.3g} GB free")


def print_plan(records: Records, norms: Mapping[int, float], rate: float) -> None:
    """Print what the gradients of a sample of every task would cost, and how well they would tell the budgets.

    Args:
        norms: of some records, by row; the spread within tasks is taken from them, the same for all tasks.
        rate: records a second.
    """
    tasks = [task_of(record) if isinstance(record, dict) else None for record in records]
    names, sizes = np.unique([task for task in tasks if task is not None], return_counts=True)
    by_task = [np.array([norm for row, norm in norms.items() if tasks[row] == name]) for name in names]
    spreads = [part.var(ddof=1) / part.mean() ** 2 for part in by_task if len(part) > 1]
    if not spreads:
        print("  no plan for a sample: no two of these records name the same task under `dataset`")
        return
    usual = np.mean(list(norms.values()))
    means = np.array([[part.mean() if len(part) else usual for part in by_task]])
    covariances = (np.mean(spreads) * means[0] ** 2)[:, None, None]
    enough = records_for_error(means, covariances, sizes, _PLANNED_ERROR)
    print("  budgets from a sample of N records of every task (step 1 with per_task N) instead of from all:")
    for number in sorted({100, 1000, enough}):
        counts = np.minimum(sizes, number)
        errors, _ = budget_errors(means, covariances, counts, sizes, 1.0)
        error = (errors / (means[0] / means.sum())).max()
        print(
            f"    N = {number}: {counts.sum()} records, {duration(counts.sum() / rate)}, standard error of a budget at "
            f"most {error:.1%}"
        )


def seconds_of_parts(step: GradientStep, records: Mapping[int, Encoded], batches: Batches) -> Mapping[str, float]:
    """Seconds of each part of one more pass, without the parts inside it. A GPU is waited for at every boundary."""
    device, inside = step.reference.device, [0.0]
    seconds = defaultdict[str, float](float)

    @contextlib.contextmanager
    def measure(name: str) -> Iterator[None]:
        wait_for(device)
        start = time.perf_counter()
        inside.append(0.0)
        try:
            yield
        finally:
            wait_for(device)
            elapsed = time.perf_counter() - start
            seconds[name] += elapsed - inside.pop()
            inside[-1] += elapsed

    step(step.ready([next(iter(records.values()))]))  # draws what a projector draws once
    for _ in batches.compute(replace(step, measure=measure), records.items(), step.ready):
        pass
    return seconds


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
