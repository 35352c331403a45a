"""Records that are left out of a chunk: what is known before the run, how many may be, and what is said of them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from tive.data import problems
from tive.data.scan import Checked
from tive.features.store import LeftOutRecord
from tive.models import NOT_FINITE, UNSUPERVISED
from tive.util.errors import UserError
from tive.util.text import shown

# Above this share of the chunk, and above a few, it is not the records that are wrong.
_MOST_LEFT_OUT = 0.02
_FEW = 2
_LONGEST_NAME = 120


def list_file(folder: Path, chunk_idx: int) -> Path:
    """Where a chunk's bad records are listed."""
    return folder / f"bad_records_{chunk_idx}.json"


def report_bad_records(checked: Checked, listing: Path, skip: bool) -> None:
    """Print what is wrong or odd: counts, the first ten; list all that cannot be used in a file.

    Raises:
        UserError: records are bad, and they are not to be skipped.
    """
    for note in checked.notes:
        print(note)
    if checked.renamed:
        first, stand_in = next(iter(checked.renamed.items()))
        name, used = problems.images_named(checked.records[first]), os.path.basename(stand_in)
        print(
            f"{len(checked.renamed)} records have their image under another extension, in other capitals or in another "
            f"Unicode form, and it is used (the first: record {first}, {shown(name, _LONGEST_NAME)} is "
            f"{shown(used, _LONGEST_NAME)}); LLaVA's trainer does not look for it: rename before step 5"
        )
    if checked.reasons and skip:
        problems.list_bad_records(checked.records, checked.reasons, listing)
        print(f"they are left out; all are listed in {listing}")
        return
    remedy = "repair them, or let them be left out (on_bad_record skip)"
    problems.refuse_bad_records(checked.records, checked.reasons, listing, remedy, len(checked.rows))


def left_out_records(checked: Checked, reasons: Mapping[int, str]) -> list[LeftOutRecord]:
    """How the manifest names records that are left out, by row."""
    return [
        LeftOutRecord(row, problems.identity_of(checked.records[row]), reason)
        for row, reason in sorted(reasons.items())
    ]


def refuse_many(left_out: Sequence[LeftOutRecord], checked: Checked, listing: Path) -> None:
    """Stop when so many of the chunk's records are left out for one kind of reason that they are rarely to blame.

    Args:
        left_out: all of the chunk's so far; they are listed in the file `listing`.

    Raises:
        UserError: more than 2% of the chunk, and more than two, have nothing supervised or overflow.
    """
    causes = {
        UNSUPERVISED: "the tokenizer or the template is not the reference model's, so name the base model that it was "
        "trained from, or its chat template; or these records have no answer within the model's length",
        (NOT_FINITE,): "their loss or gradient overflows, so try the dtype bfloat16 or float32; if it stays, the "
        "reference model diverged in training",
    }
    for reasons, cause in causes.items():
        entries = [entry for entry in left_out if entry.reason in reasons]
        if len(entries) > max(_MOST_LEFT_OUT * len(checked.rows), _FEW):
            reasons_of = checked.reasons | {entry.row: entry.reason for entry in left_out}
            remedy = (
                f"{len(entries)} of them ({' or '.join(reasons)}) are above {_MOST_LEFT_OUT:.0%} of the chunk: {cause}"
                f"; {problems.drop_command(checked.records, listing)} writes the data without them"
            )
            problems.refuse_bad_records(checked.records, reasons_of, listing, remedy, len(checked.rows))


def count_reasons(left_out: Sequence[LeftOutRecord]) -> str:
    """How many records were left out, and why: `3 records left out (2 missing image, 1 no supervised token)`."""
    kinds = Counter(problems.kind_of(entry.reason) for entry in left_out).most_common()
    why = ", ".join(f"{count} {kind}" for kind, count in kinds)
    return f"{len(left_out)} records left out" + (f" ({why})" if why else "")


def check_disk(folder: Path, begun: Path, feature_bytes: int) -> None:
    """See that the output folder can hold the chunk's features twice, which finishing it takes.

    Args:
        begun: the features' file of a chunk under way.

    Raises:
        UserError: it has too little room.
    """
    needed = 2 * feature_bytes - (begun.stat().st_blocks * 512 if begun.is_file() else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"the feature folder {folder} has {free / 1e9:.3g} GB free, this chunk needs {needed / 1e9:.3g} GB more "
            "while it is made (its features twice); free space or name another folder; the same command continues"
        )
