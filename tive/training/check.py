"""Say what a training run will be trained on and where it goes, or what is missing, before anything is loaded.

`finetune_lora.sh` and `finetune.sh` call it with the arguments that LLaVA's trainer gets. A machine without the data's
images or the base model learns so in seconds, not after the model is loaded or at the first missing image.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from tive.training.data_check import check_data
from tive.training.settings import (
    LLAVA_DISTRIBUTIONS,
    LLAVA_VERSION,
    base_config,
    check_base,
    check_settings,
    has_projector,
    projector_of,
    read_settings,
)
from tive.util.errors import UserError, run
from tive.util.packages import package_in_use

# What LLaVA leaves in the folder of a run that has ended.
TRAINED = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
TRAINED_IN_SHARDS = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def check_llava() -> str:
    """Which LLaVA the training uses: the one that is installed, of a version that this project knows."""
    found = package_in_use("llava", LLAVA_DISTRIBUTIONS)
    if found is None:
        raise UserError(f"{sys.executable} has no llava; run `bash scripts/setup.sh`")
    folder, version = found
    if version is None or not version.startswith(f"{LLAVA_VERSION}."):
        raise UserError(
            f"llava is {folder}, {f'version {version}' if version else 'which no pip installed'}; this project needs "
            f"LLaVA {LLAVA_VERSION} (`bash scripts/setup.sh` installs it)"
        )
    return f"{version} ({folder})"


def check_model(name: str, what: str, variable: str) -> str:
    """Where a model comes from: a folder with a config.json, or the hub, which is asked whether it has it."""
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise UserError(f"{what}: the folder {name} holds no config.json; name a model's folder with {variable}")
        if os.path.isfile(os.path.join(name, "adapter_config.json")):
            raise UserError(
                f"{what}: {name} is a LoRA adapter, not a whole model; merge it into its base with LLaVA's "
                f"merge_lora_weights.py, and set {variable} to the result"
            )
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


def check_projector_file(settings: argparse.Namespace, base: dict[str, Any]) -> str:
    """Where the projector's weights come from."""
    path = projector_of(settings, base)
    if path is not None and not os.path.isfile(path):
        raise UserError(f"projector: {path} is not there; set PROJECTOR to LLaVA's mm_projector.bin (docs/training.md)")
    if has_projector(base):
        return f"{path}, in place of the one in the base" if path else "the base's own"
    return path or "untrained"


def main() -> None:
    settings = read_settings()
    check_settings(settings)
    llava = check_llava()
    output = check_output(settings.output_dir)
    listing = Path(f"{os.path.normpath(settings.output_dir)}_bad_records.json")
    data = check_data(settings.data_path, settings.image_folder, settings.version, listing)
    base = check_model(settings.model_name_or_path, "base model", "MODEL")
    config = base_config(settings)
    check_base(settings, config)
    projector = check_projector_file(settings, config)
    tower = settings.vision_tower
    vision = check_model(tower, "vision tower", "VISION_TOWER") if tower else "none"

    print(f"data          {settings.data_path}: {data.records:,} records, {data.with_image:,} with an image")
    if data.tags_alone:
        print(f"              {data.tags_alone:,} have <image> in their text and no image: it is trained on as text")
    if data.unanswered:
        print(
            f"              {data.unanswered:,} end with the user's turn: LLaVA's trainer may learn nothing from them"
        )
    print(f"images        {f'{settings.image_folder}: {data.images:,} files, all there' if data.images else 'none'}")
    print(f"base model    {base}")
    print(f"vision tower  {vision}")
    print(f"projector     {projector}")
    print(f"trains        {'a LoRA adapter and the projector' if settings.lora_enable else 'the whole model'}")
    print(f"template      {settings.version}, images {settings.image_aspect_ratio}")
    print(f"LLaVA         {llava}")
    print(f"goes to       {output}")


if __name__ == "__main__":
    run(main)
