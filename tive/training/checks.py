"""What a training run will be trained on and where it goes, or what is missing, before anything is loaded.

`finetune_lora.sh` and `finetune.sh` call it with the arguments that LLaVA's trainer gets. LLaVA takes any word for a
setting and computes something: an unknown template is `vicuna_v1`, an unknown aspect ratio `square`. Here every setting
that decides whether the gradient step can follow is one of a list. No library is imported, so the answer comes at once.
"""

from __future__ import annotations

import argparse
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

from tive.data.media import images_in
from tive.data.problems import refuse_bad_records
from tive.data.records import JsonRecords, open_records
from tive.data.scan import check_chunk, scan_records
from tive.data.trained import problem_of
from tive.models.training_record import ASPECT_RATIOS, TEMPLATES, check_llava, lacks_tokenizer, model_folder
from tive.util.errors import UserError, run
from tive.util.files import check_writable, read_object
from tive.util.text import command, shown

PRETRAINED_PROJECTOR = "./checkpoints/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5/mm_projector.bin"
# What LLaVA leaves in the folder of a run that has ended.
TRAINED: tuple[str, ...] = ("adapter_model.safetensors", "adapter_model.bin", "model.safetensors", "pytorch_model.bin")
TRAINED += ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# Names of --version that LLaVA's trainer knows and that are of use to whole models alone.
_OTHER_TEMPLATES = ("v0", "v0.5", "default", "plain", "v0_plain", "mpt", "chatml_direct", "mistral_direct")
# With these the system's words go before the first question, which must not be empty.
_LLAMA_2 = ("llama_2", "llava_llama_2", "mistral_instruct")
_SWITCHES = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)

_COUNTS = ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length")
_NEEDED = ("data_path", "output_dir", "model_name_or_path")
_ANY: tuple[Any, ...] = (None, None, None, "")
_NO_TOKENS = "LLaVA-1.5's projector has no such tokens"
# The arguments of LLaVA's trainer that are looked at: LLaVA's default, of a switch True or False; the values that are
# taken, as a pattern, of the whole model and of a LoRA (None for any); why no other is.
_SETTINGS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((*_NEEDED, "image_folder", "cache_dir", "vision_tower", "pretrain_mm_mlp_adapter"), _ANY),
    "lora_enable": (False, None, None, ""),
    "version": (
        "v0",
        "|".join((*TEMPLATES, *_OTHER_TEMPLATES)),
        "|".join(TEMPLATES),
        "LLaVA's trainer takes vicuna_v1 for an unknown template, and a reference model can have no other",
    ),
    "image_aspect_ratio": ("square", *["|".join(ASPECT_RATIOS)] * 2, "LLaVA 1.5 trains every other word as square"),
    "mm_patch_merge_type": ("flat", "flat", "flat", "the others are for images of several tiles"),
    "mm_projector_type": ("linear", *[r"linear|mlp[1-9]\d*x_gelu"] * 2, "LLaVA-1.5's is mlp2x_gelu"),
    "mm_vision_select_layer": ("-1", None, None, ""),
    "mm_vision_select_feature": ("patch", *["patch|cls_patch"] * 2, "LLaVA knows no other"),
    "mm_use_im_start_end": (False, "False", "False", _NO_TOKENS),
    "mm_use_im_patch_token": (True, "False", "False", _NO_TOKENS),
    "bits": ("16", "16", "16", "the gradient step reads the base as it is, not quantized"),
    "lora_bias": ("none", None, "none", "biases beside the adapter are not supported"),
    "tune_mm_mlp_adapter": (False, None, "False", "it freezes the adapter; the projector is trained with it anyway"),
    "freeze_mm_mlp_adapter": (
        False,
        None,
        "False",
        "no projector would be saved; --mm_projector_lr 0 keeps it as it is",
    ),
    "fsdp": ("", None, "", "LLaVA saves only a part of the adapter under FSDP"),
}


