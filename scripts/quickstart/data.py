#!/usr/bin/env python
"""Draw the quickstart's data: a small multi-task instruction set in LLaVA's format, with its image files.

Seven tasks of uneven size and difficulty: questions on colour and shape in several turns (`vqa`), region boxes
(`boxes`), counting (`counting`), comparing (`comparing`), captions (`textcaps`), reading a word (`reading`) and
text-only chat (`chat`). The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from tive.util.errors import run
from tive.util.files import write_json

COLOURS = {
    "red": (214, 40, 40),
    "green": (46, 158, 70),
    "blue": (40, 84, 214),
    "yellow": (244, 208, 32),
    "purple": (138, 60, 190),
    "orange": (240, 136, 30),
}
SHAPES = ("circle", "square", "triangle", "diamond")
BACKGROUNDS = {"white": (250, 250, 250), "grey": (176, 176, 176), "black": (24, 24, 24)}
WORDS = (
    "apple",
    "bread",
    "cloud",
    "dream",
    "eagle",
    "flame",
    "grape",
    "house",
    "light",
    "mango",
    "north",
    "ocean",
    "piano",
    "queen",
    "river",
    "stone",
)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
SHORT_ANSWER = "Answer the question using a single word or phrase."

Turns = list[tuple[str, str]]


@dataclass(frozen=True)
class Thing:
    """A shape on a canvas; `box` is (left, top, right, bottom) in pixels."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def area(self) -> int:
        left, top, right, bottom = self.box
        return (right - left) * (bottom - top)


def draw_things(things: list[Thing], size: tuple[int, int], background: str) -> Image.Image:
    image = Image.new("RGB", size, BACKGROUNDS[background])
    draw = ImageDraw.Draw(image)
    for thing in things:
        left, top, right, bottom = thing.box
        middle, centre = (left + right) // 2, (top + bottom) // 2
        outline = {
            "triangle": [(middle, top), (right, bottom), (left, bottom)],
            "diamond": [(middle, top), (right, centre), (middle, bottom), (left, centre)],
        }
        if thing.shape == "circle":
            draw.ellipse(thing.box, fill=COLOURS[thing.colour])
        elif thing.shape == "square":
            draw.rectangle(thing.box, fill=COLOURS[thing.colour])
        else:
            draw.polygon(outline[thing.shape], fill=COLOURS[thing.colour])
    return image


