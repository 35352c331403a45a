"""Run the experiment of docs/experiment.md: data, base, references, arms, held-out losses, tables and plots.

What is there already is skipped, so a run that stops is continued by the same command.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable
from pathlib import Path

from scripts.experiment.commands import (
    RUN_MODULE,
    Evaluate,
    Paths,
    command,
    gradients,
    in_parallel,
    train,
)
from scripts.experiment.data import make_data
from scripts.experiment.datamodel import collect_halves, train_halves
from scripts.experiment.plan import (
    ARMS,
    FULL,
    LESS_EPOCHS,
    Q_AT_HALF,
    SMALL,
    P,
    Plan,
    Run,
    references,
    runs,
    seeds,
    variants,
)
from scripts.experiment.results import (
    base_answers_tell,
    collect_losses,
    evaluation_of,
    exact_answers_tell,
    first_selection,
    read_csv,
    read_result,
    write_csv,
)
from scripts.experiment.tables import write_tables
from tive.report.sections import choice_curves, q_where
from tive.selection.reading import find_summary
from tive.selection.summary import SUMMARY_END
from tive.util.errors import UserError
from tive.util.errors import run as run_script


def prepare(paths: Paths, plan: Plan) -> None:
    """Data, the tiny model, the base and its held-out losses."""
    if not (paths.data / "held_out.json").exists():
        make_data(paths.data, plan)
    parts = ("scripts/quickstart/model.py", "--data", paths.data / "vocabulary.json", "--folder", paths.model)
    command(paths, paths.model / "mm_projector.bin", *parts)
    evaluation = Evaluate(paths.folder / "base_evaluation", plan.max_new_tokens)
    train(paths, "finetune.sh", paths.data / "base.json", paths.base, evaluation, EPOCHS=plan.base_epochs)


def make_reference(paths: Paths, plan: Plan, variant: str, number: int) -> None:
    """A warm-up sample, the adapter trained on it, the gradients of the mixture's records, and a first selection."""
    folder, data = paths.folder / variant, paths.mixture(variant)
    warm_up, adapter = folder / f"warm_up_{number}" / "warm_up.json", folder / f"reference_{number}"
    sample = ("--source_path", data, "--target_path", warm_up, "--sample_ratio", plan.warm_up, "--seed", number)
    command(paths, warm_up, "select_warm_up_data.py", *sample)
    # LESS weighs its checkpoints by the learning rates that are logged.
    keep = ("--logging_steps", 1, "--save_strategy", "epoch", "--save_total_limit", plan.epochs, "--seed", number)
    settings = {"LORA_R": 8, "LORA_ALPHA": 16, "PROJECTOR_LEARNING_RATE": 1e-3, "EPOCHS": plan.epochs}
    train(paths, "finetune_lora.sh", warm_up, adapter, None, *keep, **settings)
    gradients(paths, data, adapter, folder / f"gradients_{number}", "--el2n")
    # The first selection says where the effective sample size is half.
    select(paths, variant, Run("tive", P, 0, number))
    if "less" in seeds(plan, variant):
        for checkpoint in less_checkpoints(paths, variant, number):
            less = folder / f"less_{number}" / checkpoint.name
            gradients(paths, data, checkpoint, less / "records", "--gradient", "adam")
            gradients(paths, paths.data / "target.json", checkpoint, less / "target")


def less_checkpoints(paths: Paths, variant: str, number: int) -> list[Path]:
    """The checkpoints whose gradients LESS takes, by their steps."""
    checkpoints = (paths.folder / variant / f"reference_{number}").glob("checkpoint-*")
    by_step = sorted(checkpoints, key=lambda path: int(path.name.removeprefix("checkpoint-")))
    return [by_step[epoch - 1] for epoch in LESS_EPOCHS if epoch <= len(by_step)]


