"""`benchmark.py gradients`: this engine against one record at a time, in one run, on the same records."""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tive.data.records import read_tasks
from tive.gradient_pass.batches import BatchLimits, GradientEngine
from tive.gradient_pass.loading import EncodedRecords, encoded_windows
from tive.gradient_pass.run import device_name, padding_efficiency
from tive.method.projection import make_projector
from tive.models import Encoded, llava
from tive.util.device import device_of, dtype_of
from tive.util.errors import UserError
from tive.util.stopwatch import Stopwatch

from .model import Shape, random_llava, random_records

PARTS = ("waiting for data", "forward", "backward", "per-record gradients", "norms", "gathering", "projection")
BLOCK = 16
WINDOW = 64


class MadeRecords(Dataset):
    """Records that are encoded already, in the place of a data file's."""

    def __init__(self, records: list[Encoded]) -> None:
        self.records = records

    def __getitem__(self, row: int) -> tuple[int, Encoded | str]:
        return row, self.records[row]


@dataclass
class Case:
    """A model, and the rows of a dataset to run it on."""

    reference: llava.Reference
    dataset: MadeRecords | EncodedRecords
    rows: list[int]
    tasks: list[str]
    arguments: argparse.Namespace

    @property
    def device(self) -> torch.device:
        return self.reference.device

    def encode(self, number: int) -> Encoded:
        """Encode one record, as the release does between two gradients."""
        row, record = self.dataset[self.rows[number]]
        if isinstance(record, str):
            raise UserError(f"record {row}: {record}; the benchmark wants records that can all be used")
        return record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--llava_7b", action="store_true", help="LLaVA-1.5-7B's shape with random weights, made on the device")
    add("--input_file", help="records (without --llava_7b)")
    add("--image_folder", default="")
    add("--model_path", help="reference model (without --llava_7b)")
    add("--model_base")
    add("--vision_tower")
    add("--records", type=int, default=128, help="how many records (128)")
    add("--device", default="auto")
    add("--dtype", default="auto", choices=("auto", "bfloat16", "float16", "float32"))
    add("--batch_size", type=int, default=16)
    add("--max_batch_tokens", type=int, default=16384)
    add("--proj_dim", type=int, default=8192)
    add("--projection_memory", type=float, default=1.0, metavar="GIB")
    add("--seconds", type=float, default=60, help="a method stops after this long (60)")
    add("--compare_matrices", action="store_true", help="instead: cost and fidelity of counting fewer matrices")


def run(arguments: argparse.Namespace) -> None:
    case = make_case(arguments)
    print(
        f"{device_name(case.device)}, {case.reference.dtype}, torch {torch.__version__}, {len(case.tasks)} records, "
        f"projection to {arguments.proj_dim}"
    )
    if arguments.compare_matrices:
        from .matrices import compare_matrices

        compare_matrices(case)
    else:
        compare_methods(case)


def make_case(arguments: argparse.Namespace) -> Case:
    device = device_of(arguments.device)
    dtype = dtype_of(arguments.dtype, device)
    if arguments.llava_7b:
        shape = Shape()
        made = MadeRecords(random_records(arguments.records, shape))
        tasks = [f"task {number % 8}" for number in range(arguments.records)]
        return Case(random_llava(shape, device, dtype), made, list(range(arguments.records)), tasks, arguments)
    if not (arguments.input_file and arguments.model_path and arguments.model_base):
        raise UserError("give --input_file, --model_path and --model_base, or --llava_7b")
    file, tasks = read_tasks(arguments.input_file)
    reference = llava.load(arguments.model_path, arguments.model_base, device, dtype, arguments.vision_tower)
    rows = np.linspace(0, len(file) - 1, min(arguments.records, len(file))).astype(int).tolist()
    dataset = EncodedRecords(llava, reference.processor, file, arguments.image_folder)
    return Case(reference, dataset, rows, [tasks[row] for row in rows], arguments)


def compare_methods(case: Case) -> None:
    """Print the table: records/s, where the time goes, memory, and the share of the device's matrix rate."""
    rate = matrix_rate(case.device, case.reference.dtype)
    operations = operations_of_a_record(case)
    print(f"matrix rate of the device: {rate / 1e12:.2f} TFLOP/s; a record: {operations / 1e12:.4g} TFLOP")
    methods = {"one at a time, BasicProjector": lambda watch: one_at_a_time(case, "BasicProjector", watch)}
    if case.device.type == "cuda":
        methods["one at a time, CudaProjector"] = lambda watch: one_at_a_time(case, "CudaProjector", watch)
    methods["this engine"] = lambda watch: this_engine(case, watch)
    print(f"{'method':<31} {'records/s':>9} {'peak GiB':>8} {'of rate':>7}  " + "  ".join(PARTS))
    for name, method in methods.items():
        gc.collect()
        reset_peak(case.device)
        watch = Stopwatch(case.device)
        try:
            done, seconds = method(watch)
        except (ImportError, RuntimeError, MemoryError) as error:
            print(f"{name:<31} does not run here: {str(error).splitlines()[0][:80]}")
            continue
        shares = "  ".join(f"{watch.seconds.get(part, 0) / seconds:>{len(part)}.1%}" for part in PARTS)
        used = done / seconds * operations / rate
        print(f"{name:<31} {done / seconds:>9.2f} {peak(case.device) / 2**30:>8.2f} {used:>7.1%}  {shares}")


