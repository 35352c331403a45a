"""The losses of transformers' own models, and the proof that a batch gives what its records give alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tive.data.media import IMAGE_TAG
from tive.models import Collated, Encoded, RecordLosses, Reference
from tive.models.common import first_line
from tive.models.losses import losses_at_supervised, losses_of_logits, supervised_tokens, unpacked
from tive.models.native_encoding import encode_turns
from tive.util.errors import UserError

# Largest difference between a loss in a batch and alone: absolute, for the small losses of a good model, and relative.
_BATCH_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (5e-3, 2e-2), torch.bfloat16: (2e-2, 5e-2)}


def _head_of(reference: Reference, records: Sequence[Encoded]) -> Callable[[Tensor], Tensor] | None:
    """The map from last hidden states to logits: the output embeddings, or these and a cap, if the model does no more.

    Tried on states that give logits of 100, so that a cap or a factor shows.
    """
    model: Any = reference.model
    states: list[Tensor] = []
    output = model.get_output_embeddings()
    cap: Any = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def capped(states: Tensor) -> Tensor:
        return torch.tanh(output(states) / cap) * cap

    def enlarge(head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not states:
            states.append(arguments[0].flatten(0, 1))
            states[0] = states[0] * (100 / head(states[0]).abs().max())
            return (states[0], *arguments[1:])
        return arguments

    hook = output.register_forward_pre_hook(enlarge)
    try:
        logits = model(**collate(reference, records).to(reference.device).inputs, use_cache=False).logits
    finally:
        hook.remove()
    for head in (output, *([capped] if cap else [])):
        if float((head(states[0]) - logits).abs().max()) <= 0.01 * float(logits.abs().max()):
            return head
    return None


def _agree(losses: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    absolute, relative = _BATCH_TOLERANCE[dtype]
    return bool(((losses - others).abs() <= absolute + relative * others.abs()).all())


@torch.no_grad()
def proven(reference: Reference) -> Reference:
    """The reference model with the head that gives its losses, and batches of made-up records that give theirs alone.

    Raises:
        UserError: they differ, or such records cannot be computed.
    """
    what = f"{type(reference.model).__name__} with {type(reference.processor.library).__name__}"
    processor = replace(reference.processor, max_length=None, max_pixels=None)
    numbers = np.random.default_rng(0)

    def made_up(question: str, answer: str, *sizes: tuple[int, int]) -> Encoded:
        images = [Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        turns = [{"from": "human", "value": IMAGE_TAG * len(sizes) + question}, {"from": "gpt", "value": answer}]
        return encode_turns(processor, None, turns, images)

    try:
        groups = [
            [
                made_up("What is it?", "Noise.", (64, 96)),
                made_up("And is this any better?", "No, also noise.", (90, 56)),
            ],
            [made_up("Hello.", "Hello!"), made_up("Count to five, please.", "One, two, three, four, five.")],
        ]
        reference = replace(reference, head=_head_of(reference, groups[1]))
        for records in groups:
            together = record_losses(reference, records).losses
            alone = torch.cat([record_losses(reference, [record]).losses for record in records])
            if not _agree(together, alone, reference.dtype):
                difference = float((together - alone).abs().max())
                raise UserError(f"{what}: a batch gives other losses than its records alone (by {difference:.1g})")
        return reference
    except UserError:
        raise
    except Exception as error:  # processors and models raise many kinds
        raise UserError(f"{what} is not supported: a made-up record cannot be computed: {first_line(error)}") from error


def record_losses(reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, logits at those positions alone.

    The whole model runs. A hook takes the hidden states before the output embeddings; where it is not known what the
    model does to its logits, the model makes all that are needed, at once.
    """
    batch = (records if isinstance(records, Collated) else collate(reference, records)).to(reference.device)
    states: list[Tensor] = []

    def keep_supervised(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        states.append(arguments[0])
        flat = arguments[0].flatten(0, 1)
        kept = flat[:1] if reference.head is not None else flat.index_select(0, batch.supervised.positions)
        return (kept, *arguments[1:])

    hook = reference.model.get_output_embeddings().register_forward_pre_hook(keep_supervised)
    try:
        logits = reference.model(**batch.inputs, use_cache=False).logits
    finally:
        hook.remove()
    if reference.head is None:
        return losses_of_logits(logits, batch.supervised, el2n)
    return losses_at_supervised(states[0], reference.head, batch.supervised, el2n)


def collate(reference: Reference, records: Sequence[Encoded]) -> Collated:
    """The model's inputs by the processor's names, padded on the right.

    What has the shape of the ids is padded; anything else (images, their sizes) is padded with zeros in its trailing
    axes and concatenated. No key of the processor is dropped.
    """
    width = max(record.length for record in records)
    by_name: dict[str, list[np.ndarray]] = {}
    for record in records:
        for name, array in record.inputs.arrays.items():
            per_token = array.shape == (1, record.length)
            by_name.setdefault(name, []).append(_padded(array, (width,)) if per_token else array)
    inputs = {}
    for name, arrays in by_name.items():
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
        joined = np.concatenate([_padded(array, shape) for array in arrays])
        inputs[name] = unpacked(joined, reference.dtype)
    return Collated(inputs, supervised_tokens([record.inputs.labels for record in records], width))


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array with zeros behind its entries, up to `shape` in all axes but the first."""
    missing = [(0, size - have) for size, have in zip(shape, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *missing]) if any(behind for _, behind in missing) else array
