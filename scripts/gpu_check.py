"""Does everything hold on this GPU? Each check prints pass or fail with its figures; `bash scripts/gpu_check.sh`."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # before torch, as the step does

# ruff: noqa: E402 - the path and the allocator come first
import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from scripts.benchmark import text_model
from tive.features.batches import Batches
from tive.features.step import GradientStep
from tive.method.gradients import gradient_features
from tive.method.projection import Sparse, TrakCuda, make_projector, project, sparse_projection
from tive.models import Encoded, Family, ModelFiles, Reference, family_of
from tive.models.common import freeze, target_modules
from tive.util.device import device_name, device_of, forget_peak, peak_memory
from tive.util.errors import run
from tive.util.files import write_json

GOLDEN = ROOT / "tests" / "golden"
# Goldens by the library that their family needs: adapter, base, and the data's folder.
GOLDENS = {
    "llava": ("reference_model/llava-lora", "reference_model/vicuna", "reference_model"),
    "qwen2_5_vl": ("native/qwen2_5_vl/adapter", "native/qwen2_5_vl/base", "native/qwen2_5_vl"),
    "llava_hf": ("native/llava_hf/adapter", "native/llava_hf/base", "native/llava_hf"),
    "internvl": ("native/internvl/adapter", "native/internvl/base", "native/internvl"),
}
_OLDEST_TRANSFORMERS = (4, 57)
# Norms relative to the published code's, and cosines absolute.
TOLERANCES = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.05), torch.float16: (0.02, 0.02)}


class LeftOut(Exception):
    """Why a check cannot run here."""


@dataclass
class Result:
    """One check: `passed`, `failed` or `left out`, its figures, and why."""

    name: str
    outcome: str
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)
    why: str = ""


# A check gives its figures, and what is wrong, empty where nothing is.
Check = Callable[[torch.device], tuple[dict[str, float], str]]


def within(figures: dict[str, float], **limits: float) -> tuple[dict[str, float], str]:
    """The figures, and which of them lie above their limits."""
    above = [f"{name} is above {limit:g}" for name, limit in limits.items() if not figures[name] <= limit]
    return figures, "; ".join(above)


def sparse_is_its_formula(device: torch.device) -> tuple[dict[str, float], str]:
    """Equal to the formula in NumPy, and the same bits twice."""
    vectors = torch.randn(16, 3 * 8192 + 500, generator=torch.Generator().manual_seed(0))
    projector = Sparse(0, 8192, device)
    first, second = (project(projector, "m", vectors.to(device)).cpu() for _ in range(2))
    expected = torch.from_numpy(sparse_projection(0, "m", vectors.numpy(), 8192))
    error = float((first - expected).abs().max() / expected.abs().max())
    return within({"error": error, "different_bits": float((first != second).sum())}, error=1e-5, different_bits=0)


def trak_keeps_small_gradients(device: torch.device) -> tuple[dict[str, float], str]:
    """TRAK's CudaProjector is linear within its bound, and does not lose what is small."""
    try:
        projector = make_projector("trak", 0, 8192, device)
    except ValueError as error:
        raise LeftOut(str(error)) from error
    if device.type == "cuda" and not isinstance(projector, TrakCuda):
        raise LeftOut("it is not TRAK's CudaProjector")
    vectors = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0)).to(device)
    large, small = project(projector, "m", vectors), project(projector, "m", 1e-6 * vectors)
    lost = float(((1e6 * small - large).norm(dim=1) / large.norm(dim=1)).max())
    bound = (large.norm(dim=1).square() / 8192 / vectors.norm(dim=1).square() - 1).abs().max()
    return within({"lost": lost, "norm_error": float(bound)}, lost=0.01, norm_error=0.1)


@dataclass(frozen=True)
class Golden:
    """A golden model and its records, encoded; what the published code computes of them."""

    family: Family
    reference: Reference
    records: list[Encoded]
    norms: np.ndarray
    cosines: np.ndarray


