"""Draw the experiment's data: the base's records, mixtures with and without wrong answers, held-out records, images."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scripts.experiment.plan import MIXTURES, Plan
from scripts.quickstart.data import TASKS
from tive.util.files import write_json

WRONG = 0.15
# What LLaVA's template v1 sets before the first turn.
TEMPLATE = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# How many records of the redundant mixture are one and the same.
COPIES = 8


def make_data(folder: Path, plan: Plan) -> None:
    """Write `vocabulary.json`, `base.json`, `MIXTURE_clean.json`, `MIXTURE_noisy.json`, `target.json`, `images/`.

    `held_out.json` comes last. The same plan gives the same files: every record is drawn by its own name.
    """
    bar = tqdm(desc="Drawing", unit=" records")

    def record(task: str, name: str, number: int) -> dict[str, Any]:
        bar.update()
        path = f"{task}/{name}_{number:05}.png"
        image, turns = TASKS[task][0](random.Random(f"{name} {task} {number}"))
        drawn: dict[str, Any] = {"id": f"{name}-{task}-{number}", "dataset": task}
        if image is not None:
            drawn["image"] = path
            (folder / "images" / task).mkdir(parents=True, exist_ok=True)
            image.save(folder / "images" / path)
        drawn["conversations"] = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        return drawn

    def shuffled(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
        random.Random(f"order {name}").shuffle(records)
        return records

    # The tokenizer's text is the same for every plan, and the template that stands before every record takes its part
    # of it: else most tokens of a record would be the template's.
    vocabulary = [record(task, "vocabulary", number) for task in plan.records for number in range(120)]
    turns = [{"from": role, "value": TEMPLATE} for role in ("human", "gpt")]
    vocabulary += [{"id": f"template-{number}", "conversations": turns} for number in range(100)]
    write_json(folder / "vocabulary.json", vocabulary)
    base = [record(task, "base", number) for task, count in plan.base.items() for number in range(count)]
    write_json(folder / "base.json", shuffled(base, "base"))
    for mixture in MIXTURES:
        records = []
        for task, count in plan.records.items():
            distinct = max(1, count // COPIES) if mixture == "redundant" else count
            pool = [record(task, mixture, number) for number in range(distinct)]
            records += [{**pool[row % distinct], "id": f"{mixture}-{task}-{row}"} for row in range(count)]
        shuffled(records, mixture)
        write_json(folder / f"{mixture}_clean.json", records)
        write_json(folder / f"{mixture}_noisy.json", with_wrong_answers(records, mixture))
    target = [record(task, "target", number) for task in plan.records for number in range(plan.target)]
    write_json(folder / "target.json", target)
    held_out = [record(task, "held_out", number) for task in plan.records for number in range(plan.held_out)]
    bar.close()
    write_json(folder / "held_out.json", held_out)


def with_wrong_answers(records: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The records, 15% of each task with the answers of another record of the task."""
    random_ = random.Random(f"wrong answers {name}")
    spoilt = list(records)
    for task in dict.fromkeys(record["dataset"] for record in records):
        rows = [row for row, record in enumerate(records) if record["dataset"] == task]
        for row in random_.sample(rows, round(WRONG * len(rows))):
            answers = _answers(records[row])
            others = [other for other in rows if _answers(records[other]) != answers]
            if others:
                wrong = _answers(records[random_.choice(others)])
                spoilt[row] = {**records[row], "conversations": _answered(records[row], wrong), "wrong_answers": True}
    return spoilt


def _answers(record: dict[str, Any]) -> list[str]:
    return [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]


def _answered(record: dict[str, Any], answers: list[str]) -> list[dict[str, str]]:
    turns = record["conversations"]
    return [
        turn if turn["from"] == "human" else {**turn, "value": answers[index // 2 % len(answers)]}
        for index, turn in enumerate(turns)
    ]
