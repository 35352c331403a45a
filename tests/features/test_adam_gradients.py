"""Gradients as Adam would apply them: the golden numbers, what mistakes would cost, and the pass as a whole."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers.golden_model import Finished, fork_step, log_of
from tests.helpers.less import CHECKPOINTS, EXPECTED, GOLDEN, less_arguments, load_less, run_less
from tests.helpers.reference import WholeGradients
from tive.features.step import GradientStep, gradient_kind, transform_of
from tive.method.gradients import gradient_features
from tive.method.target import best_subtask, checkpoint_weights, ranking, subtask_scores
from tive.models import Encoded, llava
from tive.models.common import target_modules

DATA = {name: json.loads((GOLDEN / f"{name}.json").read_text()) for name in ("data", "target")}
FORMS = {"sgd": None, "adam": "adam", "release": "release"}


@dataclass(frozen=True)
class Golden:
    """One checkpoint: its matrices' parts of a whole gradient, and the whole gradients of both data files."""

    step: int
    starts: dict[str, int]
    shapes: dict[str, torch.Size]
    gradients: Tensor
    target: Tensor
    transformed: dict[str, Tensor]


def whole_gradients(step: GradientStep, records: list[Encoded], size: int) -> Tensor:
    """Gradients `[n, P]` in record order, unprojected, from batches of `size`."""
    rows = sorted(range(len(records)), key=lambda row: (records[row].group, records[row].length))
    found = torch.zeros(len(records), step.projector.proj_dim)
    for group in {record.group for record in records}:
        members = [row for row in rows if records[row].group == group]
        for start in range(0, len(members), size):
            some = members[start : start + size]
            batch = [records[row] for row in some]
            computed = gradient_features(
                lambda batch=batch: llava.record_losses(step.reference, batch).losses,
                step.matrices,
                step.projector,
                step.transform,
            )
            found[some] = computed.features * computed.norms[:, None]
    return found


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def golden(request: pytest.FixtureRequest) -> Golden:
    return golden_of(request.param)


_GOLDEN: dict[int, Golden] = {}


def golden_of(step: int) -> Golden:
    """The pass goes over the records once, batch by batch; the transformations are applied to what it found."""
    if step not in _GOLDEN:
        path = CHECKPOINTS[step]
        reference = load_less(path)
        matrices = target_modules(reference)
        projector = WholeGradients(matrices)
        plain = GradientStep(llava, reference, matrices, projector)
        encoded = {
            name: [llava.encode(reference.processor, record, str(GOLDEN / "images")) for record in records]
            for name, records in DATA.items()
        }
        gradients = whole_gradients(plain, encoded["data"], 7)
        transformed = {"sgd": gradients}
        for name in ("adam", "release"):
            kind = gradient_kind(str(path), {"adam": "adam", "release": "adam_release"}[name])
            transform = transform_of(kind, reference, matrices, str(path))
            assert transform is not None
            parts = [
                transform(matrix, part_of(gradients, projector.start[matrix], linear.weight.shape)).flatten(1)
                for matrix, linear in matrices.items()
            ]
            transformed[name] = torch.cat(parts, dim=1)
        shapes = {name: matrix.weight.shape for name, matrix in matrices.items()}
        target = whole_gradients(plain, encoded["target"], 5)
        _GOLDEN[step] = Golden(step, projector.start, shapes, gradients, target, transformed)
    return _GOLDEN[step]


def part_of(gradients: Tensor, start: int, shape: torch.Size) -> Tensor:
    return gradients[:, start : start + shape.numel()].view(-1, *shape)


def expected_of(step: int) -> dict:
    (found,) = [checkpoint for checkpoint in EXPECTED["checkpoints"] if checkpoint["step"] == step]
    return found


def unit(gradients: Tensor) -> Tensor:
    return torch.nn.functional.normalize(gradients.double(), dim=1)


def relative_error(found: Tensor, expected: list[float]) -> float:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return float(((found.double() - wanted) / wanted).abs().max())


@pytest.mark.parametrize("form", FORMS)
def test_the_norms_are_the_golden_ones(golden: Golden, form: str) -> None:
    norms = golden.transformed[form].norm(dim=1)
    assert relative_error(norms, expected_of(golden.step)["train"][f"{form}_norms"]) < 1e-4


