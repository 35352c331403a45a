"""Encoded records, window by window, read ahead by worker processes while the device computes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tive.data.records import RecordFile
from tive.models import Encoded, Family, LeftOut
from tive.util.errors import UserError


class EncodedRecords(Dataset):
    """Row of the data file -> `(row, encoded record)`, or `(row, reason)` for one that cannot be encoded."""

    def __init__(self, family: Family, processor: Any, records: RecordFile, image_folder: str) -> None:
        # The function and not its module, which could not be sent to a process that is not forked.
        self.encode, self.processor, self.records, self.image_folder = family.encode, processor, records, image_folder

    def __getitem__(self, row: int) -> tuple[int, Encoded | str]:
        try:
            return row, self.encode(self.processor, self.records[row], self.image_folder)
        except LeftOut as reason:
            return row, str(reason)
        except Exception as error:  # one record in 665,000 that no check foresaw is not to end a run of days
            return row, f"cannot be encoded: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


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


def encoded_windows(
    dataset: EncodedRecords, windows: list[list[int]], num_workers: int
) -> Iterator[dict[int, Encoded | str]]:
    """Yield each window's encoded records by row. While one is used, the next is being filled."""
    loader = DataLoader(
        dataset,
        sampler=[row for window in windows for row in window],
        batch_size=None,
        collate_fn=_as_it_is,
        num_workers=num_workers,
        prefetch_factor=16 if num_workers else None,
        worker_init_fn=_prepare_worker,
    )

    stopped = threading.Event()
    workers: list[BaseProcess] = []

    def fill() -> Iterator[dict[int, Encoded | str]]:
        items = iter(loader)
        workers.extend(multiprocessing.active_children())
        for window in windows:
            encoded = {}
            for _ in window:
                if stopped.is_set():
                    return
                row, item = next(items)
                encoded[row] = item
            yield encoded

    return fill() if num_workers == 0 else _one_ahead(fill(), stopped, workers)


def _one_ahead(windows: Iterator[Any], stopped: threading.Event, workers: list[BaseProcess]) -> Iterator[Any]:
    """Run an iterator in a thread, one item ahead of its consumer; it ends early when `stopped` is set."""
    ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=1)

    def put(kind: str, item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put((kind, item), timeout=0.5)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in windows:
                if not put("item", item):
                    return
            put("end", None)
        except BaseException as error:  # handed to the consumer
            put("error", error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, item = ready.get(timeout=2)
            except queue.Empty:
                # A worker that is killed while it sends a record leaves the thread waiting for the rest, for ever.
                _refuse_dead(workers)
                continue
            if kind == "end":
                return
            if kind == "error":
                _refuse_dead(workers)
                raise item
            yield item
    finally:
        stopped.set()
        thread.join(timeout=5)
        for process in multiprocessing.active_children():  # one that is stuck, and deaf to SIGTERM as all of them are
            process.kill()


def _refuse_dead(workers: list[BaseProcess]) -> None:
    for process in workers:
        if process.exitcode:
            raise UserError(
                f"a process that reads records ended (exit code {process.exitcode}), most often because memory ran "
                "out; free memory or lower --num_workers; the same command continues"
            )
