"""Made-up packages in the places and forms of those that the second experiment's mixture is read from."""

from __future__ import annotations

import gzip
import importlib.util
import shutil
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from tive.util.files import write_json

NAMES = [f"{first}{second}" for first in "abcdefgh" for second in "ijklmnop"]


def write_packages(folder: Path) -> None:
    """64 emoji, icons and countries, digits, and a table of ten countries in two years."""
    pictures = folder / "emoji-datasource-twitter" / "img" / "twitter" / "64"
    pictures.mkdir(parents=True)
    emoji, numbers = [], np.random.default_rng(0)
    for number, name in enumerate(NAMES):
        pixels = numbers.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(pictures / f"{0x1F600 + number:x}.png")
        groups = {"group": 3 + number % 3, "subgroup": number % 2}
        emoji.append({"hexcode": f"{0x1F600 + number:X}", "label": f"{name} thing", "tags": [name, "thing"], **groups})
    write_json(folder / "emojibase-data" / "en" / "data.json", emoji)
    messages = {"groups": [3, 4, 5], "subgroups": [0, 1]}
    named = {
        key: [{"order": place, "message": f"{key} {place}"} for place in places] for key, places in messages.items()
    }
    write_json(folder / "emojibase-data" / "en" / "messages.json", named)

    spec = importlib.util.find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    (folder / "lucide-static" / "font").mkdir(parents=True)
    font = Path(spec.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
    shutil.copy(font, folder / "lucide-static" / "font" / "lucide.ttf")
    places = {f"{name}-icon": {"encodedCode": f"\\{0x41 + number:x}"} for number, name in enumerate(NAMES)}
    write_json(folder / "lucide-static" / "font" / "info.json", places)
    write_json(folder / "lucide-static" / "tags.json", {name: [name, "one", "two", "three"] for name in places})

    rows = [{"year": year, "country": f"Land {n}", "fertility": 1 + n / 2} for year in (1955, 2005) for n in range(10)]
    write_json(folder / "vega-datasets" / "data" / "gapminder.json", rows)
    countries = []
    for number, name in enumerate(NAMES[:40]):
        names = {"common": f"Land {name}", "official": f"Republic of Land {name}"}
        place = {"capital": [f"Town {name}"], "subregion": "Middle", "cca3": name, "borders": NAMES[: number % 3]}
        countries.append({"name": names, "area": 1000 * number, "languages": {"x": "Xish"}, **place})
    write_json(folder / "world-countries" / "countries.json", countries)
    lines = [",".join(map(str, [*numbers.integers(0, 17, 64), number % 10])) for number in range(60)]
    with zipfile.ZipFile(folder / "scikit_learn-0.whl", "w") as wheel:
        wheel.writestr("sklearn/datasets/data/digits.csv.gz", gzip.compress("\n".join(lines).encode()))
