"""Clusters of whitened features: exact arithmetic, so the same everywhere; varied where a draw is not."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tive.method import clusters
from tive.method.clusters import draw_from_clusters, grid_points, k_means, second_moments, sketched, whitening


@dataclass(frozen=True)
class Rows:
    start: int
    features: torch.Tensor

    @property
    def rows(self) -> int:
        return len(self.features)

    def load(self) -> torch.Tensor:
        return self.features


def spans_of(features: torch.Tensor, size: int = 64) -> list[Rows]:
    return [Rows(start, features[start : start + size]) for start in range(0, len(features), size)]


def made(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).half()


def lengths_of(features: torch.Tensor) -> np.ndarray:
    return features.double().norm(dim=1).numpy()


def test_a_sketch_keeps_inner_products_on_average():
    features = made(300, 5000)
    features[1::2] = features[::2] + 0.5 * features[1::2]
    unit = torch.nn.functional.normalize(features.double())
    small = sketched(features).double() / features.double().norm(dim=1, keepdim=True)
    assert small.shape == (300, clusters.DIMENSION)
    off = (small @ small.T - unit @ unit.T).abs()
    assert off.max() < 6 / clusters.DIMENSION**0.5 and (small @ small.T).diagonal().mean() == pytest.approx(1, abs=0.02)
    assert torch.equal(sketched(features[:, :40]), features[:, :40].float())


@pytest.mark.parametrize("span", [7, 64, 500])
def test_the_moments_are_those_of_the_records_that_count_whatever_the_spans(span):
    features, counted = made(500, 24), np.arange(500) % 3 > 0
    lengths = np.where(counted, lengths_of(features), np.nan)
    features[1], lengths[1] = float("inf"), np.inf
    counted[1] = False
    unit = torch.nn.functional.normalize(features.double())[torch.from_numpy(counted)]
    torch.testing.assert_close(second_moments(spans_of(features, span), lengths), unit.T @ unit / counted.sum())


def test_whitened_features_have_equal_second_moments_up_to_the_shrinkage(monkeypatch):
    monkeypatch.setattr(clusters, "SHRINKAGE", 1e-6)
    features = (made(4000, 16).float() * torch.logspace(0, -1.5, 16)).half()
    lengths = lengths_of(features)
    matrix = whitening(second_moments(spans_of(features), lengths))
    white = torch.nn.functional.normalize(features.double()) @ matrix
    torch.testing.assert_close(white.T @ white / 4000, torch.eye(16, dtype=torch.float64), atol=0.02, rtol=0)
    points = np.full((4000, 16), 99, np.int8)
    lengths[5] = np.nan
    grid_points(spans_of(features), lengths, matrix, points)
    assert (points[5] == 99).all() and np.abs(np.delete(points, 5, 0)).max() <= clusters.LIMIT
    inside = white.abs().amax(dim=1) < clusters.LIMIT / clusters.STEPS
    inside[5] = False
    assert (torch.from_numpy(points) - white * clusters.STEPS)[inside].abs().max() <= 0.5 + 1e-9


def groups_of_points(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points around four far corners, of unequal numbers, and the corner of each."""
    random = np.random.default_rng(seed)
    corner = random.permutation(np.repeat(np.arange(4), [400, 60, 25, 15]))
    centres = random.choice([-40, 40], (4, 32))
    return (centres[corner] + random.integers(-6, 7, (500, 32))).astype(np.int8), corner


def test_every_group_gives_a_record_where_a_draw_leaves_the_small_ones_out():
    points, corner = groups_of_points()
    drawn = draw_from_clusters(*k_means(points, 24, 0, "vqa"), 24)
    assert len(set(drawn.tolist())) == 24 and set(corner[drawn].tolist()) == {0, 1, 2, 3}


def test_clusters_are_the_same_for_any_threads_and_depend_on_seed_and_task(monkeypatch):
    points, _ = groups_of_points()
    before = torch.get_num_threads()
    outcomes = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            outcomes.append(k_means(points, 30, 3, "vqa"))
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(*outcomes, strict=True))
    assert not np.array_equal(outcomes[0][0], k_means(points, 30, 4, "vqa")[0])
    assert not np.array_equal(outcomes[0][0], k_means(points, 30, 3, "gqa")[0])
    # Written down once; another result on any machine is a broken promise.
    points = (np.arange(300 * 16) * 7919 % 179 - 89).astype(np.int8).reshape(300, 16)
    assert draw_from_clusters(*k_means(points, 20, 0, "vqa"), 8).tolist() == WRITTEN_DOWN


WRITTEN_DOWN = [5, 14, 26, 115, 118, 125, 146, 149]


def test_products_are_exact_even_at_the_ends_of_the_grid():
    ends = np.random.default_rng(0).choice([-clusters.LIMIT, clusters.LIMIT], (50, clusters.DIMENSION)).astype(np.int8)
    ends[0], ends[1] = clusters.LIMIT, -clusters.LIMIT
    whole = ends.astype(np.int64)
    labels, squares = k_means(ends, 50, 0, "t")
    assert sorted(labels.tolist()) == list(range(50)) and not squares.any()
    far = ((whole[0] - whole[1]) ** 2).sum()
    assert clusters._nearest(torch.tensor(ends[:1]).float(), torch.tensor(ends[1:2]).float())[1].item() == far < 2**24


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=40), st.data())
def test_clusters_take_turns_each_giving_its_nearest_record(points, data):
    labels, squares = (np.array(column) for column in zip(*points, strict=True))
    number = data.draw(st.integers(0, len(points)))
    drawn = draw_from_clusters(labels, squares, number).tolist()
    assert len(drawn) == len(set(drawn)) == number and drawn == sorted(drawn)
    taken = np.isin(np.arange(len(points)), drawn)
    for cluster in range(5):
        here = labels == cluster
        if taken[here].any() and (here & ~taken).any():
            assert squares[here & taken].max() <= squares[here & ~taken].min()
    counts = np.array([(taken & (labels == cluster)).sum() for cluster in range(5)])
    left = np.array([((labels == cluster) & ~taken).sum() for cluster in range(5)])
    assert all(counts[left > 0] >= counts.max() - 1)
