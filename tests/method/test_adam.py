"""Adam's step for a record's gradient: against torch's own optimizer, and against the formulas in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tive.method.gradients import adam_step, release_step

B1, B2, EPS, T = 0.8, 0.95, 1e-6, 7


@pytest.fixture
def numbers() -> tuple[Tensor, Tensor, Tensor]:
    """Gradients `[3, 4, 5]` and moments `[4, 5]`, of sizes as in training."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(3, 4, 5, generator=generator) * 1e-2
    return g, torch.randn(4, 5, generator=generator) * 1e-3, torch.rand(4, 5, generator=generator) * 1e-6


def test_adams_step_is_the_one_that_torchs_adamw_makes_next(numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    g, m, v = numbers
    for record, step in zip(g, adam_step(g, m, v, T, (B1, B2), EPS), strict=True):
        weight = torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=1.0, betas=(B1, B2), eps=EPS, weight_decay=0.0)
        optimizer.state[weight] = {"step": torch.tensor(float(T)), "exp_avg": m.double(), "exp_avg_sq": v.double()}
        weight.grad = record.double()
        optimizer.step()
        torch.testing.assert_close(step.double(), -weight.detach(), rtol=2e-6, atol=1e-9)


def test_the_releases_step_has_no_correction_and_eps_under_the_root(numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    g, m, v = (tensor.double() for tensor in numbers)
    expected = (0.9 * m + 0.1 * g) / (0.999 * v + 0.001 * g**2 + 1e-8) ** 0.5
    torch.testing.assert_close(release_step(*numbers).double(), expected, rtol=2e-6, atol=1e-9)


def test_neither_form_changes_what_it_is_given(numbers: tuple[Tensor, Tensor, Tensor]) -> None:
    before = [tensor.clone() for tensor in numbers]
    adam_step(*numbers, T, (B1, B2), EPS)
    release_step(*numbers)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(numbers, before, strict=True))


def test_where_nothing_ever_moved_the_step_is_zero() -> None:
    zero = torch.zeros(1, 2, 2)
    assert not adam_step(zero, zero[0], zero[0], 1, (B1, B2), 1e-8).any()
    assert not release_step(zero, zero[0], zero[0]).any()
