"""Run the experiment of docs/experiment_smollm2.md: mixture, base, reference, arms, held-out losses.

Every training's losses go to one CSV, which is also the state: what stands there is not trained again, so the same
command continues a run that stopped, and a second one beside it shares the work.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import fcntl
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from scripts.experiment.commands import ROOT, Paths, command
from scripts.experiment.mixture import Sizes, make_mixture
from scripts.experiment.plan import Q_AT_HALF, Arm, P, Run
from scripts.experiment.results import read_csv, write_csv
from scripts.experiment.smollm2 import (
    Tower,
    encode,
    evaluate,
    load_base,
    own_answers,
    train,
    with_lora,
    write_base,
)
from tive.features.store import Held, hold
from tive.models import Encoded, Reference
from tive.report.sections import choice_curves, q_where
from tive.selection.reading import find_summary, read_selection
from tive.selection.summary import SUMMARY_END
from tive.util.errors import UserError
from tive.util.errors import run as run_script
from tive.util.files import read_json

_RANDOM = ("--instance_score", "random")
ARMS = {
    "random": Arm(("--task_budget", "size", *_RANDOM), by_reference=False),
    "equal": Arm(("--task_budget", "equal", *_RANDOM), by_reference=False),
    "tive": Arm(),
    "tive_from_sample": Arm(("--from_sample",)),
    "difficulty_equal": Arm(("--task_budget", "difficulty+equal", *_RANDOM)),
    "difficulty_size": Arm(("--task_budget", "difficulty+size", *_RANDOM)),
    "tive_q_half": Arm(("--q", Q_AT_HALF)),
    "clusters": Arm(("--task_budget", "difficulty+equal", "--sampling", "clusters")),
    "visual_gain": Arm(("--task_budget", "equal", "--instance_score", "visual_gain", "--sampling", "top")),
    "all": Arm(by_reference=False, whole="epochs"),
}
MAIN = ("random", "equal", "tive", "tive_from_sample", "difficulty_equal", "difficulty_size")
# Learning rate and records in a batch: of an arm, and of the base.
RATE, BATCH = 5e-4, 4
BASE_RATE, BASE_BATCH = 1e-3, 16
RESULT = ROOT / "docs" / "results" / "smollm2_experiment.csv"


@dataclass(frozen=True)
class Plan:
    """One variant of the experiment.

    Attributes:
        caption_epochs: of tower and projector on captions, the language model frozen.
        warm_up: share of the records that the reference model is trained on.
        per_task: records of each task whose gradients make the budgets of the arm from a sample.
        seeds: of the arms in `MAIN`; `others` of the rest, in this order.
    """

    sizes: Sizes
    tower: Tower
    caption_epochs: int
    epochs: int
    rank: int
    warm_up: float
    per_task: int
    seeds: int
    others: dict[str, int]


FULL = Plan(
    sizes=Sizes(records=200, held_out=24, captions=1000),
    tower=Tower(width=192, layers=4, heads=3, image=60, patch=20),
    caption_epochs=3,
    epochs=1,
    rank=8,
    warm_up=0.08,
    per_task=40,
    seeds=4,
    others={"all": 1, "tive_q_half": 1, "clusters": 1, "visual_gain": 1},
)
SMALL = Plan(
    sizes=Sizes(records=8, held_out=2, captions=16),
    tower=Tower(width=48, layers=2, heads=4, image=60, patch=20),
    caption_epochs=1,
    epochs=1,
    rank=2,
    warm_up=0.25,
    per_task=4,
    seeds=1,
    others={"tive_q_half": 1},
)


def runs(plan: Plan) -> list[Run]:
    """Every training, the main arms first and seed by seed."""
    wanted = [(arm, seed) for seed in range(plan.seeds) for arm in MAIN]
    wanted += [(arm, seed) for arm, count in plan.others.items() for seed in range(count)]
    return [
        Run(arm, 1.0 if ARMS[arm].whole else P, seed, 0 if ARMS[arm].by_reference else None) for arm, seed in wanted
    ]


def prepare(paths: Paths, plan: Plan) -> None:
    """The mixture, the base aligned on captions, the reference model, and the sample."""
    if not (paths.data / "held_out.json").exists():
        with timed("mixture"):
            make_mixture(paths.data, plan.sizes, lambda questions: own_answers(questions, 40))
    with timed("base"):
        make_base(paths, plan)
    data, adapter, sample = paths.mixture("mixture"), paths.folder / "reference", paths.folder / "sample.json"
    warm_up = paths.folder / "warm_up.json"
    source = ("--source_path", data, "--target_path")
    command(paths, warm_up, "select_warm_up_data.py", *source, warm_up, "--sample_ratio", plan.warm_up)
    command(paths, sample, "select_warm_up_data.py", *source, sample, "--per_task", plan.per_task)
    if not (adapter / "adapter_model.safetensors").exists():
        with timed("reference"):
            reference = load_base(paths.base)
            adapted = with_lora(reference, plan.rank)
            means = train(reference, encode(reference, read_json(warm_up), paths.images), plan.epochs, RATE, BATCH)
            print("reference model, mean loss by epoch:", *(f"{mean:.3f}" for mean in means))
            adapted.save_pretrained(adapter)


def features(paths: Paths, options: Sequence[str]) -> Path:
    """The folder of the gradients that an arm's options ask for, computed when the first arm asks."""
    kind = "sample" if "--from_sample" in options else "visual_gain" if "visual_gain" in options else "all"
    data = paths.folder / "sample.json" if kind == "sample" else paths.mixture("mixture")
    output = paths.folder / f"gradients_{kind}"
    with timed(output.name):
        command(
            paths,
            output / "manifest_0.json",
            *("compute_gradient_features.py", "--input_file", data, "--image_folder", paths.images, "--device", "cpu"),
            *("--model_path", paths.folder / "reference", "--model_base", paths.base, "--output_file", output),
            *("--dtype", "bfloat16", "--proj_dim", 2048, "--num_workers", 0),
            *(["--visual_gain"] if kind == "visual_gain" else []),
        )
    return output


