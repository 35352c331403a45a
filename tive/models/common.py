"""What every family needs: folders, fingerprints, target modules, a frozen model, greedy generation."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tive.models import ModelFiles, Reference
from tive.models.training_record import model_folder
from tive.util.errors import UserError
from tive.util.files import sha256_of

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def prepare_torchvision() -> None:
    """Make torchvision importable where its operators do not fit the installed torch.

    PyPI's torchvision beside a CPU build of torch (and any other mismatch) fails on an operator that image processors
    never call; declaring it is enough for them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
# Before transformers and peft are imported, also in a loader's worker that is not forked.
prepare_torchvision()
# peft imports bitsandbytes wherever it is installed, and that warns of kernels for inference that are not.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its kind where it has no text."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_folder(model_base: str) -> str:
    """The folder of a base model, a folder or a name on huggingface.co that was downloaded; else a `UserError`."""
    folder = model_folder(model_base)
    if folder is None:
        raise UserError(
            f"the model {model_base} is neither a folder nor a downloaded model; name its folder, or download it with "
            "`huggingface-cli download`"
        )
    return str(folder)


def base_of(files: ModelFiles) -> Path:
    """The folder that a model's language model and tokenizer come from: the adapter's base, or a whole model's own."""
    return Path(files.model_path if files.model_base is None else files.model_base)


def refuse_options(files: ModelFiles, *names: str) -> None:
    """Raise a `UserError` where an option is set that the family would not look at."""
    for name in names:
        if getattr(files, name):
            raise UserError(
                f"{name} {getattr(files, name)}: {files.model_path} is a model that does not read it; leave it out"
            )


def decoder_layers(model: Any) -> nn.ModuleList:
    """The language model's layers: they stand beside its input embeddings, else a `UserError` says so."""
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if any(child is embedding for child in module.children()):
            layers = getattr(module, "layers", None)
            if isinstance(layers, nn.ModuleList):
                return layers
    raise UserError(f"{type(model).__name__} keeps its language model's layers in a way that is not supported")


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


def target_modules(reference: Reference, grad_modules: str = "self_attn") -> dict[str, nn.Linear]:
    """The LoRA matrices whose gradients count, in the model's order, by canonical name (`layers.3.self_attn.q_proj.A`).

    Only what lies below the language model's layers: a vision tower has a `self_attn` and a `q_proj` too.

    Args:
        grad_modules: comma-separated parts of a module's path in its layer (`self_attn`, `q_proj,v_proj`), or `all`.

    Raises:
        UserError: nothing is counted.
    """
    wanted = {part.strip() for part in grad_modules.split(",") if part.strip()}
    matrices: dict[str, nn.Linear] = {}
    for number, layer in enumerate(reference.layers):
        for path, module in layer.named_modules():
            if hasattr(module, "lora_A") and (wanted == {"all"} or wanted & set(path.split("."))):
                matrices[f"layers.{number}.{path}.A"] = module.lora_A["default"]
                matrices[f"layers.{number}.{path}.B"] = module.lora_B["default"]
    if not matrices:
        raise UserError(f"grad_modules {grad_modules} names no LoRA matrix of this adapter (try self_attn)")
    return matrices


def fingerprint(hashed: Iterable[Path], listed: Iterable[Path], *texts: str) -> str:
    """SHA-256 over files' content, over names, sizes and sampled content of the weight files in folders, and texts.

    Two bases of one shape differ in nothing but the content; hashing 14 GB of it at each start would cost minutes.
    """
    digest = hashlib.sha256()
    for file in hashed:
        digest.update(sha256_of(file).encode())
    for folder in listed:
        for file in sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size} {sha256_of(file, sampled=True)}\n".encode())
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()


@torch.no_grad()
def generate_ids(
    model: Any, embeddings: Tensor, lengths: Sequence[int], ends: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The most probable token after token, for each prompt of a batch, without the token that ends it.

    Args:
        embeddings: of the prompts, `[B, T, H]`, padded on the right.
        lengths: positions of each prompt.
        ends: tokens that end an answer.
    """
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long, device=embeddings.device)
    moved = torch.zeros_like(embeddings[:, :width])
    for row, length in enumerate(lengths):  # an answer goes on where its prompt ends: the padding has to lie before it
        moved[row, width - length :] = embeddings[row, :length]
        mask[row, width - length :] = 1
    from transformers import GenerationMixin

    with greedy(model, ends, max_new_tokens):
        # Not the model's own `generate`: LLaVA's takes no embeddings. Without ids some releases begin with their own.
        answers = GenerationMixin.generate(
            model,
            input_ids=mask.new_zeros(len(lengths), 0),
            inputs_embeds=moved,
            attention_mask=mask,
            use_cache=True,
        )
    return [until_end(ids, ends) for ids in answers.tolist()]


@contextlib.contextmanager
def greedy(model: Any, ends: Collection[int], max_new_tokens: int) -> Iterator[None]:
    """Makes `generate` greedy, whatever sampling or penalty the model's files ask for."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    try:
        yield
    finally:
        model.generation_config = before


def until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    stop = next((index for index, number in enumerate(ids) if number in ends), len(ids))
    return ids[:stop]
