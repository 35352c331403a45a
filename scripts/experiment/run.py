"""Run the experiment of docs/experiment_smollm2.md: mixture, base, reference, arms, held-out losses.

One Python trains and evaluates; records are sampled, measured and selected by the project's own commands. Every
training's losses go to one CSV, which is also the state: what stands there is not trained again, so the same command
continues a run that stopped. A second one, started when the gradients are there, shares the trainings.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from scripts.experiment.mixture import make_mixture
from scripts.experiment.plan import ARMS, BASE, FULL, Q_AT_HALF, SMALL, Plan, Run, runs
from scripts.experiment.smollm2 import evaluate, load_base, model_answers, train, with_lora, write_base
from scripts.experiment.tables import read_csv, read_losses, write_csv
from tive.features.launch import Held, hold
from tive.models import Encoded, Reference, native
from tive.report.sections import choice_curves, q_where
from tive.selection.output import SUMMARY_END, find_summaries, read_selection
from tive.util.errors import UserError
from tive.util.errors import run as run_script
from tive.util.files import read_json

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "docs" / "results" / "smollm2_experiment.csv"
VARIANT = "smollm2"
# Learning rate and records in a batch of an arm, which has one epoch; and of the base.
RATE, BATCH = 5e-4, 4
BASE_RATE, BASE_BATCH = 1e-3, 16


def command(folder: Path, result: Path, script: str, *arguments: object) -> None:
    """Run a script of the project, unless the file that it writes last is there; its name may be a pattern.

    Raises:
        UserError: it failed; its last line is quoted.
    """
    if any(result.parent.glob(result.name)):
        return
    log = folder / "logs" / f"{result.parent.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as file:
        program = [sys.executable, str(ROOT / script), *map(str, arguments)]
        code = subprocess.run(program, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise UserError(f"{script} failed ({lines[-1] if lines else 'no output'}); see {log}")


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long it took."""
    start = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)


def prepare(folder: Path, plan: Plan) -> None:
    """The mixture, the base aligned on captions, the reference model, and the sample."""
    data, base, adapter = folder / "data", folder / "base", folder / "reference"
    if not (data / "held_out.json").exists():
        with timed("mixture"):
            make_mixture(data, plan, model_answers)
    if not (base / "model.safetensors").exists():
        with timed("base"):
            write_base(folder / "random_base", plan.tower)
            reference = load_base(folder / "random_base")
            for module in (reference.model.model.vision_tower, reference.model.model.multi_modal_projector):
                module.requires_grad_(True)
            captions = encoded(reference, folder, data / "captions.json")
            means = train(reference, captions, plan.caption_epochs, BASE_RATE, BASE_BATCH)
            print("captions, mean loss by epoch:", *(f"{mean:.3f}" for mean in means))
            reference.processor.library.save_pretrained(base)
            reference.model.save_pretrained(base)
    for name, size in {"warm_up": ("--sample_ratio", plan.warm_up), "sample": ("--per_task", plan.per_task)}.items():
        target = folder / f"{name}.json"
        places = ("--source_path", data / "mixture.json", "--target_path", target)
        command(folder, target, "select_warm_up_data.py", *places, *size)
    if not (adapter / "adapter_model.safetensors").exists():
        with timed("reference"):
            torch.manual_seed(0)
            reference = load_base(base)
            adapted = with_lora(reference, plan.rank)
            train(reference, encoded(reference, folder, folder / "warm_up.json"), 1, RATE, BATCH)
            adapted.save_pretrained(adapter)


def encoded(reference: Reference, folder: Path, records: Path) -> list[Encoded]:
    """Records as the gradient step reads them."""
    images = str(folder / "data" / "images")
    return [native.encode(reference.processor, record, images) for record in read_json(records)]


