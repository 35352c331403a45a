"""One model over a held-out file: the loss of each record, and the answers that it generates itself."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from tive.data.scan import Checked, Scan
from tive.evaluation.answers import is_exact
from tive.evaluation.partial import Partial
from tive.evaluation.results import HeldOutResult
from tive.models import NOT_FINITE, UNSUPERVISED, Encoded, Family, Reference
from tive.models.batches import BatchLimits, compute_in_batches
from tive.models.loading import EncodedRecords, encoded_windows
from tive.util.errors import UserError
from tive.util.text import shown


@dataclass(frozen=True)
class Options:
    """How a model is evaluated, as far as its numbers do not depend on it; and `max_new_tokens`, 0 for no answers."""

    image_folder: str
    limits: BatchLimits
    window: int
    num_workers: int
    max_new_tokens: int
    skip_bad: bool


def evaluate(
    family: Family, reference: Reference, scan: Scan, checked: Checked, options: Options, partial: Partial
) -> list[HeldOutResult]:
    """The results of all records, by row; those of each window are on disk when it is done.

    Raises:
        UserError: a record cannot be used and is not to be skipped, or a batch of one does not fit in memory.
    """
    results = list(partial.done)
    rows = range(len(results), len(scan.records))
    windows = [list(rows[start : start + options.window]) for start in range(0, len(rows), options.window)]
    usable = [[row for row in window if row not in checked.reasons] for window in windows]
    dataset = EncodedRecords(family, reference.processor, scan.records, options.image_folder)
    bar = tqdm(total=len(scan.records), initial=len(results), desc="Evaluating", unit=" records")
    limits = options.limits
    with bar, encoded_windows(dataset, usable, options.num_workers) as encoded_ahead:
        for window in windows:
            encoded = next(encoded_ahead)
            found, limits = _window(family, reference, scan, checked, options, encoded, window, limits, bar.update)
            partial.add(found)
            results += found
    return results


def _window(
    family: Family,
    reference: Reference,
    scan: Scan,
    checked: Checked,
    options: Options,
    encoded: dict[int, Encoded | str],
    window: list[int],
    limits: BatchLimits,
    done: Callable[[int], object],
) -> tuple[list[HeldOutResult], BatchLimits]:
    """The results of one window, by row, and the batch limits that went well."""
    reasons = {row: checked.reasons[row] for row in window if row in checked.reasons}
    reasons |= {row: item for row, item in encoded.items() if isinstance(item, str)}
    items = {row: item for row, item in encoded.items() if isinstance(item, Encoded)}
    for row, reason in sorted(reasons.items()):
        if not options.skip_bad and reason not in UNSUPERVISED:
            raise UserError(
                f"{scan.records.path}: record {row}: {shown(reason, 160)}; repair it, or leave such records out "
                "(on_bad_record skip); the run continues where it stopped"
            )

    @torch.no_grad()
    def losses(batch: list[Encoded]) -> list[float]:
        return family.record_losses(reference, batch).losses.tolist()

    def generated(batch: list[Encoded]) -> list[str]:
        return family.generate(reference, batch, options.max_new_tokens)

    device = reference.device
    computed = compute_in_batches(losses, items, limits, device, done)
    reasons |= {row: NOT_FINITE for row, loss in computed.results.items() if not math.isfinite(loss)}
    asked = {}
    if options.max_new_tokens:
        for row, item in items.items():
            if row not in reasons:
                for number, answer in enumerate(family.answers(reference.processor, item)):
                    asked[f"{row}, answer {number}"] = (row, answer)
    prompts = {name: answer.prompt for name, (_, answer) in asked.items()}
    texts = compute_in_batches(generated, prompts, computed.limits, device)
    answers = Counter(row for row, _ in asked.values())
    exact = Counter(row for name, (row, answer) in asked.items() if is_exact(texts.results[name], answer.expected))
    done(len(window) - len(items))
    results = []
    for row in window:
        if row in reasons:
            results.append(HeldOutResult(row, left_out=reasons[row]))
            continue
        not_asked = max(0, scan.answers[row] - answers[row]) if options.max_new_tokens else 0
        results.append(HeldOutResult(row, computed.results[row], answers[row], exact[row], not_asked))
    return results, texts.limits


def report_left_out(name: str, records: list[HeldOutResult]) -> None:
    """Say how many records of a model have no loss and why, and how many answers it was not asked for.

    Raises:
        UserError: no record has a loss.
    """
    reasons = Counter(record.left_out for record in records if record.left_out is not None)
    if reasons:
        why = ", ".join(f"{count:,} {shown(reason, 80)}" for reason, count in reasons.most_common(5))
        print(f"{name}: {sum(reasons.values()):,} of {len(records):,} records are left out ({why})")
    if sum(reasons.values()) == len(records):
        raise UserError(f"{name}: no record has a loss ({next(iter(reasons))}); is this the data's model?")
    if not_asked := sum(record.not_asked for record in records):
        print(f"{name}: {not_asked:,} answers were not asked for: cut at the maximum length, or before an image")
