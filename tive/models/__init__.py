"""Model families. A family is one module with the same few functions; nothing outside it knows the family.

- `check_files(model_path, ...)`: what can be known of a reference model without loading it
- `identity(model_path, ...)`: what tells it from another one
- `load(model_path, ...)`: the reference model, proven to be what is on disk
- `encode(processor, record, ...)`: one record as arrays, in a loader's worker process
- `record_losses(reference, records)`: the mean loss of each record of a batch `[B]`
- `counted_matrices(reference, ...)`: the LoRA matrices that count, by canonical name
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np

from tive.util.errors import UserError
from tive.util.files import read_json


class LeftOut(Exception):
    """Why a record has no gradient; the text is the reason that the manifest gives."""


@dataclass
class Encoded:
    """One record, ready to be put in a batch.

    Attributes:
        input_ids: int64 `[t]`; an image stands as one token.
        labels: int64 `[t]`; -100 where nothing is supervised.
        pixels: float32 `[3, height, width]`, or None for a record without an image.
        length: positions that the language model sees, image features spliced in and cut at the maximum length.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None
    length: int


def family_of(model_path: str) -> ModuleType:
    """The module of the model family that `model_path/config.json` names (never guessed from the folder's name).

    Raises:
        UserError: there is no such folder or config, or no family is known for it.
    """
    config = Path(model_path) / "config.json"
    if not config.is_file():
        raise UserError(f"{model_path} holds no config.json; --model_path is the folder finetune_lora.sh wrote")
    content = read_json(config)
    model_type = content.get("model_type") if isinstance(content, dict) else None
    if model_type in ("llava_llama", "llava"):
        from tive.models import llava

        return llava
    raise UserError(f"{config}: the model type {model_type!r} is not supported (supported: llava_llama)")


@contextlib.contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever a library raises while it loads `what` into one line.

    Raises:
        UserError: it could not be loaded.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, sentencepiece and safetensors raise many kinds
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"cannot load {what}: {reason}; it is incomplete or damaged: download it again") from error


def base_folder(model_base: str) -> str:
    """The folder of a base model that is a folder, or a name on huggingface.co that was downloaded before.

    Raises:
        UserError: it is neither.
    """
    if os.path.isdir(model_base):
        return model_base
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model_base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model_base {model_base} is neither a folder nor a downloaded model; name the base that "
            "finetune_lora.sh used, or download it with `huggingface-cli download`"
        ) from error
