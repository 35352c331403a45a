"""Files brought into the page cache while the processor is busy with something else."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from tive.util.memory import available_memory

_BLOCK_BYTES = 8 << 20


def read_ahead(folder: str | os.PathLike[str]) -> None:
    """Start to read a folder's feature files in the background, as many as half of the available memory holds.

    A file that cannot be read is left to the one who opens it.
    """
    threading.Thread(target=_read, args=(sorted(Path(folder).glob("output_*")),), daemon=True).start()


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
