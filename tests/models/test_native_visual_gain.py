"""Visual gains of transformers' own models, of other shapes than LLaVA's: each the difference of two plain losses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.native_gradients import WholeGradient
from tive.data.conversations import images_of, without_images
from tive.data.records import open_records
from tive.features.loader import Loader
from tive.features.step import GradientStep
from tive.models import ModelFiles, native
from tive.models.common import target_modules

GOLDEN = Path(__file__).parents[1] / "golden" / "native"


@pytest.mark.parametrize("model", ["llava_hf", "qwen2_5_vl", "internvl"])
def test_a_gain_is_the_difference_of_the_losses_without_and_with_the_images(model: str) -> None:
    folder = GOLDEN / model
    files = ModelFiles(str(folder / "adapter"), str(folder / "base"))
    reference = native.load(files, torch.device("cpu"), torch.float32)
    records, rows = open_records(str(folder / "data.json")), range(10)
    loader = Loader(native, reference, records, str(folder / "images"), text_alone=True)
    encoded = [loader[row][1] for row in rows]
    matrices = target_modules(reference, "self_attn")
    step = GradientStep(native, reference, matrices, WholeGradient(matrices), visual_gain=True)

    def loss(record: dict) -> float:
        item = native.encode(reference.processor, record, str(folder / "images"))
        with torch.no_grad():
            return float(native.record_losses(reference, [item]).losses)

    gains = step(encoded)["visual_gain"].numpy()
    for record, gain in zip(json.loads((folder / "data.json").read_text()), gains, strict=False):
        if images_of(record):
            assert gain == pytest.approx(loss(without_images(record)) - loss(record), abs=2e-5)
        else:
            assert np.isnan(gain)
    assert np.isfinite(gains).sum() >= 5