def scene(random_: random.Random, count: int) -> tuple[Image.Image, list[Thing], str]:
    """A canvas with `count` different things side by side; also the things from left to right and the background."""
    width, height = random_.choice([(112, 84), (84, 112), (112, 112), (140, 70)])
    names = random_.sample([(shape, colour) for shape in SHAPES for colour in COLOURS], count)
    things, column = [], width // count
    for number, (shape, colour) in enumerate(names):
        side = random_.randint(min(column, height) // 3, min(column, height) - 4)
        left = number * column + random_.randint(0, column - side - 1)
        top = random_.randint(0, height - side - 1)
        things.append(Thing(shape, colour, (left, top, left + side, top + side)))
    background = random_.choice(sorted(BACKGROUNDS))
    return draw_things(things, (width, height), background), things, background


def vqa(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    image, (thing,), background = scene(random_, 1)
    questions = [
        (f"What color is the {thing.shape}?", thing.colour),
        ("What shape is shown?", thing.shape),
        ("What color is the background?", background),
        (f"Is the {thing.shape} {random_.choice(sorted(COLOURS))}?", ""),
    ]
    asked = questions[3][0]
    questions[3] = (asked, "yes" if thing.colour in asked else "no")
    turns = random_.sample(questions, random_.randint(2, 4))
    first, answer = turns[0]
    return image, [(f"<image>\n{first}\n{SHORT_ANSWER}", answer), *turns[1:]]


def boxes(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    image, things, _ = scene(random_, random_.randint(1, 2))
    thing = random_.choice(things)
    left, top, right, bottom = thing.box
    where = [left / image.width, top / image.height, right / image.width, bottom / image.height]
    place = "[" + ", ".join(f"{number:.2f}" for number in where) + "]"
    if random_.random() < 0.5:
        question = f"Please provide the bounding box coordinate of the region this sentence describes: {thing.name}."
        return image, [(f"<image>\n{question}", place)]
    return image, [(f"<image>\nPlease provide a short description for this region: {place}.", f"The {thing.name}.")]


def counting(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    image, things, _ = scene(random_, random_.randint(1, 5))
    colour = random_.choice([random_.choice(things).colour, random_.choice(sorted(COLOURS))])
    count = sum(thing.colour == colour for thing in things)
    return image, [
        (f"<image>\nHow many shapes are there?\n{SHORT_ANSWER}", NUMBERS[len(things)]),
        (f"How many of them are {colour}?", NUMBERS[count]),
    ]


def comparing(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    image, (first, second), _ = scene(random_, 2)
    larger, smaller = (first, second) if first.area > second.area else (second, first)
    question = f"<image>\nWhich is larger, the {first.name} or the {second.name}? Explain your answer."
    answer = (
        f"The {larger.name} is larger: it covers {larger.area / smaller.area:.1f} times the area of "
        f"the {smaller.name}, which stands on the {'left' if smaller is first else 'right'}."
    )
    return image, [(question, answer)]


def textcaps(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    image, things, background = scene(random_, random_.randint(1, 3))
    names = " and ".join(f"a {thing.name}" for thing in things)
    caption = random_.choice([f"There is {names} on {background}.", f"A {background} picture that shows {names}."])
    return image, [("<image>\nProvide a one-sentence caption for the provided image.", caption)]


def reading(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    word, colour = random_.choice(WORDS), random_.choice(sorted(COLOURS))
    image = Image.new("RGB", (132, 56), BACKGROUNDS["white"])
    place = (random_.randint(2, 20), random_.randint(2, 16))
    ImageDraw.Draw(image).text(place, word, fill=COLOURS[colour], font=ImageFont.load_default(size=30))
    spelled = ", ".join(word)
    return image, [
        (f"<image>\nWhat word is written in the image?\n{SHORT_ANSWER}", word),
        ("Spell it.", f"{spelled}."),
    ]


def chat(random_: random.Random) -> tuple[Image.Image | None, Turns]:
    thing, place, other = random_.sample(WORDS, 3)
    colour = random_.choice(sorted(COLOURS))
    number = random_.randint(3, 8)
    openers = [
        (
            f"Write a short story about a {colour} {thing}.",
            f"Once there was a {colour} {thing} that lived near the {place}. Every morning it looked at the {other} "
            f"and wished to travel. One day the {other} said: come with me, and bring {number} friends. So they "
            f"left the {place}, crossed the hills, and when the night came the {colour} {thing} was happy at last.",
        ),
        (
            f"How do I draw a {thing}?",
            f"Follow these steps. First, draw a large circle in the middle of the page. Second, add {number} short "
            f"lines that lead to the edge. Third, fill the circle with {colour}. Fourth, write the word {thing} "
            f"below it. Last, show the drawing to a friend and ask what it is.",
        ),
        (
            f"What do a {thing} and a {place} have in common?",
            f"At first sight a {thing} and a {place} are very different. Both are words of {len(thing)} and "
            f"{len(place)} letters, both can be {colour}, and both can be found in a story. If you think of the "
            f"{other} as well, you will find {number} more things that they share.",
        ),
    ]
    followers = [
        ("Thank you!", "You are welcome. Let me know if there is anything else that I can do for you."),
        (
            f"And what about the {other}?",
            f"The {other} is another matter: it is {colour}, and it is {number} years old.",
        ),
        ("Say it in one sentence.", f"In short: the {thing}, the {place} and the {other} belong together."),
        ("List the words that you used.", f"The words are {thing}, {place}, {other} and {colour}."),
    ]
    return None, [random_.choice(openers), *random_.sample(followers, random_.randint(1, 4))]


TASKS: dict[str, tuple[Callable[[random.Random], tuple[Image.Image | None, Turns]], int]] = {
    "vqa": (vqa, 220),
    "boxes": (boxes, 130),
    "counting": (counting, 110),
    "textcaps": (textcaps, 90),
    "comparing": (comparing, 70),
    "reading": (reading, 60),
    "chat": (chat, 40),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="example:\n  python scripts/quickstart/data.py --folder quickstart",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="gets data.json and images/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    random_ = random.Random(arguments.seed)
    order = [task for task, (_, count) in TASKS.items() for _ in range(count)]
    random_.shuffle(order)
    records = []
    for row, task in enumerate(tqdm(order, desc="Drawing", unit="record")):
        image, turns = TASKS[task][0](random_)
        record: dict = {"id": f"{task}-{row}", "dataset": task}
        if image is not None:
            record["image"] = f"{task}/{row:04}.png"
            path = arguments.folder / "images" / record["image"]
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
        record["conversations"] = [
            {"from": role, "value": text} for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)
        ]
        records.append(record)
    write_json(arguments.folder / "data.json", records)
    print(f"{len(records)} records of {len(TASKS)} tasks: {arguments.folder / 'data.json'}")


if __name__ == "__main__":
    run(main)
