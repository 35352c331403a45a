"""What every family does with a loaded model: freeze it, name its target modules, compute losses, generate answers."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tive.models import Collated, RecordLosses, Reference
from tive.util.errors import UserError

IGNORE = -100
# Supervised tokens whose logits are in memory at one time: with what is computed of them some 14 bytes a token and
# word of the vocabulary, 0.9 GB of 32,000 words and 4.4 GB of 152,000.
PIECE = 2048


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


def collated(inputs: dict[str, Tensor], labels: Sequence[np.ndarray], width: int) -> Collated:
    """A batch with the supervised tokens of its records.

    Args:
        inputs: the family's own.
        labels: of each record int64 `[t]`, `IGNORE` where nothing is supervised.
        width: positions of a row of the batch.
    """
    places = [np.flatnonzero(row[1:] != IGNORE) for row in labels]
    return Collated(
        inputs,
        positions=torch.from_numpy(np.concatenate([place + row * width for row, place in enumerate(places)])),
        targets=torch.from_numpy(np.concatenate([row[place + 1] for row, place in zip(labels, places, strict=True)])),
        owners=torch.from_numpy(np.repeat(np.arange(len(labels)), [len(place) for place in places])),
        counts=torch.tensor([float(len(place)) for place in places]),
    )


def losses_at_supervised(
    states: Tensor, head: Callable[[Tensor], Tensor] | None, batch: Collated, el2n: bool = False
) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, and EL2N.

    Args:
        states: the last hidden states `[S, H]` at the batch's `positions`.
        head: maps states `[s, H]` to the vocabulary's logits `[s, V]`; it is called for a piece of all supervised
            tokens at a time, and once more in the backward pass where there is more than one piece. None where the
            states are the logits.
    """

    def of_piece(states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = (states if head is None else head(states)).float()
        losses = nn.functional.cross_entropy(logits, targets, reduction="none")
        if not el2n:
            return losses, losses
        with torch.no_grad():
            errors = logits.softmax(dim=1)
            errors[torch.arange(len(targets), device=targets.device), targets] -= 1
            return losses, errors.norm(dim=1)

    compute = of_piece
    if len(states) > PIECE and states.requires_grad:  # else the logits of every piece would stay for the backward pass
        compute = partial(checkpoint, of_piece, use_reentrant=False, preserve_rng_state=False)
    pieces = [compute(*piece) for piece in zip(states.split(PIECE), batch.targets.split(PIECE), strict=True)]
    losses, errors = (torch.cat(parts) for parts in zip(*pieces, strict=True))

    def mean_by_record(values: Tensor) -> Tensor:
        return torch.zeros_like(batch.counts).index_add(0, batch.owners, values) / batch.counts

    return RecordLosses(mean_by_record(losses), mean_by_record(errors) if el2n else None)


# Answers


def supervised_runs(labels: np.ndarray) -> list[tuple[int, int]]:
    """First position and end of each answer: the runs of supervised labels `[t]`, between which something is asked."""
    supervised = np.concatenate([[False], labels != IGNORE, [False]])
    edges = np.flatnonzero(supervised[1:] != supervised[:-1]).tolist()
    return list(zip(edges[::2], edges[1::2], strict=True))


@torch.no_grad()
def greedy(
    model: Any, generate: Callable[..., Tensor], ends: Collection[int], max_new_tokens: int, **inputs: Tensor
) -> list[list[int]]:
    """The ids that `generate` puts behind `input_ids`, of each row those before the first that ends an answer.

    The most probable token after token, whatever sampling or penalty the model's files ask for.
    """
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=max_new_tokens, eos_token_id=sorted(ends), pad_token_id=min(ends)
    )
    try:
        rows = generate(**inputs, use_cache=True)[:, inputs["input_ids"].shape[1] :].tolist()
    finally:
        model.generation_config = before
    return [list(itertools.takewhile(lambda number: number not in ends, row)) for row in rows]
