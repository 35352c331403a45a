"""Stopped at any moment, the same command ends with the same bytes. Real processes, real kills, real full disks."""

from __future__ import annotations

import contextlib
import json
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers.golden_model import GOLDEN, RECORDS, fork_step, log_of, run_step, write_records
from tive.features.launch import hold

CHUNK_FILES = {"output_0.pt", "output_norm_0.json", "manifest_0.json"}


def content(folder: Path, chunk: int = 0) -> tuple[bytes, bytes]:
    """The bytes of a finished chunk's features and norms."""
    saved = torch.load(folder / f"output_{chunk}.pt", weights_only=True)
    return saved["features"].numpy().tobytes(), saved["norms"].numpy().tobytes()


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".lock_")}


def notes(folder: Path) -> list[Path]:
    return sorted(folder.glob("progress_0/window_*"))


def wait_for_notes(folder: Path, process, count: int) -> None:
    while len(notes(folder)) < count:
        assert process.is_alive(), log_of(folder)
        time.sleep(0.002)


def flip(path: Path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole") / "features"
    assert run_step(folder).code == 0
    return folder


@pytest.fixture(scope="module")
def all_windows(tmp_path_factory) -> Path:
    """A run killed when all windows were done and none of the chunk's files was written."""
    folder = tmp_path_factory.mktemp("begun") / "features"
    process = fork_step(folder, die_at="tive.features.gradient_pass.write_chunk")
    process.join()
    assert process.exitcode == -signal.SIGKILL and len(notes(folder)) == 6
    return folder


@pytest.fixture
def begun(all_windows, tmp_path) -> Path:
    return shutil.copytree(all_windows, tmp_path / "features")


@pytest.mark.parametrize("die_at", [2, 9, "tive.features.chunk.write_json"])
def test_killed_at_a_write_the_same_command_gives_the_same_bytes(whole, tmp_path, die_at):
    folder = tmp_path / "features"
    process = fork_step(folder, die_at=die_at)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (folder / "manifest_0.json").exists()
    assert run_step(folder).code == 0
    assert content(folder) == content(whole)
    assert visible(folder) == CHUNK_FILES


def test_killed_at_random_moments_no_finished_window_is_computed_again(whole, tmp_path):
    random_ = random.Random(5)
    folder = tmp_path / "features"
    for count in (1, 3):
        process = fork_step(folder, "--num_workers", 2)
        wait_for_notes(folder, process, count)
        time.sleep(random_.uniform(0, 0.1))
        process.kill()
        process.join()
        finished = {path.name: path.stat().st_mtime_ns for path in notes(folder)}
    done = run_step(folder)
    assert done.code == 0 and f"continuing: {8 * len(finished)} of 48 records are on disk" in done.out
    assert content(folder) == content(whole)


def test_killed_between_the_last_window_and_the_chunks_files_nothing_is_computed_again(whole, begun):
    done = run_step(begun)
    assert done.code == 0 and "continuing: 48 of 48" in done.out
    assert json.loads((begun / "manifest_0.json").read_text())["records_computed"] == 0
    assert content(begun) == content(whole)


def test_killed_after_the_manifest_the_chunk_is_complete_and_swept_up(whole, tmp_path):
    folder = tmp_path / "features"
    process = fork_step(folder, die_at="shutil.rmtree")
    process.join()
    assert process.exitcode == -signal.SIGKILL and (folder / "progress_0").is_dir()
    done = run_step(folder)
    assert done.code == 0 and "is complete" in done.out
    assert content(folder) == content(whole) and visible(folder) == CHUNK_FILES


def test_the_reading_processes_of_a_killed_run_end_with_it(tmp_path):
    folder = tmp_path / "features"
    data = write_records(tmp_path / "data.json", RECORDS * 20)
    process = fork_step(folder, "--num_workers", 2, "--input_file", data)
    wait_for_notes(folder, process, 1)
    process.kill()
    process.join()
    with pytest.raises(ProcessLookupError):
        for _ in range(300):
            os.killpg(process.pid, 0)
            time.sleep(0.1)


def test_what_a_killed_write_left_behind_is_swept_up(begun):
    stray = begun / ".output_0.pt.12345.tmp"
    other_chunk = begun / ".output_1.pt.12345.tmp"
    stray.write_bytes(b"half")
    other_chunk.write_bytes(b"half")
    assert run_step(begun).code == 0
    assert not stray.exists() and other_chunk.exists()


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_the_group_finishes_the_window_and_says_how_to_continue(whole, tmp_path, number, code):
    folder = tmp_path / "features"
    process = fork_step(folder, "--num_workers", 2)
    wait_for_notes(folder, process, 1)
    os.killpg(process.pid, number)
    process.join(30)
    assert process.exitcode == code, log_of(folder)
    assert "the same command (without overwrite) continues" in log_of(folder)
    assert 1 <= len(notes(folder)) < 6
    done = run_step(folder)
    assert done.code == 0 and f"continuing: {8 * len(notes(folder)) or ''}" in done.out
    assert content(folder) == content(whole)


def test_a_loader_process_that_is_killed_ends_the_run_in_one_line(tmp_path):
    folder = tmp_path / "features"
    data = write_records(tmp_path / "data.json", RECORDS * 20)
    process = fork_step(folder, "--num_workers", 1, "--input_file", data)
    wait_for_notes(folder, process, 1)
    children = [task.read_text().split() for task in Path(f"/proc/{process.pid}/task").glob("*/children")]
    (worker,) = [int(child) for some in children for child in some]
    os.kill(worker, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == 2 and "error: a process that reads records was killed" in log_of(folder)
    assert "Traceback" not in log_of(folder)


def test_a_second_process_on_the_chunk_stops(begun):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with hold(begun / ".lock_0", "computing chunk 0"):
        process = fork_step(begun)
        process.join()
    assert process.exitcode == 2
    assert "another process is computing chunk 0" in log_of(begun)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "more, named",
    [
        (["--proj_dim", 256], "proj_dim 512, now 256"),
        (["--seed", 1], "proj_seed 0, now 1"),
        (["--dtype", "bfloat16"], "dtype float32, now bfloat16"),
        (["--el2n"], "el2n False, now True"),
        (["--grad_modules", "all"], "grad_modules self_attn, now all"),
        (["--num_chunks", 2, "--chunk_idx", 0], "num_chunks 1, now 2"),
        (["--num_chunks", 2, "--chunk_idx", 1], "num_chunks 1, now 2"),
        (["--projector", "trak"], "projector sparse/2, now trak"),
        (["data"], "data_sha256"),
        (["model"], "model "),
    ],
    ids=str,
)
@pytest.mark.parametrize("state", ["begun", "complete"])
def test_a_run_that_differs_is_refused_by_name_and_harms_nothing(whole, begun, tmp_path, state, more, named):
    folder = begun if state == "begun" else shutil.copytree(whole, tmp_path / "complete")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    if more == ["data"]:
        more = ["--input_file", write_records(tmp_path / "data.json", RECORDS[:-1])]
    if more == ["model"]:
        model = shutil.copytree(GOLDEN / "llava-lora", tmp_path / "model")
        tensors = torch.load(model / "non_lora_trainables.bin", weights_only=True)
        torch.save({name: tensor + 0.001 for name, tensor in tensors.items()}, model / "non_lora_trainables.bin")
        more = ["--model_path", model]
    done = run_step(folder, *more)
    assert done.code == 2 and named in done.err and "start afresh (overwrite)" in done.err
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {path: data for path, data in after.items() if not path.name.startswith(".lock")} == {
        path: data for path, data in before.items() if not path.name.startswith(".lock")
    }


def test_overwrite_starts_afresh_and_is_itself_continued(whole, begun, tmp_path):
    process = fork_step(begun, "--seed", 1, "--overwrite", die_at="tive.features.gradient_pass.write_chunk")
    process.join()
    done = run_step(begun, "--seed", 1)
    assert done.code == 0 and "continuing: 48 of 48" in done.out
    assert content(begun) != content(whole)
    assert run_step(begun, "--overwrite").code == 0
    assert content(begun) == content(whole)


@pytest.mark.parametrize(
    "name, place",
    [("features.f16", 2 * 8 * 512 * 2 + 77), ("window_000000016_000000024", 40), ("window_000000016_000000024", 1)],
)
def test_a_damaged_window_is_found_and_computed_again(whole, begun, name, place):
    flip(begun / "progress_0" / name, place)
    done = run_step(begun)
    assert done.code == 0 and "window_000000016_000000024 is damaged" in done.out
    assert "continuing: 40 of 48" in done.out
    assert content(begun) == content(whole)


def test_damage_to_what_describes_the_run_costs_no_window(whole, begun):
    flip(begun / "progress_0" / "match.json", 0)
    (begun / "progress_0" / "window_000000024_000000032").write_bytes(b"")
    done = run_step(begun)
    assert done.code == 0 and "continuing: 40 of 48" in done.out
    assert content(begun) == content(whole)


@pytest.mark.parametrize("damaged", [None, b"{", b"match", b"chunk_idx", b"left_out", b"sha256"])
def test_a_damaged_chunk_is_found_and_computed_again(whole, tmp_path, damaged):
    folder = shutil.copytree(whole, tmp_path / "features")
    if damaged is None:
        flip(folder / "output_0.pt", 20_000)
    else:
        manifest = folder / "manifest_0.json"
        flip(manifest, manifest.read_bytes().index(damaged))
    done = run_step(folder)
    assert done.code == 0 and "damaged" in done.out and "48 features" in done.out
    assert content(folder) == content(whole)


@contextlib.contextmanager
def small_disk(folder: Path, kilobytes: int) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with open(filler, "ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))
    return filler


@pytest.mark.parametrize("moment", ["before", "at a window", "at the chunk's files"])
def test_a_full_disk_ends_in_one_line_and_the_run_continues_once_there_is_room(whole, tmp_path, monkeypatch, moment):
    with small_disk(tmp_path / "disk", 400) as disk:
        folder = disk / "features"
        if moment == "before":
            fill(disk)
        else:
            function = (
                "tive.features.store.Store.write" if moment == "at a window" else "tive.features.chunk.whole_file"
            )
            unpatched = pkgutil.resolve_name(function)

            def fill_first(*arguments):
                fill(disk)
                return unpatched(*arguments)

            monkeypatch.setattr(function, fill_first)
        stopped = run_step(folder)
        assert stopped.code == 2 and stopped.err.splitlines()[-1].startswith("error: "), stopped.err
        assert "free space" in stopped.err
        assert not (folder / "manifest_0.json").exists()
        monkeypatch.undo()
        (disk / "filler").unlink()
        assert run_step(folder).code == 0
        assert content(folder) == content(whole)
        assert visible(folder) == CHUNK_FILES


def test_a_disk_that_is_too_small_is_told_before_the_model_is_loaded_and_nothing_is_begun(tmp_path):
    with small_disk(tmp_path / "disk", 400) as disk:
        stopped = run_step(disk / "features", "--proj_dim", 8192)
        assert stopped.code == 2 and "free space" in stopped.err and "reference model" not in stopped.out
        assert run_step(disk / "features").code == 0


@pytest.mark.parametrize(
    "more",
    [
        ("--batch_size", 4),
        ("--gradient_checkpointing",),
        ("--max_batch_tokens", 200),
        ("--window", 5),
        ("--window", 16),
    ],
    ids=str,
)
def test_how_a_chunk_is_computed_may_change_while_it_is_and_afterwards(whole, begun, more):
    for name in ("window_000000016_000000024", "window_000000024_000000032"):
        (begun / "progress_0" / name).unlink()
    done = run_step(begun, *more)
    assert done.code == 0 and "continuing: 32 of 48" in done.out, done.err
    kept, now = (torch.load(folder / "output_0.pt", weights_only=True) for folder in (whole, begun))
    assert torch.allclose(kept["norms"], now["norms"], rtol=1e-5)
    assert torch.allclose(kept["features"].float(), now["features"].float(), atol=2e-3)
    assert "is complete" in run_step(begun).out
    # And between the chunks of a folder.
    for chunk, how in enumerate(((), more)):
        done = run_step(begun.parent / "two", "--num_chunks", 2, "--chunk_idx", chunk, *how)
        assert done.code == 0, done.err
