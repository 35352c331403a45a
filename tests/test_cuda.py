"""What holds on a GPU, by the checks of scripts/gpu_check.py; and on a CPU, that each of them runs and can fail."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import pytest
import torch

from scripts import gpu_check
from tests.helpers.golden_model import ROOT

CHECKS = dict(gpu_check.checks_of(argparse.Namespace(llava_7b=False), torch.device("cuda")))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
@pytest.mark.parametrize("name", [name for name in CHECKS if not name.startswith("speed")])
def test_on_a_gpu(name):
    result = gpu_check.run_check(name, CHECKS[name], torch.device("cuda"))
    if result.outcome == "left out":
        pytest.skip(result.why)
    assert result.outcome == "passed", result


def test_the_command_runs_every_check_and_writes_one_file(tmp_path):
    command = ["bash", str(ROOT / "scripts" / "gpu_check.sh"), "--device", "cpu", "--seconds", "5"]
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "check.json")], capture_output=True, text=True, check=False
    )
    content = json.loads((tmp_path / "check.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert [check["name"] for check in content["checks"]] == list(CHECKS)
    assert content["checks"][0]["outcome"] == "passed" and content["checks"][-1]["outcome"] == "left out"


@pytest.mark.parametrize("outcome, code", [("passed", 0), ("failed", 1), ("left out", 2)])
def test_a_failure_ends_in_1_and_nothing_that_ran_in_2(tmp_path, monkeypatch, outcome, code):
    def check(device):
        if outcome == "left out":
            raise gpu_check.LeftOut("its library is not here")
        return gpu_check.within({"error": 1.0}, error=2.0 if outcome == "passed" else 0.5)

    monkeypatch.setattr(gpu_check, "checks_of", lambda *_: iter([("one", check)]))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--device", "cpu", "--output", str(tmp_path / "check.json")])
    with pytest.raises(SystemExit) as end:
        gpu_check.main()
    assert end.value.code == code
    (result,) = json.loads((tmp_path / "check.json").read_text())["checks"]
    assert result["outcome"] == outcome


def test_what_a_check_raises_is_its_failure_alone():
    def broken(device):
        raise RuntimeError("of its own\nand more")

    result = gpu_check.run_check("broken", broken, torch.device("cpu"))
    assert (result.outcome, result.why) == ("failed", "RuntimeError: of its own and more")
