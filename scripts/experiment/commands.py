"""The project's own commands, as the experiment runs them: with a log each, and not again where the result is there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUN_MODULE = ROOT / "scripts" / "shell" / "run_module.py"
# What `finetune.sh` and `finetune_lora.sh` leave last in a folder.
TUNED, REFERENCE = "training_args.bin", "non_lora_trainables.bin"


@dataclass(frozen=True)
class Paths:
    """Where things lie in the experiment's folder."""

    folder: Path

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def model(self) -> Path:
        """The random language model, vision tower and projector that the base is trained from."""
        return self.folder / "model"

    @property
    def base(self) -> Path:
        return self.folder / "base"

    def mixture(self, variant: str) -> Path:
        """The records of a mixture."""
        return self.data / f"{variant}.json"

    def log(self, result: Path) -> Path:
        return self.folder / "logs" / f"{'_'.join(result.relative_to(self.folder).parts)}.log"


def command(paths: Paths, result: Path, script: Path | str, *arguments: object) -> None:
    """Run a Python script from the project's folder, unless the file that it writes last is there.

    Args:
        result: that file; its name may be a pattern.

    Raises:
        UserError: it failed; its last line is quoted.
    """
    if any(result.parent.glob(result.name)):
        return
    log = paths.log(result.parent)
    log.parent.mkdir(parents=True, exist_ok=True)
    program = [sys.executable, str(ROOT / script), *map(str, arguments)]
    with open(log, "wb") as file:
        code = subprocess.run(program, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code or not any(result.parent.glob(result.name)):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"{script} failed ({lines[-1] if lines else 'no output'}); see {log}")


@dataclass(frozen=True)
class Evaluate:
    """Where the held-out losses of a model go, and its answers where `max_new_tokens` is not 0."""

    folder: Path
    max_new_tokens: int

    @property
    def result(self) -> Path:
        return self.folder / "evaluation.json"


def train(
    paths: Paths, script: str, data: Path, output: Path, then: Evaluate | None, *more: object, **settings: object
) -> None:
    """Train as `finetune.sh` or `finetune_lora.sh` does, then evaluate, in one Python.

    From the base, or the base itself from the random parts.
    """
    last = output / (REFERENCE if script == "finetune_lora.sh" else TUNED)
    if (then.result if then else last).exists():
        return
    if output.exists() and not last.exists():
        shutil.rmtree(output)  # what a training that broke off left behind is no model
    start = {"MODEL": paths.base, "PROJECTOR": "auto"}
    if output == paths.base:
        start = {"MODEL": paths.model / "vicuna", "PROJECTOR": paths.model / "mm_projector.bin"}
    places = {"VISION_TOWER": paths.model / "clip", "DATA_PATH": data, "IMAGE_FOLDER": paths.images}
    how = {"OUTPUT_DIR": output, "GPUS": "none", "WORKERS": 0, "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3}
    # The model is tiny: what gradient checkpointing saves is not needed.
    arguments = ("--logging_steps", 10, "--gradient_checkpointing", False, *more)
    steps: list[object] = []
    if not last.exists():
        steps = [RUN_MODULE, *trainer_arguments(script, arguments, start | places | how | settings)]
    if then is not None:
        steps += ["--then"] * bool(steps)
        steps += ["scripts/evaluate.py", "--input_file", paths.data / "held_out.json", "--image_folder", paths.images]
        steps += ["--save_path", then.folder, "--num_workers", 0, "--device", "cpu", "--batch_size", 32]
        steps += ["--max_new_tokens", then.max_new_tokens, "--model", output.name, output]
    command(paths, then.result if then else last, "scripts/experiment/one_python.py", *steps)


def trainer_arguments(script: str, arguments: Sequence[object], settings: Mapping[str, object]) -> list[str]:
    """The module, and its arguments, that a training script starts on a CPU, from the script itself.

    In the place of Python it is given a program that prints its arguments, one a line; the trainer's come last.
    """
    program = ROOT / "scripts" / "experiment" / "print_arguments.sh"
    environment = {name: str(value) for name, value in {"PYTHON": program, **settings}.items()}
    shell = ["bash", str(ROOT / script), *map(str, arguments)]
    said = subprocess.run(shell, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True, check=True)
    return said.stdout.split(f"{RUN_MODULE}\n")[-1].splitlines()


def gradients(paths: Paths, data: Path, model: Path, output: Path, *more: object) -> None:
    """The gradient features of the records of `data` at a reference model, or at a checkpoint of one."""
    command(
        paths,
        output / "manifest_0.json",
        *("compute_gradient_features.py", "--input_file", data, "--image_folder", paths.images, "--device", "cpu"),
        *("--model_path", model, "--model_base", paths.base, "--output_file", output, "--proj_dim", 2048),
        *("--num_workers", 0, *more),
    )


def in_parallel(jobs: Sequence[Callable[[], object]], what: str) -> None:
    """Do jobs, one for each processor at a time and eight at most; the first that fails ends the others' wait."""
    workers = min(8, len(os.sched_getaffinity(0)))
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=what):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
