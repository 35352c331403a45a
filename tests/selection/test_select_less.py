"""LESS's selection through its command line: its arithmetic, and one clear line for everything bad."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import select_data_LESS
from tests.helpers.feature_files import call, mixture, random_features, record, refusal, write_features
from tive.method.target import checkpoint_weights, mean_rates_since, round_robin, votes
from tive.selection.less import repeated_in
from tive.selection.mixture import read_mixture
from tive.selection.output import find_summaries, read_selection

main = select_data_LESS.main
STEPS = (105, 211)


# The arithmetic, on features that were made up.


@dataclass(frozen=True)
class Made:
    """A mixture, a target of three subtasks of unequal size, interleaved, and features at two checkpoints."""

    folder: Path
    train: list[np.ndarray]
    target: list[np.ndarray]
    subtasks: np.ndarray

    def arguments(self, out: Path) -> list[str | Path | float]:
        train, target = ([self.folder / f"{name}_{step}" for step in STEPS] for name in ("train", "target"))
        data = ("--data_path", self.folder / "data.json", "--target_data", self.folder / "target.json")
        return [*data, "--train", *train, "--target", *target, "--save_path", out]


RATES = {105: {"logged": 105, "sum": 105 * 2e-5}, 211: {"logged": 211, "sum": 105 * 2e-5 + 106 * 1e-5}}


def set_match(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda match: match.update(values)


def match_of(step: int, gradient: str) -> dict[str, Any]:
    """What the features of a checkpoint are; each has a model of its own."""
    state = "c" * 64 if gradient != "sgd" else None
    return {"model": f"{step:064d}", "checkpoint": step, "gradient": gradient, "optimizer_state": state}


def write(
    made: Path,
    name: str,
    step: int,
    seed: int,
    gradient: str | None = None,
    left_out: dict[int, str] | None = None,
    norms: torch.Tensor | None = None,
    rates: dict[str, float] | None = RATES[105],
    **match: Any,
) -> np.ndarray:
    data = made / ("data.json" if name == "train" else "target.json")
    features, own_norms = random_features(len(json.loads(data.read_text())), seed=seed)
    for row in left_out or {}:
        features[row], own_norms[row] = 0, float("nan")
    own_norms = own_norms if norms is None else norms
    kind = gradient or ("adam" if name == "train" else "sgd")
    change = set_match(**(match_of(step, kind) | match))
    write_features(made / f"{name}_{step}", data, features, own_norms, 2, left_out, change, {"learning_rates": rates})
    return features.double().numpy()


def make(folder: Path) -> Made:
    (folder / "data.json").write_text(json.dumps(mixture(), ensure_ascii=False, indent=1))
    subtasks = ["b", "a", "b", "c", "b", "a"]
    target = [record(1000 + row, name) for row, name in enumerate(subtasks)]
    (folder / "target.json").write_text(json.dumps(target))
    train, goal = [], []
    for place, step in enumerate(STEPS):
        train.append(write(folder, "train", step, 10 + place, rates=RATES[step]))
        goal.append(write(folder, "target", step, 20 + place))
    return Made(folder, train, goal, np.array(["bac".index(name) for name in subtasks]))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("made"))


@pytest.fixture
def own(made: Made, tmp_path: Path) -> Made:
    """The same, for a test that changes it."""
    return replace(made, folder=Path(shutil.copytree(made.folder, tmp_path / "made")))


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def pairwise_scores(made: Made, weights: list[float]) -> np.ndarray:
    """`[N, J]`, from all pairs of records and target records."""
    total = np.zeros((len(made.train[0]), 3))
    for weight, train, target in zip(weights, made.train, made.target, strict=True):
        for subtask in range(3):
            rows = made.subtasks == subtask
            total[:, subtask] += weight * (unit(train) @ unit(target[rows]).T).mean(axis=1)
    return total


class Outcome:
    def __init__(self, out: Path) -> None:
        (summary,) = out.glob("*_summary.json")
        self.stem = summary.name.removesuffix("_summary.json")
        self.summary = json.loads(summary.read_text())
        self.subset_text = (out / f"{self.stem}.json").read_text()
        with open(out / f"{self.stem}_scores.csv", newline="") as file:
            self.rows = list(csv.DictReader(file))

    def column(self, name: str) -> np.ndarray:
        return np.array([float(row[name]) if row[name] else np.nan for row in self.rows])

    @property
    def chosen(self) -> list[int]:
        return np.flatnonzero(self.column("times_selected")).tolist()


DEFAULT_WEIGHTS = [2 / 3, 1 / 3]


def test_the_scores_are_those_of_all_pairs(made: Made, tmp_path: Path) -> None:
    call(main, *made.arguments(tmp_path))
    outcome, expected = Outcome(tmp_path), pairwise_scores(made, DEFAULT_WEIGHTS)
    found = np.stack([outcome.column(f"score_{name}") for name in "bac"], axis=1)
    assert np.abs(found - expected).max() < 1e-10
    best = expected.max(axis=1)
    np.testing.assert_allclose(outcome.column("score"), best, atol=1e-10)
    order = np.argsort(-best, kind="stable")
    assert outcome.chosen == sorted(order[: int(0.05 * len(order))].tolist())
    assert outcome.column("rank")[order].tolist() == list(range(1, len(order) + 1))


def test_the_weights_are_the_mean_logged_learning_rates_or_those_given(made: Made, tmp_path: Path) -> None:
    for out, given, expected in (("own", [], DEFAULT_WEIGHTS), ("given", ["--weights", 3, 1], [0.75, 0.25])):
        call(main, *made.arguments(tmp_path / out), *given)
        found = [checkpoint["weight"] for checkpoint in Outcome(tmp_path / out).summary["details"]["checkpoints"]]
        assert found == pytest.approx(expected, rel=1e-12)


def test_the_order_of_the_checkpoints_changes_nothing(made: Made, tmp_path: Path) -> None:
    call(main, *made.arguments(tmp_path / "one"))
    turned = made.arguments(tmp_path / "two")
    turned[5], turned[6], turned[8], turned[9] = turned[6], turned[5], turned[9], turned[8]
    call(main, *turned)
    np.testing.assert_allclose(
        Outcome(tmp_path / "one").column("score"), Outcome(tmp_path / "two").column("score"), atol=1e-11
    )


def test_mean_and_vote_over_the_subtasks(made: Made, tmp_path: Path) -> None:
    scores = pairwise_scores(made, DEFAULT_WEIGHTS)
    number = int(0.1 * len(scores))
    among = [np.isin(np.arange(len(scores)), np.argsort(-column, kind="stable")[:number]) for column in scores.T]
    expected = {"mean": scores.mean(axis=1), "vote": np.sum(among, axis=0).astype(float)}
    for how, score in expected.items():
        call(main, *made.arguments(tmp_path / how), "--p", 0.1, "--over_targets", how)
        outcome = Outcome(tmp_path / how)
        assert outcome.stem == f"Less_p_0.1_over_targets-{how}"
        np.testing.assert_allclose(outcome.column("score"), score, atol=1e-10)
        order = np.lexsort((np.arange(len(scores)), -scores.mean(axis=1), -score))
        assert outcome.chosen == sorted(order[:number].tolist())


def test_in_turn_every_subtask_takes_its_best_record_that_is_left(made: Made, tmp_path: Path) -> None:
    call(main, *made.arguments(tmp_path), "--p", 0.13, "--over_targets", "round_robin")
    outcome, scores = Outcome(tmp_path), pairwise_scores(made, DEFAULT_WEIGHTS)
    taken: list[int] = []
    for turn in range(10):
        left = [row for row in range(len(scores)) if row not in taken]
        taken.append(max(left, key=lambda row, turn=turn: (round(scores[row, turn % 3], 9), -row)))
    assert outcome.stem == "Less_p_0.13_over_targets-round_robin" and outcome.chosen == sorted(taken)
    assert [int(rank) for rank in outcome.column("rank")[taken]] == list(range(1, 11))
    assert [subtask["selected"] for subtask in outcome.summary["details"]["subtasks"]] == [4, 3, 3]


def test_turns_go_on_through_equal_scores_and_past_records_without_a_score() -> None:
    scores = np.array([[1.0, 1.0], [np.nan, np.nan], [1.0, 1.0], [2.0, 0.0], [0.0, 3.0]])
    assert round_robin(scores).tolist() == [3, 4, 0, 2]


def test_ties_go_to_the_earlier_record() -> None:
    assert votes(np.array([[1.0], [2.0], [2.0]]), 1).tolist() == [0, 1, 0]


def test_the_formulas_of_the_weights() -> None:
    rates = mean_rates_since(np.array([1.0, 1.5]), np.array([10, 20]))
    assert rates.tolist() == pytest.approx([0.1, 0.05])
    assert checkpoint_weights(rates).tolist() == pytest.approx([2 / 3, 1 / 3])


def test_records_are_written_as_they_came_in_the_order_of_the_data(made: Made, tmp_path: Path) -> None:
    call(main, *made.arguments(tmp_path), "--p", 0.2)
    outcome, records = Outcome(tmp_path), mixture()
    assert json.loads(outcome.subset_text) == [records[row] for row in outcome.chosen]
    assert outcome.summary["method"] == "LESS" and outcome.summary["subset"]["records"] == 15


def test_what_is_written_is_read_by_the_same_code(made: Made, tmp_path: Path) -> None:
    call(main, *made.arguments(tmp_path), "--p", 0.2)
    read = read_selection(find_summaries(tmp_path)[0])
    assert read.summary.method == "LESS" and int(read.drawn.sum()) == 15
    assert {"score", "rank", "score_a", "score_b", "score_c"} <= read.columns.keys()


def test_a_record_without_a_gradient_at_one_checkpoint_is_never_chosen(own: Made, tmp_path: Path) -> None:
    call(main, *own.arguments(tmp_path / "before"), "--p", 0.1)
    best = Outcome(tmp_path / "before").chosen[0]
    write(own.folder, "train", STEPS[1], 11, left_out={best: "unreadable image"}, rates=RATES[211])
    call(main, *own.arguments(tmp_path / "after"), "--p", 0.1)
    outcome = Outcome(tmp_path / "after")
    assert best not in outcome.chosen and len(outcome.chosen) == len(outcome.rows) // 10
    assert outcome.rows[best]["left_out"] == "unreadable image" and outcome.rows[best]["rank"] == ""


def test_records_that_name_no_task_are_selected_from(own: Made, tmp_path: Path) -> None:
    """Only the target's records need a subtask."""
    without = [{key: value for key, value in entry.items() if key != "dataset"} for entry in mixture()]
    (own.folder / "data.json").write_text(json.dumps(without))
    for place, step in enumerate(STEPS):
        write(own.folder, "train", step, 10 + place, rates=RATES[step])
    call(main, *own.arguments(tmp_path))
    assert len(Outcome(tmp_path).chosen) == 3


