"""The benchmarks run, compare what they say they compare, and can make a model of LLaVA's shape without a download."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.reference import GOLDEN, in_batches, step_of

ROOT = Path(__file__).resolve().parents[2]
MODEL = (
    "--model_path",
    "llava-lora",
    "--model_base",
    "vicuna",
    "--input_file",
    "data.json",
    "--image_folder",
    "images",
)


def benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = str(ROOT / "scripts" / "benchmark.py")
    return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, cwd=GOLDEN)


def test_the_gradient_benchmark_runs_both_ways_on_the_same_records():
    done = benchmark("gradients", *MODEL, "--records", "6", "--proj_dim", "64", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = {line[:31].strip(): line[31:].split() for line in done.stdout.splitlines()}
    loop, engine = rows["one at a time, BasicProjector"], rows["this engine"]
    assert float(loop[0]) > 0 and float(engine[0]) > 0
    assert len(loop) == len(engine) == 10


def test_counting_the_default_matrices_agrees_with_itself():
    done = benchmark(
        "gradients", *MODEL, "--records", "18", "--proj_dim", "64", "--device", "cpu", "--compare_matrices"
    )
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("self_attn"))
    assert first.split()[1] == "all" and first.split()[3:] == ["1.000", "1.000"]


def test_the_gradient_benchmark_says_what_it_needs():
    done = benchmark("gradients")
    assert done.returncode == 2 and "--llava_7b" in done.stderr and "Traceback" not in done.stderr


def test_a_random_model_of_llavas_form_gives_every_record_a_gradient(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.benchmark.model import Shape, random_llava, random_records

    tiny = Shape(64, 128, 2, 4, 300, 32, 64, 2, 4, image_size=56, lora_rank=4)
    reference = random_llava(tiny, torch.device("cpu"), torch.float32)
    result = in_batches(step_of(reference), random_records(16, tiny), 4)
    assert torch.isfinite(result.norms).all() and (result.norms > 0).all()
    assert result.features.shape[1] == 2 * 4 * (64 * 4 + 4 * 64)


def test_the_full_shape_counts_the_parameters_that_the_paper_counts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    from scripts.benchmark.model import Shape

    full = Shape()
    assert full.layers * 4 * 2 * full.lora_rank * full.hidden == 134_217_728


@pytest.mark.parametrize("arguments", [("--sizes", "300", "--proj_dim", "16")])
def test_the_selection_benchmark_compares_two_passes_with_all_pairs(arguments):
    done = benchmark("selection", *arguments)
    assert done.returncode == 0, done.stderr
    assert "300" in done.stdout


def test_the_memory_benchmark_says_what_a_batch_needs():
    done = benchmark("memory", "--batch_size", "2", "--tokens", "8", "--proj_dim", "16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "134,217,728 counted parameters" in done.stdout and "GiB beside the model" in done.stdout
