"""What a selection is made from: the data file's tasks, the scores in the feature files, and the records left out."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tive.data.problems import refuse_bad_records, writable
from tive.data.records import Records, open_records, suffix_of, write_records
from tive.data.scan import scan_records
from tive.data.tasks import NO_TASK, rows_by_task
from tive.data.trained import form_problem
from tive.features.lookup import Features
from tive.method.clusters import grid_points, second_moments, whitening
from tive.selection.options import CHOICES, TiveOptions, column_of
from tive.util.errors import UserError
from tive.util.text import command, shown_value

# What a feature file keeps of each record, and the scores file's column for it.
_COLUMN_OF_KEY = {"norms": "norm", "losses": "loss"} | {
    name: name for name in ("supervised_tokens", "tokens", "el2n", "visual_gain")
}


@dataclass(frozen=True)
class Mixture:
    """A data file of N records."""

    records: Records
    ids: list[str]  # `[N]`, as text
    task_names: list[str]  # in order of their first record
    task: np.ndarray  # int `[N]`, index into `task_names`
    problems: dict[int, str]  # what is wrong with records, by row; some of them the gradient step may have left out


def read_mixture(path: str | os.PathLike[str], task_key: str) -> Mixture:
    """The records of a data file and their tasks; a `UserError` where the file cannot be read."""
    scan = scan_records(open_records(path), form_problem, task_key)
    rows_of = rows_by_task([task or NO_TASK for task in scan.tasks])
    task_of_row = np.empty(len(scan.tasks), np.int64)
    for index, rows in enumerate(rows_of.values()):
        task_of_row[rows] = index
    return Mixture(scan.records, scan.ids, list(rows_of), task_of_row, scan.problems)


def refuse_problems(mixture: Mixture, left_out: Collection[int], listing: Path) -> None:
    """A `UserError` where a record has a problem, or no task, and is not among the rows that are left out.

    Args:
        listing: where all such records are listed.
    """
    unexpected = {row: problem for row, problem in mixture.problems.items() if row not in left_out}
    remedy = "name the key that holds the task as task_key, or repair the data and take the gradients again"
    refuse_bad_records(mixture.records, unexpected, listing, remedy)


def refuse_gradients(features: Features, wanted: Collection[str], why: str) -> None:
    """A `UserError` where the features are of gradients of a kind that is not wanted; the release's are plain ones."""
    kind = features.match.gradient if features.match else "sgd"
    if kind not in wanted:
        raise UserError(
            f"{features.folder} holds {kind} gradients, and {why}; take them again in another folder with "
            f"compute_gradient_features.py (gradient {next(iter(wanted))})"
        )


def refuse_missing(features: Features, mixture: Mixture, missing_path: Path, or_else: str = "") -> None:
    """A `UserError` where a record has no features.

    Args:
        missing_path: gets the records without features, which can be computed alone into its folder.
        or_else: the end of the message, what else can be done.
    """
    missing = np.flatnonzero(features.rows < 0)
    if len(missing):
        row = int(missing[0])
        missing_path = missing_path.with_suffix(suffix_of(mixture.records.path))
        write_records(missing_path, mixture.records, missing)
        again = command("compute_gradient_features.py", input_file=missing_path, output_file=missing_path.parent)
        raise UserError(
            f"{features.folder} holds no features of {len(missing):,} of the {len(mixture.ids):,} records of "
            f"{mixture.records.path} (the first: record {row}, id {shown_value(mixture.ids[row])}), and features of "
            f"another data file are found by the record's content; {again} with the other arguments as before computes "
            f"just them, then name both folders{or_else}"
        )
    if not features.is_by_row:
        print(f"{features.folder}: features of another data file; all {len(mixture.ids):,} records have theirs in it")


def record_scores(features: Features, needed: Collection[str] = ()) -> dict[str, np.ndarray]:
    """What the feature files know of every record beside its features, `[N]` each, by the scores file's column.

    `norm`, `loss`, `el2n`, `visual_gain` (float64), `supervised_tokens` and `tokens` (int64, or float64 where records
    have no features) where every chunk has them. A `UserError` where one that is needed is not there; the influence is
    where features are.
    """
    scores = {}
    for key, column in _COLUMN_OF_KEY.items():
        if (values := features.column(key)) is not None:
            is_whole = key.endswith("tokens") and np.isfinite(values).all()
            scores[column] = values.astype(np.int64) if is_whole else values
    there = scores.keys() | ({"influence"} if "norm" in scores else set())
    if lacking := sorted(set(needed) - there):
        with_it = [f"with {column}" for column in lacking if column in ("el2n", "visual_gain")]
        how = " ".join(with_it) or "in another folder (gradient sgd)"
        others = [name for name in CHOICES["instance_score"] if column_of(name) in there or name == "random"]
        raise UserError(
            f"{features.folder} holds no {' and no '.join(lacking)}; take the gradients again {how}, or choose by what "
            f"it holds (instance_score {', '.join(others)}; task_budget size or equal)"
        )
    return scores


def reasons_left_out(
    features: Features, scores: Mapping[str, np.ndarray], options: TiveOptions | None = None
) -> dict[int, str]:
    """Why records cannot count, by row: the gradient step's reason, a score that is no number, or too small a gain.

    Args:
        options: name the columns of `scores` that must be finite, and the visual gain that a record must have. A norm
            must be above zero; a record without images has no visual gain, and that is no reason.
    """
    wrong = {}
    if "norm" in scores:
        wrong["zero gradient"] = scores["norm"] == 0
        wrong["gradient norm not a positive number"] = ~(np.isfinite(scores["norm"]) & (scores["norm"] > 0))
    for column in sorted(options.columns & scores.keys() - {"norm"}) if options else ():
        is_number = ~np.isinf(scores[column]) if column == "visual_gain" else np.isfinite(scores[column])
        wrong[f"{column} not a number"] = ~is_number
    if options and options.drop_below is not None:
        wrong[f"visual gain below {options.drop_below:g}"] = scores["visual_gain"] < options.drop_below
    reasons = {row: writable(reason) for row, reason in features.left_out().items()}
    for reason, rows in wrong.items():
        for row in np.flatnonzero((features.rows >= 0) & rows).tolist():
            reasons.setdefault(row, reason)
    return reasons


def bar(title: str, records: int) -> tqdm:
    """The bar of a pass over the features."""
    return tqdm(total=records, desc=title, unit=" records", unit_scale=True, delay=1)


def whitened_points(features: Features, lengths: np.ndarray, folder: str | os.PathLike[str]) -> np.ndarray:
    """The records' features, whitened over the mixture, int8 `[N, m]` in a file of `folder` that goes with the array.

    Args:
        lengths: float64 `[N]`, `||f_s||`; NaN for a record in no mean.
    """
    spans = features.spans()
    with bar("Second moments", len(lengths)) as done:
        matrix = whitening(second_moments(spans, lengths, done.update))
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        points = np.memmap(file, np.int8, "w+", shape=(len(lengths), len(matrix)))
    with bar("Whitened points", len(lengths)) as done:
        grid_points(spans, lengths, matrix, points, done.update)
    return points
