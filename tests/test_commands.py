"""Every command block of the pages, taken from the page's own text: run, parsed, or named as not run.

The word behind a block's opening says which: ```bash and ```python are run, on the quickstarts' data under the names
that the page uses; ```bash parsed: WHY is only parsed, by the script's own parser; ```bash not run: WHY needs what is
not here. `pytest -m pages` runs it, and makes the quickstarts first where they are missing.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import here
from tests.helpers import hub_sets
from tests.helpers.forked_python import PYTHON
from tests.helpers.mixture import mixture
from tests.helpers.parse_only import TRAINERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NATIVE = ("hub_sets.md", "native.md")
COMMANDS = (
    "python",
    "bash ",
    "pip ",
    "torchrun",
    "sbatch",
    "source ",
    "accelerate",
    "swift ",
    "llamafactory",
    "export ",
)
# On a CPU, as the page says beside the command; and with data of a hundredth of the size.
SMALLER = {
    "--bf16 true": "--bf16 false --use_cpu",
    "--per_task 200": "--per_task 5",
    "--per_task 1000": "--per_task 9",
    "NUM_CHUNKS=64 bash": "NUM_CHUNKS=4 bash",
    "EPOCHS=4 bash": "EPOCHS=2 bash",
    "\nbash finetune_lora.sh\n": "\nBATCH_SIZE=2 bash finetune_lora.sh\n",
}


@dataclass(frozen=True)
class Block:
    """A fenced block: its text, and what is done with it (`run`, `parsed`, `not run`; empty: no commands).

    Blocks of Python build on each other, so they are run with those of the page before them.
    """

    text: str
    done: str
    python: bool = False


def blocks_of(page: Path) -> list[Block]:
    blocks = []
    for info, text in re.findall(r"^ *```([^\n`]*)\n(.*?)^ *```$", page.read_text(), flags=re.M | re.S):
        language, _, why = info.strip().partition(" ")
        done, _, reason = why.partition(":")
        assert not done or (done in ("parsed", "not run") and reason.strip()), f"{page.name}: ```{info}"
        known = language in ("bash", "python")
        blocks.append(Block(textwrap.dedent(text), (done or "run") if known else "", language == "python"))
    return blocks


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_of_commands_says_whether_it_is_run(page: Path) -> None:
    for block in blocks_of(page):
        lines = block.text.splitlines()
        assert block.done or not any(line.startswith(COMMANDS) for line in lines), f"{page.name}: {lines[0]}"


def quickstart(name: str, script: str) -> Path:
    """A quickstart's folder: one that is named by the environment or lies here, else it is made."""
    folder = Path(os.environ.get(name, ROOT / name.lower().replace("_", "-")))
    environment = os.environ | {"PYTHON": sys.executable}
    subprocess.run(["bash", ROOT / "scripts" / script, folder], env=environment, check=True, capture_output=True)
    return folder


def some_records(source: Path, rows: slice) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        target.write_text(json.dumps(json.loads(source.read_text())[rows]))

    return write


def linked(folder: Path) -> Callable[[Path], None]:
    """A folder whose entries are those of another."""

    def link(target: Path) -> None:
        target.mkdir(parents=True)
        for source in folder.iterdir():
            (target / source.name).symlink_to(source)

    return link


def one_bad_record(source: Path) -> Callable[[Path], None]:
    def write(target: Path) -> None:
        identity = json.loads(source.read_text())[3]["id"]
        target.write_text(json.dumps([{"row": 3, "id": identity, "reason": "missing image"}]))

    return write


def selections(source: Path, features: Path) -> Callable[[Path], None]:
    def select(target: Path) -> None:
        for q in (0.001, 50):
            command = [PYTHON, ROOT / "select_data_TIVE.py", "--data_path", source, "--q", q]
            command += ["--gradient_path", features, "--save_path", target]
            subprocess.run(list(map(str, command)), check=True, capture_output=True)

    return select


def chat(source: Path) -> Callable[[Path], None]:
    def convert(target: Path) -> None:
        command = [PYTHON, ROOT / "scripts" / "convert_data.py", "--source_path", source]
        subprocess.run([*command, "--target_path", target, "--to", "messages"], check=True, capture_output=True)

    return convert


def evaluated(source: Path, images: Path, model: Path) -> Callable[[Path], None]:
    def evaluate(target: Path) -> None:
        held_out = target.with_name("held_out.json")
        some_records(source, slice(0, None, 60))(held_out)
        command = [PYTHON, ROOT / "scripts" / "evaluate.py", "--input_file", held_out, "--save_path", target]
        command += ["--image_folder", images, "--model", "tive", model]
        subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=target.parent)

    return evaluate


def small_mixture(target: Path) -> None:
    """LLaVA-1.5's mixture, one record in 8000 of each task, and its images beside it."""
    records = [record for _, record in mixture(8000)]
    target.write_text(json.dumps(records))
    for image in {record["image"] for record in records if "image" in record}:
        path = target.parent / "playground" / "data" / image
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 24), "red").save(path)


