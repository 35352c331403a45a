"""A lock ends with the process that took it, whatever processes it leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tive.util.files import take_lock

# Takes the lock, leaves a child that has the file open as loader processes have, and waits.
HOLDER = """
import os, sys, time
from tive.util.files import take_lock
file = open(sys.argv[1], "a+b")
assert take_lock(file)
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
        with open(path, "a+b") as file:
            with pytest.raises(BlockingIOError):
                take_lock(file)
            holder.kill()
            holder.wait()
            os.kill(child, 0)  # it is alive
            assert take_lock(file)
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()
