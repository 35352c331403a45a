"""Means of groups and products with means, against naive sums."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from tive.method import influence
from tive.method.influence import Span, group_means, products


def spans_of(features: torch.Tensor, size: int, loads: list[int] | None = None) -> list[Span]:
    """Features in memory as spans; `loads` notes each time that one is read."""

    def load(start: int) -> torch.Tensor:
        if loads is not None:
            loads.append(start)
        return features[start : start + size]

    starts = range(0, len(features), size)
    return [Span(start, len(features[start : start + size]), partial(load, start)) for start in starts]


@pytest.fixture
def features() -> torch.Tensor:
    return (torch.randn(200, 31, generator=torch.Generator().manual_seed(1)) + 0.4).half()


@pytest.fixture
def groups() -> np.ndarray:
    return np.random.default_rng(2).integers(-1, 5, 200)


def unit(features: torch.Tensor) -> np.ndarray:
    double = features.double()
    return (double / double.norm(dim=1, keepdim=True)).numpy()


def test_the_means_are_those_of_the_unit_features_of_each_group(features, groups):
    means, lengths = group_means(spans_of(features, 37), groups)
    for group in range(5):
        np.testing.assert_allclose(means[group], unit(features)[groups == group].mean(0), atol=1e-13)
    asked = groups >= 0
    np.testing.assert_allclose(lengths[asked], features.double().norm(dim=1).numpy()[asked])
    assert np.isnan(lengths[~asked]).all()


def test_products_with_every_mean_and_with_the_own_one_are_cosines_with_it(features, groups):
    means, _ = group_means(spans_of(features, 64), groups)
    cosines = unit(features) @ means.numpy().T
    every = products(spans_of(features, 64), means)
    np.testing.assert_allclose(every, cosines, atol=2e-12)
    own = products(spans_of(features, 64), means, groups)
    asked = groups >= 0
    np.testing.assert_allclose(own[asked], cosines[asked, groups[asked]], atol=2e-12)
    assert np.isnan(own[~asked]).all()


def test_lengths_that_are_known_change_no_bit(features, groups):
    means, lengths = group_means(spans_of(features, 64), groups)
    given = products(spans_of(features, 64), means, groups, lengths)
    assert given.tobytes() == products(spans_of(features, 64), means, groups).tobytes()


def test_the_number_of_threads_changes_no_bit(features, groups):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            means, lengths = group_means(spans_of(features, 16), groups)
            every = products(spans_of(features, 16), means)
            results.append(means.numpy().tobytes() + every.tobytes() + lengths.tobytes())
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert len(set(results)) == 1


def test_features_that_are_zero_or_not_finite_are_in_no_mean_and_have_no_product(features, groups):
    features[3], features[11, 4], features[17, 0] = 0, float("inf"), float("nan")
    groups[[3, 11, 17]] = 2
    bad = np.isin(np.arange(200), [3, 11, 17])
    means, lengths = group_means(spans_of(features, 37), groups)
    np.testing.assert_allclose(means[2], unit(features)[(groups == 2) & ~bad].mean(0), atol=1e-13)
    every = products(spans_of(features, 37), means)
    assert (np.isnan(every).all(1) == bad).all() and (np.isnan(every).any(1) == bad).all()
    assert lengths[3] == 0


def test_what_counts_in_nothing_is_not_read(features):
    loads: list[int] = []
    spans = spans_of(features, 50, loads)
    groups = np.full(200, -1)
    groups[60] = 1
    means, _ = group_means(spans, groups)
    assert loads == [50]
    assert means.any(dim=1).tolist() == [False, True]
    assert group_means(spans, np.full(200, -1))[0].shape[0] == 0


def test_progress_is_told_of_every_row_once(features, groups):
    told: list[int] = []
    means = group_means(spans_of(features, 37), groups, progress=told.append)[0]
    products(spans_of(features, 37), means, progress=told.append)
    assert sum(told) == 400


def test_the_method_neither_prints_nor_touches_a_file(features, groups, capfd):
    products(spans_of(features, 37), group_means(spans_of(features, 37), groups)[0], groups)
    assert capfd.readouterr() == ("", "")
    assert not {"tqdm", "os", "Path"} & vars(influence).keys()
