"""`benchmark.py gradients`: ways to get projected per-record gradients, in one run, on the same batches."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from tive.features.step import GradientStep
from tive.method.gradients import adam_step, gradient_features, release_step
from tive.method.projection import Projector, make_projector
from tive.util.device import device_name, forget_peak, peak_memory

from . import cases
from .cases import Case

# A method is made ready once, and then computes batch after batch.
Method = Callable[[Case, int], Callable[[list[int]], None]]
# Above this many random numbers a batch, TRAK's BasicProjector on a CPU takes minutes for one.
_MOST_RANDOM_NUMBERS = 1e11


@dataclass
class Measured:
    """The best round of a method: records and seconds; and its peak memory in bytes."""

    records: int
    seconds: float
    peak: int

    @property
    def cost(self) -> float:
        """Seconds a record."""
        return self.seconds / self.records


def add_arguments(parser: argparse.ArgumentParser) -> None:
    cases.add_arguments(parser)
    add = parser.add_argument
    add("--proj_dim", type=int, default=8192, help="numbers in a feature")
    add("--methods", nargs="+", choices=METHODS, metavar="METHOD", help=f"all that run here; of {' '.join(METHODS)}")
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
    print_table(compare_methods(case, arguments))


def compare_methods(case: Case, arguments: argparse.Namespace) -> dict[str, Measured]:
    """Measure the methods in turns, so that what else the machine does meets all of them."""
    best: dict[str, Measured] = {}
    spent: dict[str, float] = dict.fromkeys(arguments.methods or usual_methods(case, arguments), 0.0)
    for _ in range(arguments.rounds):
        for name in [name for name, seconds in spent.items() if seconds < arguments.seconds]:
            try:
                found = one_round(METHODS[name], case, arguments)
            except (ImportError, RuntimeError, MemoryError, ValueError) as error:
                print(f"{name} does not run here: {(str(error) or type(error).__name__).splitlines()[0][:90]}")
                del spent[name]
                continue
            spent[name] += found.seconds
            if name not in best or found.cost < best[name].cost:
                best[name] = found
    return best


def usual_methods(case: Case, arguments: argparse.Namespace) -> list[str]:
    names = [name for name in METHODS if name != "bergson"]
    if case.reference.device.type == "cpu" and case.parameters * arguments.proj_dim > _MOST_RANDOM_NUMBERS:
        names = [name for name in names if name not in ("trak", "one_at_a_time")]
        print("left out, as BasicProjector would take many minutes a batch: trak, one_at_a_time")
    if arguments.text and importlib.util.find_spec("bergson"):
        names.append("bergson")
    return names


def one_round(method: Method, case: Case, arguments: argparse.Namespace) -> Measured:
    """One pass over the batches, ended after `--seconds`; before it, if rounds are many, an uncounted batch."""
    compute = method(case, arguments.proj_dim)
    if arguments.rounds > 1:
        compute(case.batches[0])
    gc.collect()
    forget_peak(case.reference.device)
    records, begin = 0, now(case.reference.device)
    for batch in case.batches:
        compute(batch)
        records += len(batch)
        seconds = now(case.reference.device) - begin
        if seconds > arguments.seconds:
            break
    return Measured(records, seconds, peak_memory(case.reference.device))


def print_table(measured: dict[str, Measured]) -> None:
    forward, limit = (measured.get(name) for name in ("forward", "forward_and_backward"))
    print(f"{'method':<21} {'ms/record':>9} {'records/s':>9} {'x forward':>9} {'x limit':>7} {'peak GiB':>8}  records")
    for name, found in measured.items():
        times = f"{found.cost / forward.cost:.2f}" if forward else ""
        above = f"{found.cost / limit.cost:.2f}" if limit else ""
        print(
            f"{name:<21} {found.cost * 1000:>9.2f} {1 / found.cost:>9.2f} {times:>9} {above:>7} "
            f"{found.peak / 2**30:>8.2f}  {found.records}"
        )


def forward(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
    """The forward pass alone."""

    @torch.no_grad()
    def compute(batch: list[int]) -> None:
        case.losses(batch)

    return compute


def forward_and_backward(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
    """Forward, and backward through the activations down to the first target module: the limit for a frozen base."""

    def start(_module: nn.Module, _inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output if output.requires_grad else output.detach().requires_grad_()

    def compute(batch: list[int]) -> None:
        hooks = [matrix.register_forward_hook(start) for matrix in case.matrices.values()]
        case.losses(batch).sum().backward()
        for hook in hooks:
            hook.remove()

    return compute


def losses_alone(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
    """The step with `--gradient none`: losses and EL2N."""
    step = GradientStep(case.family, case.reference, {}, None, el2n=True)

    def compute(batch: list[int]) -> None:
        step(step.ready([case.records[number] for number in batch]))

    return compute


class NoProjection:
    """In the place of a projector, to measure what the projection costs."""

    kind = about = "none"
    proj_dim = 1

    def add(self, sketch: Tensor, matrix_name: str, gradients: Tensor) -> None:
        pass


def ours(projector_of: Callable[[int, torch.device], Projector]) -> Method:
    """The gradient step: per-record gradients of a whole batch, projected matrix by matrix."""

    def method(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
        projector = projector_of(proj_dim, case.reference.device)

        def compute(batch: list[int]) -> None:
            gradient_features(partial(case.losses, batch), case.matrices, projector)

        return compute

    return method


def with_projector(kind: str) -> Method:
    return ours(lambda proj_dim, device: make_projector(kind, 0, proj_dim, device))


def as_adam_applies_it(form: str) -> Method:
    """The gradient step with the sparse projector, on gradients as Adam applies them; random moments of usual sizes."""

    def method(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
        device = case.reference.device
        projector = make_projector("sparse", 0, proj_dim, device)
        shapes = {name: matrix.weight.shape for name, matrix in case.matrices.items()}
        m = {name: 1e-3 * torch.randn(shape, device=device) for name, shape in shapes.items()}
        v = {name: 1e-6 * torch.rand(shape, device=device) for name, shape in shapes.items()}

        def transform(name: str, g: Tensor) -> Tensor:
            if form == "release":
                return release_step(g, m[name], v[name])
            return adam_step(g, m[name], v[name], 100, (0.9, 0.999), 1e-8)

        def compute(batch: list[int]) -> None:
            gradient_features(partial(case.losses, batch), case.matrices, projector, transform)

        return compute

    return method


def one_at_a_time(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
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

    def compute(batch: list[int]) -> None:
        rows = []
        for weight in weights:
            weight.requires_grad_(True)
        for number in batch:
            gradients = torch.autograd.grad(case.losses([number]).sum(), weights)
            rows.append(torch.cat([part.flatten() for part in gradients]).to(dtype))
        for weight in weights:
            weight.requires_grad_(False)
        projector.project(torch.stack(rows), model_id=0).cpu()

    return compute


def bergson(case: Case, proj_dim: int) -> Callable[[list[int]], None]:
    """bergson's collector on the same batches and losses: 16 x 16 numbers a matrix, gathered on the CPU."""
    from bergson.collector.gradient_collectors import GradientCollector
    from bergson.config import IndexConfig
    from bergson.gradients import GradientProcessor
    from datasets import Dataset

    model = case.reference.model
    names = {module: name for name, module in model.named_modules()}
    embeddings = model.get_input_embeddings()
    embeddings.requires_grad_(True)  # as bergson's own set-up does
    collector = GradientCollector(
        model=model,
        cfg=IndexConfig(run_path="unused"),
        data=Dataset.from_dict({"row": list(range(len(case.records)))}),
        processor=GradientProcessor(projection_dim=16),
        target_modules={names[matrix] for matrix in case.matrices.values()},
        skip_index=True,
    )

    def compute(batch: list[int]) -> None:
        embeddings.requires_grad_(True)
        with collector:
            case.losses(batch).sum().backward()
        features = torch.cat(list(collector.mod_grads.values()), dim=1).cpu()
        if features.shape != (len(batch), 256 * len(case.matrices)):
            raise RuntimeError(f"bergson's features have the shape {tuple(features.shape)}")
        collector.mod_grads.clear()
        model.zero_grad()
        embeddings.requires_grad_(False)

    return compute


METHODS: dict[str, Method] = {
    "forward": forward,
    "none": losses_alone,
    "forward_and_backward": forward_and_backward,
    "no_projection": ours(lambda proj_dim, device: NoProjection()),
    "sparse": with_projector("sparse"),
    "adam": as_adam_applies_it("adam"),
    "adam_release": as_adam_applies_it("release"),
    "trak": with_projector("trak"),
    "one_at_a_time": one_at_a_time,
    "bergson": bergson,
}


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