def given(page: str) -> dict[str, Path | Callable[[Path], None]]:
    """What lies in the folder in which a page's commands are run: name -> what it is linked to, or what makes it."""
    if page in NATIVE:
        folder = quickstart("QUICKSTART_NATIVE", "quickstart_native.sh")
        if page == "hub_sets.md":
            sets = {"FineVision": hub_sets.fine_vision, "the_cauldron": hub_sets.cauldron}
            return {"BASE": folder / "model", **sets, "LLaVA-OneVision-Data": hub_sets.one_vision}
        names: dict[str, Path | Callable[[Path], None]] = {name: folder / name for name in ("data.json", "images")}
        names |= {"warm_up.json": folder / "warm_up.json", "BASE": folder / "model"}
        return names | {"subset.json": folder / "selected" / "Tive_q_0.001_p_0.15.json"}
    folder = quickstart("QUICKSTART", "quickstart.sh")
    reference, tuned, base = folder / "reference", folder / "tuned", folder / "model" / "vicuna"
    projector = "checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin"
    names = {"lmsys/vicuna-7b-v1.5": base, "vicuna-7b-v1.5": base, projector: folder / "model" / "mm_projector.bin"}
    names |= {"openai/clip-vit-large-patch14-336": folder / "model" / "clip"}
    names |= {"data.json": folder / "data.json", "images": folder / "images", "quickstart": folder}
    copied = {"selected": linked(folder / "selected")}
    of_page: dict[str, dict[str, Path | Callable[[Path], None]]] = {
        "README.md": {"llava_v1_5_mix665k.json": small_mixture},
        "data.md": {
            "llava_v1_5_mix665k.json": small_mixture,
            "warm_up_bad_records.json": one_bad_record(folder / "data.json"),
            "chat.jsonl": chat(folder / "data.json"),
            **copied,
        },
        "gradients.md": {
            "llava_labelled.json": some_records(folder / "data.json", slice(0, None, 18)),
            "playground/data": folder / "images",
            "checkpoints/llava-v1.5-7b-warm-up-lora": reference,
        },
        "clusters.md": {
            "data.json": some_records(folder / "data.json", slice(0, None, 18)),
            "checkpoints/reference-lora": reference,
        },
        "selection.md": {
            "llava_labelled.json": folder / "data.json",
            "features": folder / "gradients",
            "playground/data": folder / "images",
            "checkpoints/llava-v1.5-7b-warm-up-lora": reference,
        },
        "report.md": {
            "playground/data": folder / "images",
            "evaluation": evaluated(folder / "data.json", folder / "images", tuned),
            "selections": selections(folder / "data.json", folder / "gradients"),
            **copied,
        },
        "evaluation.md": {f"checkpoints/llava-{name}": tuned for name in ("all", "random", "tive")}
        | {"checkpoints/llava-warm-up-lora": reference},
        "less.md": {
            "data.json": some_records(folder / "data.json", slice(0, None, 18)),
            "target.json": some_records(folder / "data.json", slice(1, None, 90)),
            "playground/data": linked(folder / "images"),
            "playground/data/warm_up.json": some_records(folder / "warm_up.json", slice(0, None, 6)),
        },
    }
    return names | of_page.get(page, {})


def workspace(page: str, folder: Path) -> dict[str, str]:
    """Lay out the project and what the page's commands need in a folder; returns the environment for them."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in {path.split("/")[0] for path in tracked.splitlines()} | {".venv", ".venv-native"}:
        if (ROOT / name).exists():
            (folder / name).symlink_to(ROOT / name)
    for name, source in given(page).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, Path):
            target.symlink_to(source.resolve())
        else:
            source(target)
    stand_ins = folder / "parse_only"
    stand_ins.mkdir()
    for program in ("python", "torchrun", "sbatch", *TRAINERS):
        named = "" if program == "python" else f"{program} "
        command = f'exec {PYTHON} {ROOT}/tests/helpers/parse_only.py {named}"$@"'
        (stand_ins / program).write_text(f"#!/bin/sh\n{command}\n")
        (stand_ins / program).chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    places = [str(ROOT)]
    if page == "native.md":
        places.append(str(folder / "trainers"))
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", places[-1]]
        subprocess.run([*fetch, "llamafactory==0.9.5", "ms-swift==4.6.0"], check=True, capture_output=True)
    environment |= {"PYTHONPATH": ":".join(places), "PYTHON": PYTHON, "WORKERS": "0"}
    programs = [Path(program).parent for program in (PYTHON, sys.executable)]
    return environment | {"PATH": ":".join([*map(str, programs), os.environ["PATH"]])}


@pytest.mark.pages
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.done for block in blocks_of(page))], ids=lambda page: page.name
)
def test_the_commands_of_a_page_run_as_they_are_written(page: Path, tmp_path: Path) -> None:
    if here() != ("native" if page.name in NATIVE else "llava"):
        pytest.skip("of the other environment")
    environment = workspace(page.name, tmp_path)
    script = ""
    for block in blocks_of(page):
        if block.done not in ("run", "parsed"):
            continue
        text = block.text
        for words, smaller in SMALLER.items():
            text = text.replace(words, smaller)
        settings = environment
        if block.done == "parsed":
            stand_ins = tmp_path / "parse_only"
            text = text.replace(".venv-native/bin/python ", "python ")  # arguments are the same in either environment
            settings = environment | {"PATH": f"{stand_ins}:{environment['PATH']}", "PYTHON": f"{stand_ins}/python"}
        command = ["bash", "-euo", "pipefail", "-c", text]
        if block.python:
            script += text
            command = [sys.executable, "-c", script]
        ended = subprocess.run(command, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert ended.returncode == 0, f"{block.text}\n{ended.stdout[-2000:]}\n{ended.stderr[-3000:]}"
    shutil.rmtree(tmp_path)
