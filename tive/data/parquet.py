"""Records in Parquet files, or in a folder that `datasets` saved (Arrow): the columns that are needed, row group by row
group; what is selected is written as Parquet with the same schema and metadata.

A column is a key of each record. Images whose bytes lie in the row (a struct of `bytes` and `path` under `image` or
`images`, or a list of them) are read where a record is asked for by its row, and left on disk where all records are
gone through.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from tive.data.arrow import as_objects, batches, look_into, row_group
from tive.data.media import StoredImage
from tive.util.errors import UserError
from tive.util.text import listed

_MOST_ROWS = 256
_GROUP_BYTES = 100 << 20
_DATA_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True)
class TableRecords:
    """The rows of Parquet or Arrow files, in the order of the files' paths.

    Attributes:
        fingerprint: SHA-256 of the files' names, sizes and Parquet footers; the bytes of images play no part.
        files: sorted by path; `folders` are those that they lie in, below the path, empty for the path itself.
        groups: int64 `[g, 3]`, the file, its row group and the first row of each row group.
        count: rows.
        image_columns: of `IMAGE_KEYS`, those whose images lie in the rows.
    """

    path: Path
    fingerprint: str
    files: tuple[Path, ...]
    folders: tuple[str, ...]
    groups: np.ndarray
    count: int
    image_columns: frozenset[str]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        row = range(self.count)[row]
        file, group, first = self._place(row)
        (batch,) = row_group(self.files[file], group).slice(row - first, 1).to_batches()
        (values,) = as_objects(batch.to_struct_array())
        return self._record(values, file, row, with_bytes=True)

    def __iter__(self) -> Iterator[Any]:
        """Every record in turn, read once from front to back, without the bytes of images."""
        row = 0
        with tqdm(total=self.count, desc=f"Reading {self.path.name}", unit=" records", delay=2) as bar:
            for file, path in enumerate(self.files):
                for batch in batches(path, self.image_columns):
                    objects = as_objects(batch.to_struct_array())
                    if not self.image_columns and not self.folders[file]:  # nothing to put in
                        yield from objects
                    else:
                        for index, values in enumerate(objects):
                            yield self._record(values, file, row + index, with_bytes=False)
                    row += batch.num_rows
                    bar.update(batch.num_rows)

    def _place(self, row: int) -> tuple[int, int, int]:
        file, group, first = self.groups[np.searchsorted(self.groups[:, 2], row, side="right") - 1].tolist()
        return file, group, first

    def _record(self, values: dict[str, Any], file: int, row: int, with_bytes: bool) -> dict[str, Any]:
        for column in self.image_columns:
            if column not in values:
                continue
            entries = values[column] if isinstance(values[column], list) else [values[column]]
            where = f"{self.files[file].name}, record {row}, {column}"
            values[column] = [_image(entry, f"{where} {index}", with_bytes) for index, entry in enumerate(entries)]
        if self.folders[file]:
            values.setdefault("folder", self.folders[file])
        return values


def _image(entry: Any, where: str, with_bytes: bool) -> Any:
    """An image of a row: a struct that is there is one, also where its bytes are null or were not read."""
    if isinstance(entry, bytes):
        return StoredImage(where, entry)
    # In another file of the folder the column may be of another type.
    if not isinstance(entry, dict) or (entry and entry.keys().isdisjoint(("bytes", "path"))):
        return entry
    path, content = entry.get("path"), entry.get("bytes")
    if with_bytes and path and not content:
        return path
    return StoredImage(path or where, content or b"" if with_bytes else None)


def is_table(path: Path) -> bool:
    """Whether a path is read as a table: a folder, or a file that begins as Parquet or Arrow does."""
    if path.is_dir():
        return True
    if not path.is_file():  # to open a pipe would wait for its writer
        return False
    try:
        with open(path, "rb") as file:
            return file.read(4) in (b"PAR1", b"ARRO", b"\xff\xff\xff\xff") or path.suffix in (".parquet", ".arrow")
    except (OSError, ValueError):
        return False


def open_table(path: Path) -> TableRecords:
    """Find the rows of a Parquet or Arrow file, or of all such files in a folder and the folders in it.

    Raises:
        UserError: there is none, a file is cut or damaged, or its columns differ from those of the first.
    """
    import pyarrow

    files = _files(path)
    digest = hashlib.sha256()
    groups: list[tuple[int, int, int]] = []
    columns: set[str] = set()
    first_schema = None
    rows = 0
    for number, file in enumerate(files):
        try:
            schema, counts, stored, footer = look_into(file)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{file} is not Parquet or Arrow, or is cut or damaged; download it again") from error
        first_schema = schema if first_schema is None else first_schema
        if set(schema.names) != set(first_schema.names):
            others = listed(sorted(set(schema.names) ^ set(first_schema.names)))
            raise UserError(f"{file} has other columns than {files[0]} ({others}); keep one kind of file in the folder")
        columns |= stored
        digest.update(f"{os.path.relpath(file, path)} {file.stat().st_size} {footer}\n".encode())
        for group, count in enumerate(counts):
            if count:
                groups.append((number, group, rows))
                rows += count
    if not rows:
        raise UserError(f"{path} holds no records; name a data file with at least one")
    below = [os.path.relpath(file.parent, path) if path.is_dir() else "." for file in files]
    folders = tuple("" if folder == "." else folder for folder in below)
    places = np.array(groups, np.int64)
    return TableRecords(path, digest.hexdigest(), tuple(files), folders, places, rows, frozenset(columns))


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").is_file():
        names = listed(sorted(folder.name for folder in path.iterdir() if folder.is_dir()))
        raise UserError(f"{path} holds several data sets ({names}); name one of these folders")
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text())
        return [path / entry["filename"] for entry in state["_data_files"]]
    files = sorted(path.rglob("*.parquet"))
    others = sorted(file for file in path.rglob("*.json*") if file.suffix in _DATA_SUFFIXES)
    if not files:
        raise UserError(f"cannot read {path}: it is a folder without Parquet files; name a data file, or such a folder")
    if others:
        raise UserError(f"{path} holds Parquet and JSON ({others[0].name}); name the files of one kind")
    return files


def write_table(
    file: BinaryIO, records: TableRecords, rows: Iterable[int], columns: Mapping[str, Sequence[str]]
) -> None:
    """Write the rows, in that order, as Parquet with the schema and metadata of the first file.

    Args:
        columns: of the file's columns, those that get other values, or are new; a text for each of `rows`.
    """
    import pyarrow
    import pyarrow.parquet as parquet

    source = row_group(records.files[0], int(records.groups[0, 1])).schema
    schema = source
    for name in columns:
        place = schema.get_field_index(name)
        field = pyarrow.field(name, pyarrow.string())
        schema = schema.append(field) if place < 0 else schema.set(place, field)
    waiting: list[Any] = []
    size = written = 0
    with parquet.ParquetWriter(file, schema) as writer:

        def flush() -> None:
            if waiting:
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting.clear()

        for (number, group, first), taken in _by_group(records, rows):
            table = row_group(records.files[number], group).take([row - first for row in taken])
            if table.schema != source:
                try:
                    table = table.select(source.names).cast(source)
                except pyarrow.ArrowException as error:
                    what = str(error).splitlines()[0]
                    raise UserError(
                        f"{records.files[number]} has columns of other types than {records.files[0]} ({what}); select "
                        "from each by itself"
                    ) from error
            values = {name: table.column(name) for name in source.names}
            values |= {name: texts[written : written + len(taken)] for name, texts in columns.items()}
            waiting.append(pyarrow.Table.from_pydict(values, schema))
            size += table.nbytes
            written += len(taken)
            if size >= _GROUP_BYTES:
                flush()
                size = 0
        flush()


def _by_group(records: TableRecords, rows: Iterable[int]) -> Iterator[tuple[tuple[int, int, int], list[int]]]:
    """Consecutive rows of one row group together, with their file, group and the group's first row."""
    place, taken = None, []
    for row in map(int, rows):
        here = records._place(row)
        if place is not None and (here != place or len(taken) >= _MOST_ROWS):
            yield place, taken
            taken = []
        place = here
        taken.append(row)
    if place is not None:
        yield place, taken
