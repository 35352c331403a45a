"""The visual gain of a record: its loss without its images, minus its loss with them."""

from __future__ import annotations

import copy
import sys

import numpy as np
import pytest
import torch

import select_data_TIVE
from tests.helpers.golden_model import GOLDEN, RECORDS, run_step
from tests.helpers.reference import load_golden
from tive.models import llava
from tive.util.errors import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gains")
    result = run_step(folder, "--visual_gain", "--batch_size", 5)
    assert result.code == 0, result.err
    return folder


def columns(folder):
    return torch.load(folder / "output_0.pt", weights_only=True)


def loss_alone(reference, record):
    with torch.no_grad():
        encoded = llava.encode(reference.processor, record, str(GOLDEN / "images"))
        return float(llava.record_losses(reference, [encoded]).losses), encoded.supervised


def test_the_gain_is_the_difference_of_two_losses_each_computed_alone(folder):
    reference, gains, compared = load_golden(), columns(folder)["visual_gain"].numpy(), 0
    for record, gain in zip(RECORDS, gains, strict=True):
        if "image" not in record:
            assert np.isnan(gain)
            continue
        text = copy.deepcopy({key: value for key, value in record.items() if key != "image"})
        for turn in text["conversations"]:
            turn["value"] = turn["value"].replace("<image>", "").strip()
        (with_image, supervised), (without, supervised_alone) = (
            loss_alone(reference, record),
            loss_alone(reference, text),
        )
        if supervised == supervised_alone:
            assert gain == pytest.approx(without - with_image, abs=2e-5)
            compared += 1
        else:  # cut behind its image
            assert np.isnan(gain)
    assert compared > 20


def test_asking_for_it_changes_no_other_number(folder, tmp_path):
    assert run_step(tmp_path, "--batch_size", 5).code == 0
    plain, asked = columns(tmp_path), columns(folder)
    assert "visual_gain" not in plain
    for name in ("features", "norms", "losses"):
        assert torch.equal(plain[name], asked[name])


def test_a_selection_by_visual_gain_takes_records_with_images_alone(folder, tmp_path, monkeypatch, capsys):
    arguments = ["--data_path", GOLDEN / "data.json", "--gradient_path", folder, "--save_path", tmp_path]
    arguments += ["--instance_score", "visual_gain", "--sampling", "top", "--p", 0.2]
    tasks = {record["dataset"] for record in RECORDS if "image" in record}
    textual = sorted({record["dataset"] for record in RECORDS} - tasks)
    arguments += ["--exclude_tasks", *(textual or ["none"])]
    monkeypatch.setattr(sys, "argv", ["select", *map(str, arguments)])
    run(select_data_TIVE.main)
    (scores,) = tmp_path.glob("*_scores.csv")
    header, *lines = [line.split(",") for line in scores.read_text().splitlines()]
    drawn = [int(line[0]) for line in lines if line[header.index("times_selected")] == "1"]
    assert drawn and all("image" in RECORDS[row] for row in drawn)