def read_settings(arguments: list[str] | None = None) -> argparse.Namespace:
    """The settings that are looked at, each of its list; of a repeated argument the last one counts, as for LLaVA."""
    parser = argparse.ArgumentParser(prog="tive.training", allow_abbrev=False, add_help=False)
    for name, (default, *_) in _SETTINGS.items():
        parser.add_argument(f"--{name}", nargs="?", const="True", default=default, required=name in _NEEDED)
    for name in _COUNTS:
        parser.add_argument(f"--{name}", default="1")
    settings, _ = parser.parse_known_args(arguments)
    for name in _COUNTS:
        if not re.fullmatch(r"0*[1-9]\d*", getattr(settings, name)):
            raise UserError(f"--{name} {getattr(settings, name)} is no whole number from 1 up")
    for name, (default, taken, taken_for_lora, why) in _SETTINGS.items():
        value = getattr(settings, name)
        if isinstance(default, bool):  # what transformers' parser makes of a switch
            if str(value).lower() not in _SWITCHES:
                raise UserError(f"--{name} {value} is neither True nor False")
            value = _SWITCHES[str(value).lower()]
            setattr(settings, name, value)
        pattern = taken_for_lora if settings.lora_enable else taken
        if pattern is not None and not re.fullmatch(pattern, str(value)):
            remedy = f"write --{name} {pattern.replace('|', ' or ')}" if pattern else f"leave --{name} out"
            raise UserError(f"--{name} {value}: {why}; {remedy}")
    return settings


def model_config(name: str, what: str, variable: str, cache_dir: str | None = None) -> dict[str, Any]:
    """A model's config.json, of a folder or of the hub, which is asked for the file.

    Args:
        what, variable: the model's part in the training, and the variable that sets it, for messages.
    """
    folder = model_folder(name, cache_dir)
    if folder is None:
        from huggingface_hub import hf_hub_download

        try:
            folder = Path(hf_hub_download(name, "config.json", cache_dir=cache_dir)).parent
        except (OSError, ValueError) as error:
            raise UserError(
                f"{what}: {name} is no folder, and no model that can be had from huggingface.co; set {variable}"
            ) from error
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{what}: {name} is a LoRA adapter, not a whole model; merge it into its base with LLaVA's "
            f"merge_lora_weights.py, and set {variable} to the result"
        )
    return read_object(folder / "config.json")


def base_config(settings: argparse.Namespace) -> dict[str, Any]:
    """The config.json of the base, which is whole and not quantized.

    A base that is a LLaVA model keeps its tower and projector: arguments that say something else are refused.
    """
    name = settings.model_name_or_path
    base = model_config(name, "base model", "MODEL", settings.cache_dir)
    lacking = lacks_tokenizer(Path(name)) if os.path.isdir(name) else None  # a hub's model is there in part at most
    if lacking:
        raise UserError(f"base model: {lacking}")
    if base.get("quantization_config"):
        raise UserError(f"{name} is quantized; name the base that it was made from")
    if has_projector(base):
        tower, given = str(base["mm_vision_tower"]), settings.vision_tower
        if not given or (tower != given and os.path.realpath(tower) != os.path.realpath(given)):
            raise UserError(f"{name} is a LLaVA model, whose vision tower is trained with; set VISION_TOWER={tower}")
        for key in ("mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"):
            if key in base and str(base[key]) != getattr(settings, key):
                raise UserError(f"{name} is a LLaVA model with {key} {base[key]}; add --{key} {base[key]}")
    return base


def has_projector(base: dict[str, Any]) -> bool:
    """Whether a base is a LLaVA model, which brings a projector."""
    return "mm_vision_tower" in base


def projector_of(settings: argparse.Namespace, base: dict[str, Any]) -> str | None:
    """The file that the projector starts from; None where it starts as the base has it, or at random without one."""
    named, own = settings.pretrain_mm_mlp_adapter, has_projector(base)
    if named == "auto":
        named = None if own else PRETRAINED_PROJECTOR
    if (named == "" and not own) or (named and not os.path.isfile(named)):
        problem = f"{named} is not there" if named else "the base has none of its own"
        raise UserError(f"projector: {problem}; set PROJECTOR to LLaVA's mm_projector.bin (docs/training.md)")
    return named or None


def training_problem(record: Any, template: str = "v1") -> str | None:
    """What keeps LLaVA's trainer from taking a record, in a few words and with the remedy; None when nothing does."""
    problem = problem_of(record)
    if problem:
        return problem
    images = images_in(record)
    if images and not isinstance(record.get("image"), str):
        return (
            "has its image in a list or under `images`, which LLaVA's trainer does not take; convert it with "
            "scripts/convert_data.py --to llava"
        )
    if "image" in record and not images:
        return "has an empty `image`, which LLaVA's trainer would open; remove the key"
    turns = record["conversations"]
    if not any(turn["value"].split() for turn in turns):
        return "has no text in any turn, and LLaVA's sampler stops at it; remove it"
    if template in _LLAMA_2 and not turns[turns[0]["from"] == "gpt"]["value"]:
        return f"begins with an empty question, which the template {template} does not take; remove it"
    return None


