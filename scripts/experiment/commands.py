"""The project's own commands, as the experiment runs them: with a log each, and not again where the result is there."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# What `finetune.sh` and `finetune_lora.sh` leave last in a folder.
TUNED, REFERENCE = "training_args.bin", "non_lora_trainables.bin"


@dataclass(frozen=True)
class Paths:
    """Where things lie in the experiment's folder, and the program that stands in for Python."""

    folder: Path
    python: Path

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


def command(paths: Paths, result: Path, *parts: object, **environment: object) -> None:
    """Run a script from the project's folder, unless the file that it writes last is there.

    Args:
        result: that file; its name may be a pattern.
        parts: a `.sh` or `.py` script and its arguments.

    Raises:
        UserError: it failed; its last line is quoted.
    """
    if any(result.parent.glob(result.name)):
        return
    log = paths.log(result.parent)
    log.parent.mkdir(parents=True, exist_ok=True)
    program = "bash" if str(parts[0]).endswith(".sh") else paths.python
    settings = {name: str(value) for name, value in environment.items()}
    with open(log, "wb") as file:
        code = subprocess.run(
            [str(program), *map(str, parts)],
            cwd=ROOT,
            env={**os.environ, "PYTHON": str(paths.python), **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code or not any(result.parent.glob(result.name)):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"{parts[0]} failed ({lines[-1] if lines else 'no output'}); see {log}")


def train(paths: Paths, script: str, data: Path, output: Path, *more: object, **settings: object) -> None:
    """Train from the base (the base itself: from the random parts) with one of the project's own scripts."""
    last = REFERENCE if script == "finetune_lora.sh" else TUNED
    if output.exists() and not (output / last).exists():
        shutil.rmtree(output)  # what a training that broke off left behind is no model
    start = {"MODEL": paths.base, "PROJECTOR": "auto"}
    if output == paths.base:
        start = {"MODEL": paths.model / "vicuna", "PROJECTOR": paths.model / "mm_projector.bin"}
    command(
        paths,
        output / last,
        # The model is tiny: what gradient checkpointing saves is not needed.
        *(script, "--logging_steps", 10, "--gradient_checkpointing", False, *more),
        **start,
        VISION_TOWER=paths.model / "clip",
        DATA_PATH=data,
        IMAGE_FOLDER=paths.images,
        OUTPUT_DIR=output,
        **{"GPUS": "none", "WORKERS": 0, "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3} | settings,
    )


def evaluate(paths: Paths, model: Path, name: str, save_path: Path, max_new_tokens: int) -> None:
    """The held-out losses of a model, and its answers where `max_new_tokens` is not 0."""
    command(
        paths,
        save_path / "evaluation.json",
        *("scripts/evaluate.py", "--input_file", paths.data / "held_out.json", "--image_folder", paths.images),
        *("--save_path", save_path, "--num_workers", 0, "--device", "cpu", "--max_new_tokens", max_new_tokens),
        *("--batch_size", 32, "--model", name, model),
    )


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
