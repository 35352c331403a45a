"""Which process computes which chunk, and that a launcher's processes can be lost, stopped and continued."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.golden_model import ROOT, SCRIPT, run_step, step_arguments
from tive.gradient_pass.launch import Place, place_of
from tive.util.errors import UserError

SHELL = ROOT / "scripts" / "compute_gradients.sh"
SBATCH = ROOT / "scripts" / "compute_gradients.sbatch"


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
        ((8, None), {}, "--num_chunks 8 without --chunk_idx"),
        ((8, 8), {}, "not one of 0 .. 7"),
        ((None, 1), {}, "not one of 0 .. 0"),
        ((8, -1), {}, "not one of 0 .. 7"),
        ((0, None), {}, "--num_chunks"),
        ((4, None), torchrun(0, 8, 0), "--num_chunks 4 under 8 processes"),
        ((8, 0), torchrun(0, 8, 0), "gives all 8 processes of torchrun the same chunk"),
        ((None, None), {"SLURM_ARRAY_TASK_ID": "3"}, "in a SLURM array give --num_chunks"),
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


# What the launchers start instead of Python, so that their own part is tested without a model: it notes its
# arguments, and its chunk's plan says what it does.
STUB = """#!/usr/bin/env bash
chunk=${SLURM_ARRAY_TASK_ID:-}
while (($#)); do [[ $1 != --chunk_idx ]] || chunk=$2; [[ $1 != --num_chunks ]] || count=$2; all+="$1 "; shift; done
echo "$chunk/$count on ${CUDA_VISIBLE_DEVICES:-none}: $all" >>"$NOTES"
trap 'echo "chunk $chunk stopped"; exit 143' TERM
echo "working on $chunk"
[[ ! -f $PLANS/$chunk ]] || source "$PLANS/$chunk"
echo "chunk $chunk done"
"""


@pytest.fixture
def stub(tmp_path):
    """Starts a launcher on the stub; returns the process, its notes and the folder of its logs."""
    program = tmp_path / "python"
    program.write_text(STUB)
    program.chmod(0o755)
    notes = tmp_path / "notes"
    notes.touch()

    def start(script: Path, plans: dict[int, str] | None = None, arguments: tuple[str, ...] = (), **environment: str):
        folder = tmp_path / "plans"
        folder.mkdir(exist_ok=True)
        for chunk, plan in (plans or {}).items():
            (folder / str(chunk)).write_text(plan)
        return subprocess.Popen(
            ["bash", str(script), "--output_file", str(tmp_path / "out"), "--seed", "1 2", *arguments],
            env={**os.environ, "PYTHON": str(program), "NOTES": str(notes), "PLANS": str(folder), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    start.notes, start.out = notes, tmp_path / "out"
    return start


def test_a_free_gpu_takes_the_next_chunk_and_each_chunk_has_its_log(stub):
    process = stub(SHELL, {0: "sleep 3.5"}, GPUS="4 6", NUM_CHUNKS="4", STATUS_SECONDS="1")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0, out
    started = dict(line.split(": ")[0].split(" on ") for line in stub.notes.read_text().splitlines())
    assert started == {"0/4": "4", "1/4": "6", "2/4": "6", "3/4": "6"}
    assert all("--seed 1 2 --num_chunks 4" in line for line in stub.notes.read_text().splitlines())
    for chunk in range(4):
        assert (stub.out / f"log_{chunk}.txt").read_text().endswith(f"working on {chunk}\nchunk {chunk} done\n")
    assert "chunk 0 on 4: working on 0" in out  # shown while it runs
    assert "all 4 chunks are complete" in out


def test_a_failed_chunk_is_named_with_its_log_holds_no_other_back_and_runs_again_at_the_next_call(stub):
    failing = {1: "echo 'error: image 5 is missing'; exit 2"}
    process = stub(SHELL, failing, GPUS="0 1", NUM_CHUNKS="4")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"error: chunk 1 failed: error: image 5 is missing (whole log: {stub.out}/log_1.txt)" in out
    chunks = [line.split(":")[0] for line in stub.notes.read_text().splitlines()]
    # The GPU may be what is broken: it takes no more.
    assert sorted(chunks) == ["0/4 on 0", "1/4 on 1", "2/4 on 0", "3/4 on 0"]
    process = stub(SHELL, {1: ""}, GPUS="0 1", NUM_CHUNKS="4")
    assert "all 4 chunks are complete" in process.communicate(timeout=60)[0] and process.returncode == 0


def test_without_a_gpu_left_the_chunks_that_did_not_start_are_named(stub):
    process = stub(SHELL, {0: "exit 1"}, GPUS="0", NUM_CHUNKS="3")
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "chunks 1 to 2 were not started: no GPU is left" in out


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_every_process_of_the_loop_and_starts_no_more(stub, number, code):
    process = stub(SHELL, dict.fromkeys(range(3), "for i in {1..300}; do sleep 0.1; done"), GPUS="0 1", NUM_CHUNKS="3")
    while stub.notes.read_text().count("\n") < 2:
        time.sleep(0.02)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code
    assert "chunk 0: stopped" in out and "chunk 1: stopped" in out and "the same call continues" in out
    assert stub.notes.read_text().count("\n") == 2
    for chunk in range(2):
        assert (stub.out / f"log_{chunk}.txt").read_text().endswith(f"chunk {chunk} stopped\n")


def test_the_loop_refuses_what_it_sets_itself(stub):
    for arguments in (("--num_chunks", "3"), ("--chunk_idx=0",)):
        process = stub(SHELL, None, arguments, GPUS="0")
        assert "NUM_CHUNKS" in process.communicate(timeout=60)[0] and process.returncode == 2


@pytest.fixture
def slurm(tmp_path):
    """The environment of array task 5 on a node, with stand-ins for SLURM's commands."""
    commands = tmp_path / "slurm"
    commands.mkdir()
    (commands / "srun").write_text('#!/usr/bin/env bash\n"$@"\n')
    (commands / "scontrol").write_text('#!/usr/bin/env bash\necho "scontrol $*"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    return {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_ARRAY_JOB_ID": "900",
        "SLURM_ARRAY_TASK_ID": "5",
        "SLURM_JOB_ID": "906",
    }


def test_an_array_task_starts_its_chunk_and_passes_on_how_it_ended(stub, slurm, tmp_path):
    copy = tmp_path / "slurm_script"  # SLURM runs a copy
    copy.write_bytes(SBATCH.read_bytes())
    process = stub(copy, {}, **slurm, NUM_CHUNKS="9")
    assert "requeue" not in process.communicate(timeout=60)[0] and process.returncode == 0
    assert "5/9 on none: compute_gradient_features.py --num_chunks 9 --output_file" in stub.notes.read_text()
    process = stub(copy, {5: "exit 2"}, **slurm)
    assert "requeue" not in process.communicate(timeout=60)[0] and process.returncode == 2


def test_a_task_near_its_time_limit_is_queued_again(stub, slurm):
    process = stub(SBATCH, {5: "exit 143"}, **slurm)  # SLURM signals what srun started, and not the script
    assert "scontrol requeue 900_5" in process.communicate(timeout=60)[0] and process.returncode == 143


def test_a_task_that_is_cancelled_is_not_queued_again(stub, slurm):
    process = stub(SBATCH, {5: "for i in {1..300}; do sleep 0.1; done"}, **slurm)
    while not stub.notes.read_text():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    assert "requeue" not in process.communicate(timeout=60)[0] and process.returncode == 143


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
    while not list(out.glob("progress_1/window_*.json")):
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (victim,) = [int(pid) for pid in workers if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(victim, signal.SIGKILL)
    log, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and not (out / "manifest_1.json").exists(), log

    done = subprocess.run(
        ["bash", str(SHELL), *step_arguments(out, "--window", 2)],
        env={**os.environ, "PYTHON": sys.executable, "GPUS": "cpu cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" in (out / "log_1.txt").read_text()
    for chunk in range(2):
        assert run_step(tmp_path / "plain", "--window", 2, "--num_chunks", 2, "--chunk_idx", chunk).code == 0
        saved = [torch.load(folder / f"output_{chunk}.pt", weights_only=True) for folder in (out, tmp_path / "plain")]
        assert torch.equal(saved[0]["features"], saved[1]["features"])
        assert torch.equal(saved[0]["norms"], saved[1]["norms"])
