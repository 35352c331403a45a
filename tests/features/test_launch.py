"""Which process computes which chunk, and that a launcher's processes can be lost, stopped and continued."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.forked_python import PYTHON
from tests.helpers.golden_model import ROOT, SCRIPT, run_step, step_arguments
from tive.features.launch import Place, place_of, records_done
from tive.util.errors import UserError

SHELL = ROOT / "scripts" / "compute_gradients.sh"


def torchrun(rank: int, world: int, local: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(local)}


def srun(rank: int, world: int, local: int) -> dict[str, str]:
    return {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(world), "SLURM_LOCALID": str(local)}


@pytest.mark.parametrize(
    "arguments, environment, place",
    [
        ((None, None), {}, Place(1, 0, 0, "arguments")),
        ((8, 3), {}, Place(8, 3, 0, "arguments")),
        ((1, None), {}, Place(1, 0, 0, "arguments")),
        ((None, None), torchrun(0, 1, 0), Place(1, 0, 0, "arguments")),
        ((None, None), torchrun(11, 16, 3), Place(16, 11, 3, "torchrun")),
        ((16, None), torchrun(11, 16, 3), Place(16, 11, 3, "torchrun")),
        ((None, None), srun(5, 8, 1), Place(8, 5, 1, "srun")),
        ((None, None), {"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, Place(1, 0, 0, "arguments")),
        ((64, None), {"SLURM_ARRAY_TASK_ID": "17"}, Place(64, 17, 0, "SLURM array task 17")),
        ((64, 2), {"SLURM_ARRAY_TASK_ID": "17"}, Place(64, 2, 0, "arguments")),
        ((64, "any"), {"SLURM_ARRAY_TASK_ID": "17"}, Place(64, None, 0, "the next that is open")),
        ((None, "any"), torchrun(11, 16, 3), Place(16, None, 3, "the next that is open")),
        (
            (64, None),
            {"SLURM_ARRAY_TASK_ID": "7", **srun(3, 8, 3)},
            Place(64, 59, 3, "SLURM array task 7, process 3 of srun"),
        ),
    ],
)
def test_the_chunk_comes_from_arguments_array_torchrun_or_srun(arguments, environment, place):
    assert place_of(*arguments, environment) == place


@pytest.mark.parametrize(
    "arguments, environment, message",
    [
        ((8, None), {}, "num_chunks 8 without chunk_idx"),
        ((8, 8), {}, "not one of 0 .. 7"),
        ((None, 1), {}, "not one of 0 .. 0"),
        ((8, -1), {}, "not one of 0 .. 7"),
        ((0, None), {}, "check num_chunks, chunk_idx and the array"),
        ((4, None), torchrun(0, 8, 0), "num_chunks 4 under 8 processes"),
        ((8, 0), torchrun(0, 8, 0), "gives all 8 processes of torchrun the same chunk"),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "3"}, "in a SLURM array give num_chunks"),
        ((8, None), {"SLURM_ARRAY_TASK_ID": "8"}, "chunk 8 (SLURM array task 8) is not one of 0 .. 7"),
    ],
)
def test_a_chunk_that_is_not_told_is_an_error_of_one_line(arguments, environment, message):
    with pytest.raises(UserError) as error:
        place_of(*arguments, environment)
    assert message in str(error.value)


def test_all_processes_of_torchrun_srun_and_arrays_have_chunks_of_their_own():
    for environments, count in (
        ([torchrun(rank, 6, rank % 3) for rank in range(6)], None),
        ([srun(rank, 6, rank % 3) for rank in range(6)], None),
        ([{"SLURM_ARRAY_TASK_ID": str(task), **srun(rank, 3, rank)} for task in range(2) for rank in range(3)], 6),
    ):
        assert [place_of(count, None, environment).chunk_idx for environment in environments] == list(range(6))


def test_a_slurm_array_computes_what_the_chunks_arguments_do(tmp_path, monkeypatch):
    assert run_step(tmp_path / "arguments", "--num_chunks", 3, "--chunk_idx", 1).code == 0
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    done = run_step(tmp_path / "array", "--num_chunks", 3)
    assert done.code == 0 and "chunk 1 of 3 (SLURM array task 1): 16 of 48 records" in done.out
    saved = [torch.load(tmp_path / name / "output_1.pt", weights_only=True) for name in ("arguments", "array")]
    assert torch.equal(saved[0]["features"], saved[1]["features"])


# What the loop over GPUs starts instead of Python, so that its own part is tested without a model: it notes its
# arguments, and the plan of its GPU says what it does.
STUB = (
    f"""#!/usr/bin/env bash
