#!/usr/bin/env python
"""Make the native quickstart's model: a Qwen2.5-VL as it comes from the hub, but small and random.

Tokenizer, image processor and chat template are those of the tests' golden Qwen2.5-VL: the library's own classes and
the public template, with a small byte-level vocabulary. Every call gives the same files.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
from pathlib import Path

import torch

from tive.models.common import prepare_torchvision
from tive.util.errors import run

GOLDEN = Path(__file__).resolve().parents[2] / "tests" / "golden" / "native" / "qwen2_5_vl" / "base"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model goes")
    folder = parser.parse_args().folder

    prepare_torchvision()  # before transformers is imported
    library = importlib.import_module("transformers")
    torch.manual_seed(0)
    config = library.AutoConfig.from_pretrained(GOLDEN, trust_remote_code=False)
    model = library.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    # Built beside its place, so that a model that is there is a whole one.
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(GOLDEN, unfinished, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    model.save_pretrained(unfinished)
    os.replace(unfinished, folder)
    print(f"{folder}: Qwen2.5-VL with {model.num_parameters():,} random parameters")


if __name__ == "__main__":
    run(main)
