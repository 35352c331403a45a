"""Parquet and Arrow files, below the records: schema, row groups, batches without images, Python's objects of them."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tive.data.media import IMAGE_KEYS
from tive.util.errors import UserError
from tive.util.files import sha256_of

_BATCH_ROWS = 128
# Keys of turns with few values, each of which is made once for many rows.
_FEW_VALUES = ("from", "role")


def look_into(file: Path) -> tuple[Any, list[int], set[str], str]:
    """The schema of a file, the rows of its groups, the columns that hold images, and what tells it from another."""
    import pyarrow.parquet as parquet

    if file.suffix == ".arrow" or not _is_parquet(file):
        table = _arrow(file)
        counts = [batch.num_rows for batch in table.to_batches()]
        return table.schema, counts, _columns_with_bytes(table.schema), sha256_of(file, sampled=True)
    source = parquet.ParquetFile(file)
    counts = [source.metadata.row_group(group).num_rows for group in range(source.num_row_groups)]
    with open(file, "rb") as raw:
        raw.seek(-8, os.SEEK_END)
        size = int.from_bytes(raw.read(4), "little")
        raw.seek(-8 - size, os.SEEK_END)
        footer = hashlib.sha256(raw.read(size)).hexdigest()
    return source.schema_arrow, counts, _columns_with_bytes(source.schema_arrow), footer


def _is_parquet(file: Path) -> bool:
    with open(file, "rb") as raw:
        return raw.read(4) == b"PAR1"


def _columns_with_bytes(schema: Any) -> set[str]:
    """The columns under a key of images that hold their bytes."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_list(kind) or types.is_large_list(kind):
            return holds_bytes(kind.value_type)
        if types.is_struct(kind):
            return any(kind.field(index).name == "bytes" for index in range(kind.num_fields))
        return types.is_binary(kind) or types.is_large_binary(kind)

    return {field.name for field in schema if field.name in IMAGE_KEYS and holds_bytes(field.type)}


def _arrow(file: Path) -> Any:
    """A memory-mapped Arrow file; of the stream form, which `datasets` writes, or the file form."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(pyarrow.memory_map(str(file))).read_all()


def row_group(file: Path, group: int) -> Any:
    """A row group with all its columns."""
    try:
        return _decoded_group(file, group, os.stat(file).st_mtime_ns)
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}; put it back") from error


@lru_cache(maxsize=2)
def _decoded_group(file: Path, group: int, _changed: int) -> Any:
    """The last two row groups are kept, so that neighbouring rows are decoded once."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        if not _is_parquet(file):
            return pyarrow.Table.from_batches([_arrow(file).to_batches()[group]])
        # Without threads: a worker of the loader may be a fork.
        return parquet.ParquetFile(file).read_row_group(group, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{file} cannot be read in row group {group}; it was cut or changed: download it again"
        ) from error


def batches(file: Path, image_columns: frozenset[str]) -> Iterator[Any]:
    """A file's rows in batches, without the bytes of images."""
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        if not _is_parquet(file):
            table = _arrow(file)
            for column in image_columns:
                place = table.schema.get_field_index(column)
                table = table.set_column(place, column, _paths_alone(table.column(column)))
            yield from table.to_batches(_BATCH_ROWS)
            return
        source = parquet.ParquetFile(file)
        leaves = [source.schema.column(index).path for index in range(len(source.schema))]
        bytes_of = {
            f"{column}{inner}.bytes" for column in image_columns for inner in ("", ".list.element", ".list.item")
        }
        needed = [leaf for leaf in leaves if leaf not in bytes_of]
        yield from source.iter_batches(_BATCH_ROWS, columns=needed, use_threads=False)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file} cannot be read; it was cut or changed: download it again") from error


def _paths_alone(column: Any) -> Any:
    """A column of images without their bytes."""
    import pyarrow
    import pyarrow.compute as compute

    def pruned(array: Any) -> Any:
        if pyarrow.types.is_list(array.type):
            return pyarrow.ListArray.from_arrays(array.offsets, pruned(array.values), mask=array.is_null())
        if pyarrow.types.is_struct(array.type) and array.type.get_field_index("path") >= 0:
            return pyarrow.StructArray.from_arrays(
                [compute.struct_field(array, "path")], ["path"], mask=array.is_null()
            )
        return array

    return pyarrow.chunked_array([pruned(chunk) for chunk in column.chunks])


def as_objects(array: Any) -> list[Any]:
    """`array.to_pylist()`, a column at a time and not a value, in a third of the time for texts.

    A key that is null is left out of its object: a table gives every row the keys of all rows.
    """
    import pyarrow.types as types

    values: list[Any]
    if types.is_struct(array.type) and array.type.num_fields:
        # One text for each key, which the code's own are compared to at once.
        names = [sys.intern(array.type.field(index).name) for index in range(array.type.num_fields)]
        columns = array.flatten()
        objects = [
            (_few_texts if name in _FEW_VALUES else as_objects)(column)
            for name, column in zip(names, columns, strict=True)
        ]
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
        flat = as_objects(array.flatten())
        ends = np.cumsum(array.value_lengths().fill_null(0).to_numpy()).tolist()
        values = [flat[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    elif types.is_string(array.type) or types.is_large_string(array.type):
        return array.to_numpy(zero_copy_only=False).tolist()
    else:
        return array.to_pylist()
    if array.null_count:
        values = [value if valid else None for value, valid in zip(values, array.is_valid().to_pylist(), strict=True)]
    return values


def _few_texts(array: Any) -> list[Any]:
    """`as_objects` of a column with few values: one text for all rows that hold it."""
    import pyarrow.types as types

    if not types.is_string(array.type):
        return as_objects(array)
    encoded = array.dictionary_encode()
    texts = np.array([*map(sys.intern, encoded.dictionary.to_pylist()), None], object)
    return texts[encoded.indices.fill_null(-1).to_numpy()].tolist()
