"""A mixture with the shapes and counts of LLaVA-1.5's, without its images or its text.

Run by itself it writes the whole of it, 665,298 records and about 1 GB, to try `scripts/label_tasks.py` at full size,
or with `--scale 1000` a thousandth:

    python tests/helpers/mixture.py mixture.json
    python scripts/label_tasks.py --source_path mixture.json --target_path labelled.json
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# As the authors counted them (LLaVA issue 702).
COUNTS = {
    "LLaVA-Instruct": 157_712,
    "ShareGPT": 40_688,
    "VQAv2": 82_783,
    "GQA": 72_140,
    "OKVQA": 8_998,
    "OCR-VQA": 80_000,
    "A-OKVQA": 66_160,
    "textcaps": 21_953,
    "RefCOCO": 48_447,
    "VisualGenome": 86_417,
}
SHORT_ANSWER = "Answer the question using a single word or phrase."
OPTION_LETTER = "Answer with the option's letter from the given choices directly."
REGION = "Please provide a short description for this region: [0.42, 0.61, 0.78, 0.95]."
BOX = "Please provide the bounding box coordinate of the region this sentence describes: a man in a red coat."
COCO = "coco/train2017/000000033471.jpg"
WORDS = "A bus drives down a wet street past two people who wait under a green umbrella near an old café"


def record(image: str | None, questions: list[str], answers: list[str] | None = None) -> dict[str, Any]:
    """A record in LLaVA's form; the image's tag opens the first question."""
    answers = answers or ["Yes"] * len(questions)
    turns = []
    for number, (question, answer) in enumerate(zip(questions, answers, strict=True)):
        tag = "<image>\n" if image is not None and number == 0 else ""
        turns += [{"from": "human", "value": tag + question}, {"from": "gpt", "value": answer}]
    if image is None:
        return {"id": "wgByO4Y_0", "model": "", "conversations": turns}
    return {"id": Path(image).stem, "image": image, "conversations": turns}


def example(task: str, random_: random.Random) -> dict[str, Any]:
    """One record of a task, in its published shape: merged questions, formatting prompt, image folder."""

    def text(low: int, high: int) -> str:
        return " ".join(random_.choices(WORDS.split(), k=random_.randint(low, high))).capitalize() + "."

    def questions(low: int, high: int) -> list[str]:
        return [text(5, 10)[:-1] + "?" for _ in range(random_.randint(low, high))]

    def short(image: str, low: int, high: int) -> dict[str, Any]:
        asked = questions(low, high)
        return record(image, [f"{asked[0]}\n{SHORT_ANSWER}", *asked[1:]])

    if task == "VQAv2":
        return short(COCO, 3, 9)
    if task == "OKVQA":
        return short(COCO, 1, 2)
    if task == "GQA":
        return short("gqa/images/2375429.jpg", 5, 25)
    if task == "OCR-VQA":
        return short("ocr_vqa/images/1878883.jpg", 3, 5)
    if task == "A-OKVQA":
        options = "\n".join(f"{letter}. {random_.choice(WORDS.split())}" for letter in "ABCD")
        asked = [f"{question}\n{options}\n{OPTION_LETTER}" for question in questions(1, 2)]
        return record(COCO, asked, ["C"] * len(asked))
    if task == "textcaps":
        asked = "Provide a one-sentence caption for the provided image.\nReference OCR token: EXIT, 24, ROUTE"
        return record("textvqa/train_images/011e7e629fb9ae7b.jpg", [asked], [text(8, 14)])
    if task in ("RefCOCO", "VisualGenome"):
        image = COCO if task == "RefCOCO" else "vg/VG_100K_2/2404787.jpg"
        asked = [random_.choice((REGION, BOX)) for _ in range(random_.randint(3, 12))]
        return record(image, asked, ["[0.42, 0.61, 0.78, 0.95]"] * len(asked))
    if task == "ShareGPT":
        asked = questions(2, 8)
        return record(None, asked, [text(200, 520) for _ in asked])
    form = random_.choice(("conversation", "detail", "reasoning"))
    if form == "detail":
        return record(COCO, ["What do you see happening in this image?"], [text(80, 160)])
    asked = questions(3, 6) if form == "conversation" else questions(1, 1)
    return record(COCO, asked, [text(40, 120) for _ in asked])


def mixture(scale: int = 1, variants: int = 200) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield `(task, record)` in a shuffled order, `count // scale` of each task, from `variants` records of each."""
    random_ = random.Random(0)
    pool = {task: [example(task, random_) for _ in range(variants)] for task in COUNTS}
    tasks = [task for task, count in COUNTS.items() for _ in range(count // scale)]
    random_.shuffle(tasks)
    for number, task in enumerate(tasks):
        yield task, pool[task][number % variants]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--scale", type=int, default=1, help="write one record in so many of each task")
    arguments = parser.parse_args()
    with open(arguments.path, "w", encoding="utf-8") as file:
        for number, (_, content) in enumerate(mixture(arguments.scale)):
            file.write(("[" if number == 0 else ", ") + json.dumps(content))
        file.write("]")


if __name__ == "__main__":
    main()