def check_data(path: str, image_folder: str | None, template: str, listing: Path) -> list[str]:
    """Read the whole file and look for every image; what is to be said of it, one line each.

    A `UserError` where the file is not one that LLaVA reads, or records cannot be trained on, which `listing` names.
    """
    records = open_records(path)
    if not isinstance(records, JsonRecords) or records.is_lines:
        source = Path(path)
        options = {"source_path": path, "target_path": str(source.with_suffix(".json"))}
        if not isinstance(records, JsonRecords):
            options |= {"to": "llava", "image_folder": str(source.with_name(f"{source.stem}_images"))}
        convert = command("scripts/convert_data.py", **options)
        raise UserError(f"{path} is no JSON list, which LLaVA's trainer takes; convert it with {convert}")
    scan = scan_records(records, partial(training_problem, template=template))
    images = {row: paths[0] for row, paths in enumerate(scan.images) if paths}
    if images and not (image_folder and os.path.exists(image_folder)):  # a file in its place is told below
        raise UserError(
            f"{path} names {len(images):,} images, and the folder {image_folder} is not there; set IMAGE_FOLDER"
        )
    checked = check_chunk(scan, range(len(records)), image_folder or "")
    problems = dict(scan.problems)
    for row, image in images.items():
        names = f"names {shown(image, 80)} below {image_folder}"
        if row in checked.reasons:
            problems[row] = f"{names}: {checked.reasons[row]}"
        elif row in checked.renamed:  # step 3 takes it, the trainer opens a path and nothing else
            stand_in = shown(os.path.basename(checked.renamed[row]), 80)
            problems[row] = f"{names}, and the file is {stand_in}; rename one of them"
    refuse_bad_records(records, problems, listing)
    notes = [f"              {note}" for note in checked.notes]
    if scan.unanswered:
        notes.append(
            f"              {len(scan.unanswered):,} end with the user's turn: LLaVA's trainer may learn nothing from "
            f"them (the first: record {scan.unanswered[0]})"
        )
    return [
        f"data          {path}: {len(records):,} records, {len(images):,} with an image",
        *notes,
        f"images        {f'{image_folder}: {len(set(images.values())):,} files, all there' if images else 'none'}",
    ]


def check_output(folder: str) -> str:
    """Where the model goes; a trained model that is there already is not overwritten."""
    path = Path(folder)
    there = [name for name in TRAINED if (path / name).exists()]
    if there or path.is_file():
        what = f"already holds a trained model ({there[0]})" if there else "is a file"
        raise UserError(f"{path} {what}; set another OUTPUT_DIR, or remove this one")
    check_writable(path)
    checkpoints = [entry for entry in path.glob("checkpoint-*") if entry.name.split("-")[-1].isdigit()]
    if not checkpoints:
        return f"{path}"
    last = max(checkpoints, key=lambda entry: int(entry.name.split("-")[-1]))
    if not (last / "trainer_state.json").exists():
        raise UserError(f"{last} is incomplete, and training would go on from it; remove it")
    return f"{path}, going on from {last.name}"


def main() -> None:
    settings = read_settings()
    llava, version = check_llava()
    output = check_output(settings.output_dir)
    listing = Path(f"{os.path.normpath(settings.output_dir)}_bad_records.json")
    data = check_data(settings.data_path, settings.image_folder, settings.version, listing)
    base = base_config(settings)
    projector = projector_of(settings, base)
    if has_projector(base):
        projector = f"{projector}, in place of the one in the base" if projector else "the base's own"
    if settings.vision_tower:
        model_config(settings.vision_tower, "vision tower", "VISION_TOWER")

    print(*data, sep="\n")
    print(f"base model    {settings.model_name_or_path}")
    print(f"vision tower  {settings.vision_tower or 'none'}")
    print(f"projector     {projector or 'untrained'}")
    print(f"trains        {'a LoRA adapter and the projector' if settings.lora_enable else 'the whole model'}")
    print(f"template      {settings.version}, images {settings.image_aspect_ratio}")
    print(f"LLaVA         {version} ({llava})")
    print(f"goes to       {output}")


if __name__ == "__main__":
    run(main)
