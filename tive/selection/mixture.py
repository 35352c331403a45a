"""What a selection is made from: the data file's tasks, the scores in the feature files, and the records left out."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.problems import refuse_bad_records
from tive.data.records import Records, open_records, suffix_of, write_records
from tive.data.scan import scan_records
from tive.data.tasks import rows_by_task
from tive.data.trained import form_problem
from tive.features.lookup import Features
from tive.method.clusters import grid_points, second_moments, whitening
from tive.selection.options import SCORE_COLUMNS, TiveOptions
from tive.util.errors import UserError
from tive.util.text import command, shown_value

NO_TASK = "(no task)"
# What a feature file keeps of each record, and the scores file's column for it.
COLUMN_OF = {
    "norms": "norm",
    "losses": "loss",
    "supervised_tokens": "supervised_tokens",
    "tokens": "tokens",
    "el2n": "el2n",
    "visual_gain": "visual_gain",
}


@dataclass(frozen=True)
class Mixture:
    """A data file of N records.

    Attributes:
        ids: `[N]`, as text.
        task_names: in order of their first record.
        task: int `[N]`, index into `task_names`.
        problems: what is wrong with records, by row.
    """

    records: Records
    ids: list[str]
    task_names: list[str]
    task: np.ndarray
    problems: dict[int, str]


def read_mixture(path: str | os.PathLike[str], task_key: str) -> Mixture:
    """Read a data file. A record that the gradient step may have left out is no error yet.

    Raises:
        UserError: the file cannot be read.
    """
    scan = scan_records(open_records(path), form_problem, task_key)
    tasks = [task or NO_TASK for task in scan.tasks]
    rows_of = rows_by_task(tasks)
    task_of_row = np.empty(len(tasks), np.int64)
    for index, rows in enumerate(rows_of.values()):
        task_of_row[rows] = index
    return Mixture(scan.records, scan.ids, list(rows_of), task_of_row, scan.problems)


def _text(value: Any) -> str:
    """An id or a reason as text that can be written and printed, half a surrogate pair too."""
    if not isinstance(value, str):
        return "" if value is None else json.dumps(value)
    return value if value.isascii() else value.encode("utf-8", "backslashreplace").decode()


def record_scores(features: Features, needed: Collection[str] = ()) -> dict[str, np.ndarray]:
    """What the feature files know of every record beside its features, `[N]` each, by the scores file's column.

    `norm`, `loss`, `el2n`, `visual_gain` (float64), `supervised_tokens` and `tokens` (int64, or float64 where records
    have no features) where every chunk has them.

    Raises:
        UserError: a column that is needed is not there; the influence is where features are.
    """
    scores = {}
    for key, column in COLUMN_OF.items():
        if (values := features.column(key)) is not None:
            is_whole = key.endswith("tokens") and np.isfinite(values).all()
            scores[column] = values.astype(np.int64) if is_whole else values
    if lacking := sorted(set(needed) - scores.keys() - ({"influence"} if has_gradients(features) else set())):
        with_it = [f"with {column}" for column in lacking if column in ("el2n", "visual_gain")]
        how = " ".join(with_it) or "in another folder (gradient sgd)"
        there = [name for name, column in SCORE_COLUMNS.items() if column in scores]
        raise UserError(
            f"{features.folder} holds no {' and no '.join(lacking)}; take the gradients again {how}, or choose by what "
            f"it holds (instance_score {', '.join([*there, 'random'])}; task_budget size or equal)"
        )
    return scores


def refuse_missing(features: Features, mixture: Mixture, missing_path: Path, or_else: str = "") -> None:
    """Every record needs features, unless the selection is from a sample.

    Args:
        missing_path: where the records without features are written, to be computed alone into its folder.
        or_else: the end of the message, what else can be done.

    Raises:
        UserError: there are such records.
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


def has_gradients(features: Features) -> bool:
    """Whether there are gradient norms and features beside the scores of the forward pass."""
    return features.match is None or features.match.has_features


def refuse_adam(features: Features) -> None:
    """TIVE's values and influences are those of the gradient itself.

    Raises:
        UserError: the features are of gradients as Adam would apply them.
    """
    if features.match is not None and features.match.gradient.startswith("adam"):
        raise UserError(
            f"{features.folder} holds {features.match.gradient} gradients, which are for select_data_LESS.py; take "
            "those that TIVE selects by with compute_gradient_features.py in another folder (gradient sgd)"
        )


def reasons_left_out(
    features: Features, scores: Mapping[str, np.ndarray], options: TiveOptions | None = None
) -> dict[int, str]:
    """Why records cannot count, by row: the gradient step's reason, a score that is no number, or too small a gain.

    Args:
        options: name the columns of `scores` that must be finite, and the visual gain that a record must have. A norm
            must be above zero; a record without images has no visual gain, and that is no reason.
    """
    reasons = {row: _text(reason) for row, reason in features.left_out().items()}

    def add(wrong: np.ndarray, reason: str) -> None:
        for row in np.flatnonzero((features.rows >= 0) & wrong).tolist():
            reasons.setdefault(row, reason)

    if "norm" in scores:
        add(scores["norm"] == 0, "zero gradient")
        add(~(np.isfinite(scores["norm"]) & (scores["norm"] > 0)), "gradient norm not a positive number")
    if options is None:
        return reasons
    for column in sorted(options.columns & scores.keys() - {"norm"}):
        wrong = np.isinf(scores[column]) if column == "visual_gain" else ~np.isfinite(scores[column])
        add(wrong, f"{column} not a number")
    if options.drop_below is not None:
        add(scores["visual_gain"] < options.drop_below, f"visual gain below {options.drop_below:g}")
    return reasons


def refuse_problems(mixture: Mixture, left_out: Collection[int], listing: Path) -> None:
    """A record that has a problem or no task must be among the rows that are left out; else a `UserError`."""
    unexpected = {row: problem for row, problem in mixture.problems.items() if row not in left_out}
    remedy = "name the key that holds the task as task_key, or repair the data and take the gradients again"
    refuse_bad_records(mixture.records, unexpected, listing, remedy)


def reasons_of_features(lengths: np.ndarray, groups: np.ndarray) -> dict[int, str]:
    """Why records cannot count, by row: their features are zero, or not finite.

    Args:
        lengths: float64 `[N]`, `||f_s||`.
        groups: int `[N]`, negative for a record that was not asked for.
    """
    useless = (groups >= 0) & ~(np.isfinite(lengths) & (lengths > 0))
    return {
        row: "features are zero" if lengths[row] == 0 else "features not finite"
        for row in np.flatnonzero(useless).tolist()
    }


def counted_groups(task: np.ndarray, excluded: np.ndarray, reasons: Collection[int]) -> np.ndarray:
    """The task of each record for the passes over the features, int `[N]`; -1 for a record in no mean.

    Args:
        task: int `[N]`, index of each record's task.
        excluded: bool `[T]`.
        reasons: the rows of records that were left out.
    """
    groups = np.where(excluded[task], -1, task)
    groups[list(reasons)] = -1
    return groups


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
