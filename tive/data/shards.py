"""Records packed into Parquet shards in TRL's form (`parts`), with the bytes of their images in the rows."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from tive.data.conversations import from_llava, to_llava
from tive.data.images import BadImage, find_image
from tive.data.media import Image
from tive.data.parquet import GROUP_BYTES
from tive.data.records import Records, name_of
from tive.util.errors import UserError
from tive.util.files import whole_file

GROUPS_A_SHARD = 5
_BATCH_ROWS = 1024


def packed(record: Any) -> dict[str, Any]:
    """A record as a row: `messages` with parts, a list of `images`, and its other keys; a `ValueError` where it has no
    such form. A null or an empty object, which Parquet tells from no key in no other row, is null."""
    row = from_llava(to_llava(record), "parts")
    images = row.pop("images", [])
    return {key: _storable(value) for key, value in row.items()} | {"images": images}


def _storable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _storable(inner) for key, inner in value.items()} or None
    return [_storable(inner) for inner in value] if isinstance(value, list) else value


def schema_of(records: Records) -> tuple[Any, dict[int, str]]:
    """The schema of all records as rows, and why records have no place in it, by row."""
    import pyarrow

    schema, problems = pyarrow.schema([]), {}
    refused = (pyarrow.ArrowException, ValueError, OverflowError, RecursionError)

    def joined(rows: list[dict[str, Any]]) -> Any:
        more = pyarrow.schema(list(pyarrow.array(rows).type))
        return pyarrow.unify_schemas([schema, more], promote_options="permissive")

    every = enumerate(records)
    while batch := list(itertools.islice(every, _BATCH_ROWS)):
        rows = {}
        for row, record in batch:
            try:
                rows[row] = packed(record) | {"images": None}
            except ValueError as error:
                problems[row] = str(error)
        if not rows:
            continue
        try:
            schema = joined([*rows.values()])
        except refused:
            for row, values in rows.items():
                try:
                    schema = joined([values])
                except refused as error:
                    what = str(error).removeprefix("Unable to merge: ").splitlines()[0]
                    problems[row] = f"has values that do not fit into a column with those of the rows before: {what}"
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [field for field in schema if field.name != "images"] + [pyarrow.field("images", pyarrow.list_(image))]
    # By this `datasets` takes the column as pictures.
    features = {"info": {"features": {"images": [{"_type": "Image"}]}}}
    return pyarrow.schema(fields, metadata={"huggingface": json.dumps(features)}), problems


def write_shards(target: Path, records: Records, schema: Any, image_folder: str) -> int:
    """Write all records as Parquet files below `target`, which is there when all are written, and count the files; a
    `UserError` where a file cannot be written, or an image cannot be read.

    A row group holds about `GROUP_BYTES`, a file `GROUPS_A_SHARD` of them. Files that an earlier call left unfinished
    are kept, if it was for the same records and image folder.
    """
    import pyarrow.parquet as parquet

    made_of = hashlib.sha256(f"{records.fingerprint} {os.path.abspath(image_folder)}".encode()).hexdigest()
    unfinished = target.with_name(f".{target.name}.{made_of[:16]}.unfinished")
    shards = sorted(unfinished.glob("train-*.parquet"))
    start = sum(parquet.read_metadata(shard).num_rows for shard in shards)
    number = len(shards)
    groups = _groups(records, range(start, len(records)), schema, image_folder)
    with tqdm(total=len(records), initial=start, desc="Packing", unit=" records", delay=2) as bar:
        for first in groups:
            path = unfinished / f"train-{number:05d}.parquet"
            with whole_file(path) as file, parquet.ParquetWriter(file, schema) as writer:
                for group in itertools.chain([first], itertools.islice(groups, GROUPS_A_SHARD - 1)):
                    writer.write_table(group)
                    bar.update(group.num_rows)
            number += 1
    os.rename(unfinished, target)
    return number


def _groups(records: Records, rows: range, schema: Any, image_folder: str) -> Iterator[Any]:
    """The tables of the row groups."""
    import pyarrow

    waiting, size = [], 0
    for row in rows:
        record = records[row]
        values = packed(record)
        try:
            values["images"] = [_stored(image, image_folder) for image in values["images"]]
        except (BadImage, OSError) as error:
            raise UserError(
                f"{records.path}: {name_of(row, record)}: {error}; it was there before: run it again"
            ) from error
        waiting.append(values)
        size += len(str(values["messages"])) + sum(len(image["bytes"]) for image in values["images"])
        if size >= GROUP_BYTES or row == rows[-1]:
            try:
                yield pyarrow.Table.from_pylist(waiting, schema)
            except pyarrow.ArrowException as error:
                where = f"{records.path}: records {row + 1 - len(waiting)} to {row}"
                raise UserError(f"{where} have a value that does not fit into its column: {error}") from error
            waiting, size = [], 0


def _stored(image: Image, folder: str) -> dict[str, Any]:
    if isinstance(image, str):
        return {"bytes": Path(find_image(folder, image)).read_bytes(), "path": image}
    return {"bytes": image.content, "path": image.name}
