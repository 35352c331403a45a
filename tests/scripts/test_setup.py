"""scripts/setup.sh: runs once, completes what was interrupted, leaves an environment's own versions alone."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for every Python: notes what it is asked for, makes a .venv of itself, and fails on request.
STAND_IN = """#!/bin/bash
echo "$*" >>"$LOG"
case "$*" in
    *--version*) echo "Python 3.11" ;;
    *"-m venv"*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *"pip install"*) exit "${PIP_FAILS:-0}" ;;
    -c*version_info*) exit "${UNSUPPORTED:-0}" ;;
esac
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what set-up needs, and a folder of stand-ins for every name a Python may have."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    shutil.copy(ROOT / "requirements-native.txt", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copy(ROOT / "scripts" / "setup.sh", tmp_path / "scripts")
    shutil.copytree(ROOT / "scripts" / "shell", tmp_path / "scripts" / "shell")
    (tmp_path / "bin").mkdir()
    for name in ("python3.10", "python3.11", "python3.12", "python3", "python"):
        (tmp_path / "bin" / name).write_text(STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def set_up(
    project: Path, *arguments: str, script: str = "setup.sh", **settings: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a script of the copy; returns how it ended and what Python was asked for."""
    log = project / "log"
    log.write_text("")
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    environment = inherited | {"PATH": f"{project}/bin:{os.environ['PATH']}", "LOG": str(log)} | settings
    command = ["bash", str(project / "scripts" / script), *arguments]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    return ended, log.read_text().splitlines()


def installs(log: list[str]) -> list[str]:
    return [line for line in log if "pip install" in line]


def test_the_second_environment_has_a_folder_and_versions_of_its_own(project: Path) -> None:
    for _ in range(2):
        ended, log = set_up(project, "native")
        assert ended.returncode == 0, ended.stderr
    assert not installs(log) and ".venv-native is complete" in ended.stdout
    _, log = set_up(project)
    assert "--requirement requirements.txt" in installs(log)[0], "one environment does not stand for the other"


def test_all_checks_set_up_each_environment_by_itself_and_run_the_tests_in_it(project: Path) -> None:
    shutil.copy(ROOT / "scripts" / "test.sh", project / "scripts")
    ended, log = set_up(project, script="test.sh")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert [line.split()[-1] for line in installs(log) if "--requirement" in line] == [
        "requirements.txt",
        "requirements-native.txt",
    ]
    assert len([line for line in log if "-m pytest" in line]) == 2
    assert f"with {project}/.venv/bin/python" in ended.stdout
    assert f"with {project}/.venv-native/bin/python" in ended.stdout


def test_an_environment_that_there_is_not_is_refused(project: Path) -> None:
    ended, log = set_up(project, "nativ")
    assert ended.returncode == 2 and ended.stderr.startswith("error: nativ is no environment") and not log


def test_a_second_call_installs_nothing(project: Path) -> None:
    first, log = set_up(project)
    assert first.returncode == 0, first.stderr
    assert ["--requirement requirements.txt" in line for line in installs(log)] == [True, False]
    assert "--no-deps llava-torch==1.2.2.post1 traker==0.3.2 --editable ." in installs(log)[1]
    second, log = set_up(project)
    assert second.returncode == 0 and "nothing to do" in second.stdout
    assert not installs(log)


def test_other_requirements_are_installed_by_the_next_call(project: Path) -> None:
    set_up(project)
    with open(project / "requirements.txt", "a") as file:
        file.write("einops==0.7.0\n")
    _, log = set_up(project)
    assert len(installs(log)) == 2


def test_an_interrupted_set_up_is_completed_by_the_next_call(project: Path) -> None:
    stopped, _ = set_up(project, PIP_FAILS="1")
    assert stopped.returncode != 0
    ended, log = set_up(project)
    assert ended.returncode == 0 and "completing .venv" in ended.stdout
    assert len(installs(log)) == 2


def test_without_a_supported_python_one_line_says_which_are(project: Path) -> None:
    ended, log = set_up(project, UNSUPPORTED="1")
    assert ended.returncode == 2 and not installs(log)
    assert (
        ended.stderr.splitlines() == [line for line in ended.stderr.splitlines() if "3.10, 3.11 or 3.12" in line] != []
    )


def test_an_interpreter_that_is_not_there_is_named(project: Path) -> None:
    ended, _ = set_up(project, PYTHON="/no/such/python")
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: PYTHON=/no/such/python is not a program")


def test_a_complete_environment_is_left_as_it_is(project: Path) -> None:
    """The environment that runs the tests; its imports are checked together."""
    has_llava = importlib.util.find_spec("llava") is not None
    ended, _ = set_up(project, *([] if has_llava else ["native"]), PYTHON=sys.executable)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    assert lines[0].startswith("nothing is missing")
    assert lines[-1].startswith("ready: Python 3.") and ("llava-torch" in lines[-1]) == has_llava
