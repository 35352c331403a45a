"""How fast the step is: records a second, the share of the device's matrix rate, memory; random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import models
from tive.features.batches import Batches
from tive.features.step import GradientStep
from tive.method.projection import make_projector
from tive.models import Encoded, Reference, spliced
from tive.models.common import target_modules
from tive.util.device import forget_peak, peak_memory

# What is measured: a step and its records. On a CPU it is small, and shows that it runs.
Case = tuple[GradientStep, list[Encoded]]


def step_of(family: Any, reference: Reference) -> GradientStep:
    """The gradient step with the sparse projector."""
    projector = make_projector("sparse", 0, 8192, reference.device)
    return GradientStep(family, reference, target_modules(reference), projector)


def dtype_and_count(device: torch.device) -> tuple[torch.dtype, int]:
    return (torch.bfloat16, 64) if device.type == "cuda" else (torch.float32, 4)


def text(device: torch.device) -> Case:
    """A text model of LLaVA-7B's width."""
    dtype, count = dtype_and_count(device)
    width, layers, tokens = (4096, 8, 700) if device.type == "cuda" else (64, 2, 16)
    reference = models.random_llava(models.text_shape(width, layers), device, dtype)
    return step_of(spliced, reference), models.random_texts(count, tokens)


def llava(device: torch.device) -> Case:
    """LLaVA-1.5-7B with its vision tower, and records like its mixture's."""
    dtype, count = dtype_and_count(device)
    shape = models.LLAVA_7B if device.type == "cuda" else models.SMALL_LLAVA
    return step_of(spliced, models.random_llava(shape, device, dtype)), models.random_records(shape, count)


def qwen(device: torch.device) -> Case:
    """Qwen2.5-VL-3B with its vision tower, and records with an image of 504 x 672 pixels."""
    from tive.models import native

    dtype, count = dtype_and_count(device)
    shape = models.QWEN_3B if device.type == "cuda" else models.SMALL_QWEN
    reference = models.random_qwen(shape, device, dtype)
    return step_of(native, reference), models.random_qwen_records(shape, count, reference)


def speed(make: Callable[[torch.device], Case], device: torch.device) -> tuple[dict[str, float], str]:
    """Records a second, and the share of the device's matrix rate that the whole step reaches."""
    step, records = make(device)
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
        "share_of_matrix_rate": rate / matrix_rate(device, step.reference.dtype),
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


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
