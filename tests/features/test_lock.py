"""One process a chunk: whoever finds a chunk open takes it, and none is left open or computed twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tive.features.launch import Held, compute_open_chunks, hold
from tive.util.errors import UserError


def test_a_process_takes_the_lowest_open_chunk_until_all_are_done():
    taken = []
    compute_open_chunks(4, taken.append)
    assert taken == [0, 1, 2, 3]


def test_a_chunk_that_its_process_lost_meanwhile_is_taken_over():
    taken, held = [], {0, 2}

    def compute(chunk):
        if chunk in held:
            raise Held
        taken.append(chunk)
        held.discard(0)  # its process was killed while this one was computing

    compute_open_chunks(4, compute)
    assert taken == [1, 0, 3]


def test_a_chunk_that_fails_is_tried_once_holds_no_other_back_and_is_named_at_the_end():
    taken = []

    def compute(chunk):
        taken.append(chunk)
        if chunk == 1:
            raise UserError("record 7 is bad")

    with pytest.raises(UserError, match="1 of 3 chunks failed: chunk 1: record 7 is bad"):
        compute_open_chunks(3, compute)
    assert taken == [0, 1, 2]


def test_a_chunk_is_free_again_however_its_block_ends(tmp_path):
    with pytest.raises(ZeroDivisionError), hold(tmp_path / ".lock_3", "computing chunk 3"):
        1 / 0  # noqa: B018
    with hold(tmp_path / ".lock_3", "computing chunk 3"):
        pass


# Takes the lock, leaves a child that has the file open as loader processes have, and waits.
HOLDER = """
import os, sys, time
from pathlib import Path
from tive.features.launch import hold
with hold(Path(sys.argv[1]), "computing"):
    child = os.fork()
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


def test_a_lock_is_held_by_one_process_and_is_free_when_it_is_killed_though_its_children_live(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, path], stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(Held), hold(path, "computing"):
            pass
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # it is alive
        with hold(path, "computing"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
