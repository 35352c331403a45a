"""One model over a held-out file: each record's loss, and the answers that the model generates."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from tive.data.scan import Checked, Scan
from tive.evaluation.answers import is_exact
from tive.evaluation.results import HeldOutResult
from tive.features.batches import Batches
from tive.features.loader import Loader, usable
from tive.features.store import Store
from tive.models import NOT_FINITE, Encoded, Family, Reference
from tive.util.errors import UserError
from tive.util.text import shown

# Of each record, as `HeldOutResult` names them.
COLUMNS = {"loss": np.float32, "answers": np.int32, "exact": np.int32, "not_asked": np.int32}


@dataclass(frozen=True)
class EvaluationOptions:
    """How a model is evaluated; of these only `max_new_tokens` changes the numbers, and 0 asks for no answers."""

    image_folder: str
    batch_size: int
    max_batch_tokens: int
    window: int
    num_workers: int
    max_new_tokens: int
    skip_bad: bool


def take_known(
    store: Store, content: Sequence[str], known: Mapping[str | None, HeldOutResult], reasons: Container[int]
) -> int:
    """Put the results that are known of records of equal content into the store, and count them.

    Args:
        reasons: the rows that cannot be used any more, their images being gone for instance.
    """
    rows_of_all = (row for rows in store.missing(len(content)) for row in rows)
    missing = [row for row in rows_of_all if content[row] in known and row not in reasons]
    for _, run in groupby(enumerate(missing), key=lambda pair: pair[1] - pair[0]):  # of consecutive rows
        rows = [row for _, row in run]
        columns = {
            name: np.array([getattr(known[content[row]], name) for row in rows], kind) for name, kind in COLUMNS.items()
        }
        store.write(range(rows[0], rows[-1] + 1), columns, {})
    return len(missing)


def evaluate(
    family: Family, reference: Reference, scan: Scan, checked: Checked, options: EvaluationOptions, store: Store
) -> None:
    """Compute the results of all records that are not on disk; those of each window are when it is done. A `UserError`
    where a record cannot be used and is not to be skipped, or a batch of one does not fit in memory.
    """
    windows = store.missing(options.window)
    readable = [row for rows in windows for row in rows if row not in checked.reasons]
    encode = partial(family.encode, reference.processor)
    loader = Loader(encode, scan.records, options.image_folder, options.num_workers)
    batches = Batches(options.batch_size, options.max_batch_tokens)
    total = len(scan.records)
    bar = tqdm(total=total, initial=total - sum(map(len, windows)), desc="Evaluating", unit=" records")
    with bar, loader.read(readable) as items:
        for rows in windows:
            reasons = {row: checked.reasons[row] for row in rows if row in checked.reasons}
            records = dict(usable(islice(items, len(rows) - len(reasons)), reasons, options.skip_bad))
            losses = losses_of(family, reference, records, batches)
            reasons |= {row: NOT_FINITE for row, loss in losses.items() if not np.isfinite(loss)}
            records = {row: record for row, record in records.items() if row not in reasons}
            numbers: dict[str, Mapping[int, float]] = {"loss": {row: losses[row] for row in records}}
            if options.max_new_tokens:
                answers, exact = answers_of(family, reference, records, batches, options.max_new_tokens)
                not_asked = {row: max(0, scan.answers[row] - answers[row]) for row in records}
                numbers |= {"answers": answers, "exact": exact, "not_asked": not_asked}
            columns = {
                name: np.array([numbers.get(name, {}).get(row, np.nan if name == "loss" else 0) for row in rows], kind)
                for name, kind in COLUMNS.items()
            }
            store.write(rows, columns, reasons)
            bar.update(len(rows))


@torch.no_grad()
def losses_of(family: Family, reference: Reference, records: dict[int, Encoded], batches: Batches) -> dict[int, float]:
    """The loss of each record by its row."""

    def losses(batch: Sequence[Encoded]) -> Tensor:
        return family.record_losses(reference, batch).losses

    computed = list(batches.compute(losses, records.items()))
    rows = [row for batch, _ in computed for row, _ in batch]
    values = torch.cat([losses for _, losses in computed]).tolist() if computed else []
    return dict(zip(rows, values, strict=True))


def answers_of(
    family: Family, reference: Reference, records: dict[int, Encoded], batches: Batches, max_new_tokens: int
) -> tuple[Counter[int], Counter[int]]:
    """How many answers each record asked for, and how many of them the model produced exactly, by row."""

    def generated(batch: Sequence[Encoded]) -> list[str]:
        return family.generate(reference, batch, max_new_tokens)

    asked = [(row, *pair) for row, record in records.items() for pair in family.answers(reference.processor, record)]
    exact: Counter[int] = Counter()
    for batch, texts in batches.compute(generated, enumerate(prompt for _, prompt, _ in asked)):
        for (number, _), text in zip(batch, texts, strict=True):
            row, _, expected = asked[number]
            exact[row] += is_exact(text, expected)
    return Counter(row for row, *_ in asked), exact


def results_of(name: str, store: Store, content: Sequence[str]) -> list[HeldOutResult]:
    """The results on disk, by row, of which those without a loss are printed with the reasons, and how many answers the
    model was not asked for; a `UserError` where no record has a loss.

    Args:
        content: the records' hashes.
    """
    left_out, columns = store.left_out, {column: values.tolist() for column, values in store.columns.items()}
    results = [
        HeldOutResult(row, left_out=left_out[row], content=content[row])
        if row in left_out
        else HeldOutResult(row, content=content[row], **{column: values[row] for column, values in columns.items()})
        for row in store.rows
    ]
    if left_out:
        reasons = Counter(left_out.values()).most_common(5)
        why = ", ".join(f"{count:,} {shown(reason, 80)}" for reason, count in reasons)
        print(f"{name}: {len(left_out):,} of {len(results):,} records are left out ({why})")
        if len(left_out) == len(results):
            raise UserError(f"{name}: no record has a loss ({reasons[0][0]}); is this the data's model?")
    if not_asked := sum(result.not_asked for result in results):
        print(f"{name}: {not_asked:,} answers were not asked for: cut at the maximum length, or before an image")
    return results