def golden(name: str, device: torch.device, dtype: torch.dtype) -> Golden:
    """Load a golden model.

    Raises:
        LeftOut: its library is not here.
    """
    if name == "llava" and importlib.util.find_spec("llava") is None:
        raise LeftOut("the library llava is not installed")
    if name != "llava" and tuple(map(int, version("transformers").split(".")[:2])) < _OLDEST_TRANSFORMERS:
        raise LeftOut(f"transformers {version('transformers')} does not have its class")
    adapter, base, data = (GOLDEN / part for part in GOLDENS[name])
    before = os.getcwd()
    os.chdir(data)  # the config of one names its vision tower from there
    try:
        files = ModelFiles(str(adapter), str(base))
        family = family_of(files)
        reference = family.load(files, device, dtype)
        content = json.loads((data / "data.json").read_text())
        records = [family.encode(reference.processor, record, str(data / "images")) for record in content]
    finally:
        os.chdir(before)
    expected = json.loads((data / "expected.json").read_text())
    if "image_backends" in expected:
        bases = {base.__name__ for base in type(reference.processor.library.image_processor).__mro__}
        fast = bases & {"TorchvisionBackend", "BaseImageProcessorFast"}
        expected = expected["image_backends"]["torchvision" if fast else "pil"]
    return Golden(family, reference, records, np.array(expected["norms"]), np.array(expected["cosines"]))


class WholeGradients:
    """A projector that keeps every number: features are the gradients themselves."""

    kind = about = "whole"

    def __init__(self, step_matrices: dict[str, torch.nn.Linear]) -> None:
        sizes = [matrix.weight.numel() for matrix in step_matrices.values()]
        self.starts = dict(zip(step_matrices, np.cumsum([0, *sizes]).tolist(), strict=False))
        self.proj_dim = sum(sizes)

    def add(self, sketch: torch.Tensor, matrix_name: str, gradients: torch.Tensor) -> None:
        start = self.starts[matrix_name]
        sketch[:, start : start + gradients.shape[1]] = gradients


def norms_and_cosines(of: Golden, size: int, loss_scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Norms `[n]` and cosines `[n, n]` of the unprojected gradients, in batches of `size` records."""
    matrices = target_modules(of.reference)
    projector = WholeGradients(matrices)
    norms, features = np.zeros(len(of.records)), np.zeros((len(of.records), projector.proj_dim))

    def losses(batch: Sequence[Encoded]) -> torch.Tensor:
        return of.family.record_losses(of.reference, batch).losses

    for batch in Batches(size, 16384).cut(list(enumerate(of.records))):
        rows = [row for row, _ in batch]
        computed = gradient_features(
            partial(losses, [item for _, item in batch]), matrices, projector, loss_scale=loss_scale
        )
        norms[rows], features[rows] = computed.norms.cpu().numpy(), computed.features.cpu().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return norms, features @ features.T


def golden_holds(name: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, float], str]:
    """Norms and cosines are the published code's."""
    made = golden(name, device, dtype)
    norms, cosines = norms_and_cosines(made, 8, 2.0**12 if dtype == torch.float16 else 1.0)
    error = {
        "norms_relative": float(np.abs(norms / made.norms - 1).max()),
        "cosines": float(np.abs(cosines - made.cosines).max()),
    }
    norm, cosine = TOLERANCES[dtype]
    return within(error, norms_relative=norm, cosines=cosine)


def a_batch_is_its_records_alone(device: torch.device) -> tuple[dict[str, float], str]:
    """A batch gives what its records alone give, and gradient checkpointing changes nothing."""
    made = first_golden(device)
    alone, in_batches = norms_and_cosines(made, 1)[0], norms_and_cosines(made, 8)[0]
    freeze(made.reference.model, gradient_checkpointing=True)
    checkpointed = norms_and_cosines(made, 8)[0]
    error = {
        "batch_against_alone": float(np.abs(in_batches / alone - 1).max()),
        "with_checkpointing": float(np.abs(checkpointed / in_batches - 1).max()),
    }
    return within(error, batch_against_alone=1e-4, with_checkpointing=1e-5)


def first_golden(device: torch.device, dtype: torch.dtype = torch.float32) -> Golden:
    """The first golden model whose library is here."""
    reasons = []
    for name in GOLDENS:
        try:
            return golden(name, device, dtype)
        except LeftOut as reason:
            reasons.append(f"{name}: {reason}")
    raise LeftOut("; ".join(reasons))


def out_of_memory_is_survived(device: torch.device) -> tuple[dict[str, float], str]:
    """Memory really runs out: tokens are halved, every record is computed, and batches of short records stay full."""
    if device.type != "cuda":
        raise LeftOut("it wants a GPU")
    reference = text_model.random_llama(1024, 8, device, torch.bfloat16)
    step = step_of(reference)
    long, short = text_model.random_texts(32, 2048), text_model.random_texts(64, 256)
    step(step.ready(short[:2]))
    forget_peak(device)
    before, total = torch.cuda.memory_reserved(device), torch.cuda.mem_get_info(device)[1]
    step(step.ready(long[:1]))
    room = 10 * (peak_memory(device) - torch.cuda.memory_allocated(device))  # of the sixteen long records of a batch
    forget_peak(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (before + room) / total), device)
    batches, done, sizes = Batches(16, 16 * 2048), 0, []
    try:
        for batch, results in batches.compute(step, enumerate([*long, *short]), step.ready):
            done += int(torch.isfinite(results["norms"]).sum())
            sizes += [len(batch)] * (batch[0][1].length == 256)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)
    figures: dict[str, float] = {"records": done, "tokens": batches.tokens, "records_of_a_short_batch": max(sizes)}
    good = done == 96 and batches.tokens < 16 * 2048 and max(sizes) == 16
    return figures, "" if good else "memory did not run out, records are missing, or short batches are not full"