@pytest.mark.parametrize("form", ["adam", "release"])
def test_the_influence_on_the_target_is_the_golden_one(form: str) -> None:
    influence = sum(
        expected_of(step)["weight"] * unit(golden_of(step).transformed[form]) @ unit(golden_of(step).target).T
        for step in CHECKPOINTS
    )
    expected = (EXPECTED if form == "adam" else EXPECTED["release"])["influence"]
    assert (influence - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-4


@pytest.mark.parametrize("form", FORMS)
def test_unprojected_the_scores_and_the_ranking_are_the_golden_ones(form: str) -> None:
    subtasks = [np.array(EXPECTED["target_subtask"]) == name for name in EXPECTED["subtasks"]]

    def products(step: int) -> np.ndarray:
        cosines = (unit(golden_of(step).transformed[form]) @ unit(golden_of(step).target).T).numpy()
        return np.stack([cosines[:, rows].mean(axis=1) for rows in subtasks], axis=1)

    weights = checkpoint_weights(np.array([expected_of(step)["learning_rate"] for step in CHECKPOINTS]))
    scores = best_subtask(subtask_scores(map(products, CHECKPOINTS), weights))
    expected = EXPECTED if form == "adam" else EXPECTED[form]
    assert np.abs(scores - np.array(expected["scores"])).max() < 1e-4
    assert ranking(scores).tolist() == expected["ranking"]


def test_in_alphabetical_order_or_corrected_for_the_wrong_step_the_golden_norms_would_not_come_out() -> None:
    """Shapes do not tell layer 10 from layer 2: only the numbers do, far above what the goldens allow."""
    golden, path = golden_of(10), CHECKPOINTS[10]
    reference = load_less(path)
    matrices = target_modules(reference)
    kind = gradient_kind(str(path), "adam")
    expected = expected_of(10)["train"]["adam_norms"]

    def error(names: dict[str, str]) -> float:
        transform = transform_of(kind, reference, matrices, str(path))
        assert transform is not None
        parts = [
            transform(names[name], part_of(golden.gradients, golden.starts[name], shape)).flatten(1)
            for name, shape in golden.shapes.items()
        ]
        return relative_error(torch.cat(parts, dim=1).norm(dim=1), expected)

    layers = sorted({int(name.split(".")[1]) for name in matrices})
    alphabetical = dict(zip(layers, sorted(layers, key=str), strict=True))
    mistaken = {
        name: ".".join(["layers", str(alphabetical[int(name.split(".")[1])]), *name.split(".")[2:]])
        for name in matrices
    }
    assert error({name: name for name in matrices}) < 1e-4
    assert error(mistaken) > 1e-2


def test_the_correction_is_that_of_the_next_step() -> None:
    golden, path = golden_of(10), CHECKPOINTS[10]
    reference = load_less(path)
    matrices = target_modules(reference)
    kind = gradient_kind(str(path), "adam")
    assert kind.state is not None
    constants = kind.state.constants | {"t": kind.state.constants["t"] - 1}
    kind = replace(kind, state=replace(kind.state, constants=constants))
    transform = transform_of(kind, reference, matrices, str(path))
    assert transform is not None
    parts = [
        transform(name, part_of(golden.gradients, golden.starts[name], shape)).flatten(1)
        for name, shape in golden.shapes.items()
    ]
    error = relative_error(torch.cat(parts, dim=1).norm(dim=1), expected_of(10)["train"]["adam_norms"])
    assert error > 2e-3


def test_a_loss_scale_is_taken_out_before_the_transformation() -> None:
    path = CHECKPOINTS[10]
    reference = load_less(path)
    matrices = target_modules(reference)
    transform = transform_of(gradient_kind(str(path), "adam"), reference, matrices, str(path))
    records = [llava.encode(reference.processor, record, str(GOLDEN / "images")) for record in DATA["target"][:2]]
    found = [
        gradient_features(
            lambda: llava.record_losses(reference, records).losses, matrices, WholeGradients(matrices), transform, scale
        )
        for scale in (1.0, 4096.0)
    ]
    torch.testing.assert_close(found[0].norms, found[1].norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(found[0].features, found[1].features, rtol=1e-3, atol=1e-6)


# The pass as a whole, on the target's 12 records.


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "features"
    assert run_adam(folder).code == 0
    return folder


def run_adam(folder: Path, *more: object) -> Finished:
    return run_less(folder, CHECKPOINTS[10], "target.json", "--gradient", "adam", "--window", 4, *more)


def content(folder: Path, chunk: int = 0) -> dict:
    return torch.load(folder / f"output_{chunk}.pt", weights_only=True)


def test_the_features_say_what_gradient_they_are_of(whole: Path) -> None:
    match = content(whole)["match"]
    assert match["gradient"] == "adam" and match["checkpoint"] == 10 and len(match["optimizer_state"]) == 64
    rates = json.loads((whole / "manifest_0.json").read_text())["learning_rates"]
    assert rates["logged"] == 10 and rates["sum"] / 10 == pytest.approx(EXPECTED["checkpoints"][0]["learning_rate"])


def test_a_killed_pass_goes_on_to_the_same_features(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    arguments = less_arguments(CHECKPOINTS[10], "target.json", "--gradient", "adam", "--window", 4)
    process = fork_step(folder, *arguments, die_at="tive.features.gradient_pass.write_chunk")
    process.join()
    assert not (folder / "manifest_0.json").exists(), log_of(folder)
    done = run_adam(folder)
    assert done.code == 0 and "continuing: 12 of 12" in done.out
    assert torch.equal(content(folder)["features"], content(whole)["features"])


def test_in_chunks_the_features_are_the_same(whole: Path, tmp_path: Path) -> None:
    for chunk in range(2):
        assert run_adam(tmp_path, "--num_chunks", 2, "--chunk_idx", chunk).code == 0
    features = torch.cat([content(tmp_path, chunk)["features"] for chunk in range(2)]).float()
    cosines = torch.nn.functional.cosine_similarity(features, content(whole)["features"].float(), dim=1)
    assert (cosines > 0.999).all()


def test_a_dry_run_writes_no_features(tmp_path: Path) -> None:
    done = run_adam(tmp_path / "features", "--dry_run", 4)
    assert done.code == 0, done.err
    assert not list(tmp_path.glob("features/output*"))


def test_another_gradient_or_state_is_another_run(whole: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(whole, tmp_path / "features")
    for more, named in (
        (["--gradient", "sgd"], "gradient adam, now sgd"),
        (["--adam_form", "release"], "gradient adam, now adam_release"),
    ):
        done = run_adam(folder, *more)
        assert done.code == 2 and named in done.err


@pytest.mark.parametrize("option", ["--adam_form", "--optimizer_state"])
def test_what_only_adam_needs_is_refused_without_it(tmp_path: Path, option: str) -> None:
    value = {"--adam_form": "release", "--optimizer_state": str(CHECKPOINTS[10])}[option]
    done = run_less(tmp_path, CHECKPOINTS[10], "target.json", option, value)
    assert done.code == 2 and "--gradient adam" in done.err
