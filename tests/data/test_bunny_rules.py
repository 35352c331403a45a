"""Bunny-695K: the id names the source, and what comes from LLaVA-1.5 is told apart as in LLaVA-1.5's own rules."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.helpers.mixture import COCO, COUNTS, example, record
from tive.data.tasks import read_rules

RULES = read_rules(Path(__file__).resolve().parents[2] / "scripts" / "rules" / "bunny_695k.yaml")
SOURCES = {
    "svit_detail_": (["SVIT-detail"], 70_809),
    "svit_conversation_": (["SVIT-conversation"], 43_980),
    "svit_complex_": (["SVIT-complex"], 21_560),
    "svit_referring_": (["SVIT-referring"], 21_363),
    "wizardlm_": (["WizardLM"], 70_000),
    "llavav1.5_": (sorted(COUNTS.keys() - {"LLaVA-Instruct", "ShareGPT"}), 466_898),
}


def test_the_counts_of_each_source_are_the_published_ones():
    for tasks, count in SOURCES.values():
        assert sum(RULES.expected[task] for task in tasks) == count
    assert sum(RULES.expected.values()) == 694_610


@pytest.mark.parametrize("prefix", [prefix for prefix, (tasks, _) in SOURCES.items() if len(tasks) == 1])
@pytest.mark.parametrize("image", [None, COCO, "vg/VG_100K/1.jpg"])
def test_the_id_names_the_source_whatever_the_image(prefix, image):
    made = record(image, ["What is it?"]) | {"id": f"{prefix}17"}
    assert [RULES.task_of(made, split=False)] == SOURCES[prefix][0]


def test_what_comes_from_llava_is_told_apart_as_there_and_nothing_else_is():
    choose = random.Random(3)
    for task in SOURCES["llavav1.5_"][0]:
        for _ in range(20):
            made = example(task, choose)
            assert RULES.task_of(made | {"id": "llavav1.5_17"}, split=False) == task
            assert RULES.task_of(made | {"id": "17"}, split=False) is None
    assert RULES.task_of(record("new/1.jpg", ["What?"]) | {"id": "llavav1.5_1"}, split=False) is None
