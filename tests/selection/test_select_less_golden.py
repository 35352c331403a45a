"""LESS's selection from real checkpoints to the golden scores and ranking."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import select_data_LESS
from tests.helpers.feature_files import call
from tests.helpers.less import CHECKPOINTS, EXPECTED, GOLDEN, run_less
from tive.selection.output import find_summaries, read_selection

main = select_data_LESS.main


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features of both checkpoints: of the records as Adam applies them, of the target as they are."""
    folder = tmp_path_factory.mktemp("golden")
    for step, path in CHECKPOINTS.items():
        for name, data, more in (("train", "data.json", ("--gradient", "adam")), ("target", "target.json", ())):
            done = run_less(folder / name / str(step), path, data, "--proj_dim", 8192, "--window", 512, *more)
            assert done.code == 0, done.err
    return folder


def golden_paths(folder: Path, out: Path) -> list[str | Path | float]:
    train, target = ([folder / name / str(step) for step in CHECKPOINTS] for name in ("train", "target"))
    data = ("--data_path", GOLDEN / "data.json", "--target_data", GOLDEN / "target.json")
    return [*data, "--train", *train, "--target", *target, "--save_path", out]


def test_from_checkpoints_to_the_golden_scores(golden: Path, tmp_path: Path) -> None:
    call(main, *golden_paths(golden, tmp_path), "--p", 0.25)
    outcome = read_selection(find_summaries(tmp_path)[0])
    expected = np.array(EXPECTED["subtask_scores"])
    scores = np.stack([outcome.column(f"score_{name}") for name in EXPECTED["subtasks"]], axis=1)
    assert np.abs(scores - expected).max() < 0.03
    details = outcome.summary.details
    weights = [checkpoint["weight"] for checkpoint in details["checkpoints"]]
    assert weights == pytest.approx([checkpoint["weight"] for checkpoint in EXPECTED["checkpoints"]], rel=1e-9)
    assert [subtask["records"] for subtask in details["subtasks"]] == [5, 4, 3]


def test_the_ranking_is_the_golden_one_where_scores_are_apart(golden: Path, tmp_path: Path) -> None:
    call(main, *golden_paths(golden, tmp_path), "--p", 0.25)
    outcome = read_selection(find_summaries(tmp_path)[0])
    ranks, scores = outcome.column("rank"), np.array(EXPECTED["scores"])
    apart = [(a, b) for a in range(40) for b in range(40) if scores[a] > scores[b] + 0.03]
    assert len(apart) > 250 and all(ranks[a] < ranks[b] for a, b in apart)
    # No record is passed over for one that is worse by more than the projection's error.
    assert outcome.drawn.sum() == 10
    assert scores[~outcome.drawn].max() < scores[outcome.drawn].min() + 0.03


def test_the_golden_projected_norms_are_those_of_the_unprojected_gradients(golden: Path) -> None:
    for checkpoint in EXPECTED["checkpoints"]:
        norms = json.loads((golden / "train" / str(checkpoint["step"]) / "output_norm_0.json").read_text())
        assert norms == pytest.approx(checkpoint["train"]["adam_norms"], rel=1e-4)