def select(paths: Paths, variant: str, run: Run) -> Path:
    """The subset of a run; the whole mixture where its arm chooses nothing."""
    arm, folder, data = ARMS[run.arm], paths.folder / variant, paths.mixture(variant)
    if arm.whole:
        return data
    target = folder / "selected" / run.name
    parts: tuple[object, ...] = ("--data_path", data, "--save_path", target, "--p", run.share)
    if arm.target:
        checkpoints = less_checkpoints(paths, variant, run.reference or 0)
        features = [folder / f"less_{run.reference}" / path.name for path in checkpoints]
        parts += ("--target_data", paths.data / "target.json", "--train", *(path / "records" for path in features))
        parts += ("--target", *(path / "target" for path in features))
        command(paths, target / f"*{SUMMARY_END}", "select_data_LESS.py", *parts)
    else:
        options = [*arm.options]
        if Q_AT_HALF in options:
            options[options.index(Q_AT_HALF)] = f"{q_at_half(paths, variant, run.reference or 0):.4g}"
        parts += ("--gradient_path", folder / f"gradients_{run.reference or 0}", "--exclude_tasks", "none")
        command(paths, target / f"*{SUMMARY_END}", "select_data_TIVE.py", *parts, "--seed", run.seed, *options)
    summary = find_summary(target)
    return summary.with_name(f"{summary.name.removesuffix(SUMMARY_END)}.json")


@functools.cache
def q_at_half(paths: Paths, variant: str, reference: int) -> float:
    """The q where the effective sample size of influence is half of the records."""
    _, sizes, curves = choice_curves(first_selection(paths.folder, variant, reference))
    q = q_where(sizes @ curves / sizes.sum(), 0.5)
    if q is None:
        raise UserError(f"{variant}: no q halves the effective sample size with reference {reference}")
    return q


def do(paths: Paths, plan: Plan, variant: str, run: Run, max_new_tokens: int) -> None:
    """Select, train and evaluate one run."""
    model = paths.folder / variant / "models" / run.name
    more: list[object] = ["--seed", run.seed]
    if ARMS[run.arm].whole == "steps":
        more += ["--max_steps", math.ceil(P * sum(plan.records.values()) / 8) * plan.epochs]
    evaluation = Evaluate(evaluation_of(paths.folder, variant, run, max_new_tokens > 0), max_new_tokens)
    train(paths, "finetune.sh", select(paths, variant, run), model, evaluation, *more, EPOCHS=plan.epochs)


def check_influence(paths: Paths, plan: Plan, number: int) -> None:
    """One small step along the gradient of records, with one reference (influence_check.py)."""
    module = (RUN_MODULE, "scripts.experiment.influence_check", paths.folder)
    result = paths.folder / "steps" / f"{number}.csv"
    command(paths, result, *module, "--records", plan.steps, "--reference", number, "--result", result)


def experiment(paths: Paths, plan: Plan) -> None:
    """All of it, the parts that others wait for first."""

    def wanted(whole: bool, max_new_tokens: int) -> list[Callable[[], None]]:
        return [
            functools.partial(do, paths, plan, variant, run, max_new_tokens)
            for variant in variants(plan)
            for run in runs(plan, variant)
            if (ARMS[run.arm].whole == "epochs") == whole
        ]

    prepare(paths, plan)
    made = [
        functools.partial(make_reference, paths, plan, variant, number)
        for variant in variants(plan)
        for number in references(plan, variant)
    ]
    in_parallel(made, "References")
    base = read_result(paths.folder / "base_evaluation")
    tokens = plan.max_new_tokens if base_answers_tell(base) else 0
    in_parallel(wanted(True, tokens), "All records")
    if tokens:
        whole = [
            read_result(evaluation_of(paths.folder, variant, run, True))
            for variant in variants(plan)
            for run in runs(plan, variant)
            if run.arm == "all_epochs"
        ]
        tokens = tokens if exact_answers_tell(base, whole) else 0
        in_parallel(wanted(True, tokens), "All records")
    in_parallel(wanted(False, tokens), "Arms")
    in_parallel(train_halves(paths, plan), "Random halves")
    in_parallel([functools.partial(check_influence, paths, plan, number) for number in range(plan.references)], "Steps")
    collect_losses(paths.folder, plan, tokens > 0)
    collect_halves(paths.folder, plan)
    steps = [row for number in range(plan.references) for row in read_csv(paths.folder / "steps" / f"{number}.csv")]
    write_csv(paths.folder / "results" / "steps.csv", steps)
    write_tables(paths.folder / "results")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where everything is written")
    parser.add_argument("--small", action="store_true", help="a variant of minutes, which shows that it works")
    arguments = parser.parse_args()
    experiment(Paths(arguments.folder.resolve()), SMALL if arguments.small else FULL)


if __name__ == "__main__":
    run_script(main)