def this_engine(case: Case, watch: Stopwatch) -> tuple[int, float]:
    """Run all records through the gradient step's own path: processes encode windows ahead of the engine."""
    engine = make_engine(case, "self_attn", None)
    engine.compute([case.encode(0)])  # the signs are drawn once a run, not once a record
    engine.stopwatch = watch
    engine.real_tokens = engine.padded_tokens = 0
    limits = BatchLimits(case.arguments.batch_size, case.arguments.max_batch_tokens)
    windows = [case.rows[start : start + WINDOW] for start in range(0, len(case.rows), WINDOW)]
    begin = time.perf_counter()
    ahead = encoded_windows(case.dataset, windows, num_workers=4 if case.device.type == "cuda" else 1)
    for _ in windows:
        with watch.measure("waiting for data"):
            encoded = next(ahead)
        engine.compute_all(encoded, limits)
    seconds = time.perf_counter() - begin
    print(f"  projector: {engine.projector.about}; padding efficiency {padding_efficiency(engine):.2f}")
    return len(case.rows), seconds


def make_engine(case: Case, grad_modules: str, last_layers: int | None) -> GradientEngine:
    matrices = llava.counted_matrices(case.reference, grad_modules, last_layers)
    counted = sum(matrix.weight.numel() for matrix in matrices.values())
    budget = int(case.arguments.projection_memory * 2**30)
    projector = make_projector("auto", 0, case.arguments.proj_dim, case.device, counted, budget)
    return GradientEngine(llava, case.reference, matrices, projector)


def one_at_a_time(case: Case, projector_name: str, watch: Stopwatch) -> tuple[int, float]:
    """What the method is without this engine: autograd's parameter gradients of one record after another.

    The gradients of 16 records are stacked and projected whole by TRAK's projector.
    """
    from trak import projectors

    weights = [matrix.weight for matrix in llava.counted_matrices(case.reference, "self_attn").values()]
    counted = sum(weight.numel() for weight in weights)
    dtype = case.reference.dtype if case.device.type == "cpu" else torch.float16
    projector = getattr(projectors, projector_name)(
        grad_dim=counted,
        proj_dim=case.arguments.proj_dim,
        seed=0,
        proj_type=projectors.ProjectionType.rademacher,
        device=case.device,
        dtype=dtype,
        block_size=128,
        max_batch_size=BLOCK,
    )
    done, begin = 0, time.perf_counter()
    try:
        for weight in weights:
            weight.requires_grad_(True)
        while done < len(case.tasks) and time.perf_counter() - begin < case.arguments.seconds:
            rows = []
            for number in range(done, min(done + BLOCK, len(case.tasks))):
                with watch.measure("waiting for data"):
                    record = case.encode(number)
                gradients = gradients_of_one(case.reference, record, weights, watch)
                with watch.measure("gathering"):
                    rows.append(torch.cat([part.flatten() for part in gradients]).to(dtype))
            with watch.measure("gathering"):
                stacked = torch.stack(rows)
            with watch.measure("projection"):
                projector.project(stacked, model_id=0).cpu()
            done += len(rows)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    return done, time.perf_counter() - begin


def gradients_of_one(
    reference: llava.Reference, record: Encoded, weights: list[Tensor], watch: Stopwatch
) -> tuple[Tensor, ...]:
    device = reference.device
    with watch.measure("forward"):
        images = None
        if record.pixels is not None:
            images = torch.from_numpy(record.pixels)[None].to(device, reference.dtype)
        loss = reference.model(
            torch.from_numpy(record.input_ids)[None].to(device),
            images=images,
            labels=torch.from_numpy(record.labels)[None].to(device),
        ).loss
    with watch.measure("backward"):
        return torch.autograd.grad(loss, weights)


def operations_of_a_record(case: Case) -> float:
    """Floating-point operations that a record takes here, without padding: counted by torch, projection by formula."""
    from torch.utils.flop_counter import FlopCounterMode

    class Nothing:
        kind, about, proj_dim = "none", "none", 1

        def project(self, matrix: str, gradients: Tensor) -> Tensor:
            return gradients.new_zeros(len(gradients), 1, dtype=torch.float32)

    matrices = llava.counted_matrices(case.reference, "self_attn")
    engine = GradientEngine(llava, case.reference, matrices, Nothing())
    some = [case.encode(number) for number in range(0, len(case.tasks), max(1, len(case.tasks) // 16))]
    with FlopCounterMode(display=False) as counter:
        for record in some:
            engine.compute([record])
    counted = sum(matrix.weight.numel() for matrix in matrices.values())
    return counter.get_total_flops() / len(some) + 2 * counted * case.arguments.proj_dim


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product on the device."""
    size = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(5):
        wait()
        begin = time.perf_counter()
        left @ right
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the process's high-water mark


def peak(device: torch.device) -> int:
    """Most memory in use since `reset_peak`, in bytes, the model's weights and torch itself included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
