"""How fast the step is: records a second, the share of the device's matrix rate, memory; random weights."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import models
from scripts.benchmark.gradients import now
from tive.features.batches import Batches
from tive.features.step import GradientStep
from tive.method.projection import make_projector
from tive.models.common import target_modules
from tive.util.device import forget_peak, peak_memory

# What is measured on a GPU; and on a CPU, where it is small and shows that it runs.
TEXT = (models.text_shape(4096, 8, 700), models.text_shape(64, 2, 16))  # of LLaVA-7B's width
QWEN_3B = (models.QWEN_3B, models.SMALL_QWEN)  # with an image of 504 x 672 pixels
LLAVA_7B = (models.LLAVA_7B, models.SMALL_LLAVA)


def step_of(shape: models.Shape, device: torch.device, dtype: torch.dtype) -> GradientStep:
    """The gradient step with the sparse projector, on a model with random weights."""
    family, reference = models.random_model(shape, device, dtype)
    return GradientStep(family, reference, target_modules(reference), make_projector("sparse", 0, 8192, device))


def speed(shapes: tuple[models.Shape, models.Shape], device: torch.device) -> tuple[dict[str, float], str]:
    """Records a second, and the share of the device's matrix rate that the whole step reaches."""
    shape, dtype, count = (shapes[0], torch.bfloat16, 64) if device.type == "cuda" else (shapes[1], torch.float32, 4)
    step = step_of(shape, device, dtype)
    records = models.random_records(shape, count, step.reference)
    forget_peak(device)
    batches = Batches(16, 16384)
    first = next(batches.cut(list(enumerate(records))))
    with FlopCounterMode(display=False) as counted:
        step(step.ready([item for _, item in first]))
    begin, done = now(device), 0
    for batch, _ in batches.compute(step, enumerate(records), step.ready, in_thread=True):
        done += len(batch)
    seconds = now(device) - begin
    rate = counted.get_total_flops() / sum(item.length for _, item in first) * batches.padded / seconds
    return {
        "records_per_second": done / seconds,
        "share_of_matrix_rate": rate / matrix_rate(device, dtype),
        "waiting_for_data": batches.waited / seconds,
        "peak_gib": peak_memory(device) / 2**30,
    }, ""


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """What the device reaches in one large matrix product, in operations a second."""
    size = 8192 if device.type == "cuda" else 256
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    for _ in range(3):
        a @ b
    begin = now(device)
    for _ in range(20):
        a @ b
    return 20 * 2 * size**3 / (now(device) - begin)
