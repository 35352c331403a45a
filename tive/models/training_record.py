"""What a training used, written beside the model: the file between the training (steps 2 and 5) and the gradient step.

Trainers leave a model without a word about the template it was trained with, and at most the name of its base.
`finetune_lora.sh`, `finetune.sh` and `scripts/train_trl.py` write `tive_training.json` into the output folder and into
each checkpoint. Step 3 computes what stands there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

import msgspec

from tive.util.errors import UserError
from tive.util.files import read_object, sha256_of, write_json
from tive.util.text import of_project

RECORD_FILE = "tive_training.json"
# What LLaVA's trainer (llava-torch 1.2.2) trains a LLaMA model with and the gradient step computes the same way. Its
# other names: `v0` adds a token, `plain` is for projectors alone, those of MPT mask every answer of a LLaMA tokenizer.
TEMPLATES = (
    *("v1", "vicuna_v1", "llava_v1", "v1_mmtag", "llava_v0", "v0_mmtag"),
    *("llama_2", "llava_llama_2", "mistral_instruct"),
)
# Every other word is computed as `square` by LLaVA 1.5, whatever it says.
ASPECT_RATIOS = ("pad", "square")
_CONFIG_KEYS_WITHOUT_EFFECT = ("_name_or_path", "transformers_version", "use_cache", "architectures")


class TrainingRecord(msgspec.Struct, frozen=True, tag_field="format", tag=1, forbid_unknown_fields=True):
    """What a training used."""

    template: str  # of LLaVA's trainer its `version`; of TRL's the SHA-256 of the chat template's text
    base: dict[str, Any]  # path and fingerprint, as `recorded_model` gives them
    lora: dict[str, Any] | None  # rank, alpha, dropout, bias; None where the whole model was trained
    versions: dict[str, str]  # of the trainer and of what it ran on
    trainer: str = "llava"  # or `trl`
    image_aspect_ratio: str = ""  # LLaVA's, one of `ASPECT_RATIOS`
    vision_tower: dict[str, Any] | None = None  # LLaVA's, as `base`; None where there is none
    projector: dict[str, Any] = {}  # LLaVA's: `start` ("file", "base" or "random"), and of a file its path and SHA-256
    settings: dict[str, Any] = {}  # of TRL's trainer, those that say what is trained on


def write_record(folder: Path, record: TrainingRecord) -> None:
    write_json(folder / RECORD_FILE, msgspec.to_builtins(record))


def read_record(folder: Path) -> TrainingRecord | None:
    """The record beside a model, None where there is none; a `UserError` where it cannot be understood."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.convert(read_object(path), TrainingRecord)
    except msgspec.ValidationError as error:
        raise UserError(
            f"{path} was not written by this version of TIVE ({error}); use the version that trained the model"
        ) from error


def model_folder(name: str, cache_dir: str | None = None, revision: str | None = None) -> Path | None:
    """Where the files of a model are on this machine, of a folder or a hub name; None when they are not."""
    if os.path.isdir(name):
        return Path(name)
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", cache_dir=cache_dir, revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def recorded_model(name: str, cache_dir: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """What a record says of a model that was loaded: its path or hub name, and its fingerprint."""
    folder = model_folder(name, cache_dir, revision)
    if folder is None:
        raise UserError(f"{name} was loaded, and its files cannot be found; name a folder")
    return {"path": os.path.abspath(name) if os.path.isdir(name) else name, **model_fingerprint(folder)}


def lora_of(model: Any) -> dict[str, Any]:
    """What a record says of the one adapter of a model of peft's."""
    (adapter,) = model.peft_config.values()
    return {"r": adapter.r, "alpha": adapter.lora_alpha, "dropout": adapter.lora_dropout, "bias": adapter.bias}


def versions_of(*packages: str) -> dict[str, str]:
    """The installed versions of packages, `unknown` for one that has none."""
    versions = dict.fromkeys(packages, "unknown")
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def model_fingerprint(folder: Path) -> dict[str, Any]:
    """What tells one model from another of the same shape: its configuration, and its weights' names, sizes, hashes."""
    config = read_object(folder / "config.json")
    kept = {key: value for key, value in config.items() if key not in _CONFIG_KEYS_WITHOUT_EFFECT}
    text = json.dumps(kept, sort_keys=True, ensure_ascii=True)
    return {
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "weights": {file.name: [file.stat().st_size, sha256_of(file, sampled=True)] for file in weight_files(folder)},
    }


def weight_files(folder: Path) -> list[Path]:
    """The weight files that transformers loads: safetensors where there are any, else torch's."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def difference(recorded: dict[str, Any], folder: Path) -> str | None:
    """In a few words, how a model's files differ from those that a training recorded; None when they do not."""
    present = model_fingerprint(folder)
    if present["config"] != recorded.get("config"):
        return "its config.json is another"
    now, then = present["weights"], recorded.get("weights", {})
    others = sorted(name for name in now.keys() | then.keys() if now.get(name) != then.get(name))
    return f"its weights in {others[0]} are others" if others else None


def lacks_tokenizer(base: Path) -> str | None:
    """Why LLaVA's trainer cannot take the tokenizer of a LLaMA base, with the remedy; None when it can."""
    if (base / "tokenizer.model").is_file():
        return None
    return (
        f"{base} has no tokenizer.model, which LLaVA's trainer needs (use_fast=False takes no tokenizer.json); "
        "take it from the original base"
    )


def check_llava() -> tuple[Path, str]:
    """The folder and the version of the LLaVA that an import takes; a `UserError` where there is none, or it is another
    than the one that is known here: PYTHONPATH or the working folder holds a package of that name.
    """
    spec = importlib.util.find_spec("llava")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"{sys.executable} has no LLaVA; `bash {of_project('scripts/setup.sh')}` makes an environment that has: "
            f"run the same command with {of_project('.venv/bin/python')}"
        )
    folder, known = Path(next(iter(spec.submodule_search_locations))).resolve(), None
    for name in ("llava-torch", "llava"):  # from PyPI, or from its repository
        with contextlib.suppress(PackageNotFoundError):
            installed = distribution(name)
            places = [Path(str(installed.locate_file(""))).resolve()]  # beside its metadata
            if direct := installed.read_text("direct_url.json"):  # of an editable install: its checkout
                url = urlparse(json.loads(direct).get("url", ""))
                places += [Path(unquote(url.path)).resolve()] if url.scheme == "file" else []
            known = known or (installed.version if folder.parent in places else None)
    if known is None or not known.startswith("1.2."):
        raise UserError(
            f"llava is taken from {folder} ({known or 'which no pip installed'}), another LLaVA than the 1.2 that is "
            "supported; is PYTHONPATH set? `bash scripts/setup.sh` installs the right one"
        )
    return folder, known
