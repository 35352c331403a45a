"""A terminal that is closed, full, or of another encoding ends no run; what data hold does not act on it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

from tests.helpers.golden_model import ROOT, step_arguments
from tive.util.errors import LINE_LIMIT, UserError, harmless, run

# A script as the project's are: it prints much, draws a bar, writes its file last.
SCRIPT = """
import sys, time
from pathlib import Path
from tqdm import tqdm
from tive.util.errors import UserError, run

def main():
    for number in tqdm(range(50), mininterval=0):
        print("line", number, "ä" * 2000, flush=True)
        print("note\x1b[2J", number, file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    if len(sys.argv) > 2:
        raise UserError("wrong: " + sys.argv[2])

run(main)
"""


def ended(tmp_path: Path, redirection: str, *more: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the script under bash's redirection."""
    (tmp_path / "script.py").write_text(SCRIPT)
    command = f'"$0" script.py written "$@" {redirection}'
    done = subprocess.run(
        ["bash", "-c", f"{command}\nexit ${{PIPESTATUS[0]}}", sys.executable, *more],
        cwd=tmp_path,
        env={**os.environ, **environment},
        capture_output=True,
    )
    return done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")


@pytest.mark.parametrize(
    "redirection",
    ["| true", "| head -1", ">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full", ">/dev/full 2>&1", "2>&1 | true"],
)
def test_a_closed_or_full_terminal_ends_no_run(tmp_path: Path, redirection: str) -> None:
    code, out, err = ended(tmp_path, redirection)
    assert code == 0 and (tmp_path / "written").read_text() == "done"
    assert "Traceback" not in out + err and "Exception ignored" not in out + err


def test_the_gradient_pass_goes_on_without_its_bar(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(
        '[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
    )
    step = [sys.executable, str(ROOT / "compute_gradient_features.py")]
    step += step_arguments(tmp_path / "out", "--input_file", tmp_path / "data.json")
    with open("/dev/full", "w") as full:
        done = subprocess.run(step, stdout=full, stderr=full, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0
    assert (tmp_path / "out" / "output_0.pt").exists() and (tmp_path / "out" / "manifest_0.json").exists()


def test_an_error_keeps_its_exit_code_where_it_cannot_be_shown(tmp_path: Path) -> None:
    assert ended(tmp_path, "2>/dev/full", "file x")[0] == 2
    assert ended(tmp_path, ">&- 2>&-", "file x")[0] == 2


@pytest.mark.parametrize("word", ["~/my data", "--save_path=~/my data"])
def test_a_home_that_the_shell_did_not_expand_is_no_folder_of_that_name(tmp_path: Path, word: str) -> None:
    code, _, err = ended(tmp_path, "", word, HOME="/home/ada")
    assert code == 2 and err.count("\n") == 1 and "'/home/ada/my data'" in err
    assert not (tmp_path / "written").exists()


def test_a_stop_that_a_library_catches_is_no_error(tmp_path: Path) -> None:
    """As `except: pass` around an import does, which then fails for what was not imported."""
    (tmp_path / "script.py").write_text(
        "import os, signal\nfrom tive.util.errors import run\n"
        "def main():\n    try:\n        os.kill(os.getpid(), signal.SIGINT)\n    except:\n        pass\n"
        "    raise ImportError('cannot import a name')\nrun(main)\n"
    )
    done = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


def test_a_terminal_without_utf8_gets_escapes(tmp_path: Path) -> None:
    code, out, err = ended(tmp_path, "", "Größe", PYTHONIOENCODING="ascii")
    assert code == 2 and "line 0 \\xe4\\xe4" in out and "note\\x1b[2J 0" in err
    assert err.splitlines()[-1] == "error: wrong: Gr\\xf6\\xdfe"


def test_an_error_is_one_line_whatever_it_quotes(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise UserError("image 'a\nb\x1b[31m\r" + "data:" * 20_000 + "': write it to a file")

    with pytest.raises(SystemExit) as stop:
        run(main)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: image 'a\\nb\\x1b[31m\\r") and line.endswith("write it to a file")
    assert len(line) < LINE_LIMIT + 10


@given(st.text())
def test_harmless_text_has_nothing_that_acts_on_a_terminal(text: str) -> None:
    shown = harmless(text)
    assert all(character.isprintable() or character in "\n\t" for character in shown.removeprefix("\r"))
    assert harmless(shown) == shown


def test_text_for_people_stays_as_it_is() -> None:
    for text in ("a plain line\n", "two\nlines", "task\t12", "Größe 図 ok", "\r 12%|███▍ | 3/20 [00:01<00:05]", ""):
        assert harmless(text) == text


def test_a_bar_is_drawn_as_tqdm_draws_it(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        for _ in tqdm(range(3), mininterval=0, miniters=1):
            pass

    run(main)
    err = capsys.readouterr().err
    assert "3/3" in err and "\\r" not in err and err.count("\r") > 2


def test_a_python_without_the_libraries_is_told_where_they_are(capsys):
    def main():
        import no_such_library  # noqa: F401

    with pytest.raises(SystemExit) as end:
        run(main)
    line = capsys.readouterr().err
    assert end.value.code == 2 and line.count("\n") == 1
    assert line.startswith(f"error: {sys.executable} has no no_such_library; ") and "docs/install.md" in line


@pytest.mark.parametrize("script", ["scripts/report.py", "scripts/label_tasks.py", "select_data_TIVE.py"])
def test_a_script_says_so_too_where_the_environment_was_not_activated(tmp_path: Path, script: str) -> None:
    command = [sys.executable, "-S", ROOT / script, "--data_path", "a", "--gradient_path", "b", "--save_path", "c"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "docs/install.md" in done.stderr