def step_of(reference: Reference) -> GradientStep:
    """The gradient step of a random text model."""
    family: Any = text_model
    projector = make_projector("sparse", 0, 8192, reference.device)
    return GradientStep(family, reference, target_modules(reference), projector)


def killed_runs_are_continued(device: torch.device) -> tuple[dict[str, float], str]:
    """With forked workers, a run that is killed and continued gives what an uninterrupted one gives."""
    name = next((name for name in GOLDENS if _runs(name, device)), None)
    if name is None:
        raise LeftOut("no golden model's library is here")
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _step(name, whole, device).wait(120)
        process = _step(name, killed, device)
        while not list(killed.glob("progress_0/window_*.json")) and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        again = _step(name, killed, device)
        code = again.wait(120)
        if code or not (whole / "manifest_0.json").is_file():
            return {"exit_code": code}, (again.stderr.read() if again.stderr else "")[-200:]
        one, other = (torch.load(path / "output_0.pt", weights_only=True) for path in (whole, killed))
        manifest = json.loads((whole / "manifest_0.json").read_text())
    norms = float((one["norms"] / other["norms"] - 1).abs().max())
    cosine = torch.nn.functional.cosine_similarity(one["features"].float(), other["features"].float())
    waited = manifest["seconds_waiting_for_data"] / manifest["seconds"]
    return within(
        {"norms_relative": norms, "features": 1 - float(cosine.min()), "waiting_for_data": waited},
        norms_relative=1e-4,
        features=1e-4,
    )


def _runs(name: str, device: torch.device) -> bool:
    try:
        golden(name, device, torch.float32)
    except LeftOut:
        return False
    return True


