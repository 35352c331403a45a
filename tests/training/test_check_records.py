"""The check before training looks at every record, and lists all that LLaVA's trainer cannot take."""

from __future__ import annotations

import json

import pytest

from tests.helpers.records import GOOD_TURNS, record_with, write
from tive.training.check import check_records
from tive.util.errors import UserError

TAKEN = [
    record_with(*GOOD_TURNS, image="a.jpg"),
    record_with(("human", "What?"), ("gpt", "That.")),
    record_with(*GOOD_TURNS),
]
NOT_TAKEN = [
    (record_with(*GOOD_TURNS, images=["a.jpg"]), "--to llava"),
    (record_with(*GOOD_TURNS, image=["a.jpg"]), "--to llava"),
    (record_with(*GOOD_TURNS, video="a.mp4"), "`video`"),
    (record_with(("user", "What?"), ("assistant", "That.")), "--to llava"),
    (record_with(("human", " "), ("gpt", "")), "no text in any turn"),
]


def test_what_the_trainer_takes_is_counted_with_the_tags_that_have_no_image(tmp_path):
    data = check_records(str(write(tmp_path / "a.json", json.dumps(TAKEN))), tmp_path / "bad.json")
    assert (data.records, data.images, data.with_image, data.tags_alone) == (3, {"a.jpg"}, 1, 1)


def test_all_that_the_trainer_cannot_take_is_listed_with_its_remedy(tmp_path, capsys):
    path, listing = tmp_path / "a.json", tmp_path / "bad.json"
    write(path, json.dumps([*TAKEN, *(record for record, _ in NOT_TAKEN)]))
    with pytest.raises(UserError, match=r"5 of 8 records cannot be used \(the first: record 3 .*--drop"):
        check_records(str(path), listing)
    entries = json.loads(listing.read_text())
    assert [entry["row"] for entry in entries] == [3, 4, 5, 6, 7]
    for entry, (_, said) in zip(entries, NOT_TAKEN, strict=True):
        assert said in entry["reason"]
    assert capsys.readouterr().out.count("  record ") == 5
    write(path, json.dumps(TAKEN))
    check_records(str(path), listing)
    assert not listing.exists()
