"""How far the chunks of a feature folder are, told without torch: `python -m tive.features.status DIR NUM_CHUNKS`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def records_done(folder: Path, num_chunks: int) -> tuple[int, int]:
    """How many records have an end on disk, in finished chunks and in windows, and how many the data file has.

    The second number is 0 while no chunk has been begun.
    """
    done = total = 0
    for chunk in range(num_chunks):
        match = _read(folder / f"manifest_{chunk}.json").get("match")
        if match:
            done += match["stop"] - match["start"]
        else:
            progress = folder / f"progress_{chunk}"
            match = _read(progress / "match.json")
            windows = [_read(path).get("columns", {}) for path in progress.glob("window_*.json")]
            done += sum(len(next(iter(columns.values()), [])) for columns in windows)
        total = max(total, match.get("data_records", 0))
    return done, total


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):  # not there, or just being replaced
        return {}
    return content if isinstance(content, dict) else {}


if __name__ == "__main__":
    print(*records_done(Path(sys.argv[1]), int(sys.argv[2])))