def select(folder: Path, run: Run) -> Path:
    """The summary of a run's selection, made by the project's own command."""
    options, target = [*ARMS[run.arm]], folder / "selected" / run.name
    if Q_AT_HALF in options:
        # The q where the effective sample size of influence is half of the records.
        _, sizes, curves = choice_curves(read_selection(select(folder, Run("tive", 0))))
        q = q_where(sizes @ curves / sizes.sum(), 0.5)
        if q is None:
            raise UserError("no q halves the effective sample size of influence")
        options[options.index(Q_AT_HALF)] = f"{q:.4g}"
    # The features that the options ask for are computed when the first arm asks.
    kind = "sample" if "--from_sample" in options else "visual_gain" if "visual_gain" in options else "all"
    data = folder / "data" / "mixture.json"
    records = folder / "sample.json" if kind == "sample" else data
    features = folder / f"gradients_{kind}"
    parts = ["--input_file", records, "--image_folder", folder / "data" / "images", "--output_file", features]
    parts += ["--model_path", folder / "reference", "--model_base", folder / "base", "--device", "cpu"]
    parts += ["--dtype", "bfloat16", "--proj_dim", 2048, "--num_workers", 0]
    parts += ["--visual_gain"] if kind == "visual_gain" else []
    command(folder, features / "manifest_0.json", "compute_gradient_features.py", *parts)
    parts = ["--data_path", data, "--gradient_path", features, "--save_path", target, "--seed", run.seed]
    command(folder, target / f"*{SUMMARY_END}", "select_data_TIVE.py", *parts, "--exclude_tasks", "none", *options)
    (summary,) = find_summaries(target)
    return summary


def experiment(folder: Path, plan: Plan, csv: Path) -> None:
    """All of it, but for what stands in the CSV or another process does.

    Raises:
        UserError: the CSV holds runs of another base, or a step failed.
    """
    prepare(folder, plan)
    torch.manual_seed(0)  # of the adapter that every training starts from
    reference, held_out = load_base(folder / "base"), folder / "data" / "held_out.json"
    tasks = [record["dataset"] for record in read_json(held_out)]
    records = encoded(reference, folder, held_out)
    with_lora(reference, plan.rank)
    trained = {name: value for name, value in reference.model.named_parameters() if value.requires_grad}
    start = {name: value.detach().clone() for name, value in trained.items()}

    def rows_of(run: Run) -> list[dict[str, object]]:
        """Train a run from the base, or nothing for the base itself, and evaluate: a row a task."""
        reference.model.load_state_dict(start, strict=False)
        if run != BASE:
            summary = select(folder, run)
            subset = summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}.json")
            train(reference, encoded(reference, folder, subset), 1, RATE, BATCH, run.seed)
        results = evaluate(reference, records)
        rows: list[dict[str, object]] = []
        for task in dict.fromkeys(tasks):
            pairs = zip(tasks, results, strict=True)
            losses, exact = zip(*(result for name, result in pairs if name == task), strict=True)
            identity = {"variant": VARIANT, "arm": run.arm, "seed": run.seed, "task": task}
            numbers = {"loss": round(sum(losses) / len(losses), 6), "answers": len(losses), "exact": sum(exact)}
            rows.append({**identity, "mixture_records": plan.records_of(task), **numbers})
        return rows

    if csv.exists():
        before = read_losses(csv).get(VARIANT, {}).get(BASE, {})
        for row in rows_of(BASE):
            loss = before.get(str(row["task"]), {}).get("loss", math.nan)
            if not abs(float(str(row["loss"])) - loss) < 0.01:
                raise UserError(
                    f"{csv} holds runs of another base ({row['task']}: {loss}, here {row['loss']}); take the folder "
                    "that they were made in, or name another file with --result"
                )
    for run in (BASE, *runs(plan)):
        with contextlib.suppress(Held), hold(folder / "locks" / run.name, "at this run"):
            if run in read_losses(csv).get(VARIANT, {}):
                continue
            with timed(run.name):
                rows = rows_of(run)
            with open(folder / "locks" / "csv", "w") as writing:
                fcntl.lockf(writing, fcntl.LOCK_EX)
                write_csv(csv, [*read_csv(csv), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything else is written")
    parser.add_argument("--result", type=Path, metavar="CSV", help="losses (docs/results; of --small in the folder)")
    parser.add_argument("--small", action="store_true", help="a variant of minutes, which shows that it works")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    csv = arguments.result or (folder / "losses.csv" if arguments.small else RESULT)
    experiment(folder, SMALL if arguments.small else FULL, csv.resolve())


if __name__ == "__main__":
    run_script(main)
