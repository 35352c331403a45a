"""Files brought into the page cache while the processor is busy with something else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tive.util.memory import available_memory

_BLOCK_BYTES = 8 << 20


def read_ahead(*folders: str | os.PathLike[str]) -> None:
    """Start to read folders' feature files in the background, as many as half of the available memory holds.

    Rows out of order, which the passes take, would read a cold disk in small steps.

    A file that cannot be read is left to the one who opens it.
    """
    paths = [path for folder in folders for path in sorted(Path(folder).glob("output_*"))]
    threading.Thread(target=_read, args=(paths,), daemon=True).start()


def _read(paths: list[Path]) -> None:
    room = (available_memory() or 0) // 2
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        try:
            room -= path.stat().st_size
            if room < 0:
                return
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        except OSError:
            continue
