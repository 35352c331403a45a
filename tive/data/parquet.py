"""Records in Parquet files, or in a folder that `datasets` saved (Arrow): the columns that are needed, row group by row
group; what is selected is written as Parquet with the same schema and metadata.

A column is a key of each record. Images whose bytes lie in the row (a struct of `bytes` and `path` under `image` or
`images`, or a list of them) are read where a record is asked for by its row, and left on disk where all records are
gone through.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from tive.data.media import IMAGE_KEYS, StoredImage
from tive.util.errors import UserError
from tive.util.files import read_object, sha256_of
from tive.util.text import first_line, listed

GROUP_BYTES = 100 << 20
_BATCH_ROWS = 128
# Keys of turns with few values, each of which is made once for many rows.
_FEW_VALUES = ("from", "role")


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
        file, group, first = self.place(row)
        (batch,) = row_group(self.files[file], group).slice(row - first, 1).to_batches()
        (values,) = _as_objects(batch.to_struct_array(), with_bytes=True)
        return self._record(values, file, row, with_bytes=True)

    def __iter__(self) -> Iterator[Any]:
        """Every record in turn, read once from front to back, without the bytes of images."""
        row = 0
        with tqdm(total=self.count, desc=f"Reading {self.path.name}", unit=" records", delay=2) as bar:
            for file, path in enumerate(self.files):
                for batch in _batches(path, self.image_columns):
                    objects = _as_objects(batch.to_struct_array(), with_bytes=False)
                    if not self.image_columns and not self.folders[file]:  # nothing to put in
                        yield from objects
                    else:
                        for index, values in enumerate(objects):
                            yield self._record(values, file, row + index, with_bytes=False)
                    row += batch.num_rows
                    bar.update(batch.num_rows)

    def place(self, row: int) -> tuple[int, int, int]:
        """The file of a row, its row group and the group's first row."""
        file, group, first = self.groups[np.searchsorted(self.groups[:, 2], row, side="right") - 1].tolist()
        return file, group, first

    def _record(self, values: dict[str, Any], file: int, row: int, with_bytes: bool) -> dict[str, Any]:
        for column in self.image_columns & values.keys():
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
        return _first_bytes(path) in (b"PAR1", b"ARRO", b"\xff\xff\xff\xff") or path.suffix in (".parquet", ".arrow")
    except (OSError, ValueError):
        return False


def _first_bytes(file: Path) -> bytes:
    with open(file, "rb") as raw:
        return raw.read(4)


def open_table(path: Path) -> TableRecords:
    """Find the rows of a Parquet or Arrow file, or of all such files in a folder and the folders in it; a `UserError`
    where there is none, a file is cut or damaged, or its columns differ from those of the first."""
    import pyarrow
    import pyarrow.parquet as parquet

    files = _files(path)
    digest = hashlib.sha256()
    groups: list[tuple[int, int, int]] = []
    columns: set[str] = set()
    first_schema = None
    rows = 0
    for number, file in enumerate(files):
        try:
            if file.suffix == ".arrow" or _first_bytes(file) != b"PAR1":
                table = _arrow(file)
                schema, counts = table.schema, [batch.num_rows for batch in table.to_batches()]
                footer = sha256_of(file, sampled=True)
            else:
                source = parquet.ParquetFile(file)
                schema = source.schema_arrow
                counts = [source.metadata.row_group(group).num_rows for group in range(source.num_row_groups)]
                with open(file, "rb") as raw:
                    raw.seek(-8, os.SEEK_END)
                    size = int.from_bytes(raw.read(4), "little")
                    raw.seek(-8 - size, os.SEEK_END)
                    footer = hashlib.sha256(raw.read(size)).hexdigest()
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{file} is not Parquet or Arrow, or is cut or damaged; download it again") from error
        first_schema = schema if first_schema is None else first_schema
        if others := sorted(set(schema.names) ^ set(first_schema.names)):
            raise UserError(
                f"{file} has other columns than {files[0]} ({listed(others)}); keep one kind of file in the folder"
            )
        # A column of bytes, or of structs or lists with bytes in them.
        columns |= {field.name for field in schema if field.name in IMAGE_KEYS and "binary" in str(field.type)}
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
        return [path / entry["filename"] for entry in read_object(path / "state.json")["_data_files"]]
    files = sorted(path.rglob("*.parquet"))
    others = sorted(file for file in path.rglob("*.json*") if file.suffix in (".json", ".jsonl"))
    if not files:
        raise UserError(f"cannot read {path}: it is a folder without Parquet files; name a data file, or such a folder")
    if others:
        raise UserError(f"{path} holds Parquet and JSON ({others[0].name}); name the files of one kind")
    return files


