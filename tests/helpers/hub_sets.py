"""Small data sets with exactly the columns that three large ones have on the hub, made up and written by `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image as Pictures

RATINGS = ("relevance", "visual_dependency", "image_correspondence", "formatting")


def picture(number: int) -> Pictures.Image:
    return Pictures.fromarray(np.random.default_rng(number).integers(0, 255, (56, 56, 3), dtype=np.uint8))


def asked(number: int) -> dict[str, str]:
    return {"user": f"What is number {number}?", "assistant": f"Noise, and the number {number % 7}."}


def _write(path: Path, columns: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset, Features

    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=Features(columns)).to_parquet(path)


def fine_vision(folder: Path) -> None:
    """HuggingFaceM4/FineVision: a folder a subset, several images a record, ratings of its turns."""
    from datasets import Image, List, Value

    columns: dict[str, Any] = {
        "images": List(Image()),
        "texts": List({"user": Value("string"), "assistant": Value("string")}),
        "source": Value("string"),
    }
    for rating in RATINGS:
        columns |= {f"{rating}_ratings": List(Value("int64")), f"{rating}_min": Value("int64")}
    for number, subset in enumerate(("ai2d_merged", "text_openhermes", "vqav2")):
        rows = [
            {"images": [picture(row)] * (subset != "text_openhermes"), "texts": [asked(row), asked(row + 1)]}
            | {"source": subset}
            | {f"{rating}_ratings": [5, 4] for rating in RATINGS}
            | {f"{rating}_min": 4 for rating in RATINGS}
            for row in range(20 * number, 20 * number + 20)
        ]
        _write(folder / subset / "train-00000-of-00001.parquet", columns, rows)


def cauldron(folder: Path) -> None:
    """HuggingFaceM4/the_cauldron: a folder a subset, the source beside each question."""
    from datasets import Image, List, Value

    text = {"user": Value("string"), "assistant": Value("string"), "source": Value("string")}
    for number, subset in enumerate(("chart2text", "clevr")):
        rows = [
            {"images": [picture(row)], "texts": [asked(row) | {"source": subset}]}
            for row in range(20 * number, 20 * number + 20)
        ]
        _write(folder / subset / "train-00000-of-00001.parquet", {"images": List(Image()), "texts": List(text)}, rows)


def one_vision(folder: Path) -> None:
    """lmms-lab/LLaVA-OneVision-Data: LLaVA's turns, one image or none."""
    from datasets import Image, List, Value

    turn = {"from": Value("string"), "value": Value("string")}
    columns = {"id": Value("string"), "image": Image(), "conversations": List(turn), "data_source": Value("string")}
    for number, subset in enumerate(("CLEVR-Math(MathV360K)", "magpie_pro(l3_80b_st)")):
        rows = [
            {
                "id": f"{subset}_{row}",
                "image": None if number else picture(row),
                "conversations": [
                    {"from": "human", "value": ("" if number else "<image>\n") + asked(row)["user"]},
                    {"from": "gpt", "value": asked(row)["assistant"]},
                ],
                "data_source": subset,
            }
            for row in range(20 * number, 20 * number + 20)
        ]
        _write(folder / subset / "train-00000-of-00001.parquet", columns, rows)
