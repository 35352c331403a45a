"""How fast the step is: records a second, the share of the device's matrix rate, memory; random weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import text_model
from scripts.gpu_check.results import NotHere
from tive.features.batches import Batches
from tive.features.step import GradientStep
from tive.method.projection import make_projector
from tive.models import Encoded, Reference
from tive.models.common import target_modules
from tive.util.device import forget_peak, peak_memory

# What is measured: a step and its records.
Case = tuple[GradientStep, list[Encoded]]


def step_of(family: Any, reference: Reference) -> GradientStep:
    """The gradient step with the sparse projector."""
    projector = make_projector("sparse", 0, 8192, reference.device)
    return GradientStep(family, reference, target_modules(reference), projector)


def speed(make: Callable[[torch.device], Case], device: torch.device) -> tuple[dict[str, float], str]:
    """Records a second, and the share of the device's matrix rate that the whole step reaches."""
    step, records = make(device)
    forget_peak(device)
    batches = Batches(16, 16384)
    first = next(batches.cut(list(enumerate(records))))
    with FlopCounterMode(display=False) as counted:
        step(step.ready([item for _, item in first]))
    synchronize(device)
    begin, done = time.perf_counter(), 0
    for batch, _ in batches.compute(step, enumerate(records), step.ready, in_thread=True):
        done += len(batch)
    synchronize(device)
    seconds = time.perf_counter() - begin
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
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize(device)
    return 20 * 2 * size**3 / (time.perf_counter() - begin)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def text(device: torch.device) -> Case:
    """A text model of LLaVA-7B's width; on a CPU a small one."""
    on_gpu = device.type == "cuda"
    width, layers, tokens, count = (4096, 8, 700, 64) if on_gpu else (64, 2, 16, 4)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    reference = text_model.random_llama(width, layers, device, dtype)
    return step_of(text_model, reference), text_model.random_texts(count, tokens)


def llava(device: torch.device) -> Case:
    """LLaVA-1.5-7B with its vision tower, and records like its mixture's; on a CPU a small one."""
    from scripts.benchmark.model import Shape, random_llava, random_records
    from tive.models import llava as family

    on_gpu = device.type == "cuda"
    shape = Shape() if on_gpu else Shape(64, 128, 2, 4, 512, 32, 64, 2, 4, 28, 14, 4)
    try:
        reference = random_llava(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    except ImportError as error:
        raise NotHere(str(error)) from error
    return step_of(family, reference), random_records(64 if on_gpu else 4, shape)


def qwen(device: torch.device) -> Case:
    """Qwen2.5-VL-3B with its vision tower, and records with an image of 504 x 672 pixels; on a CPU a small one."""
    from scripts.benchmark.qwen_model import QwenShape, random_qwen, random_qwen_records
    from tive.models import native as family

    on_gpu = device.type == "cuda"
    shape = QwenShape() if on_gpu else QwenShape(64, 128, 2, 4, 2, 512, 32, 64, 2, 4, (1,), 4)
    try:
        reference = random_qwen(shape, device, torch.bfloat16 if on_gpu else torch.float32)
    except ImportError as error:
        raise NotHere(str(error)) from error
    grid = (36, 48) if on_gpu else (4, 8)
    return step_of(family, reference), random_qwen_records(64 if on_gpu else 4, shape, reference, grid)
