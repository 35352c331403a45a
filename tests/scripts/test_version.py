"""Every script tells its version."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = [*ROOT.glob("*.sh"), *(ROOT / "scripts").glob("*.sh"), *ROOT.glob("*.py"), *(ROOT / "scripts").glob("*.py")]
SCRIPTS = [file for file in FILES if file.suffix == ".sh" or "__main__" in file.read_text()]


@pytest.mark.pages
def test_every_script_prints_the_projects_version() -> None:
    programs = {script: "bash" if script.suffix == ".sh" else sys.executable for script in SCRIPTS}
    running = {
        script: subprocess.Popen(
            [program, script, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for script, program in programs.items()
    }
    for script, process in running.items():
        out, err = process.communicate()
        absent = script.name == "train_trl.py" and "setup.sh native" in err  # of the other environment
        assert absent or (process.returncode == 0 and out == f"tive {version('tive')}\n"), (script, out, err)
