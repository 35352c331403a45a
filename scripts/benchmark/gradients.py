"""Ways to get projected per-record gradients, in one run on the same batches, and what none can cost less than."""

from __future__ import annotations

import argparse
import functools
import gc
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tive.features.step import GradientStep
from tive.method.gradients import gradient_features
from tive.method.projection import Projector, make_projector
from tive.util.device import device_name, forget_peak, peak_memory
from tive.util.text import print_table

from . import cases
from .cases import Case

# Computes a batch, with so many numbers in a feature; what it needs for that it makes once.
Method = Callable[[Case, int, list[int]], object]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    add = parser.add_argument
    add("--proj_dim", type=int, default=8192, help="numbers in a feature")
    add("--methods", nargs="+", choices=METHODS, default=USUAL, metavar="METHOD", help=f"of {' '.join(METHODS)}")
    add("--rounds", type=int, default=3, help="methods take turns so often; the best counts")
    add("--seconds", type=float, default=60, help="a method gets no further round, and ends a round, after this long")


def run(arguments: argparse.Namespace) -> None:
    case = cases.make_case(arguments)
    tokens = sum(record.length for record in case.records)
    padded = sum(len(batch) * max(case.records[number].length for number in batch) for batch in case.batches)
    print(
        f"{device_name(case.reference.device)}, {case.reference.dtype}, torch {torch.__version__}\n"
        f"{len(case.records)} records of {tokens / len(case.records):.0f} tokens in {len(case.batches)} batches, "
        f"padding efficiency {tokens / padded:.2f}; {case.parameters:,} parameters in {len(case.matrices)} matrices, "
        f"{arguments.proj_dim} features"
    )
    best: dict[str, Round] = {}
    spent = dict.fromkeys(arguments.methods, 0.0)
    for _ in range(arguments.rounds):  # in turns, so that what else the machine does meets all of them
        for name in [name for name, seconds in spent.items() if seconds < arguments.seconds]:
            try:
                measured = one_round(METHODS[name], case, arguments)
            except (ImportError, RuntimeError, MemoryError, ValueError) as error:
                print(f"{name} does not run here: {(str(error) or type(error).__name__).splitlines()[0][:90]}")
                del spent[name]
                continue
            spent[name] += measured.cost * measured.records
            best[name] = min(measured, best.get(name, measured))
    forward, limit = (best.get(name) for name in ("forward", "forward_and_backward"))
    rows: list[tuple[str, ...]] = [("method", "ms/record", "records/s", "x forward", "x limit", "peak GiB", "records")]
    for name, (cost, records, peak) in best.items():
        ratios = [f"{cost / to.cost:.2f}" if to else "-" for to in (forward, limit)]
        rows.append((name, f"{cost * 1000:.2f}", f"{1 / cost:.2f}", *ratios, f"{peak / 2**30:.2f}", str(records)))
    print_table(rows)


class Round(NamedTuple):
    """Seconds a record, records, and peak memory in bytes."""

    cost: float
    records: int
    peak: int


def one_round(method: Method, case: Case, arguments: argparse.Namespace) -> Round:
    """One pass over the batches, ended after `--seconds`; before it, if rounds are many, an uncounted batch."""
    if arguments.rounds > 1:
        method(case, arguments.proj_dim, case.batches[0])
    gc.collect()
    forget_peak(case.reference.device)
    records, begin = 0, now(case.reference.device)
    for batch in case.batches:
        method(case, arguments.proj_dim, batch)
        records += len(batch)
        seconds = now(case.reference.device) - begin
        if seconds > arguments.seconds:
            break
    return Round(seconds / records, records, peak_memory(case.reference.device))


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def forward(case: Case, proj_dim: int, batch: list[int]) -> None:
    """The forward pass alone."""
    with torch.no_grad():
        case.losses(batch)


