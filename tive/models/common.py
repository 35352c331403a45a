"""What every family needs: folders, fingerprints, target modules, a frozen model, greedy generation."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tive.models import ModelFiles, RecordLosses, Reference, Supervised
from tive.models.training_record import model_folder
from tive.util.errors import UserError
from tive.util.files import sha256_of

IGNORE = -100
# Supervised tokens whose logits are in memory at one time: with what is computed of them some 14 bytes a token and
# word of the vocabulary, 0.9 GB of 32,000 words and 4.4 GB of 152,000.
PIECE = 2048
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


# Losses


def packed(numbers: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Numbers as they travel from a worker: rounded to what the model computes in, of bfloat16 the bits as int16."""
    tensor = torch.from_numpy(numbers).to(dtype)
    return (tensor.view(torch.int16) if dtype == torch.bfloat16 else tensor).numpy()


def unpacked(numbers: np.ndarray, dtype: torch.dtype) -> Tensor:
    """What `packed` packed, or other numbers, in `dtype`; whole numbers (of 32 or 64 bits) as they are."""
    tensor = torch.from_numpy(numbers)
    tensor = tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def supervised_tokens(labels: Sequence[np.ndarray], width: int) -> Supervised:
    """The supervised tokens of records whose labels are int64 `[t]`, `IGNORE` where nothing is supervised.

    Args:
        width: positions of a row of the batch.
    """
    places = [np.flatnonzero(row[1:] != IGNORE) for row in labels]
    return Supervised(
        positions=torch.from_numpy(np.concatenate([place + row * width for row, place in enumerate(places)])),
        targets=torch.from_numpy(np.concatenate([row[place + 1] for row, place in zip(labels, places, strict=True)])),
        owners=torch.from_numpy(np.repeat(np.arange(len(labels)), [len(place) for place in places])),
        counts=torch.tensor([float(len(place)) for place in places]),
    )


def supervised_runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """First position and end of each answer: the runs of supervised labels `[t]`, between which something is asked."""
    supervised = np.concatenate([[False], labels != IGNORE, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


def losses_at_supervised(
    hidden: Tensor, head: Callable[[Tensor], Tensor], supervised: Supervised, el2n: bool = False
) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, and EL2N.

    Args:
        hidden: the last hidden states `[B, T, H]`.
        head: maps hidden states `[s, H]` to the vocabulary's logits `[s, V]`; is called for a piece of all supervised
            tokens at a time, and once more in the backward pass where there is more than one piece.
    """
    kept = hidden.flatten(0, 1).index_select(0, supervised.positions)
    states, targets = kept.split(PIECE), supervised.targets.split(PIECE)
    compute = partial(_losses_of_tokens, head, el2n=el2n)
    if len(states) > 1 and kept.requires_grad:  # else the logits of every piece would stay for the backward pass
        compute = partial(checkpoint, compute, use_reentrant=False, preserve_rng_state=False)
    return _of_records([compute(*piece) for piece in zip(states, targets, strict=True)], supervised, el2n)


def losses_of_logits(logits: Tensor, supervised: Supervised, el2n: bool = False) -> RecordLosses:
    """`losses_at_supervised` from the logits `[S, V]` of all supervised tokens."""
    return _of_records([_losses_of_tokens(lambda same: same, logits, supervised.targets, el2n)], supervised, el2n)


def _losses_of_tokens(
    head: Callable[[Tensor], Tensor], states: Tensor, targets: Tensor, el2n: bool
) -> tuple[Tensor, Tensor]:
    """Cross-entropy and EL2N of tokens, each `[s]`; of EL2N zeros where it is not asked for."""
    logits = head(states).float()
    losses = nn.functional.cross_entropy(logits, targets, reduction="none")
    if not el2n:
        return losses, torch.zeros_like(losses)
    with torch.no_grad():
        difference = logits.softmax(dim=1)
        difference[torch.arange(len(targets), device=targets.device), targets] -= 1
        return losses, difference.norm(dim=1)


def _of_records(pieces: list[tuple[Tensor, Tensor]], supervised: Supervised, el2n: bool) -> RecordLosses:
    """Each record's means, from the losses and EL2N of pieces of all tokens."""
    losses, errors = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    def mean_by_record(values: Tensor) -> Tensor:
        return torch.zeros_like(supervised.counts).index_add(0, supervised.owners, values) / supervised.counts

    return RecordLosses(mean_by_record(losses), mean_by_record(errors) if el2n else None)
