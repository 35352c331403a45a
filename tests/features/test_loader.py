"""Workers read ahead of the one who uses what they read; one that dies ends the run in a line that names its record."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tive.data.records import open_records
from tive.features.loader import Loader, usable
from tive.models import Encoded, LeftOut
from tive.util.errors import UserError

COUNT = 24


def encode(processor: Path, record: dict[str, Any], image_folder: str) -> Encoded:
    """A stand-in for a family's encoding: does what the record asks for, and leaves a file that says it was read."""
    (processor / f"read_{record['id']}").touch()
    what = record.get("do")
    if what == "leave out":
        raise LeftOut("for a reason")
    if what == "fail":
        raise KeyError("unforeseen")
    if what == "lack memory":
        raise MemoryError
    if what == "die":
        time.sleep(0.1)  # the kernel kills in the midst of something
        os.kill(os.getpid(), signal.SIGKILL)
    return Encoded(length=1, supervised=1, group="text", inputs=bytes(record.get("size", 8)))


def loader_of(folder: Path, num_workers: int = 0, count: int = COUNT, **asked: dict[int, Any]) -> Loader:
    records: list[dict[str, Any]] = [
        {"id": f"r{row}", "image": f"{row}.png", "conversations": []} for row in range(count)
    ]
    for key, values in asked.items():
        for row, value in values.items():
            records[row][key] = value
    (folder / "data.json").write_text(json.dumps(records))
    records_file = open_records(folder / "data.json")
    return Loader(partial(encode, folder), records_file, "", num_workers)


ROWS = list(range(COUNT))


@pytest.mark.parametrize("num_workers", [0, 1, 3])
def test_every_row_comes_with_its_record_or_its_reason_in_order(tmp_path, num_workers):
    loader = loader_of(tmp_path, num_workers, do={3: "leave out", 8: "fail"})
    rows = [0, 1, 3, 8, 5, 20]
    with loader.read(rows) as items:
        found = dict(items)
    assert list(found) == rows
    reasons = {row: item for row, item in found.items() if isinstance(item, str)}
    assert reasons == {3: "for a reason", 8: "cannot be encoded: KeyError: 'unforeseen'"}


def test_while_a_record_is_used_the_next_are_read_and_no_more_than_memory_should_hold(tmp_path):
    with loader_of(tmp_path, 2, count=400).read(range(400)) as items:
        next(items)
        for _ in range(200):
            if len(list(tmp_path.glob("read_*"))) >= 32:
                break
            time.sleep(0.05)
        else:
            pytest.fail("nothing was read ahead")
        time.sleep(0.3)
        assert len(list(tmp_path.glob("read_*"))) < 100


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_worker_that_is_killed_while_it_reads_ends_the_run_and_names_the_record(tmp_path, num_workers):
    loader = loader_of(tmp_path, num_workers, do={13: "die"})
    with (
        pytest.raises(
            UserError, match=r"was killed \(signal 9\) while it read .*record 13 \(id '?r13'?\), image 13.png"
        ),
        loader.read(ROWS) as ahead,
    ):
        for _ in ahead:
            pass


@pytest.mark.parametrize("size", [8, 4 << 20], ids=["waiting", "sending"])
def test_a_worker_that_is_killed_at_any_moment_ends_the_run_at_once_wherever_the_run_is(tmp_path, size):
    loader = loader_of(tmp_path, 1, size=dict.fromkeys(range(COUNT), size))
    before, begin = set(children_of(os.getpid())), time.perf_counter()
    with (
        pytest.raises(UserError, match="a process that reads records was killed"),
        loader.read(ROWS) as ahead,
    ):
        next(ahead)
        (worker,) = set(children_of(os.getpid())) - before
        os.kill(worker, signal.SIGKILL)
        time.sleep(20)  # what computes, and does not ask for records
    assert time.perf_counter() - begin < 15


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_lack_of_memory_ends_the_run_and_is_no_reason_to_leave_the_record_out(tmp_path, num_workers):
    loader = loader_of(tmp_path, num_workers, do={7: "lack memory"})
    with (
        pytest.raises(UserError, match=r"memory ran out while .*record 7 .* was read"),
        loader.read(ROWS) as ahead,
    ):
        for _ in usable(ahead, {}, skip_bad=True):
            pass


def test_other_errors_of_the_run_pass_through_and_no_worker_stays(tmp_path):
    before = children_of(os.getpid())
    with (
        pytest.raises(RuntimeError, match="of its own"),
        loader_of(tmp_path, 2).read(ROWS) as ahead,
    ):
        next(ahead)
        assert len(children_of(os.getpid())) == len(before) + 2
        raise RuntimeError("of its own")
    assert children_of(os.getpid()) == before


STUCK = """
import os, signal, sys, time
from pathlib import Path
from tests.features import test_loader
folder = Path(sys.argv[1])
def stuck(record, image_folder):
    time.sleep(0 if record["id"] in ("r0", "r1") else 1000)
    return test_loader.Encoded(1, 1, "text", b"")
loader = test_loader.loader_of(folder, 1)
loader.encode = stuck
with loader.read([0, 1, 2, 3]) as ahead:
    next(ahead)
print("left", flush=True)
"""


def test_a_worker_that_is_stuck_does_not_keep_the_run_from_ending(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0 and done.stdout == "left\n", done.stderr


def children_of(pid: int) -> set[int]:
    children = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return {int(child) for some in children for child in some}
