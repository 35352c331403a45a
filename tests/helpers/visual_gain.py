"""Visual gains as the gradient step computes them, and from two plain losses."""

from __future__ import annotations

import math
from functools import partial
from itertools import islice
from pathlib import Path
from types import ModuleType

import torch

from tive.data.conversations import images_of, without_images
from tive.data.records import open_records
from tive.features.loader import Loader
from tive.features.step import GradientStep
from tive.method.projection import Sparse
from tive.models import Reference
from tive.models.common import target_modules


def visual_gains(family: ModuleType, reference: Reference, folder: Path, count: int) -> tuple[list[float], list[float]]:
    """Of the first records of `folder`: the step's gains in one batch, and the differences of losses taken alone."""
    records, images = open_records(str(folder / "data.json")), str(folder / "images")
    loader = Loader(partial(family.encode, reference.processor), records, images, text_alone=True)
    projector = Sparse(0, 8, torch.device("cpu"))
    step = GradientStep(family, reference, target_modules(reference, "self_attn"), projector, visual_gain=True)

    def loss(record: dict) -> float:
        with torch.no_grad():
            return float(family.record_losses(reference, [family.encode(reference.processor, record, images)]).losses)

    differences = [
        loss(without_images(record)) - loss(record) if images_of(record) else math.nan
        for record in islice(records, count)
    ]
    return step(step.ready([loader[row][1] for row in range(count)]))["visual_gain"].tolist(), differences
