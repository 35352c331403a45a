"""What holds on a GPU, by the checks of scripts/gpu_check; and on a CPU, that they run, and can fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts.gpu_check import main as gpu_check
from scripts.gpu_check.checks import within
from scripts.gpu_check.goldens import NotHere
from scripts.gpu_check.main import run_check
from tests.helpers.forked_python import PYTHON

ROOT = Path(__file__).resolve().parents[1]
CHECKS = dict(gpu_check.checks_of(with_llava_7b=True))
# On a CPU these are small and take seconds; the others are tests of their own rooms.
SMALL = [name for name in CHECKS if name.startswith(("speed", "sparse")) or "4 bits" in name]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("speed")])
def test_on_a_gpu(name):
    result = run_check(name, CHECKS[name], torch.device("cuda"))
    if result.outcome == "left out":
        pytest.skip(result.why)
    assert result.outcome == "passed", result


@pytest.mark.parametrize("name", SMALL)
def test_on_a_cpu_the_check_passes_or_says_what_is_not_here(name):
    result = run_check(name, CHECKS[name], torch.device("cpu"))
    assert result.outcome == "passed" or (result.outcome == "left out" and result.why), result


def test_the_command_goes_through_every_check_and_writes_one_file(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--seconds", "1", "--llava_7b"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "check.json")],
        env=os.environ | {"PYTHON": PYTHON},
        capture_output=True,
        text=True,
        check=False,
    )
    content = json.loads((tmp_path / "check.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["name"] for check in content["checks"]] == list(CHECKS)
    assert content["checks"][0]["outcome"] == "passed" and content["checks"][-1]["outcome"] == "left out"


@pytest.mark.parametrize("outcome, code", [("passed", 0), ("failed", 1), ("left out", 2)])
def test_a_failure_ends_in_1_and_nothing_that_ran_in_2(tmp_path, monkeypatch, outcome, code):
    def check(device):
        if outcome == "left out":
            raise NotHere("its library is not here")
        return within({"error": 1.0}, error=2.0 if outcome == "passed" else 0.5)

    monkeypatch.setattr(gpu_check, "checks_of", lambda with_llava_7b: iter([("one", check)]))
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--device", "cpu", "--output", str(tmp_path / "check.json")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == code
    (result,) = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert result["outcome"] == outcome


def test_what_a_check_raises_is_its_failure_alone():
    def broken(device):
        raise RuntimeError("of its own\nand more")

    result = run_check("broken", broken, torch.device("cpu"))
    assert (result.outcome, result.why) == ("failed", "RuntimeError: of its own and more")


def test_a_python_without_the_libraries_is_told_which_it_lacks(tmp_path):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
    done = subprocess.run(command, env=os.environ | {"PYTHON": str(bare)}, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "msgspec" in done.stderr and "--wheels" in done.stderr
