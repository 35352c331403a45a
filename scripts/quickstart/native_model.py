#!/usr/bin/env python
"""Make the native quickstart's model: a Qwen2.5-VL as it comes from the hub, but small and random.

Tokenizer, image processor and chat template are those of the tests' golden Qwen2.5-VL: the library's own classes and
the public template, with a small byte-level vocabulary. The same seed gives the same files.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

# Before transformers: it makes torchvision importable.
from tive.models.native import load_processor  # noqa: F401  # isort: skip
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from tive.util.errors import run

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "native" / "qwen2_5_vl" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model goes; made new")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.manual_seed(arguments.seed)
    config = AutoConfig.from_pretrained(GOLDEN, trust_remote_code=False)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # Built beside its place, so that a model that is there is a whole one.
    unfinished = arguments.folder.with_name(arguments.folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    for file in GOLDEN.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            shutil.copy(file, unfinished)
    model.save_pretrained(unfinished)
    os.replace(unfinished, arguments.folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{arguments.folder}: Qwen2.5-VL with {parameters:,} random parameters")


if __name__ == "__main__":
    run(main)