def make_base(paths: Paths, plan: Plan) -> None:
    """Align a random tower and projector with the language model, which is frozen, on captions."""
    if (paths.base / "model.safetensors").exists():
        return
    start = paths.folder / "random_base"
    write_base(start, plan.tower)
    reference = load_base(start)
    for module in (reference.model.model.vision_tower, reference.model.model.multi_modal_projector):
        module.requires_grad_(True)
    captions = encode(reference, read_json(paths.data / "captions.json"), paths.images)
    means = train(reference, captions, plan.caption_epochs, BASE_RATE, BASE_BATCH)
    print("captions, mean loss by epoch:", *(f"{mean:.3f}" for mean in means))
    reference.processor.library.save_pretrained(paths.base)
    reference.model.save_pretrained(paths.base)


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    start, processor = time.monotonic(), time.process_time()
    yield
    if time.monotonic() - start > 1:
        spent = time.process_time() - processor
        print(f"{what}: {time.monotonic() - start:.0f} s, {spent:.0f} s of this process", flush=True)


def select(paths: Paths, run: Run) -> Path:
    """The subset of a run by the project's own command; the whole mixture where its arm chooses nothing."""
    arm, data = ARMS[run.arm], paths.mixture("mixture")
    if arm.whole:
        return data
    options = [*arm.options]
    if Q_AT_HALF in options:
        options[options.index(Q_AT_HALF)] = f"{q_at_half(paths, run):.4g}"
    target = paths.folder / "selected" / run.name
    parts = ("--data_path", data, "--gradient_path", features(paths, options), "--save_path", target, "--p", run.share)
    more = ("--seed", run.seed, "--exclude_tasks", "none", *options)
    command(paths, target / f"*{SUMMARY_END}", "select_data_TIVE.py", *parts, *more)
    summary = find_summary(target)
    return summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}.json")


def q_at_half(paths: Paths, run: Run) -> float:
    """The q where the effective sample size of influence is half of the records."""
    tive = Run("tive", run.share, 0, run.reference)
    select(paths, tive)
    _, sizes, curves = choice_curves(read_selection(find_summary(paths.folder / "selected" / tive.name)))
    q = q_where(sizes @ curves / sizes.sum(), 0.5)
    if q is None:
        raise UserError("no q halves the effective sample size")
    return q


