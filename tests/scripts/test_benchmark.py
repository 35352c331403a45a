"""The benchmarks run, compare what they say they compare, and can make a model of LLaVA's shape without a download."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from scripts.benchmark import models
from scripts.benchmark.whole import whole_gradients
from tests.helpers.forked_python import PYTHON
from tests.helpers.golden_model import GOLDEN

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
    return subprocess.run([PYTHON, script, *arguments], capture_output=True, text=True, cwd=GOLDEN)


def rows_of(output: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.strip()}


def test_the_gradient_benchmark_compares_all_methods_on_the_same_records():
    methods = ("forward", "forward_and_backward", "no_projection", "sparse", "trak", "one_at_a_time")
    sizes = ("--records", "6", "--proj_dim", "64", "--device", "cpu", "--rounds", "1")
    done = benchmark("gradients", *MODEL, *sizes, "--methods", *methods)
    assert done.returncode == 0, done.stderr
    rows = rows_of(done.stdout)
    for method in methods:
        cost, rate, times_forward, times_limit, memory, records = map(float, rows[method])
        assert cost > 0 and times_forward > 0 and times_limit > 0 and memory > 0 and records == 6
        assert rate == pytest.approx(1000 / cost, rel=0.01)
    assert rows["forward"][2] == rows["forward_and_backward"][3] == "1.00"


def test_the_gradient_benchmark_says_which_methods_do_not_run_here():
    done = benchmark("gradients", "--text", "32", "1", "8", "--records", "4", "--methods", "bergson", "forward")
    assert done.returncode == 0, done.stderr
    assert "bergson does not run here" in done.stdout and "forward" in rows_of(done.stdout)


def test_the_projection_benchmark_holds_both_kinds_to_the_bound():
    done = benchmark("projection", "--text", "32", "2", "16", "--records", "24", "--proj_dims", "128", "--seeds", "3")
    assert done.returncode == 0, done.stderr
    for kind in ("sparse", "dense"):
        (line,) = [line for line in done.stdout.splitlines() if line.startswith(kind)]
        error, least, most, bound, share = (float(line.split()[place].strip("()")) for place in (2, 3, 5, 6, 7))
        assert 0 < least <= error <= most < 2 * bound and share == pytest.approx(error / bound, abs=0.01)


def test_the_gradient_benchmark_says_what_it_needs():
    done = benchmark("gradients")
    assert done.returncode == 2 and "--llava_7b" in done.stderr and "Traceback" not in done.stderr


def test_a_random_model_of_llavas_form_gives_every_record_a_gradient():
    family, reference = models.random_model(models.SMALL_LLAVA, torch.device("cpu"), torch.float32)
    records = models.random_records(models.SMALL_LLAVA, 16, reference)
    norms, gradients = whole_gradients(family, reference, records, 4)
    assert torch.isfinite(norms).all() and (norms > 0).all()
    assert gradients.shape[1] == 2 * 4 * (64 * 4 + 4 * 64)
    assert sum(record.inputs.pixels is not None for record in records) == 15


def test_the_full_shape_counts_the_parameters_that_the_paper_counts():
    full = models.LLAVA_7B
    assert full.text["num_hidden_layers"] * 4 * 2 * full.rank * full.text["hidden_size"] == 134_217_728


def test_the_memory_benchmark_says_what_a_batch_needs():
    done = benchmark("memory", "--batch_size", "2", "--tokens", "8", "--proj_dim", "16", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "134,217,728 parameters" in done.stdout and "GiB beside the model" in done.stdout
