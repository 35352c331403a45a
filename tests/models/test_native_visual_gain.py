"""Visual gains of transformers' own models, of other shapes than LLaVA's: each the difference of two plain losses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.visual_gain import visual_gains
from tive.models import ModelFiles, native

GOLDEN = Path(__file__).parents[1] / "golden" / "native"


@pytest.mark.parametrize("model", ["llava_hf", "qwen2_5_vl", "internvl"])
def test_a_gain_is_the_difference_of_the_losses_without_and_with_the_images(model: str) -> None:
    files = ModelFiles(str(GOLDEN / model / "adapter"), str(GOLDEN / model / "base"))
    reference = native.load(files, torch.device("cpu"), torch.float32)
    gains, differences = visual_gains(native, reference, GOLDEN / model, 10)
    assert np.isfinite(gains).sum() >= 5
    np.testing.assert_allclose(gains, differences, rtol=0, atol=2e-5)
