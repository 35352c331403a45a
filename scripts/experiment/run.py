"""Run the experiment of docs/experiment.md: data, base, references, arms, held-out losses, tables and plots.

What is there already is skipped, so a run that stops is continued by the same command.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from scripts.experiment.data import make_data
from scripts.experiment.plan import ARMS, FULL, Q_AT_HALF, SMALL, P, Plan, Run, runs, variants
from scripts.experiment.tables import write_results
from tive.report.choice import choice_of
from tive.selection.files import SUMMARY_END, find_summary, read_selection
from tive.util.errors import UserError
from tive.util.errors import run as run_script

ROOT = Path(__file__).resolve().parents[2]
TUNED = "training_args.bin"


def command(log: Path, result: Path, *parts: object, **environment: object) -> None:
    """Run a command from the project's folder, unless the file that it writes last is there; its output goes to `log`.

    Args:
        result: that file; its name may be a pattern.

    Raises:
        UserError: it failed; its last line is quoted.
    """
    if any(result.parent.glob(result.name)):
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in environment.items()}
    with open(log, "wb") as file:
        code = subprocess.run(
            [str(part) for part in parts],
            cwd=ROOT,
            env={**os.environ, "PYTHON": sys.executable, **settings},
            stdout=file,
            stderr=subprocess.STDOUT,
        ).returncode
    if code or not any(result.parent.glob(result.name)):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"{parts[0]} {parts[1]} failed ({lines[-1] if lines else 'no output'}); see {log}")


class Experiment:
    """The paths of one variant of the experiment, and the commands that fill them."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder, self.plan = folder, plan
        self.data, self.model, self.base = folder / "data", folder / "model", folder / "base"

    def train(self, script: str, data: Path, output: Path, last: str, *more: object, **settings: object) -> None:
        """Train from the base (or, without one, from the language model) with one of the project's own scripts."""
        if output.exists() and not (output / last).exists():
            shutil.rmtree(output)  # what a training that broke off left behind is no model
        start = {"MODEL": self.base, "PROJECTOR": "auto"}
        if output == self.base:
            start = {"MODEL": self.model / "vicuna", "PROJECTOR": self.model / "mm_projector.bin"}
        command(
            self.folder / "logs" / f"{'_'.join(output.relative_to(self.folder).parts)}.log",
            output / last,
            *("bash", script, "--logging_steps", 50, *more),
            **start,
            VISION_TOWER=self.model / "clip",
            DATA_PATH=data,
            IMAGE_FOLDER=self.data / "images",
            OUTPUT_DIR=output,
            **{"GPUS": "none", "WORKERS": 0, "BATCH_SIZE": 8, "LEARNING_RATE": 1e-3} | settings,
        )

    def prepare(self) -> None:
        """Data, the tiny model, the base and its held-out losses."""
        if not (self.data / "held_out.json").exists():
            make_data(self.data, self.plan)
        make = ("scripts/quickstart/model.py", "--data", self.data / "vocabulary.json", "--folder", self.model)
        command(self.folder / "logs" / "model.log", self.model, sys.executable, *make)
        self.train("finetune.sh", self.data / "base.json", self.base, TUNED, EPOCHS=self.plan.base_epochs)
        self.evaluate(self.folder / "base_evaluation", [("base", self.base)])

    def evaluate(self, save_path: Path, models: list[tuple[str, Path]]) -> None:
        # Called whenever a model may be new: results that are there are kept.
        (save_path / "evaluation.json").unlink(missing_ok=True)
        command(
            self.folder / "logs" / f"{'_'.join(save_path.relative_to(self.folder).parts)}.log",
            save_path / "evaluation.json",
            *(sys.executable, "scripts/evaluate.py", "--input_file", self.data / "held_out.json"),
            *("--image_folder", self.data / "images", "--save_path", save_path, "--num_workers", 0),
            *("--device", "cpu", "--max_new_tokens", self.plan.max_new_tokens),
            *(part for model in models for part in ("--model", *model)),
        )

    def reference(self, variant: str, number: int) -> None:
        """A warm-up sample, the adapter that is trained on it, and the gradients of the mixture's records."""
        folder, data = self.folder / variant, self.data / f"{variant}.json"
        warm_up = folder / f"warm_up_{number}.json"
        sample = ("--source_path", data, "--target_path", warm_up, "--sample_ratio", self.plan.warm_up)
        logs = self.folder / "logs"
        command(
            logs / f"{variant}_warm_up_{number}.log",
            warm_up,
            *(sys.executable, "select_warm_up_data.py", *sample, "--seed", number),
        )
        adapter = folder / f"reference_{number}"
        settings = {"LORA_R": 8, "LORA_ALPHA": 16, "PROJECTOR_LEARNING_RATE": 1e-3, "EPOCHS": self.plan.warm_up_epochs}
        self.train("finetune_lora.sh", warm_up, adapter, "non_lora_trainables.bin", "--seed", number, **settings)
        gradients = folder / f"gradients_{number}"
        command(
            logs / f"{variant}_gradients_{number}.log",
            gradients / "manifest_0.json",
            *(sys.executable, "compute_gradient_features.py", "--input_file", data, "--el2n", "--device", "cpu"),
            *("--image_folder", self.data / "images", "--model_path", adapter, "--model_base", self.base),
            *("--output_file", gradients, "--proj_dim", 2048),
        )

    def select(self, variant: str, run: Run) -> Path:
        """The subset of a run; the whole mixture where its arm chooses nothing."""
        data = self.data / f"{variant}.json"
        arm = ARMS[run.arm]
        if arm.whole:
            return data
        options = [*arm.options]
        if Q_AT_HALF in options:
            options[options.index(Q_AT_HALF)] = f"{self.q_at_half(variant, run.reference or 0):.4g}"
        target = self.folder / variant / "selected" / run.name
        command(
            self.folder / "logs" / f"{variant}_select_{run.name}.log",
            target / f"*{SUMMARY_END}",
            *(sys.executable, "select_data_TIVE.py", "--data_path", data, "--save_path", target),
            *("--gradient_path", self.folder / variant / f"gradients_{run.reference or 0}", "--exclude_tasks", "none"),
            *("--p", run.share, "--seed", run.seed, *options),
        )
        summary = find_summary(target, None)
        return summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}.json")

    def q_at_half(self, variant: str, reference: int) -> float:
        """The q where the effective sample size of influence is half of the records."""
        tive = Run("tive", P, self.plan.seeds[0], reference)
        summary = find_summary(self.folder / variant / "selected" / tive.name, None)
        choice = choice_of(read_selection(summary))
        q = None if choice is None else choice.q_where(0.5)
        if q is None:
            raise UserError(f"{variant}: no q halves the effective sample size with reference {reference}")
        return q

    def arms(self, variant: str) -> None:
        """Select, train and evaluate every run on one mixture."""
        wanted = sorted(runs(self.plan), key=lambda run: Q_AT_HALF in ARMS[run.arm].options)
        models = []
        for run in tqdm(wanted, desc=f"Arms on {variant}", unit=" runs"):
            subset, output = self.select(variant, run), self.folder / variant / "models" / run.name
            more: list[object] = ["--seed", run.seed]
            if ARMS[run.arm].whole == "steps":
                records = sum(self.plan.records.values())
                more += ["--max_steps", math.ceil(P * records / 8) * self.plan.epochs]
            self.train("finetune.sh", subset, output, TUNED, *more, EPOCHS=self.plan.epochs)
            models.append((run.name, output))
        self.evaluate(self.folder / variant / "evaluation", models)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--small", action="store_true", help="a variant of minutes, which shows that it works")
    arguments = parser.parse_args()
    plan = SMALL if arguments.small else FULL
    experiment = Experiment(arguments.folder.resolve(), plan)
    experiment.prepare()
    for variant in variants(plan):
        for number in range(plan.references):
            experiment.reference(variant, number)
        experiment.arms(variant)
    write_results(experiment.folder, plan)


if __name__ == "__main__":
    run_script(main)