class Trainer:
    """The base in memory, an adapter on it that each training starts anew, and the held-out records."""

    def __init__(self, paths: Paths, plan: Plan) -> None:
        self.paths, self.plan = paths, plan
        torch.manual_seed(0)
        self.reference: Reference = load_base(paths.base)
        self.held_out: list[dict[str, Any]] = read_json(paths.data / "held_out.json")
        self.encoded: list[Encoded] = encode(self.reference, self.held_out, paths.images)
        with_lora(self.reference, plan.rank)
        self.start = copy.deepcopy(self._trained())

    def _trained(self) -> dict[str, torch.Tensor]:
        return {name: value.data for name, value in self.reference.model.named_parameters() if value.requires_grad}

    def row_for_each_task(self, run: Run | None) -> list[dict[str, object]]:
        """Train one run, or nothing, from the base, and evaluate: rows of the CSV."""
        for name, value in self._trained().items():
            value.copy_(self.start[name])
        if run is not None:
            records = encode(self.reference, read_json(select(self.paths, run)), self.paths.images)
            train(self.reference, records, self.plan.epochs, RATE, BATCH, run.seed)
        results = evaluate(self.reference, self.encoded)
        shown = Run("base", 1.0, 0, None) if run is None else run
        rows: list[dict[str, object]] = []
        for task in dict.fromkeys(record["dataset"] for record in self.held_out):
            pairs = zip(self.held_out, results, strict=True)
            losses, exact = zip(*(result for record, result in pairs if record["dataset"] == task), strict=True)
            identity = {"arm": shown.arm, "share": shown.share, "seed": shown.seed}
            reference = "" if shown.reference is None else shown.reference
            numbers = {"loss": round(sum(losses) / len(losses), 6), "answers": len(losses), "exact": sum(exact)}
            sizes = {"mixture_records": self.plan.sizes.records}
            rows.append({"variant": "smollm2", **identity, "reference": reference, "task": task, **numbers, **sizes})
        return rows


def done(csv: Path) -> set[tuple[str, str]]:
    """Arm and seed of the runs that stand in the CSV."""
    return {(row["arm"], row["seed"]) for row in read_csv(csv)} if csv.exists() else set()


def refuse_other_base(csv: Path, rows: list[dict[str, object]]) -> None:
    """Refuse to add to the runs of another base.

    Raises:
        UserError: the base's losses are not those that stand in the CSV.
    """
    before = {row["task"]: float(row["loss"]) for row in read_csv(csv) if row["arm"] == "base"}
    for row in rows:
        loss = before.get(str(row["task"]), math.nan)
        if not abs(float(str(row["loss"])) - loss) < 0.01:
            raise UserError(
                f"{csv} holds runs of another base ({row['task']}: {loss}, here {row['loss']}); take the folder that "
                "they were made in, or name another file with --result"
            )


def experiment(paths: Paths, plan: Plan, csv: Path) -> None:
    """All of it, but for what stands in the CSV or another process does."""
    prepare(paths, plan)
    trainer = Trainer(paths, plan)
    if csv.exists():
        refuse_other_base(csv, trainer.row_for_each_task(None))
    (paths.folder / "locks").mkdir(exist_ok=True)
    for run in (None, *runs(plan)):
        arm, seed = ("base", "0") if run is None else (run.arm, str(run.seed))
        with contextlib.suppress(Held), hold(paths.folder / "locks" / f"{arm}_{seed}", "at this run"):
            if (arm, seed) in done(csv):
                continue
            with timed(f"{arm}, seed {seed}"):
                rows = trainer.row_for_each_task(run)
            with open(paths.folder / "locks" / "csv", "w") as writing:
                fcntl.lockf(writing, fcntl.LOCK_EX)
                write_csv(csv, [*(read_csv(csv) if csv.exists() else []), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--result", type=Path, metavar="CSV", help="losses (docs/results)")
    parser.add_argument("--small", action="store_true", help="a variant of minutes, which shows that it works")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    csv = arguments.result or (folder / "losses.csv" if arguments.small else RESULT)
    experiment(Paths(folder), SMALL if arguments.small else FULL, csv.resolve())


if __name__ == "__main__":
    run_script(main)
