"""What can be known before any GPU time: data, images, disk. Bad records are counted, shown and written down."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tive.data import bad_records
from tive.data.media import IMAGE_TAG
from tive.data.scan import Checked
from tive.features.manifest import LeftOutRecord
from tive.features.progress import progress_folder
from tive.util.errors import UserError
from tive.util.text import shown

LONGEST_NAME = 120
# Above this share of the chunk, and above a few, it is not the records that are wrong.
_MOST_LEFT_OUT = 0.02
_FEW = 2


@dataclass(frozen=True)
class Tolerance:
    """Which records may be left out of a run.

    Attributes:
        bad: those that cannot be used; else the first of them stops the run.
        most: the share of the chunk that may be left out for what is rarely the records' fault; None for the default,
            2% or two records.
    """

    bad: bool = False
    most: float | None = None

    def limit(self, count: int) -> float:
        """The number of a chunk's records that may be left out for that."""
        return max(_MOST_LEFT_OUT * count, _FEW) if self.most is None else self.most * count


def left_out_entry(row: int, record: Any, reason: str) -> LeftOutRecord:
    """How a manifest names a record that was left out."""
    return LeftOutRecord(row, bad_records.identity_of(record), reason)


def report_bad_records(checked: Checked, folder: Path, chunk_idx: int, stop: bool) -> None:
    """Say what is wrong or odd: counts, the first ten, and a file with all that cannot be used.

    Raises:
        UserError: records are bad, and `stop` is set.
    """
    if checked.tags_alone:
        print(
            f"{len(checked.tags_alone)} records have {IMAGE_TAG} in their text and no image, and it is read as text "
            f"(the first: record {checked.tags_alone[0]}); where an image is meant, name it under `image`"
        )
    if checked.renamed:
        first, stand_in = next(iter(checked.renamed.items()))
        name, found = bad_records.images_named(checked.records[first]), os.path.basename(stand_in)
        print(
            f"{len(checked.renamed)} records have their image under another extension, in other capitals or in another "
            f"Unicode form, and it is used (the first: record {first}, {shown(name, LONGEST_NAME)} is "
            f"{shown(found, LONGEST_NAME)}); LLaVA's trainer does not look for it: rename before step 5"
        )
    listing = list_file(folder, chunk_idx)
    if not checked.reasons:
        listing.unlink(missing_ok=True)  # of an earlier call, repaired since
        return
    count, total = len(checked.reasons), len(checked.rows)
    bad_records.report_bad_records(checked.records, checked.reasons, total, listing, "records of this chunk")
    if stop:
        raise UserError(
            f"{count:,} of {total:,} records cannot be used, all listed in {listing}; repair them, or let them be left "
            "out (on_bad_record skip)"
        )
    print(f"they are left out; all are listed in {listing}")


def list_file(folder: Path, chunk_idx: int) -> Path:
    """Where a chunk's bad records are listed."""
    return folder / f"bad_records_{chunk_idx}.json"


def refuse_many(
    left_out: list[LeftOutRecord],
    reasons: tuple[str, ...],
    checked: Checked,
    tolerance: Tolerance,
    listed: Path,
    hint: str,
) -> None:
    """Stop when so many of the chunk's records are left out for `reasons` that they are rarely to blame.

    Args:
        left_out: all of the chunk's so far; they are listed in the file `listed`.

    Raises:
        UserError: there are more than `tolerance` allows.
    """
    entries = [entry for entry in left_out if entry.reason in reasons]
    limit = tolerance.limit(len(checked.rows))
    if len(entries) <= limit:
        return
    reasons_of = checked.reasons | {entry.row: entry.reason for entry in left_out}
    bad_records.list_bad_records(checked.records, reasons_of, listed)
    share = _MOST_LEFT_OUT if tolerance.most is None else tolerance.most
    raise UserError(
        f"{len(entries)} records up to record {entries[-1].row} are left out ({' or '.join(reasons)}; the first: "
        f"record {entries[0].row}), above {share * 100:.3g}% of the chunk: {hint}; all are listed in {listed}, and "
        "more may be left out with on_bad_record skip and a higher most_left_out"
    )


def count_reasons(left_out: list[LeftOutRecord]) -> str:
    """How many records were left out, and why: `3 records left out (2 missing image, 1 no supervised token)`."""
    kinds = Counter(bad_records.kind_of(entry.reason) for entry in left_out).most_common()
    why = ", ".join(f"{count} {kind}" for kind, count in kinds)
    return f"{len(left_out)} records left out" + (f" ({why})" if why else "")


def check_disk(folder: Path, chunk_idx: int, feature_bytes: int) -> None:
    """See that the output folder can hold the chunk's features twice, which finishing it takes.

    Raises:
        UserError: it has too little room.
    """
    begun = progress_folder(folder, chunk_idx) / "features.f16"
    needed = 2 * feature_bytes - (begun.stat().st_blocks * 512 if begun.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the feature folder {folder} has {free / 1e9:.3g} GB free, this chunk needs {needed / 1e9:.3g} GB more "
            "while it is made (its features twice); free space or name another folder; the same command continues"
        )
