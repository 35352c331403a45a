"""Say what a training run will be trained on and where it goes, or what is missing, before anything is loaded.

`finetune_lora.sh` and `finetune.sh` call it with the arguments that LLaVA's trainer gets. A machine without the data's
images or the base model learns so in seconds, not after the model is loaded or at the first missing image.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from pathlib import Path
from typing import Any

from tive.data.media import media_of
from tive.data.records import name_of, open_records, problem_of
from tive.data.stream import is_json_lines
from tive.util.errors import UserError, run

# What LLaVA leaves in the folder of a run that has ended.
TRAINED = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
TRAINED_IN_SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_arguments() -> argparse.Namespace:
    """The few of LLaVA's arguments that are looked at; of a repeated argument the last one counts, as for LLaVA."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    for name in ("data_path", "output_dir", "model_name_or_path"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("image_folder", "vision_tower", "pretrain_mm_mlp_adapter"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--lora_enable", default="False")
    arguments, _ = parser.parse_known_args()
    return arguments


def training_problem_of(record: Any) -> str | None:
    """What keeps LLaVA's trainer from taking a record, in a few words and with the remedy; None when nothing does."""
    problem = problem_of(record)
    if problem:
        return f"{problem}; repair or remove it"
    if media_of(record).images and not isinstance(record.get("image"), str):
        return (
            "has its image in a list or under `images`, which LLaVA's trainer does not take; convert it with "
            "scripts/convert_data.py --to llava"
        )
    if not any(turn["value"].split() for turn in record["conversations"]):
        return "has no text in any turn, and LLaVA's sampler stops at it; remove it"
    return None


def check_records(path: str) -> tuple[int, set[str], int]:
    """The number of records, the images they name, and the number of records with an image."""
    if is_json_lines(path):
        raise UserError(
            f"{path} is JSON Lines, and LLaVA's trainer takes a JSON list; convert it with scripts/convert_data.py"
        )
    images: list[str] = []

    def visit(row: int, record: Any) -> None:
        problem = training_problem_of(record)
        if problem:
            raise UserError(f"{name_of(path, row, record)} {problem}")
        if "image" in record:
            images.append(record["image"])

    return len(open_records(path, visit)), set(images), len(images)


def check_images(folder: str | None, images: set[str], data_path: str) -> None:
    """Every image is in its folder. Folders are listed, which costs less than asking for each of 600K files."""
    if not images:
        return
    if not folder or not os.path.isdir(folder):
        raise UserError(
            f"{data_path} names {len(images):,} images, and the folder {folder} is not there; set IMAGE_FOLDER"
        )
    names_below: dict[str, set[str]] = defaultdict(set)
    for image in images:
        below, name = os.path.split(image)
        names_below[below].add(name)
    missing: list[str] = []
    for below, names in names_below.items():
        try:
            present = set(os.listdir(os.path.join(folder, below)))
        except OSError:
            present = set()
        missing += [os.path.join(below, name) for name in names - present]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing):,} of {len(images):,} images, {min(missing)} for one; "
            "put them there, name another IMAGE_FOLDER, or remove their records"
        )


def check_model(name: str, what: str, variable: str) -> str:
    """Where a model comes from: a folder with a config.json, or the hub, which is asked whether it has it."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{what}: the folder {name} holds no config.json; name a model's folder with {variable}")
        return f"{name} (folder)"
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise UserError(f"{what}: {name} is not there; set {variable} to a folder or to a name on huggingface.co")
    from huggingface_hub import HfApi, try_to_load_from_cache
    from huggingface_hub.utils import RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return f"{name} (downloaded before)"
    try:
        HfApi().model_info(name, timeout=10)
    except (OSError, ValueError) as error:
        reason = "there is none to read" if isinstance(error, RepositoryNotFoundError) else "it cannot be reached"
        raise UserError(
            f"{what}: {name} is neither a folder here nor downloaded nor at huggingface.co ({reason}); "
            f"set {variable} to a folder"
        ) from error
    return f"{name} (to be downloaded from huggingface.co)"


def check_output(folder: str) -> str:
    """Where the model goes; a trained model that is there already is not overwritten."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; set OUTPUT_DIR to a folder")
    for name in (*TRAINED, *TRAINED_IN_SHARDS):
        if (path / name).exists():
            raise UserError(
                f"{path} already holds a trained model ({name}); set another OUTPUT_DIR, or remove this one"
            )
    checkpoints = [entry for entry in path.glob("checkpoint-*") if entry.name.split("-")[-1].isdigit()]
    if not checkpoints:
        return f"{path}"
    last = max(checkpoints, key=lambda entry: int(entry.name.split("-")[-1]))
    if not (last / "trainer_state.json").exists():
        raise UserError(f"{last} is incomplete, and training would go on from it; remove it")
    return f"{path}, going on from {last.name}"


def main() -> None:
    arguments = read_arguments()
    output = check_output(arguments.output_dir)
    records, images, with_image = check_records(arguments.data_path)
    check_images(arguments.image_folder, images, arguments.data_path)
    projector = arguments.pretrain_mm_mlp_adapter
    if projector and not os.path.isfile(projector):
        raise UserError(
            f"projector: {projector} is not there; set PROJECTOR to LLaVA's mm_projector.bin (README, step 2)"
        )
    base = check_model(arguments.model_name_or_path, "base model", "MODEL")
    tower = arguments.vision_tower
    vision = check_model(tower, "vision tower", "VISION_TOWER") if tower else "none"

    print(f"data          {arguments.data_path}: {records:,} records, {with_image:,} with an image")
    print(
        f"images        {arguments.image_folder}: {len(images):,} files, all there" if images else "images        none"
    )
    print(f"base model    {base}")
    print(f"vision tower  {vision}")
    print(f"projector     {projector or 'untrained'}")
    print(
        f"trains        {'a LoRA adapter and the projector' if arguments.lora_enable == 'True' else 'the whole model'}"
    )
    print(f"goes to       {output}")


if __name__ == "__main__":
    run(main)