# What is said.


def test_one_checkpoint_and_a_target_out_of_the_mixture_are_warned_of(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = json.loads((own.folder / "target.json").read_text())
    target[3] = mixture()[5] | {"dataset": "c"}
    (own.folder / "target.json").write_text(json.dumps(target))
    write(own.folder, "target", STEPS[0], 20)
    data = ("--data_path", own.folder / "data.json", "--target_data", own.folder / "target.json")
    folders = ("--train", own.folder / "train_105", "--target", own.folder / "target_105")
    call(main, *data, *folders, "--save_path", tmp_path / "out")
    printed = capsys.readouterr().out
    assert "warning: one checkpoint only" in printed
    assert "warning: 1 target records are also records of the mixture (the first: target record 3)" in printed


def test_target_records_are_repeated_by_their_content_whatever_their_ids_and_forms(tmp_path: Path) -> None:
    def turns(text: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{text}?"}, {"role": "assistant", "content": f"{text}."}]

    data = [{"messages": turns(text)} for text in "abc"] + [record(7, "vqa")]
    target = [{"id": 0, "messages": turns(text)} for text in "xbz"] + [record(7, "vqa") | {"id": "other"}]
    for name, content in (("data", data), ("target", target)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    mixed, goal = (read_mixture(str(tmp_path / f"{name}.json"), "dataset") for name in ("data", "target"))
    assert repeated_in(goal, mixed) == [1, 3]


def test_target_records_that_the_pass_left_out_are_said_and_count_in_no_mean(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for place, step in enumerate(STEPS):
        write(own.folder, "target", step, 20 + place, left_out={0: "unreadable image"})
    call(main, *own.arguments(tmp_path))
    assert "1 target records have no gradient and count in no mean" in capsys.readouterr().out
    assert [subtask["records"] for subtask in Outcome(tmp_path).summary["details"]["subtasks"]] == [2, 2, 1]


@pytest.mark.parametrize("p", [0.02, 0.05, 0.5])
def test_subtasks_that_no_selected_record_serves_best_are_named(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], p: float
) -> None:
    call(main, *made.arguments(tmp_path), "--p", p)
    subtasks = Outcome(tmp_path).summary["details"]["subtasks"]
    without = [subtask["name"] for subtask in subtasks if not subtask["selected"]]
    said = [line for line in capsys.readouterr().out.splitlines() if "that serves them best: " in line]
    assert len(said) == bool(without)
    if without:
        assert f"{len(without)} of 3 subtasks" in said[0] and f"best: {', '.join(without)} (" in said[0]
    assert bool(without) == (p < 0.5)


# What is refused.

Change = Callable[[Path], object]
OTHERS: dict[str, Any] = {
    "grad_modules": "mlp",
    "counted_parameters": 999,
    "projector": "trak_basic",
    "proj_seed": 1,
}


def zero_norm(folder: Path) -> None:
    norms = torch.ones(6)
    norms[4] = 0
    write(folder, "target", 105, 20, norms=norms)


def as_it_is(step: int) -> Change:
    return lambda folder: write(folder, "train", step, 10, gradient="sgd", rates=RATES[step])


def long_subtask(folder: Path) -> None:
    records = json.loads((folder / "target.json").read_text())
    records[3]["dataset"] = "c" * 5000
    (folder / "target.json").write_text(json.dumps(records))
    write(folder, "target", 105, 20, left_out={3: "unreadable image"})


BAD: dict[str, tuple[Change, list[str | float], str]] = {
    "adam as target": (
        lambda folder: write(folder, "target", 211, 21, gradient="adam"),
        [],
        "target_211 holds adam gradients, and a target's are taken as they are",
    ),
    "sgd as training": (as_it_is(105), [], "train_105 holds sgd gradients"),
    "scores alone as training": (
        lambda folder: write_features(
            folder / "train_105",
            folder / "data.json",
            torch.empty(78, 0),
            torch.rand(78),
            2,
            change=set_match(**match_of(105, "none")),
        ),
        [],
        "train_105 holds none gradients",
    ),
    "adam where sgd was asked for": (lambda folder: None, ["--gradient", "sgd"], "train_105 holds adam gradients"),
    "two forms": (
        lambda folder: write(folder, "train", 211, 11, gradient="adam_release", rates=RATES[211]),
        [],
        "are of different forms",
    ),
    "not finite": (
        lambda folder: write(folder, "target", 105, 20, left_out={2: "not finite"}),
        [],
        "target_105: the gradient of target record 2 (id 'b/1002') is zero or not finite",
    ),
    "zero": (zero_norm, [], "target record 4 (id 'b/1004') is zero or not finite (zero gradient)"),
    "empty subtask": (
        lambda folder: write(folder, "target", 105, 20, left_out={3: "unreadable image"}),
        [],
        "no record of the target's subtask c has a gradient (record 3: unreadable image)",
    ),
    "empty subtask of a long name": (
        long_subtask,
        [],
        "...ccccccccccccccc has a gradient (record 3: unreadable image)",
    ),
    "weights below zero": (lambda folder: None, ["--weights", -1, 2], "weights (-1.0, 2.0) cannot be"),
    "weights not a number": (lambda folder: None, ["--weights", "nan", 2], "weights (nan, 2.0)"),
    "weights all zero": (lambda folder: None, ["--weights", 0, 0], "weights (0.0, 0.0)"),
    "too many weights": (lambda folder: None, ["--weights", 1, 2, 3], "3 weights for 2 checkpoints"),
    "no rates": (
        lambda folder: write(folder, "train", 211, 11, rates={"logged": 0, "sum": 0.0}),
        [],
        "train_211: the learning rates that the trainer logged",
    ),
    "no trainer": (
        lambda folder: write(folder, "train", 211, 11, rates=None, checkpoint=None),
        [],
        "train_211: the learning rates that the trainer logged",
    ),
    "rates of another training": (
        lambda folder: write(folder, "train", 211, 11, rates={"logged": 100, "sum": 1.0}),
        [],
        "train_211: the learning rates that the trainer logged",
    ),
    "rates of zero": (
        lambda folder: [write(folder, "train", step, 11, rates={"logged": step, "sum": 0.0}) for step in STEPS],
        [],
        "train_211: the learning rates that the trainer logged",
    ),
    "dimension": (
        lambda folder: write_features(
            folder / "target_105",
            folder / "target.json",
            *random_features(6, 16),
            2,
            change=set_match(**match_of(105, "sgd")),
        ),
        [],
        "differ in `proj_dim` (24 and 16)",
    ),
    "too small a share": (lambda folder: None, ["--p", 0.001], "p = 0.001 of 78 records is less than one"),
    "no share": (lambda folder: None, ["--p", 1.5], "p 1.5"),
}
BAD |= {
    key: (
        lambda folder, key=key, value=value: write(folder, "target", 105, 20, **{key: value}),
        [],
        f"train_105 and {{folder}}/target_105 differ in `{key}`",
    )
    for key, value in OTHERS.items()
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_meant_is_refused_in_one_line(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    change, more, reason = BAD[case]
    change(own.folder)
    line = refusal(capsys, main, *own.arguments(tmp_path / "out"), *more)
    assert reason.replace("{folder}", str(own.folder)) in line, line
    assert not (tmp_path / "out").exists()


def test_sgd_gradients_of_the_records_are_taken_when_asked_for(own: Made, tmp_path: Path) -> None:
    for step in STEPS:
        as_it_is(step)(own.folder)
    call(main, *own.arguments(tmp_path), "--gradient", "sgd")
    assert Outcome(tmp_path).stem == "Less_p_0.05_gradient-sgd"


def test_folders_pair_by_their_checkpoint_and_each_must_have_its_other_side(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = made.arguments(tmp_path)
    train, target = arguments[5:7], arguments[8:10]
    call(main, *arguments, "--target", *target[::-1])
    np.testing.assert_allclose(Outcome(tmp_path).column("score_a"), pairwise_scores(made, DEFAULT_WEIGHTS)[:, 1])
    for of_records, of_target, named in (
        (train, target[:1], train[1]),
        (train[:1], target, target[1]),
        ([train[0], train[1], train[0]], target, train[0]),
    ):
        line = refusal(capsys, main, *arguments, "--train", *of_records, "--target", *of_target)
        assert str(named) in line and ("give the" in line or "leave it out" in line)


def test_a_checkpoints_features_may_lie_in_several_folders(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = own.arguments(tmp_path)
    records = [*mixture(), record(1998, "new"), record(1999, "new")]
    (own.folder / "data.json").write_text(json.dumps(records[::-1]))
    parts = []
    for number, step in enumerate(STEPS):
        line = refusal(capsys, main, *arguments, "--train", *(own.folder / f"train_{step}" for step in STEPS), *parts)
        missing = tmp_path / "missing" / f"train_{number}" / "records.json"
        assert "2 of the 80 records" in line and f"--input_file {missing}" in line and "compute_gradient" in line
        extra, norms = random_features(2, seed=step)
        change = set_match(**match_of(step, "adam"))
        write_features(
            missing.parent, missing, extra, norms, 1, change=change, manifest={"learning_rates": RATES[step]}
        )
        parts.append(missing.parent)
    train = [own.folder / f"train_{step}" for step in STEPS]
    call(main, *arguments, "--train", *train, *parts)
    whole = [
        np.concatenate([features, random_features(2, seed=step)[0].double().numpy()[::-1]])[::-1]
        for step, features in zip(STEPS, own.train, strict=True)
    ]
    expected = pairwise_scores(Made(own.folder, whole, own.target, own.subtasks), DEFAULT_WEIGHTS)
    np.testing.assert_allclose(Outcome(tmp_path).column("score_b"), expected[:, 0], atol=1e-9)


def test_a_target_record_without_a_subtask_is_refused(
    own: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = json.loads((own.folder / "target.json").read_text())
    del target[2]["dataset"]
    (own.folder / "target.json").write_text(json.dumps(target))
    for place, step in enumerate(STEPS):
        write(own.folder, "target", step, 20 + place)
    line = refusal(capsys, main, *own.arguments(tmp_path))
    assert "target.json" in line and "record 2" in line and "dataset" in line