[[ $1 == *run_module.py ]] && exec {sys.executable} "$@"
"""
    + """
echo "$CUDA_VISIBLE_DEVICES: $*" >>"$NOTES"
trap 'echo "stopped"; exit 143' TERM
echo "working on $CUDA_VISIBLE_DEVICES"
source "$PLANS/$CUDA_VISIBLE_DEVICES"
"""
)


@pytest.fixture
def loop(tmp_path):
    """Starts the loop over GPUs 4 and 6 on the stub; returns the process."""
    program = tmp_path / "python"
    program.write_text(STUB)
    program.chmod(0o755)
    (tmp_path / "plans").mkdir()
    (tmp_path / "notes").touch()

    def start(plans: dict[int, str], *arguments: str, **environment: str):
        for gpu in (4, 6):
            (tmp_path / "plans" / str(gpu)).write_text(plans.get(gpu, ""))
        settings = {"PYTHON": program, "NOTES": tmp_path / "notes", "PLANS": tmp_path / "plans", "GPUS": "4,6"}
        return subprocess.Popen(
            ["bash", str(SHELL), "--output_file", str(tmp_path / "out"), "--seed", "1 2", *arguments],
            env={**os.environ, **{name: str(value) for name, value in settings.items()}, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            # Tests that run in the background may be deaf to Ctrl-C, and so would be what they start.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )

    return start


def complete(folder: Path, *chunks: int) -> str:
    return f"touch {' '.join(f'{folder}/out/manifest_{chunk}.json' for chunk in chunks)}"


def test_each_gpu_gets_a_process_that_takes_open_chunks_and_has_its_log(loop, tmp_path):
    process = loop({4: "sleep 2; " + complete(tmp_path, 0), 6: complete(tmp_path, 1, 2)}, NUM_CHUNKS="3")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "all 3 chunks are complete" in out, out
    started = (tmp_path / "notes").read_text().splitlines()
    assert sorted(line[:2] for line in started) == ["4:", "6:"]
    assert all(line.endswith("--seed 1 2 --num_chunks 3 --chunk_idx any") for line in started)
    logs = sorted((tmp_path / "out").glob("log_*.txt"))
    assert [log.read_text().splitlines()[1] for log in logs] == ["working on 4", "working on 6"]


def test_a_process_that_fails_is_named_with_its_log_and_the_chunks_that_it_leaves(loop, tmp_path):
    process = loop({4: "echo 'error: image 5 is missing'; exit 2", 6: complete(tmp_path, 1)})
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "error: process 0 on 4 ended with 2: error: image 5 is missing (whole log: " in out
    assert "error: not complete: chunk 0 of 2; the same call continues" in out


def test_what_stops_every_process_is_said_once_and_nothing_of_an_earlier_call(loop):
    plan = "echo 'error: the model is not there'; exit 2"
    first = loop({4: "echo 'error: of the first call'; exit 2"}).communicate(timeout=60)[0]
    assert first.count("of the first call") == 1
    out = loop(dict.fromkeys((4, 6), plan)).communicate(timeout=60)[0]
    assert out.count("the model is not there") == 1 and "of the first call" not in out


def test_the_progress_is_one_line_over_all_chunks_with_the_time_left(loop, tmp_path):
    folder = tmp_path / "out"
    (folder / "progress_1").mkdir(parents=True)
    match = {"start": 0, "stop": 6, "data_records": 12}
    (folder / "manifest_0.json").write_text(json.dumps({"match": match}))
    (folder / "progress_1" / "match.json").write_text(json.dumps(match))
    window = folder / "progress_1" / "window_000000006_000000009"
    process = loop({4: f"touch {window}; sleep 4"}, STATUS_SECONDS="1")
    out, _ = process.communicate(timeout=60)
    lines = [line for line in out.splitlines() if "of 12 records" in line]
    assert lines and "9 of 12 records (75%), 2 processes, 0 min left" in lines[-1], out
    assert records_done(folder, 2) == (9, 12) and records_done(tmp_path / "empty", 2) == (0, 0)


def test_a_dry_run_of_the_loop_prints_the_estimate_once_and_ends_well(tmp_path):
    done = subprocess.run(
        ["bash", str(SHELL), *step_arguments(tmp_path / "out", "--dry_run", 3)],
        env={**os.environ, "PYTHON": PYTHON, "GPUS": "cpu cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("records/s") == 1 and not list((tmp_path / "out").glob("*_*"))


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_every_process_of_the_loop(loop, tmp_path, number, code):
    process = loop(dict.fromkeys((4, 6), "for i in {1..300}; do sleep 0.1; done"))
    while (tmp_path / "notes").read_text().count("\n") < 2:
        time.sleep(0.02)
    time.sleep(0.2)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code and "stopped; the same call continues" in out
    for log in (tmp_path / "out").glob("log_*.txt"):
        assert log.read_text().endswith("stopped\n")


def test_the_loop_refuses_what_it_sets_itself(loop):
    for argument in ("--num_chunks=3", "--chunk_idx=0"):
        process = loop({}, argument)
        assert "NUM_CHUNKS" in process.communicate(timeout=60)[0] and process.returncode == 2


def test_the_loop_asks_the_installed_torch_for_the_gpus_wherever_it_is_called_from(tmp_path):
    (tmp_path / "torch.py").write_text("print('a stranger')")
    environment = {name: value for name, value in os.environ.items() if name not in ("GPUS", "CUDA_VISIBLE_DEVICES")}
    done = subprocess.run(
        ["bash", str(SHELL), "--output_file", "out", "--input_file", "missing.json"],
        cwd=tmp_path,
        env={**environment, "PYTHON": sys.executable, "PYTHONPATH": str(tmp_path), "NUM_CHUNKS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    count = torch.cuda.device_count()
    assert f"process {max(count, 1) - 1}: started on {count - 1 if count else 'cpu'}" in done.stdout, done.stderr
    assert "stranger" not in done.stdout + done.stderr and not (tmp_path / "__pycache__").exists()


def test_torchrun_loses_a_process_and_the_loop_over_devices_continues_its_chunks(tmp_path):
    out = tmp_path / "features"
    command = [str(Path(sys.executable).with_name("torchrun")), "--nproc_per_node", "2", str(SCRIPT)]
    process = subprocess.Popen(
        [*command, *step_arguments(out, "--window", 2)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while not list(out.glob("progress_1/window_*")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [int(pid) for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    log, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not (out / "manifest_1.json").exists(), log

    done = subprocess.run(
        ["bash", str(SHELL), *step_arguments(out, "--window", 2)],
        env={**os.environ, "PYTHON": PYTHON, "GPUS": "cpu cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    logs = "".join(log.read_text() for log in out.glob("log_*.txt"))
    assert "continuing" in logs and "chunk 1 of 2 (the next that is open) done" in logs
    for chunk in range(2):
        assert run_step(tmp_path / "plain", "--window", 2, "--num_chunks", 2, "--chunk_idx", chunk).code == 0
        saved = [torch.load(folder / f"output_{chunk}.pt", weights_only=True) for folder in (out, tmp_path / "plain")]
        assert torch.equal(saved[0]["features"], saved[1]["features"])
        assert torch.equal(saved[0]["norms"], saved[1]["norms"])
