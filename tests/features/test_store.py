"""Windows on disk are ranges of rows: they are read again whatever the window, and what is missing is known."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tive.features.store import Store

TYPES = {"norms": np.float32, "tokens": np.int32}
ROWS = range(5, 38)


def store_in(folder, match="a", types=TYPES):
    return Store(folder / "progress", ROWS, {"match": match}, types, 4)


def window(rows: range) -> tuple[range, dict[str, np.ndarray], dict[int, str], np.ndarray]:
    numbers = np.arange(rows.start, rows.stop)
    columns = {"norms": numbers.astype(np.float32), "tokens": numbers.astype(np.int32)}
    features = np.repeat(numbers[:, None], 4, 1).astype(np.float16)
    return rows, columns, {rows.start: "why"}, features


def test_windows_of_any_size_make_up_what_is_missing_in_any_order(tmp_path):
    choice = random.Random(3)
    for size in (10, 3, 7, 1, 100):
        store = store_in(tmp_path)
        missing = store.missing(size)
        assert max(map(len, missing), default=0) <= size
        for rows in choice.sample(missing, len(missing) // 2 if size < 100 else len(missing)):
            store.write(*window(rows))
    store = store_in(tmp_path)
    assert store.missing(5) == []
    assert store.columns["norms"].tolist() == list(ROWS) == store.columns["tokens"].tolist()
    assert store.features()[:, 2].tolist() == list(ROWS)
    assert [*store.left_out] == [rows.start for rows in store.windows]


def test_not_a_number_is_kept(tmp_path):
    rows, columns, left_out, features = window(range(5, 9))
    columns["norms"][1] = np.nan
    store_in(tmp_path).write(rows, columns, left_out, features)
    again = store_in(tmp_path)
    assert again.windows == [rows]
    assert np.array_equal(again.columns["norms"][:4], columns["norms"], equal_nan=True)


@pytest.mark.parametrize("change", ["features", "window", "match", "columns"])
def test_what_is_damaged_or_of_something_else_is_missing(tmp_path, change, capsys):
    store = store_in(tmp_path)
    for rows in store.missing(10):
        store.write(*window(rows))
    if change == "features":
        store.features()[12] = 9
    if change == "window":
        path = tmp_path / "progress" / "window_000000015_000000025"
        path.write_bytes(path.read_bytes().replace(np.float32(16).tobytes(), np.float32(17).tobytes()))
    types = TYPES | ({"el2n": np.float32} if change == "columns" else {})
    again = store_in(tmp_path, "b" if change == "match" else "a", types)
    damaged = change in ("features", "window")
    missing = [range(15, 25)] if damaged else [range(5, 15), range(15, 25), range(25, 35), range(35, 38)]
    assert again.missing(10) == missing
    assert capsys.readouterr().out.count("computed again") == len(missing)
    assert store_in(tmp_path, "b" if change == "match" else "a", types).missing(10) == missing


def test_a_store_without_features_has_no_file_of_them(tmp_path):
    store = Store(tmp_path / "s", range(3), {}, TYPES)
    store.write(range(3), window(range(3))[1], {})
    assert not (tmp_path / "s" / "features.f16").exists()
    assert Store(tmp_path / "s", range(3), {}, TYPES).missing(2) == []
