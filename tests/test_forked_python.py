"""The stand-in for Python: a program that it forks runs and ends as one that is started does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers.forked_python import PYTHON

PROBE = """
import os, signal, sys, time
print("torch" in sys.modules, os.getpid(), os.getcwd(), *sys.argv[1:], flush=True)
exec(sys.argv[1])
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def start(python: str, folder: Path, code: str, **environment: str) -> subprocess.Popen[str]:
    command, streams = [python, "-m", "probe", code], {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=folder, env=os.environ | environment, text=True, **streams)


def is_forked(folder: Path, **environment: str) -> bool:
    out, _ = start(PYTHON, folder, "pass", **environment).communicate()
    return out.startswith("True")


@pytest.mark.parametrize(
    "code", ["pass", "sys.exit(3)", "sys.exit('wrong')", "1 / 0", "os.kill(os.getpid(), signal.SIGKILL)", "os._exit(4)"]
)
def test_it_ends_as_by_itself(folder: Path, code: str) -> None:
    forked, fresh = (start(python, folder, code) for python in (PYTHON, sys.executable))
    (out, err), (wanted, wanted_err) = forked.communicate(), fresh.communicate()
    assert forked.returncode == fresh.returncode
    assert out.split()[2:] == wanted.split()[2:] and out.startswith("True ") and wanted.startswith("False ")
    assert err.splitlines()[-1:] == wanted_err.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_it(folder: Path, number: int) -> None:
    process = start(PYTHON, folder, "time.sleep(60)")
    assert process.stdout is not None
    fork = int(process.stdout.readline().split()[1])
    process.send_signal(number)
    assert process.wait(20) == -number
    with pytest.raises(ProcessLookupError):
        for _ in range(200):
            os.kill(fork, 0)
            time.sleep(0.05)
    process.communicate()


def test_what_a_fork_could_not_be_is_started_afresh(folder: Path) -> None:
    assert is_forked(folder) and is_forked(folder, MODEL="a", PYTHONPATH=str(folder))
    assert not is_forked(folder, OMP_NUM_THREADS="2") and not is_forked(folder, HF_HOME="a")
    (folder / "torch.py").touch()
    assert not is_forked(folder) and not is_forked(Path("/"), PYTHONPATH=str(folder))
