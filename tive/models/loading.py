"""Encoded records, window by window, read ahead by worker processes while the device computes."""

from __future__ import annotations

import contextlib
import itertools
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Generator, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset, get_worker_info

from tive.data.media import media_of
from tive.data.records import Records, name_of
from tive.models import Encoded, Family, LeftOut
from tive.util.errors import UserError

_NOTHING = -1


class EncodedRecords(Dataset):
    """Row of the data file -> row and encoded record, or the reason why there is none, or the lack of memory for it."""

    def __init__(self, family: Family, processor: Any, records: Records, image_folder: str) -> None:
        # The function and not its module, which could not be sent to a process that is not forked.
        self.encode, self.processor, self.records, self.image_folder = family.encode, processor, records, image_folder

    def __getitem__(self, row: int) -> tuple[int, Encoded | str | MemoryError]:
        try:
            return row, self.encode(self.processor, self.records[row], self.image_folder)
        except LeftOut as reason:
            return row, str(reason)
        except MemoryError:  # a lack of this machine, which is no reason to leave the record out
            return row, MemoryError()
        except Exception as error:  # one record in 665,000 that no check foresaw is not to end a run of days
            return row, f"cannot be encoded: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


class _Traced(Dataset):
    """A dataset whose workers leave word of the row that they are reading, for when one of them is killed."""

    def __init__(self, dataset: Dataset, num_workers: int) -> None:
        self.dataset = dataset
        self.processes = multiprocessing.RawArray("q", num_workers)
        self.reading = multiprocessing.RawArray("q", [_NOTHING] * num_workers)

    def __getitem__(self, row: int) -> Any:
        worker = get_worker_info()
        if worker is None:
            return self.dataset[row]
        self.processes[worker.id], self.reading[worker.id] = os.getpid(), row
        item = self.dataset[row]
        self.reading[worker.id] = _NOTHING
        return item

    def name(self, row: int) -> str:
        """How an error names the record of a row, with its image."""
        if not isinstance(self.dataset, EncodedRecords):
            return f"record {row}"
        records = self.dataset.records
        record = records[row]
        images = media_of(record).images
        return name_of(records.path, row, record) + (f", image {images[0]}" if images else "")


def _as_it_is(item: Any) -> Any:
    # Arrays travel to the main process by value: shared tensors would take a file descriptor each.
    return item


def _prepare_worker(_worker: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group; the main process finishes its window and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # A worker that sends a record when the main process is killed would wait for ever, and hold its GPU memory.
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@contextlib.contextmanager
def encoded_windows(
    dataset: Dataset, windows: list[list[int]], num_workers: int
) -> Iterator[Iterator[dict[int, Encoded | str]]]:
    """Each window's encoded records by row, in turn; while one window is used, the workers read the next.

    Args:
        dataset: row -> `(row, encoded record or reason)`, an `EncodedRecords` or what stands in for it.

    Raises:
        UserError: a worker was killed, which torch reports wherever the body of the `with` is; or memory ran out.
    """
    traced = _Traced(dataset, num_workers)
    loader = DataLoader(
        traced,
        sampler=list(itertools.chain.from_iterable(windows)),
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        # Together the workers are one window ahead.
        prefetch_factor=max(2, math.ceil(max(map(len, windows), default=0) / num_workers)) if num_workers else None,
        worker_init_fn=_prepare_worker,
    )
    others = multiprocessing.active_children()
    items = iter(loader)
    workers = [process for process in multiprocessing.active_children() if process not in others]
    filled = _filled(windows, items, traced)
    try:
        yield filled
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(_how_one_ended(workers, traced)) from error
    finally:
        filled.close()
        del items  # the last that holds the loader: torch waits for the workers to end
        _end(workers)


def _filled(
    windows: list[list[int]], items: Iterator[tuple[int, Any]], traced: _Traced
) -> Generator[dict[int, Encoded | str], None, None]:
    for window in windows:
        encoded = {}
        for row, item in itertools.islice(items, len(window)):
            if isinstance(item, MemoryError):
                raise UserError(
                    f"memory ran out while {traced.name(row)} was read; free memory or lower num_workers, or remove "
                    "the record if it happens again; the same command continues"
                )
            encoded[row] = item
        yield encoded


def _end(workers: list[BaseProcess]) -> None:
    """End workers that are stuck or that torch could not wait for; they are deaf to SIGTERM, which it sends."""
    if not workers:
        return
    torchs_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it would raise for each of them
    for process in workers:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, torchs_handler)


def _how_one_ended(workers: list[BaseProcess], traced: _Traced) -> str:
    """What is known of a worker that was killed, and of the record that it was reading."""
    reading = dict(zip(traced.processes, traced.reading, strict=True))
    for process in workers:
        if code := process.exitcode:
            ended = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
            row = reading.get(process.pid, _NOTHING)
            while_reading = f" while it read {traced.name(row)}" if row != _NOTHING else ""
            return (
                f"a process that reads records {ended}{while_reading}, most often because memory ran out; free memory "
                "or lower num_workers, or remove the record if it happens again; the same command continues"
            )
    return "a process that reads records ended; free memory or lower num_workers; the same command continues"