def _step(name: str, output: Path, device: torch.device) -> subprocess.Popen[str]:
    adapter, base, data = (GOLDEN / part for part in GOLDENS[name])
    command = [sys.executable, str(ROOT / "compute_gradient_features.py"), "--input_file", str(data / "data.json")]
    command += ["--image_folder", str(data / "images"), "--model_path", str(adapter), "--model_base", str(base)]
    command += ["--output_file", str(output), "--window", "4", "--num_workers", "2", "--dtype", "float32"]
    command += ["--device", str(device), "--projector", "sparse", "--proj_dim", "1024"]
    return subprocess.Popen(command, cwd=data, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


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


def speed(
    make: Callable[[torch.device], tuple[GradientStep, list[Encoded]]], device: torch.device
) -> tuple[dict[str, float], str]:
    """Records a second, and the share of the device's matrix rate that the whole step reaches."""
    step, records = make(device)
    batches = list(Batches(16, 16384).cut(list(enumerate(records))))
    with FlopCounterMode(display=False) as counted:
        step(step.ready([item for _, item in batches[0]]))
    synchronize(device)
    begin, done = time.perf_counter(), 0
    for batch in batches:
        step(step.ready([item for _, item in batch]))
        done += len(batch)
    synchronize(device)
    seconds = time.perf_counter() - begin
    rate = counted.get_total_flops() / len(batches[0]) * done / seconds
    return {
        "records_per_second": done / seconds,
        "share_of_matrix_rate": rate / matrix_rate(device, step.reference.dtype),
        "peak_gib": peak_memory(device) / 2**30,
    }, ""


def text_of(
    width: int, layers: int, tokens: int, count: int, device: torch.device
) -> tuple[GradientStep, list[Encoded]]:
    """A random text model, in bfloat16 on a GPU, and records of one length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return step_of(text_model.random_llama(width, layers, device, dtype)), text_model.random_texts(count, tokens)


def llava_7b(device: torch.device) -> tuple[GradientStep, list[Encoded]]:
    """LLaVA-1.5-7B's shape with random weights, and records like its mixture's."""
    from scripts.benchmark.model import Shape, random_llava, random_records
    from tive.models import llava

    try:
        reference = random_llava(Shape(), device, torch.bfloat16)
    except ImportError as error:
        raise LeftOut(str(error)) from error
    projector = make_projector("sparse", 0, 8192, device)
    return GradientStep(llava, reference, target_modules(reference), projector), random_records(64, Shape())


def checks_of(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, Check]]:
    """Every check by its name, the short ones first."""
    yield "sparse projector: its formula, the same bits twice", sparse_is_its_formula
    yield "TRAK's CudaProjector: bound and small gradients", trak_keeps_small_gradients
    for name in GOLDENS:
        for dtype in TOLERANCES:
            yield f"golden {name} in {str(dtype).removeprefix('torch.')}", partial(golden_holds, name, dtype)
    yield "a batch against its records alone, with and without checkpointing", a_batch_is_its_records_alone
    yield "a real lack of memory", out_of_memory_is_survived
    yield "forked workers, killed and continued", killed_runs_are_continued
    on_gpu = device.type == "cuda"
    yield (
        "speed: text model of LLaVA-7B's width",
        partial(speed, partial(text_of, *((4096, 8, 700, 64) if on_gpu else (64, 2, 16, 4)))),
    )
    yield (
        "speed: text model of Qwen2.5-VL-3B's width and depth",
        partial(speed, partial(text_of, *((2048, 36, 700, 64) if on_gpu else (64, 2, 16, 4)))),
    )
    if arguments.llava_7b:
        yield "speed: LLaVA-1.5-7B's shape", partial(speed, llava_7b)


def run_check(name: str, check: Check, device: torch.device) -> Result:
    """Run one check; whatever it raises is a failure of its own."""
    begin = time.perf_counter()
    try:
        figures, wrong = check(device)
        outcome = "failed" if wrong else "passed"
    except (LeftOut, ImportError) as reason:
        figures, outcome, wrong = {}, "left out", str(reason)
    except Exception as error:  # the others are to run all the same
        figures, outcome, wrong = {}, "failed", f"{type(error).__name__}: {error}"
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Result(name, outcome, time.perf_counter() - begin, figures, " ".join(wrong.split())[:300])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--llava_7b", action="store_true", help="also measure LLaVA-1.5-7B's shape with random weights")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:K; on a CPU it shows that the checks run")
    add("--seconds", type=float, default=300, help="no check is begun after so long (300)")
    add("--output", type=Path, default=Path("gpu_check.json"), help="the JSON with everything (gpu_check.json)")
    return parser.parse_args()


def main() -> None:
    arguments, begin = parse_arguments(), time.perf_counter()
    device = device_of(arguments.device)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0]}
    print(f"{device_name(device)}, torch {torch.__version__}")
    results = []
    for name, check in checks_of(arguments, device):
        if time.perf_counter() - begin > arguments.seconds:
            result = Result(name, "left out", 0.0, {}, f"{arguments.seconds:g} s were over")
        else:
            result = run_check(name, check, device)
        figures = ", ".join(f"{key} {value:.3g}" for key, value in result.figures.items())
        print(
            f"{result.outcome:<8}  {result.seconds:6.1f} s  {name}: {'; '.join(filter(None, (figures, result.why)))}",
            flush=True,
        )
        results.append(result)
        content = {"device": device_name(device), "versions": versions, "checks": [asdict(each) for each in results]}
        write_json(arguments.output, content)
    outcomes = [result.outcome for result in results]
    print(
        f"{outcomes.count('passed')} passed, {outcomes.count('failed')} failed, {outcomes.count('left out')} left out; "
        f"written: {arguments.output}"
    )
    sys.exit(1 if "failed" in outcomes else 0 if "passed" in outcomes else 2)


if __name__ == "__main__":
    run(main)
