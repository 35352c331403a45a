"""One chunk of the gradient pass: take it, check its records, compute what is not on disk, write its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from tive.data.scan import Checked, Scan, check_chunk, check_image_folder
from tive.features.lock import hold_chunk, is_complete, refuse_other_runs
from tive.features.manifest import Run
from tive.features.progress import Progress, remove_progress
from tive.gradient_pass.batches import GradientStep
from tive.gradient_pass.dry_run import dry_run
from tive.gradient_pass.preflight import Tolerance, check_disk, report_bad_records
from tive.gradient_pass.run import finish_chunk, run_pass
from tive.models.batches import BatchLimits
from tive.models.loading import EncodedRecords


@dataclass(frozen=True)
class PassOptions:
    """How a chunk is computed, as far as its numbers do not depend on it.

    Attributes:
        folder: the feature folder.
        projector: the kind of projector that was asked for, or `auto`.
        read_image: reads every image before the run, or None.
        tolerance: which records may be left out.
        num_workers: processes that read and encode; None for a number by the device.
        inputs: the paths that the command named and what is known of the checkpoint, for the manifest.
    """

    folder: Path
    image_folder: str
    read_image: Callable[[str], object] | None
    tolerance: Tolerance
    overwrite: bool
    projector: str
    num_workers: int | None
    inputs: Mapping[str, object]


def compute_chunk(name: str, scan: Scan, run: Run, options: PassOptions, load: Callable[[], GradientStep]) -> None:
    """Compute a chunk, or go on with it; nothing is done where it is complete.

    Args:
        name: how messages call it.
        run: what is known before the model is loaded.
        load: loads the model; is called when there is something to compute.

    Raises:
        ChunkIsHeld: another process is computing it.
        UserError: its files are of another run, its records are bad, or it cannot be written.
        SystemExit: a signal stopped it; what is done is on disk.
    """
    folder = options.folder
    check_image_folder(scan, run.rows, options.image_folder)  # before anything is written
    with hold_chunk(folder, run.chunk_idx):
        if not options.overwrite:
            if is_complete(folder, run, options.projector):
                remove_progress(folder, run.chunk_idx)
                print(f"{name} is complete in {folder}")
                return
            refuse_other_runs(folder, run)
        checked = check_chunk(scan, run.rows, options.image_folder, options.read_image)
        check_disk(folder, run.chunk_idx, 2 * len(run.rows) * run.proj_dim)
        report_bad_records(checked, folder, run.chunk_idx, not options.tolerance.bad)

        step = load()
        parameters = sum(matrix.weight.numel() for matrix in step.matrices.values())
        run = replace(run, counted_parameters=parameters, projector=step.projector.kind)
        if not options.overwrite:
            refuse_other_runs(folder, run)
        progress = Progress(folder, run, options.overwrite)
        outcome = run_pass(
            checked,
            _encoded(step, checked, options),
            _workers(step, options),
            step,
            _limits(run),
            progress,
            options.tolerance,
        )
        if outcome.stopped_by is not None:
            print(f"{name} stopped; what is done is on disk, and the same command (without overwrite) continues")
            raise SystemExit(128 + outcome.stopped_by)
        finish_chunk(name, folder, run, outcome, progress, step, options.inputs)


def estimate_chunk(records: int, scan: Scan, run: Run, options: PassOptions, load: Callable[[], GradientStep]) -> None:
    """Compute `records` of a chunk's records, say what the whole costs, and write no features.

    Raises:
        UserError: its records are bad, or none can be computed.
    """
    checked = check_chunk(scan, run.rows, options.image_folder, options.read_image)
    report_bad_records(checked, options.folder, run.chunk_idx, not options.tolerance.bad)
    step = load()
    dry_run(records, checked, _encoded(step, checked, options), step, _limits(run), options.folder)


def _encoded(step: GradientStep, checked: Checked, options: PassOptions) -> EncodedRecords:
    return EncodedRecords(step.family, step.reference.processor, checked.records, options.image_folder)


def _workers(step: GradientStep, options: PassOptions) -> int:
    if options.num_workers is not None:
        return options.num_workers
    return 4 if step.reference.device.type == "cuda" else 1


def _limits(run: Run) -> BatchLimits:
    return BatchLimits(run.batch_size, run.max_batch_tokens)
