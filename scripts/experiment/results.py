"""Where the experiment's results lie in its folder, and how they are read."""

from __future__ import annotations

from pathlib import Path

from scripts.experiment.plan import P, Run
from tive.evaluation.results import ModelResult, read_evaluation
from tive.selection.files import Selection, find_summary, read_selection


def evaluation_of(folder: Path, variant: str, run: Run, answered: bool) -> Path:
    """The folder of a run's held-out losses, with or without generated answers."""
    return folder / variant / ("answered" if answered else "evaluated") / run.name


def read_result(save_path: Path) -> ModelResult:
    """The one model of an evaluation."""
    return read_evaluation(save_path).models[0]


def first_selection(folder: Path, variant: str, reference: int) -> Selection:
    """TIVE's selection with a reference and seed 0: it has the influence of every record of the mixture."""
    return read_selection(find_summary(folder / variant / "selected" / Run("tive", P, 0, reference).name, None))


def step_results(folder: Path, reference: int) -> Path:
    """What `influence_check.py` writes."""
    return folder / "steps" / str(reference) / "influence_check.json"
