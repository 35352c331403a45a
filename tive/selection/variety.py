"""Variety within a task: the whitened points that are clustered, in a file that bounds the memory."""

from __future__ import annotations

import os
import tempfile

import numpy as np

from tive.features.lookup import Features
from tive.method.clusters import grid_points, second_moments, whitening
from tive.selection.printing import bar


def whitened_points(features: Features, lengths: np.ndarray, folder: str | os.PathLike[str]) -> np.ndarray:
    """The records' features, whitened over the mixture, int8 `[N, m]` in a file of `folder` that goes with the array.

    Args:
        lengths: float64 `[N]`, `||f_s||`; NaN for a record that counts in nothing.
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