def _arrow(file: Path) -> Any:
    """A memory-mapped Arrow file; of the stream form, which `datasets` writes, or the file form."""
    import pyarrow

    try:
        return pyarrow.ipc.open_stream(pyarrow.memory_map(str(file))).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def row_group(file: Path, group: int) -> Any:
    """A row group with all its columns."""
    return _decoded_group(file, group, os.stat(file).st_mtime_ns if file.exists() else 0)


@lru_cache(maxsize=2)
def _decoded_group(file: Path, group: int, _changed: int) -> Any:
    """The last two row groups are kept, so that neighbouring rows are decoded once."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        if _first_bytes(file) != b"PAR1":
            return pyarrow.Table.from_batches([_arrow(file).to_batches()[group]])
        # Without threads: a worker of the loader may be a fork.
        return parquet.ParquetFile(file).read_row_group(group, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read in row group {group}; it was cut or changed: download it again"
        ) from error


def _batches(file: Path, image_columns: frozenset[str]) -> Iterator[Any]:
    """A file's rows in batches; of Parquet the bytes of images are not read."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        if _first_bytes(file) != b"PAR1":
            yield from _arrow(file).to_batches(_BATCH_ROWS)
            return
        source = parquet.ParquetFile(file)
        leaves = [source.schema.column(index).path for index in range(len(source.schema))]
        needed = [leaf for leaf in leaves if leaf.split(".")[0] not in image_columns or not leaf.endswith(".bytes")]
        yield from source.iter_batches(_BATCH_ROWS, columns=needed, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read; it was cut or changed: download it again") from error


def _as_objects(array: Any, with_bytes: bool) -> list[Any]:
    """`array.to_pylist()`, a column at a time and not a value, in a third of the time for texts.

    A key that is null is left out of its object: a table gives every row the keys of all rows.

    Args:
        with_bytes: where not, the bytes in an object are None.
    """
    import pyarrow.types as types

    values: list[Any]
    if types.is_struct(array.type) and array.type.num_fields:
        # One text for each key, which the code's own are compared to at once.
        names = [sys.intern(array.type.field(index).name) for index in range(array.type.num_fields)]
        columns = array.flatten()
        objects: list[Any] = []
        for name, column in zip(names, columns, strict=True):
            if name in _FEW_VALUES and types.is_string(column.type):
                encoded = column.dictionary_encode()
                texts = np.array([*map(sys.intern, encoded.dictionary.to_pylist()), None], object)
                objects.append(texts[encoded.indices.fill_null(-1).to_numpy()].tolist())
            elif name == "bytes" and not with_bytes:
                objects.append([None] * len(column))
            else:
                objects.append(_as_objects(column, with_bytes))
        if len(names) == 2:  # turns and images, the most by far
            first, second = names
            values = [{first: one, second: other} for one, other in zip(*objects, strict=False)]
        else:
            values = [dict(zip(names, row, strict=False)) for row in zip(*objects, strict=False)]
        for name, column in zip(names, columns, strict=True):
            if column.null_count:
                for index in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
                    del values[index][name]
    elif types.is_list(array.type) or types.is_large_list(array.type):
        flat = _as_objects(array.flatten(), with_bytes)
        ends = np.cumsum(array.value_lengths().fill_null(0).to_numpy()).tolist()
        values = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    elif types.is_string(array.type) or types.is_large_string(array.type):
        return array.to_numpy(zero_copy_only=False).tolist()
    else:
        return array.to_pylist()
    if array.null_count:
        values = [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


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
        for (number, group, first), taken in itertools.groupby(map(int, rows), records.place):
            table = row_group(records.files[number], group).take([row - first for row in taken])
            if table.schema != source:
                try:
                    table = table.select(source.names).cast(source)
                except pyarrow.ArrowException as error:
                    raise UserError(
                        f"{records.files[number]} has columns of other types than {records.files[0]} "
                        f"({first_line(error)}); select from each by itself"
                    ) from error
            values = {name: table.column(name) for name in source.names}
            values |= {name: texts[written : written + len(table)] for name, texts in columns.items()}
            waiting.append(pyarrow.Table.from_pydict(values, schema))
            size += table.nbytes
            written += len(table)
            if size >= GROUP_BYTES:
                writer.write_table(pyarrow.concat_tables(waiting))
                waiting, size = [], 0
        if waiting:
            writer.write_table(pyarrow.concat_tables(waiting))
