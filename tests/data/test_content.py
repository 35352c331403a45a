"""A record's hash is that of what a trainer sees in it."""

from __future__ import annotations

import json

import pytest

from tive.data.trained import record_hash

TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A cat."}]
RECORD = {"id": 1, "dataset": "vqa", "image": "coco/1.jpg", "conversations": TURNS}
MESSAGES = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]


@pytest.mark.parametrize(
    "same",
    [
        {"conversations": [dict(reversed(turn.items())) for turn in TURNS], "image": "./coco//1.jpg", "id": "other"},
        {"messages": MESSAGES, "images": ["coco/1.jpg"], "dataset": "another task"},
        {"image": ["coco/1.jpg"], "conversations": TURNS, "system": ""},
        RECORD | {"conversations": [TURNS[0] | {"loss": None}, TURNS[1] | {"source": "a set"}]},
        json.loads(json.dumps(RECORD, indent=4)),
    ],
)
def test_labels_forms_and_spellings_play_no_part(same):
    assert record_hash(same) == record_hash(RECORD) and len(record_hash(same)) == 16


@pytest.mark.parametrize(
    "other",
    [
        RECORD | {"image": "coco/2.jpg"},
        RECORD | {"system": "Be brief."},
        RECORD | {"conversations": [TURNS[0], {"from": "gpt", "value": "A dog."}]},
        RECORD | {"conversations": TURNS * 2},
        RECORD | {"conversations": [TURNS[0], TURNS[1] | {"loss": False}]},
    ],
)
def test_what_a_trainer_sees_counts(other):
    assert record_hash(other) != record_hash(RECORD)


def test_what_cannot_be_read_has_a_hash_of_its_own():
    odd = [None, 3, "text", [], {}, {"conversations": 3}, {"conversations": [{"from": "gpt", "value": "\udfff"}]}]
    assert len({record_hash(record) for record in [*odd, RECORD]}) == len(odd) + 1
