"""What every model family needs, once: loading, freezing, target modules, identity, losses at supervised positions."""

from __future__ import annotations

import contextlib
import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.models import ModelFiles, RecordLosses, Reference
from tive.util.errors import UserError
from tive.util.files import sampled_sha256, sha256_of

IGNORE = -100
_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


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
            f"the base model {model_base} is neither a folder nor a downloaded model; name the base that "
            "finetune_lora.sh used, or download it with `huggingface-cli download`"
        ) from error


def base_of(files: ModelFiles) -> Path:
    """The folder that a model's language model and tokenizer come from: the adapter's base, or a whole model's own."""
    return Path(files.model_path if files.model_base is None else files.model_base)


def refuse_options(files: ModelFiles, *names: str) -> None:
    """Refuse options that the family would not look at.

    Raises:
        UserError: one is set.
    """
    for name in names:
        if getattr(files, name) is not None:
            raise UserError(
                f"{name} {getattr(files, name)}: {files.model_path} is a model that does not read it; leave it out"
            )


def freeze(model: Any, gradient_checkpointing: bool) -> None:
    """Make nothing trainable and turn every dropout off, also under gradient checkpointing."""
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        with warnings.catch_warnings():  # transformers 5.24 wants another name, which older releases do not have
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # eval() turns checkpointing off without a word. What checkpoints is in training mode, its parts are not.
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def target_modules(
    reference: Reference, grad_modules: str = "self_attn", last_layers: int | None = None
) -> dict[str, nn.Linear]:
    """The LoRA matrices whose gradients count, in the model's order, by canonical name (`layers.3.self_attn.q_proj.A`).

    Only what lies below the language model's layers: a vision tower has a `self_attn` and a `q_proj` too.

    Args:
        grad_modules: comma-separated parts of a module's path in its layer (`self_attn`, `q_proj,v_proj`), or `all`.
        last_layers: count the last N layers alone.

    Raises:
        UserError: nothing is counted, or there are fewer layers.
    """
    wanted = {part.strip() for part in grad_modules.split(",") if part.strip()}
    layers = reference.layers
    if last_layers is not None and not 1 <= last_layers <= len(layers):
        raise UserError(f"last_layers {last_layers} is not one of 1 .. {len(layers)}")
    matrices: dict[str, nn.Linear] = {}
    for number, layer in list(enumerate(layers))[-last_layers if last_layers else 0 :]:
        for path, module in layer.named_modules():
            if hasattr(module, "lora_A") and (wanted == {"all"} or wanted & set(path.split("."))):
                matrices[f"layers.{number}.{path}.A"] = module.lora_A["default"]
                matrices[f"layers.{number}.{path}.B"] = module.lora_B["default"]
    if not matrices:
        raise UserError(f"grad_modules {grad_modules} names no LoRA matrix of this adapter (try self_attn)")
    return matrices


def fingerprint(hashed: Iterable[Path], listed: Iterable[Path]) -> str:
    """SHA-256 over the content of files, and over names, sizes and sampled content of the weight files in folders.

    Two bases of one shape differ in nothing but the content; hashing 14 GB of it at each start would cost minutes.
    """
    digest = hashlib.sha256()
    for file in hashed:
        digest.update(sha256_of(file).encode())
    for folder in listed:
        for file in sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size} {sampled_sha256(file)}\n".encode())
    return digest.hexdigest()


def losses_at_supervised(hidden: Tensor, head: nn.Module, labels: Tensor, el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens; logits are computed at those positions alone.

    Args:
        hidden: the last hidden states `[B, T, H]`.
        head: the map to the vocabulary's logits.
        labels: `[B, T]`, `IGNORE` where nothing is supervised; position t is predicted from hidden state t - 1.
    """
    targets = labels[:, 1:]
    supervised = targets != IGNORE
    logits = head(hidden[:, :-1][supervised]).float()
    return losses_of_logits(logits, targets[supervised], supervised.sum(dim=1), el2n)


def losses_of_logits(logits: Tensor, targets: Tensor, counts: Tensor, el2n: bool = False) -> RecordLosses:
    """`losses_at_supervised` from the logits `[S, V]` (float32) and targets `[S]` of all supervised tokens.

    Args:
        counts: `[B]`, how many of the S tokens each record has, record by record.
    """
    owner = torch.repeat_interleave(counts)

    def mean_by_record(values: Tensor) -> Tensor:
        return torch.zeros(len(counts), device=values.device).index_add(0, owner, values) / counts

    losses = mean_by_record(nn.functional.cross_entropy(logits, targets, reduction="none"))
    if not el2n:
        return RecordLosses(losses, None)
    with torch.no_grad():
        difference = logits.softmax(dim=1)
        difference[torch.arange(len(targets), device=targets.device), targets] -= 1
        return RecordLosses(losses, mean_by_record(difference.norm(dim=1)))


def library_versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages, `unknown` for one that has none."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "unknown"
    return found