def forward_and_backward(case: Case, proj_dim: int, batch: list[int]) -> None:
    """Forward, and backward through the activations down to the first target module: the limit for a frozen base."""

    def start(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    hooks = [matrix.register_forward_hook(start) for matrix in case.matrices.values()]
    case.losses(batch).sum().backward()
    for hook in hooks:
        hook.remove()


def losses_alone(case: Case, proj_dim: int, batch: list[int]) -> None:
    """The step with `--gradient none`: losses and EL2N."""
    step = GradientStep(case.family, case.reference, {}, None, el2n=True)
    step(step.ready([case.records[number] for number in batch]))


class NoProjection:
    """In the place of a projector, to measure what the projection costs."""

    kind = about = "none"
    proj_dim = 1

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        pass


def gradients(kind: str, case: Case, proj_dim: int, batch: list[int]) -> None:
    """The gradient step: per-record gradients of a whole batch, projected matrix by matrix."""
    gradient_features(partial(case.losses, batch), case.matrices, projector_of(kind, proj_dim, case.reference.device))


@functools.cache
def projector_of(kind: str, proj_dim: int, device: torch.device) -> Projector:
    return NoProjection() if kind == "none" else make_projector(kind, 0, proj_dim, device)


def one_at_a_time(case: Case, proj_dim: int, batch: list[int]) -> None:
    """What the method is without this engine: autograd's parameter gradients of one record after another.

    The gradients of a batch are stacked and projected whole by TRAK's projector.
    """
    from trak.projectors import BasicProjector, CudaProjector, ProjectionType

    device, weights = case.reference.device, [matrix.weight for matrix in case.matrices.values()]
    dtype = case.reference.dtype if device.type == "cpu" else torch.float16
    projector = (BasicProjector if device.type == "cpu" else CudaProjector)(
        grad_dim=case.parameters,
        proj_dim=proj_dim,
        seed=0,
        proj_type=ProjectionType.rademacher,
        device=device,
        dtype=dtype,
        block_size=128,
        max_batch_size=16,
    )
    rows = []
    for weight in weights:
        weight.requires_grad_(True)
    for number in batch:
        parts = torch.autograd.grad(case.losses([number]).sum(), weights)
        rows.append(torch.cat([part.flatten() for part in parts]).to(dtype))
    for weight in weights:
        weight.requires_grad_(False)
    projector.project(torch.stack(rows), model_id=0).cpu()


def bergson(case: Case, proj_dim: int, batch: list[int]) -> None:
    """bergson's collector on the same batches and losses: 16 x 16 numbers a matrix, gathered on the CPU."""

    def start(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return inputs[0].detach().requires_grad_(), *inputs[1:]

    hook = case.reference.layers[0].register_forward_pre_hook(start)
    collector = collector_of(case)
    with collector:
        case.losses(batch).sum().backward()
    hook.remove()
    features = torch.cat(list(collector.mod_grads.values()), dim=1).cpu()
    if features.shape != (len(batch), 256 * len(case.matrices)):
        raise RuntimeError(f"bergson's features have the shape {tuple(features.shape)}")
    collector.mod_grads.clear()


@functools.cache
def collector_of(case: Case) -> Any:
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    model = case.reference.model
    names = {module: name for name, module in model.named_modules()}
    model.get_input_embeddings().requires_grad_(True)  # bergson takes its dtype from what can be trained
    collector = GradientCollector(
        model=model,
        cfg=IndexConfig(run_path="unused"),
        data=Dataset.from_dict({"row": list(range(len(case.records)))}),
        processor=GradientProcessor(projection_dim=16),
        target_modules={names[matrix] for matrix in case.matrices.values()},
        skip_index=True,
    )
    model.requires_grad_(False)
    return collector


METHODS: dict[str, Method] = {
    "forward": forward,
    "none": losses_alone,
    "forward_and_backward": forward_and_backward,
    "no_projection": partial(gradients, "none"),
    "sparse": partial(gradients, "sparse"),
    "trak": partial(gradients, "trak"),
    "one_at_a_time": one_at_a_time,
    "bergson": bergson,
}
# The others take minutes a batch for large models on a CPU, or a library of their own.
USUAL = ("forward", "none", "forward_and_backward", "no_projection", "sparse")
