"""Features belong to records: changed data takes those that are there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch

from tests.helpers.feature_files import mixture, random_features, record, write_features
from tive.data.records import Records, open_records
from tive.data.trained import record_hash, record_hashes, rows_with
from tive.features.lookup import Features, open_features
from tive.util.errors import UserError

RECORDS = mixture()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor, torch.Tensor]:
    folder = tmp_path_factory.mktemp("made")
    (folder / "data.json").write_text(json.dumps(RECORDS))
    features, norms = random_features(len(RECORDS))
    features[5], norms[5] = 0, float("nan")
    write_features(folder / "features", folder / "data.json", features, norms, left_out={5: "image missing"})
    return folder, features, norms


def as_messages(one: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in one["conversations"]]
    return {key: value for key, value in one.items() if key != "conversations"} | {"messages": turns}


ORDER = np.random.default_rng(0).permutation(len(RECORDS)).tolist()
CHANGED: dict[str, tuple[list[dict[str, Any]], list[int]]] = {
    "relabelled": ([one | {"dataset": "other", "id": 7} for one in RECORDS], list(range(78))),
    "reordered": ([RECORDS[row] for row in ORDER], ORDER),
    "in another form": ([as_messages(one) for one in RECORDS], list(range(78))),
    "filtered": (RECORDS[10:40:3], list(range(10, 40, 3))),
    "grown": ([record(990, "new"), *RECORDS, record(991, "new")], [-1, *range(78), -1]),
    "repeated": ([RECORDS[3], *RECORDS[3:5]], [3, 3, 4]),
}


def opened(
    made: tuple[Path, Any, Any], folder: Path, records: list[dict[str, Any]], name: str = "features"
) -> Features:
    (folder / "changed.json").write_text(json.dumps(records, indent=3))
    return open_features(made[0] / name, open_records(folder / "changed.json"))


@pytest.mark.parametrize("change", CHANGED)
def test_changed_data_takes_the_features_that_are_there(made, tmp_path, change):
    records, rows = CHANGED[change]
    found = opened(made, tmp_path, records)
    assert found.rows.tolist() == rows
    _, features, norms = made
    expected = torch.stack([features[row] if row >= 0 else torch.zeros_like(features[0]) for row in rows])
    assert torch.equal(torch.cat([span.load() for span in found.spans()]), expected)
    wanted = [float(norms[row]) if row >= 0 else np.nan for row in rows]
    np.testing.assert_allclose(found.column("norms"), wanted)
    assert found.left_out() == {place: "image missing" for place, row in enumerate(rows) if row == 5}


def test_the_same_file_is_matched_by_row_without_a_look_at_the_records(made, monkeypatch):
    monkeypatch.setattr("tive.features.lookup.record_hashes", lambda *_: pytest.fail("hashed"))
    assert open_features(made[0] / "features", open_records(made[0] / "data.json")).is_by_row


def test_features_of_before_the_hashes_are_matched_through_their_data_file_as_long_as_it_is_there(made, tmp_path):
    folder, features, norms = made
    data = tmp_path / "data.json"
    data.write_text((folder / "data.json").read_text())
    write_features(tmp_path / "old", data, features, norms, manifest={"data_path": str(data)}, content=False)
    records, rows = CHANGED["filtered"]
    (tmp_path / "changed.json").write_text(json.dumps(records))
    changed = open_records(tmp_path / "changed.json")
    assert open_features(tmp_path / "old", changed).rows.tolist() == rows
    data.write_text(data.read_text() + " ")
    with pytest.raises(UserError, match=r"data\.json"):
        open_features(tmp_path / "old", changed)


def test_several_folders_are_one_and_must_be_of_one_space(made, tmp_path):
    new = [record(990, "new"), record(991, "new")]
    (tmp_path / "new.json").write_text(json.dumps(new))
    more, norms = random_features(2, seed=9)
    write_features(tmp_path / "more", tmp_path / "new.json", more, norms, 1, left_out={1: "odd"})
    grown = CHANGED["grown"][0]
    (tmp_path / "grown.json").write_text(json.dumps(grown))
    records = open_records(tmp_path / "grown.json")
    joined = open_features([str(made[0] / "features"), str(tmp_path / "more")], records)
    assert joined.rows.tolist() == [78, *range(78), 79]
    loaded = torch.cat([span.load() for span in joined.spans()])
    assert torch.equal(loaded[[0, -1]], more) and torch.equal(loaded[1:-1], made[1])
    assert joined.left_out() == {6: "image missing", 79: "odd"}
    write_features(
        tmp_path / "other", tmp_path / "new.json", more, norms, 1, change=lambda match: match.update(model="x")
    )
    with pytest.raises(UserError, match="model"):
        open_features([str(made[0] / "features"), str(tmp_path / "other")], records)


def test_half_a_hash_in_common_is_no_match():
    hashes = np.array([list(record_hash(one)) for one in RECORDS[:4]], np.uint8)
    near = hashes.copy()
    near[:, 12] ^= 1
    assert rows_with(hashes, near).tolist() == [-1] * 4
    assert rows_with(hashes, hashes[::-1]).tolist() == [3, 2, 1, 0]
    assert rows_with(hashes[:0], hashes).tolist() == [-1] * 4


def test_images_in_the_rows_count_by_their_bytes_wherever_the_rows_stand(tmp_path):
    def written(name: str, order: list[int]) -> Records:
        rows = [
            {
                "image": {"bytes": bytes([row]) * 9, "path": "0.png"},
                "source": name,
                "texts": [{"user": "?", "assistant": "!"}],
            }
            for row in order
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        return open_records(tmp_path / f"{name}.parquet")

    first, second = written("first", [0, 1, 2, 3]), written("second", [3, 1, 9])
    assert rows_with(record_hashes(first), record_hashes(second)).tolist() == [3, 1, -1]
    assert record_hashes(first, range(1, 3)).tolist() == record_hashes(first)[1:3].tolist()
    assert record_hashes(first, range(2, 2)).shape == (0, 16)
