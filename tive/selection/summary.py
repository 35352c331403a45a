"""What a selection's summary says: written and read by the same structs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from tive.util.errors import UserError
from tive.util.files import read_json

SUMMARY_END = "_summary.json"
ROWS_END = "_rows.npy"
SCORES_END = "_scores.csv"
# A scores file begins and ends with these; between them is a column for each score.
FIRST_COLUMNS = ["row", "id", "task"]
LAST_COLUMNS = ["times_selected", "left_out"]
MAX_COUNT, MAX_SIZE = 1 << 40, 1e300
Count = Annotated[int, Meta(ge=0, lt=MAX_COUNT)]
Size = Annotated[float, Meta(ge=0, lt=MAX_SIZE)]


class Task(Struct, frozen=True, rename={"name": "task"}):
    """One task of a selection; what is not defined for it, or for the method, is None.

    Attributes:
        records: of the data file; `counted` those that the method takes into account.
        value: `V_t`, its mean gradient norm.
        basis: what its budget is in proportion to: `V_t`, its records, a mean score, or 1; None where several rules
            share the total.
        budget: in records; `budget_before_rounding` is `p * N * basis / sum of basis`.
        selected: records written, a repeated one each time; `distinct` counts it once.
        budget_parts: where several rules share the total, what each gives this task, in records.
        sampled: of a selection from a sample, the records that the values are means of; `value_error` and
            `budget_error` are the standard errors of the value and the budget, `budget_interval` holds the budget in
            95% of samples.
        effective_sample_size: of its instance weights, between 1 and `counted`.
    """

    name: str
    records: Count
    counted: Count
    selected: Count
    distinct: Count
    excluded: bool = False
    value: Size | None = None
    basis: Size | None = None
    budget: Count | None = None
    budget_before_rounding: Size | None = None
    budget_parts: dict[str, Size] | None = None
    effective_sample_size: Size | None = None
    sampled: Count | None = None
    value_error: Size | None = None
    budget_error: Size | None = None
    budget_interval: tuple[Size, Size] | None = None


class UncountedRecord(Struct, frozen=True):
    """A record that counts in no mean and is never drawn."""

    row: Count
    reason: str
    id: str | None = None
    task: str | None = None


class SelectedFrom(Struct, frozen=True):
    """The data and the features. `match` is what the chunks have in common, None for the release's files."""

    data_path: str
    data_sha256: str
    data_records: Count
    gradient_path: str
    image_folder: str | None = None
    chunks: list[dict[str, Any]] = []
    match: dict[str, Any] | None = None


class Subset(Struct, frozen=True):
    """The file of selected records, or of their row numbers alone. `distinct` counts a repeated record once."""

    file: str
    records: Count
    sha256: str
    distinct: Count | None = None


class Summary(Struct, frozen=True):
    """A selection's arguments, inputs and results: enough to make the subset again and to check it.

    Attributes:
        method: `TIVE`, or the name of another method that wrote it.
        details: what this method alone has to say.
        gradient_pass: the manifests of the feature files, without what stands elsewhere in the summary.
    """

    arguments: dict[str, Any]
    versions: dict[str, Any]
    inputs: SelectedFrom
    tasks: Annotated[list[Task], Meta(min_length=1)]
    left_out: list[UncountedRecord]
    subset: Subset
    gradient_pass: list[dict[str, Any]]
    method: str = "TIVE"
    created: str = ""
    details: dict[str, Any] = {}


def encode_summary(summary: Summary) -> bytes:
    content = json.dumps(msgspec.to_builtins(summary), indent=2, ensure_ascii=False, allow_nan=False)
    # A path of bytes that are no UTF-8 has half a surrogate pair for each.
    return content.encode("utf-8", "backslashreplace") + b"\n"


class _Drawn(Struct):
    q: Size
    p: Size = 0.15


class _TiveArguments(Struct):
    """Of TIVE's arguments, those that are computed with when the summary is read."""

    arguments: _Drawn


def read_summary(path: Path) -> Summary:
    """Read a summary.

    Raises:
        UserError: the file cannot be read, or is not what a selection writes; the key is named.
    """
    try:
        summary = msgspec.convert(read_json(path), Summary)
        if summary.method == "TIVE":
            msgspec.convert({"arguments": summary.arguments}, _TiveArguments)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is not a selection's summary: {error}; make the selection again") from error
    names = [task.name for task in summary.tasks]
    if len(set(names)) != len(names):
        raise UserError(f"{path} names a task twice; make the selection again")
    return summary
