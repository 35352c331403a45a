"""What a model's folder holds: read, loaded whole, and compared with what it was trained on."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from tive.models import ModelFiles
from tive.models.training_record import difference, model_folder
from tive.util.errors import UserError
from tive.util.files import read_json, read_object
from tive.util.text import first_line

# What stands in a file beside quantised weights, or in their place, in the names of the common libraries; scales are no
# such thing where they are CLIP's (`logit_scale`) or those of a cache of keys and values (`k_scale`).
_QUANTIZED = re.compile(
    r"(?<!logit_)(?<!\.[kv]_)scale|zero_point|qweight|qzeros|g_idx|packed|absmax|quant_(state|map)|SCB$|W_q$"
)


@contextlib.contextmanager
def loading(place: str | Path) -> Iterator[None]:
    """Turns whatever a library raises while it reads a file or folder into a `UserError` of one line that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, tokenizers, sentencepiece, safetensors and torch raise many kinds
        for path in sorted(Path(place).glob("*.json")):
            if isinstance(content := read_json(path), dict) and content.get("auto_map"):
                raise UserError(
                    f"{path} names code beside the model (auto_map), which is never run; take the model in the form of "
                    "transformers, whose name mostly ends in -hf"
                ) from error
        raise UserError(
            f"cannot read {place}: {first_line(error)}; it is damaged or not trusted: make or download it again, or "
            "use an environment that has what it needs (bash scripts/setup.sh native)"
        ) from error


def read_config(folder: Path, in_4bit: bool = False) -> dict[str, Any]:
    """A model's config.json, of weights that are not quantised, or `in_4bit` by bitsandbytes.

    A `UserError` where there is none, it is no JSON object, or it or a file of weights says that weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder (no config.json); name the model's folder")
    config = read_object(path)
    known = stored_in_4bit(config)
    if known and in_4bit:
        return config
    said = [f"{path}: quantization_config"] if _says_quantized(config) else []
    said += [
        f"{file}: {name} is stored as {kind}"
        for file in sorted(folder.glob("*.safetensors"))
        for name, (_, kind) in stored_tensors(file).items()
        if kind.startswith(("F8", "F6", "F4")) or ("weight" in name and kind in ("I8", "U8"))
    ]
    if said:
        remedy = "take load_in_4bit (transformers' models), or " if known else ""
        raise UserError(
            f"{said[0]}: gradients on quantised weights are not supported as they are; {remedy}name the same model in "
            "full precision, and a reference model that was trained on it"
        )
    return config


def stored_tensors(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and kind (`F32`, `I8`) of each tensor in a file of safetensors, whose numbers are not read."""
    from safetensors import safe_open

    with loading(path), safe_open(path, framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}


def library_config(folder: Path) -> Any:
    """The config of a model that the installed transformers knows, without dropout; a `UserError` where it does not."""
    from transformers import AutoConfig

    def turn_off_dropout(config: Any) -> None:
        for name, value in vars(config).items():
            if "drop" in name and isinstance(value, float):
                setattr(config, name, 0.0)
            elif hasattr(value, "to_dict"):
                turn_off_dropout(value)

    with loading(folder):
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    turn_off_dropout(config)  # some are functions that no mode of a module ends, in parts of the model too
    return config


def stored_in_4bit(config: dict[str, Any]) -> bool:
    """Whether a model's weights are stored in 4 bits of bitsandbytes."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and bool(method.get("load_in_4bit"))


def _says_quantized(config: dict[str, Any]) -> bool:
    """Whether a config, or one of a part inside it, has a `quantization_config` that is not empty."""
    parts = (part for part in config.values() if isinstance(part, dict))
    return bool(config.get("quantization_config")) or any(map(_says_quantized, parts))


def refuse_other(folder: Path, what: str, recorded: dict[str, Any] | None, present: Path | None) -> None:
    """Raise a `UserError` where a model is another one than the training of `folder` recorded."""
    differs = difference(recorded, present) if recorded and present else None
    if recorded and differs:
        raise UserError(
            f"the {what} {present} is not the one that {folder} was trained with ({differs}); name that one: "
            f"{recorded.get('path')}"
        )


def print_named_base(folder: Path, base: Path) -> None:
    """Print the base that an adapter names, where another is used."""
    named = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    of_hub = re.search(r"models--([^/]+)/snapshots/", f"{base}/")
    if Path(named).resolve() != base.resolve() and not (of_hub and named == of_hub[1].replace("--", "/")):
        print(
            f"{folder}/adapter_config.json names the base {named}; taken as trained on {base} (in the same precision: "
            "an adapter of a base in 4 bits needs load_in_4bit)"
        )


def base_folder(model_base: str) -> str:
    """The folder of a base model, a folder or a name on huggingface.co that was downloaded; else a `UserError`."""
    folder = model_folder(model_base)
    if folder is None:
        raise UserError(
            f"the model {model_base} is neither a folder nor a downloaded model; name its folder, or download it with "
            "`huggingface-cli download`"
        )
    return str(folder)


def refuse_options(files: ModelFiles, *names: str) -> None:
    """Raise a `UserError` where an option is set that the family would not look at."""
    for name in names:
        if getattr(files, name):
            raise UserError(
                f"{name} {getattr(files, name)}: {files.model_path} is a model that does not read it; leave it out"
            )


def load_pretrained(
    kind: Any, folder: str | Path, place: tuple[torch.device, torch.dtype], apart: tuple[str, ...] = (), **options: Any
) -> Any:
    """A model of one of transformers' classes, each weight from the folder's files; it prints those of no parameter.

    A `UserError` where it cannot be loaded, lacks weights, or has what belongs to quantised ones.

    Args:
        place: where its weights go, each as it is read, and in which precision.
        apart: prefixes of weights that come from another place, or that the class leaves out on purpose.
    """
    from transformers.utils import logging

    device, dtype = place
    if device.type != "cpu" or "quantization_config" in options:
        options["device_map"] = {"": device}
    logging.set_verbosity_error()  # what it warns of is looked at below
    with loading(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*do_sample.*")  # of a generation config that is not used here
        model, report = kind.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True, **options)
    unused = sorted(key for key in map(str, report["unexpected_keys"]) if not key.startswith(apart))
    quantized = [key for key in unused if _QUANTIZED.search(key)]
    if quantized:
        raise UserError(
            f"{folder} holds {quantized[0]}, which belongs to quantised weights and has no place in the model; name "
            "the same model in full precision"
        )
    missing = {str(key) for part in ("missing_keys", "mismatched_keys") for key in report[part]}
    missing = {key for key in missing if not key.startswith(apart)}
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, {min(missing)} among them; download it again")
    if unused:
        print(f"{folder}: {len(unused)} weights have no place in the model and are not used, {unused[0]} among them")
    return model
