"""The array script on a real SLURM: a limit that is too short, requeue, preemption, and a cancelled task."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.golden_model import RECORDS, ROOT, step_arguments
from tests.helpers.slurm import called, cluster, is_installed, start_now, state_of, wait_for

SBATCH = ROOT / "scripts" / "compute_gradients.sbatch"
pytestmark = pytest.mark.skipif(not is_installed(), reason="SLURM is not installed here, or this is not root")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    with cluster(tmp_path_factory.mktemp("slurm")) as environment:
        yield environment | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """So many records that a task stays at work while things happen to it."""
    path = tmp_path_factory.mktemp("data") / "data.json"
    path.write_text(json.dumps(RECORDS * 100))
    return path


class Task:
    """One task of the array, submitted with two chunks to compute."""

    def __init__(self, slurm: dict[str, str], data: Path, folder: Path, *options: str) -> None:
        self.slurm, self.out, self.log = slurm, folder / "features", folder / "log.txt"
        small = ("--array=0", "--cpus-per-task=1", "--mem=0", "--time=10", f"--output={self.log}")
        step = step_arguments(self.out, "--input_file", data, "--window", 2, "--batch_size", 2)
        submitted = subprocess.run(
            ["sbatch", "--parsable", *small, *options, str(SBATCH), *step],
            env=slurm | {"NUM_CHUNKS": "2"},
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
        self.job = submitted.stdout.strip() + "_0"

    def windows(self) -> int:
        """How many windows are on disk."""
        return sum(1 for _ in self.out.glob("progress_*/window_*"))

    def state(self) -> str:
        return state_of(self.slurm, self.job)

    def said(self) -> str:
        # A bar may have written half of a character.
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def wait_for_windows(self, count: int) -> None:
        wait_for(lambda: self.windows() >= count, f"{count} windows")

    def goes_on(self) -> None:
        """Wait until a task that is queued again computes what it had not; then end it."""
        before = self.windows()
        start_now(self.slurm, self.job)
        wait_for(lambda: "continuing: " in self.said(), "the task to go on")
        self.wait_for_windows(before + 1)
        self.cancel()

    def cancel(self) -> None:
        called(self.slurm, "scancel", self.job)
        wait_for(lambda: not called(self.slurm, "squeue", "--noheader", "--jobs", self.job), "the task's end")


def test_a_task_near_its_time_limit_finishes_its_window_is_queued_again_and_goes_on(slurm, data, tmp_path):
    task = Task(slurm, data, tmp_path, "--signal=TERM@60")
    task.wait_for_windows(3)
    # The signal is due a minute before the limit: SLURM sends it at its next look.
    called(slurm, "scontrol", "update", f"JobId={task.job}", "TimeLimit=1")
    wait_for(lambda: "queued again" in task.said(), "the signal")
    assert "stopped; what is done is on disk" in task.said()
    called(slurm, "scontrol", "update", f"JobId={task.job}", "TimeLimit=10")
    task.goes_on()


def test_a_task_that_is_queued_again_by_hand_goes_on(slurm, data, tmp_path):
    task = Task(slurm, data, tmp_path)
    task.wait_for_windows(3)
    called(slurm, "scontrol", "requeue", task.job)
    task.goes_on()


def test_a_task_that_a_more_urgent_one_pushes_out_goes_on(slurm, data, tmp_path):
    task = Task(slurm, data, tmp_path)
    task.wait_for_windows(3)
    urgent = ("sbatch", "--parsable", "--partition=urgent", "--gres=gpu:2", "--output=/dev/null", "--wrap", "sleep 1")
    other = called(slurm, *urgent).strip()
    wait_for(lambda: state_of(slurm, other) == "COMPLETED", "the urgent task")
    task.goes_on()


def test_a_task_that_is_cancelled_stays_cancelled(slurm, data, tmp_path):
    task = Task(slurm, data, tmp_path)
    task.wait_for_windows(3)
    task.cancel()
    assert task.state() == "CANCELLED" and "queued again" not in task.said()
