"""The data loader: encoded records in order, read ahead by worker processes while the device computes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from tive.data.conversations import images_of, without_images
from tive.data.problems import images_named
from tive.data.records import Records, name_of
from tive.models import UNSUPERVISED, Encoded, LeftOut
from tive.util.errors import UserError

# Records that the workers together are ahead.
_AHEAD = 64
_NOTHING = -1
_LESS_MEMORY = "free memory or lower num_workers, or remove the record if it happens again; the same command continues"


def workers_beside(device: torch.device, wanted: int | None) -> int:
    """How many processes read and encode beside a device, where nobody chose."""
    return wanted if wanted is not None else 4 if device.type == "cuda" else 1


class Loader(Dataset):
    """Reads and encodes records in `num_workers` processes, or in this one.

    As torch's data set it maps a row to the row and its encoded record, the reason why there is none, or the lack of
    memory for it.

    Args:
        encode: a family's `encode` with its processor: a record and the image folder to what is computed.
        text_alone: encode records with images a second time, without them.
    """

    def __init__(
        self,
        encode: Callable[[Any, str], Encoded],
        records: Records,
        image_folder: str,
        num_workers: int = 0,
        text_alone: bool = False,
    ) -> None:
        self.encode, self.records, self.image_folder = encode, records, image_folder
        self.num_workers, self.text_alone = num_workers, text_alone
        # Records that the workers are ahead, together.
        self.ahead = num_workers * max(2, _AHEAD // max(1, num_workers))
        # Of each worker: its process, and the row that it is reading, for when it is killed.
        self.processes = multiprocessing.RawArray("q", num_workers)
        self.reading = multiprocessing.RawArray("q", [_NOTHING] * num_workers)

    def __getitem__(self, row: int) -> tuple[int, Encoded | str | UserError]:
        worker = get_worker_info()
        if worker is not None:
            self.processes[worker.id], self.reading[worker.id] = os.getpid(), row
        item: Encoded | str | UserError
        try:
            record = self.records[row]
            item = self.encode(record, self.image_folder)
            if self.text_alone and images_of(record):
                with contextlib.suppress(LeftOut):
                    item = replace(item, text_alone=self.encode(without_images(record), self.image_folder))
        except LeftOut as reason:
            item = str(reason)
        except MemoryError:  # a lack of this machine, which is no reason to leave the record out
            item = UserError(f"memory ran out while {self._name(row)} was read; {_LESS_MEMORY}")
        except Exception as error:  # one record in 665,000 that no check foresaw is not to end a run of days
            item = f"cannot be encoded: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        if worker is not None:
            self.reading[worker.id] = _NOTHING
        return row, item

    @contextlib.contextmanager
    def read(self, rows: Sequence[int]) -> Iterator[Iterator[tuple[int, Encoded | str | UserError]]]:
        """Each row with its item, in order, while the block runs.

        Raises:
            UserError: a worker was killed, which torch reports wherever the block is.
        """
        loader = DataLoader(
            self,
            sampler=rows,
            batch_size=None,
            collate_fn=tuple,  # leaves it as it is: tensors would be shared, and take a file descriptor each
            num_workers=self.num_workers,
            prefetch_factor=self.ahead // self.num_workers if self.num_workers else None,
            worker_init_fn=_prepare_worker,
        )
        others = multiprocessing.active_children()
        items = iter(loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        try:
            yield items
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            reading = dict(zip(self.processes, self.reading, strict=True))
            what, row = "ended", _NOTHING
            for process in workers:
                if code := process.exitcode:
                    what = f"was killed (signal {-code})" if code < 0 else f"ended (exit code {code})"
                    row = reading.get(process.pid, _NOTHING)
            where = f" while it read {self._name(row)}" if row != _NOTHING else ""
            raise UserError(
                f"a process that reads records {what}{where}, most often because memory ran out; {_LESS_MEMORY}"
            ) from error
        finally:
            _end(workers)

    def _name(self, row: int) -> str:
        """How an error names the record of a row, with its image."""
        record = self.records[row]
        images = images_named(record)
        return f"{self.records.path}: {name_of(row, record)}" + (f", image {images}" if images else "")


def usable(
    items: Iterable[tuple[int, Encoded | str | UserError]], reasons: dict[int, str], skip_bad: bool
) -> Iterator[tuple[int, Encoded]]:
    """The records that could be encoded, with their rows; the reasons of the others go to `reasons`.

    Raises:
        UserError: memory ran out, or a record is bad and such are not to be skipped.
    """
    for row, item in items:
        if isinstance(item, Encoded):
            yield row, item
        elif isinstance(item, UserError):
            raise item
        elif skip_bad or item in UNSUPERVISED:
            reasons[row] = item
        else:
            raise UserError(
                f"record {row}: {item}; repair it, or let such records be left out (on_bad_record skip); the run "
                "continues where it stopped"
            )


def _prepare_worker(_worker: int) -> None:
    # Ctrl-C and SIGTERM reach the whole process group; the main process finishes its window and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = os.getppid()

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    # A worker that sends a record when the main process is killed would wait for ever, and hold its GPU memory.
    threading.Thread(target=end_with_parent, daemon=True).start()


def _end(workers: list[BaseProcess]) -> None:
    """End the workers, stuck ones too; they are deaf to SIGTERM, which torch would send."""
    if not workers:
        return
    torchs_handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it would raise for each of them
    for process in workers:
        process.kill()
        process.join()
    signal.signal(signal.SIGCHLD, torchs_handler)
