"""Say what a training run will be trained on and where it goes, or what is missing, before anything is loaded.

`finetune_lora.sh` and `finetune.sh` call it with the arguments that LLaVA's trainer gets. A machine without the data's
images or the base model learns so in seconds, not after the model is loaded or at the first missing image.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from tive.data.media import media_of
from tive.data.problems import problem_of, refuse_bad_records
from tive.data.records import JsonRecords, open_records
from tive.data.scan import check_chunk, scan_records
from tive.training.settings import (
    base_config,
    check_settings,
    has_projector,
    model_config,
    projector_of,
    read_settings,
)
from tive.util.errors import UserError, run
from tive.util.packages import check_llava
from tive.util.text import command, shown

# What LLaVA leaves in the folder of a run that has ended.
TRAINED: tuple[str, ...] = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
TRAINED += ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# With these the system's words go before the first question, which must not be empty.
_LLAMA_2 = ("llama_2", "llava_llama_2", "mistral_instruct")
_LONGEST_NAME = 80


def training_problem(record: Any, template: str = "v1") -> str | None:
    """What keeps LLaVA's trainer from taking a record, in a few words and with the remedy; None when nothing does."""
    problem = problem_of(record)
    if problem:
        return problem
    media = media_of(record)
    if media.images and not isinstance(record.get("image"), str):
        return (
            "has its image in a list or under `images`, which LLaVA's trainer does not take; convert it with "
            "scripts/convert_data.py --to llava"
        )
    if "image" in record and not media.images:
        return "has an empty `image`, which LLaVA's trainer would open; remove the key"
    turns = record["conversations"]
    if not any(turn["value"].split() for turn in turns):
        return "has no text in any turn, and LLaVA's sampler stops at it; remove it"
    if template in _LLAMA_2 and not turns[turns[0]["from"] == "gpt"]["value"]:
        return f"begins with an empty question, which the template {template} does not take; remove it"
    return None


def check_data(path: str, image_folder: str | None, template: str, listing: Path) -> list[str]:
    """Read the whole file and look for every image; what is to be said of it, one line each.

    Args:
        listing: where the records that cannot be trained on are listed; one of an earlier call is removed.

    Raises:
        UserError: the file is not one that LLaVA reads, or records cannot be trained on: counts and the first ten are
            printed.
    """
    records = open_records(path)
    if records.is_lines or not isinstance(records, JsonRecords):
        source = Path(path)
        options: dict[str, str | Path] = {"source_path": source, "target_path": source.with_suffix(".json")}
        if not isinstance(records, JsonRecords):
            options |= {"to": "llava", "image_folder": source.with_name(f"{source.stem}_images")}
        raise UserError(
            f"{path} is no JSON list, which LLaVA's trainer takes; convert it with "
            + command("scripts/convert_data.py", **options)
        )
    scan = scan_records(records, partial(training_problem, template=template))
    images = {row: paths[0] for row, paths in enumerate(scan.images) if paths}
    if images and not (image_folder and os.path.isdir(image_folder)):
        raise UserError(
            f"{path} names {len(images):,} images, and the folder {image_folder} is not there; set IMAGE_FOLDER"
        )
    checked = check_chunk(scan, range(len(records)), image_folder or "")
    problems = dict(scan.problems)
    for row, image in images.items():
        names = f"names {shown(image, _LONGEST_NAME)} below {image_folder}"
        if row in checked.reasons:
            problems[row] = f"{names}: {checked.reasons[row]}"
        elif row in checked.renamed:  # step 3 takes it, the trainer opens a path and nothing else
            stand_in = shown(os.path.basename(checked.renamed[row]), _LONGEST_NAME)
            problems[row] = f"{names}, and the file is {stand_in}; rename one of them"
    refuse_bad_records(records, problems, listing)
    notes = list(checked.notes)
    if scan.unanswered:
        notes.append(
            f"{len(scan.unanswered):,} end with the user's turn: LLaVA's trainer may learn nothing from them (the "
            f"first: record {scan.unanswered[0]})"
        )
    return [
        f"data          {path}: {len(records):,} records, {len(images):,} with an image",
        *(f"              {note}" for note in notes),
        f"images        {f'{image_folder}: {len(set(images.values())):,} files, all there' if images else 'none'}",
    ]


def check_output(folder: str) -> str:
    """Where the model goes; a trained model that is there already is not overwritten."""
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; set OUTPUT_DIR to a folder")
    for name in TRAINED:
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
    settings = read_settings()
    check_settings(settings)
    llava, version = check_llava()
    output = check_output(settings.output_dir)
    listing = Path(f"{os.path.normpath(settings.output_dir)}_bad_records.json")
    data = check_data(settings.data_path, settings.image_folder, settings.version, listing)
    base, source = base_config(settings)
    projector = projector_of(settings, base)
    if has_projector(base):
        projector = f"{projector}, in place of the one in the base" if projector else "the base's own"
    tower = settings.vision_tower
    tower = f"{tower} ({model_config(tower, 'vision tower', 'VISION_TOWER')[1]})" if tower else "none"

    print(*data, sep="\n")
    print(f"base model    {settings.model_name_or_path} ({source})")
    print(f"vision tower  {tower}")
    print(f"projector     {projector or 'untrained'}")
    print(f"trains        {'a LoRA adapter and the projector' if settings.lora_enable else 'the whole model'}")
    print(f"template      {settings.version}, images {settings.image_aspect_ratio}")
    print(f"LLaVA         {version} ({llava})")
    print(f"goes to       {output}")


if __name__ == "__main__":
    run(main)
