"""A step along a record's gradient changes the held-out loss as its gradient says, and leaves the model as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scripts.experiment.influence_check import loss_changes, mean_loss, unit_gradient
from scripts.experiment.statistics import rank_interval
from tests.helpers.reference import encode_golden, load_golden
from tive.models import llava
from tive.models.common import target_modules


@pytest.fixture(scope="module")
def golden():
    reference = load_golden()
    return reference, [record for record in encode_golden(reference)[:12] if record.inputs.pixels is not None]


def test_a_small_step_changes_the_loss_by_the_product_of_the_gradients(golden):
    reference, records = golden
    weights = [matrix.weight for matrix in target_modules(reference).values()]
    changes = loss_changes(llava, reference, records[:4], records[4:7], step := 1e-2)
    for weight in weights:
        weight.requires_grad_(True)
    losses = llava.record_losses(reference, records[4:7]).losses.mean()
    held_out = torch.autograd.grad(losses, weights)
    units = [unit_gradient(llava, reference, weights, record) for record in records[:4]]
    for weight in weights:
        weight.requires_grad_(False)
    products = [-step * sum(float((a * b).sum()) for a, b in zip(unit, held_out, strict=True)) for unit in units]
    assert changes == pytest.approx(products, rel=0.1, abs=2e-6)


def test_the_model_is_left_as_it_was(golden):
    reference, records = golden
    before = mean_loss(llava, reference, records)
    loss_changes(llava, reference, records[:2], records[2:4], 0.5)
    assert mean_loss(llava, reference, records) == before
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_rank_correlation_is_spearmans_with_ties_at_their_mean():
    assert rank_interval([1, 2, 3, 4, 5], [1, 4, 9, 16, 25])[0] == pytest.approx(1.0)
    # Spearman, 1904 form with ties: ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4.
    assert rank_interval([1, 2, 2, 3], [1, 2, 3, 4])[0] == pytest.approx(0.948683, abs=1e-6)
    middle, low, high = rank_interval(*np.random.default_rng(0).normal(size=(2, 400)))
    assert low < middle < high and low < 0 < high
