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

from tive.util.errors import run
from tive.util.files import write_json

COLOURS = {"red": "#d62828", "green": "#2e9e46", "blue": "#2854d6"}
COLOURS |= {"yellow": "#f4d020", "purple": "#8a3cbe", "orange": "#f0881e"}
SHAPES = ("circle", "square", "triangle", "diamond")
BACKGROUNDS = {"white": "#fafafa", "grey": "#b0b0b0", "black": "#181818"}
WORDS = "apple bread cloud dream eagle flame grape house light mango north ocean piano queen river stone".split()  # noqa: SIM905
NUMBERS = ("zero", "one", "two", "three", "four", "five")
SHORT_ANSWER = "Answer the question using a single word or phrase."

# An image, or None, and the turns, each a question and its answer. `make_record` puts `<image>` before the first.
Drawn = tuple[Image.Image | None, list[tuple[str, str]]]


@dataclass(frozen=True)
class Thing:
    """A shape on a canvas; `box` is (left, top, right, bottom) in pixels, of equal sides."""

    shape: str
    colour: str
    box: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def area(self) -> int:
        return (self.box[2] - self.box[0]) ** 2

    def draw(self, canvas: ImageDraw.ImageDraw) -> None:
        left, top, right, bottom = self.box
        middle, centre, colour = (left + right) // 2, (top + bottom) // 2, COLOURS[self.colour]
        if self.shape == "circle":
            canvas.ellipse(self.box, fill=colour)
        elif self.shape == "square":
            canvas.rectangle(self.box, fill=colour)
        elif self.shape == "triangle":
            canvas.polygon([(middle, top), (right, bottom), (left, bottom)], fill=colour)
        else:
            canvas.polygon([(middle, top), (right, centre), (middle, bottom), (left, centre)], fill=colour)


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
    image = Image.new("RGB", (width, height), BACKGROUNDS[background])
    for thing in things:
        thing.draw(ImageDraw.Draw(image))
    return image, things, background


def vqa(random_: random.Random) -> Drawn:
    image, (thing,), background = scene(random_, 1)
    asked = random_.choice(sorted(COLOURS))
    questions = [
        (f"What color is the {thing.shape}?", thing.colour),
        ("What shape is shown?", thing.shape),
        ("What color is the background?", background),
        (f"Is the {thing.shape} {asked}?", "yes" if thing.colour == asked else "no"),
    ]
    (first, answer), *others = random_.sample(questions, random_.randint(2, 4))
    return image, [(f"{first}\n{SHORT_ANSWER}", answer), *others]


def boxes(random_: random.Random) -> Drawn:
    image, things, _ = scene(random_, random_.randint(1, 2))
    thing = random_.choice(things)
    shares = [place / side for place, side in zip(thing.box, image.size * 2, strict=True)]
    place = "[" + ", ".join(f"{share:.2f}" for share in shares) + "]"
    if random_.random() < 0.5:
        question = f"Please provide the bounding box coordinate of the region this sentence describes: {thing.name}."
        return image, [(question, place)]
    return image, [(f"Please provide a short description for this region: {place}.", f"The {thing.name}.")]


def counting(random_: random.Random) -> Drawn:
    image, things, _ = scene(random_, random_.randint(1, 5))
    colour = random_.choice([random_.choice(things).colour, random_.choice(sorted(COLOURS))])
    count = sum(thing.colour == colour for thing in things)
    asked = f"How many shapes are there?\n{SHORT_ANSWER}"
    return image, [(asked, NUMBERS[len(things)]), (f"How many of them are {colour}?", NUMBERS[count])]


def comparing(random_: random.Random) -> Drawn:
    image, (first, second), _ = scene(random_, 2)
    larger, smaller = (first, second) if first.area > second.area else (second, first)
    side = "left" if smaller is first else "right"
    answer = (
        f"The {larger.name} is larger: it covers {larger.area / smaller.area:.1f} times the area of the "
        f"{smaller.name}, which stands on the {side}."
    )
    return image, [(f"Which is larger, the {first.name} or the {second.name}? Explain your answer.", answer)]


def textcaps(random_: random.Random) -> Drawn:
    image, things, background = scene(random_, random_.randint(1, 3))
    names = " and ".join(f"a {thing.name}" for thing in things)
    caption = random_.choice([f"There is {names} on {background}.", f"A {background} picture that shows {names}."])
    return image, [("Provide a one-sentence caption for the provided image.", caption)]


def reading(random_: random.Random) -> Drawn:
    word, colour = random_.choice(WORDS), random_.choice(sorted(COLOURS))
    image = Image.new("RGB", (132, 56), BACKGROUNDS["white"])
    place = (random_.randint(2, 20), random_.randint(2, 16))
    ImageDraw.Draw(image).text(place, word, fill=COLOURS[colour], font=ImageFont.load_default(size=30))
    asked = f"What word is written in the image?\n{SHORT_ANSWER}"
    return image, [(asked, word), ("Spell it.", f"{', '.join(word)}.")]


def chat(random_: random.Random) -> Drawn:
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
    matter = f"The {other} is another matter: it is {colour}, and it is {number} years old."
    followers = [
        ("Thank you!", "You are welcome. Let me know if there is anything else that I can do for you."),
        (f"And what about the {other}?", matter),
        ("Say it in one sentence.", f"In short: the {thing}, the {place} and the {other} belong together."),
        ("List the words that you used.", f"The words are {thing}, {place}, {other} and {colour}."),
    ]
    return None, [random_.choice(openers), *random_.sample(followers, random_.randint(1, 4))]


# Tasks and their records.
TASKS: dict[Callable[[random.Random], Drawn], int] = {vqa: 220, boxes: 130, counting: 110, textcaps: 90}
TASKS |= {comparing: 70, reading: 60, chat: 40}


def make_record(task: Callable[[random.Random], Drawn], row: int, random_: random.Random, images: Path) -> dict:
    """A record in LLaVA's format; its image is written below `images`."""
    image, turns = task(random_)
    name = task.__name__
    record: dict = {"id": f"{name}-{row}", "dataset": name}
    if image is not None:
        record["image"] = f"{name}/{row:04}.png"
        (images / name).mkdir(parents=True, exist_ok=True)
        image.save(images / record["image"])
        turns[0] = (f"<image>\n{turns[0][0]}", turns[0][1])
    pairs = [(("human", asked), ("gpt", answered)) for asked, answered in turns]
    record["conversations"] = [{"from": role, "value": text} for pair in pairs for role, text in pair]
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="gets data.json and images/")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    random_ = random.Random(arguments.seed)
    order = [task for task, count in TASKS.items() for _ in range(count)]
    random_.shuffle(order)
    records = [make_record(task, row, random_, arguments.folder / "images") for row, task in enumerate(order)]
    write_json(arguments.folder / "data.json", records)
    print(f"{len(records)} records of {len(TASKS)} tasks: {arguments.folder / 'data.json'}")


if __name__ == "__main__":
    run(main)
