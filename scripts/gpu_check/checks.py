"""The checks of what is computed: projectors, goldens, memory that runs out, runs that are killed."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from scripts.benchmark import models
from scripts.gpu_check.goldens import GOLDEN, GOLDENS, ROOT, NotHere, first_here, golden
from scripts.gpu_check.speed import step_of
from tive.features.batches import Batches
from tive.features.step import FLOAT16_LOSS_SCALES
from tive.method.projection import Sparse, TrakCuda, make_projector, project, sparse_projection
from tive.models.common import freeze
from tive.util.device import forget_peak, peak_memory
from tive.util.errors import UserError

# Norms relative to the published code's, and cosines absolute.
TOLERANCES = {torch.float32: (1e-3, 1e-3), torch.bfloat16: (0.05, 0.05), torch.float16: (0.02, 0.02)}


def within(figures: dict[str, float], **limits: float) -> tuple[dict[str, float], str]:
    """The figures, and which of them lie above their limits."""
    above = [f"{name} is above {limit:g}" for name, limit in limits.items() if not figures[name] <= limit]
    return figures, "; ".join(above)


def farthest(values: np.ndarray, others: np.ndarray) -> float:
    """The largest relative difference."""
    return float(np.abs(values / others - 1).max())


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
        raise NotHere(str(error)) from error
    if device.type == "cuda" and not isinstance(projector, TrakCuda):
        raise NotHere("it is not TRAK's CudaProjector")
    vectors = torch.randn(16, 20_000, generator=torch.Generator().manual_seed(0)).to(device)
    large, small = project(projector, "m", vectors), project(projector, "m", 1e-6 * vectors)
    lost = float(((1e6 * small - large).norm(dim=1) / large.norm(dim=1)).max())
    bound = (large.norm(dim=1).square() / 8192 / vectors.norm(dim=1).square() - 1).abs().max()
    return within({"lost": lost, "norm_error": float(bound)}, lost=0.01, norm_error=0.1)


def golden_holds(name: str, dtype: torch.dtype, device: torch.device) -> tuple[dict[str, float], str]:
    """Norms and cosines are the published code's."""
    made = golden(name, device, dtype)
    norms, cosines = made.norms_and_cosines(8, FLOAT16_LOSS_SCALES[0] if dtype == torch.float16 else 1.0)
    norm, cosine = TOLERANCES[dtype]
    error = {"norms_relative": farthest(norms, made.norms), "cosines": float(np.abs(cosines - made.cosines).max())}
    return within(error, norms_relative=norm, cosines=cosine)


def a_batch_is_its_records_alone(device: torch.device) -> tuple[dict[str, float], str]:
    """A batch gives what its records alone give, and gradient checkpointing changes nothing."""
    made = golden(first_here(), device, torch.float32)
    alone, in_batches = (made.norms_and_cosines(size)[0] for size in (1, 8))
    freeze(made.reference.model, gradient_checkpointing=True)
    checkpointed = made.norms_and_cosines(8)[0]
    error = {
        "batch_against_alone": farthest(in_batches, alone),
        "with_checkpointing": farthest(checkpointed, in_batches),
    }
    return within(error, batch_against_alone=1e-4, with_checkpointing=1e-5)


def four_bits_are_a_batch_alone(device: torch.device) -> tuple[dict[str, float], str]:
    """A base in 4 bits gives other norms than in float32, and in a batch those of its records alone."""
    try:
        made = golden("qwen2_5_vl", device, torch.float32, load_in_4bit=True)
    except UserError as error:
        raise NotHere(str(error)) from error
    alone, in_batches = (made.norms_and_cosines(size)[0] for size in (1, 8))
    figures = {"batch_against_alone": farthest(in_batches, alone), "to_float32": farthest(in_batches, made.norms)}
    if figures["to_float32"] < 1e-3:
        return figures, "the base is not in 4 bits"
    return within(figures, batch_against_alone=1e-3, to_float32=0.5)


def out_of_memory_is_survived(device: torch.device) -> tuple[dict[str, float], str]:
    """Memory really runs out: tokens are halved, every record is computed, and batches of short records stay full."""
    if device.type != "cuda":
        raise NotHere("it wants a GPU")
    shapes = [models.text_shape(1024, 8, tokens) for tokens in (2048, 256)]
    step = step_of(shapes[0], device, torch.bfloat16)
    long, short = (models.random_records(shape, 64, step.reference) for shape in shapes)
    long = long[:32]
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


def killed_runs_are_continued(device: torch.device) -> tuple[dict[str, float], str]:
    """With forked workers, a run that is killed and continued gives what an uninterrupted one gives."""
    name = first_here()
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        _step(name, whole, device).wait(120)
        process = _step(name, killed, device)
        while not list(killed.glob("progress_0/window_*")) and process.poll() is None:
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


def _step(name: str, output: Path, device: torch.device) -> subprocess.Popen[str]:
    adapter, base, data = (GOLDEN / part for part in GOLDENS[name])
    command = [sys.executable, str(ROOT / "compute_gradient_features.py"), "--input_file", str(data / "data.json")]
    command += ["--image_folder", str(data / "images"), "--model_path", str(adapter), "--model_base", str(base)]
    command += ["--output_file", str(output), "--window", "4", "--num_workers", "2", "--dtype", "float32"]
    command += ["--device", str(device), "--projector", "sparse", "--proj_dim", "1024"]
    return subprocess.Popen(command, cwd=data, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
