"""A folder of 200 subsets, 1,000,000 rows in FineVision's columns, whose images of 50 KB are those of a few files.

python tests/helpers/many_subsets.py FOLDER writes 4 files of 5,000 rows (1 GB) and links them into the subsets.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet

ROWS, FILES, SUBSETS, IMAGE_BYTES, GROUP_ROWS = 5000, 4, 200, 50_000, 1000
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
TURN = pyarrow.struct([("user", pyarrow.string()), ("assistant", pyarrow.string())])
SCHEMA = pyarrow.schema(
    [("images", pyarrow.list_(IMAGE)), ("texts", pyarrow.list_(TURN)), ("source", pyarrow.string())]
)


def write_file(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with parquet.ParquetWriter(path, SCHEMA, use_dictionary=["source"]) as writer:
        for group in range(ROWS // GROUP_ROWS):
            rows = [
                {
                    "images": [{"bytes": os.urandom(IMAGE_BYTES), "path": None}],
                    "texts": [{"user": f"What is shown in {number} {group} {row}?", "assistant": "Noise. " * 20}] * 3,
                    "source": f"source {number}",
                }
                for row in range(GROUP_ROWS)
            ]
            writer.write_table(pyarrow.Table.from_pylist(rows, SCHEMA))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for subset in range(SUBSETS):
        path = folder / f"subset_{subset:03d}" / "0.parquet"
        if subset < FILES:
            write_file(path, subset)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.link(folder / f"subset_{subset % FILES:03d}" / "0.parquet", path)
