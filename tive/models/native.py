"""Vision-language models of transformers' own (Qwen-VL, InternVL, LLaVA-OneVision and others), as one family.

Nothing here knows a model by its name: the processor makes the inputs, the chat template the text, transformers' class
the logits. What would be wrong without a sign is proven at loading instead: every tensor of the adapter has its one
place, and a batch gives what its records give alone.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tive.data.media import IMAGE_TAG
from tive.models import Collated, Encoded, ModelFiles, RecordLosses, Reference, native_encoding
from tive.models.adapter import attach_adapter, check_adapter, fingerprint
from tive.models.checkpoint import (
    library_config,
    load_pretrained,
    print_named_base,
    read_config,
    refuse_options,
    refuse_other,
    stored_in_4bit,
)
from tive.models.common import collated, decoder_layers, freeze, greedy, losses_at_supervised, unpacked
from tive.models.native_encoding import encode_turns, load_processor, processor_folder
from tive.models.optimizer_state import MOMENTS_FILE
from tive.models.training_record import RECORD_FILE, read_record, versions_of
from tive.util.errors import UserError
from tive.util.text import first_line, of_project

LIBRARIES: tuple[str, ...] = ("transformers", "tokenizers", "peft", "accelerate", "pillow", "torchvision")
encode, answers, record_problem = native_encoding.encode, native_encoding.answers, native_encoding.record_problem

OLDEST = (4, 57)
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# Files beside an adapter that hold no weights of its training, or hold the frozen base once more (FSDP).
_NO_TRAINED_WEIGHTS = re.compile(
    r"adapter_model\.(safetensors|bin)|(training_args|optimizer|scheduler)(_\d+)?\.bin|pytorch_model_fsdp(_\d+)?\.bin"
    rf"|{re.escape(MOMENTS_FILE)}"
)
# Largest difference between a loss in a batch and alone: absolute, for the small losses of a good model, and relative.
_BATCH_TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.float16: (5e-3, 2e-2), torch.bfloat16: (2e-2, 5e-2)}


def check_files(files: ModelFiles) -> None:
    """What can be known of the model without loading it: that its files are there, supported, and fit each other."""
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise UserError(
            f"this reference model needs transformers {'.'.join(map(str, OLDEST))} or newer, and this environment has "
            f"{transformers.__version__}; `bash {of_project('scripts/setup.sh')} native` makes one that has: run the "
            f"same command with {of_project('.venv-native/bin/python')}"
        )
    if files.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs the package bitsandbytes; install it with `pip install bitsandbytes`")
    # What it warns of is proven below, or known: processors of two backends, numbers of tokens out of range.
    transformers.utils.logging.set_verbosity_error()
    refuse_options(files, "vision_tower")
    model_type = read_config(files.base, files.load_in_4bit).get("model_type")
    if type(library_config(files.base)) not in transformers.AutoModelForImageTextToText._model_mapping:
        raise UserError(f"{files.base}/config.json: {model_type!r} is no vision-language model of transformers")
    if files.model_base is not None:
        check_adapter(files.folder)
        for file in sorted([*files.folder.glob("*.safetensors"), *files.folder.glob("*.bin")]):
            if not _NO_TRAINED_WEIGHTS.fullmatch(file.name):
                raise UserError(
                    f"{file}: trained weights beside the adapter are not supported; train with LoRA alone (in ms-swift "
                    "with freeze_vit true), or with modules_to_save, which the adapter's file holds"
                )
        record = read_record(files.folder)
        refuse_other(files.folder, "base model", record.base if record else None, files.base)
    load_processor(files)


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, base, processor, template, limits, libraries.

    Image processors of two backends, and of two releases, resize differently: their class and the versions count.
    """
    source, processor = processor_folder(files), load_processor(files).library
    return fingerprint(
        files,
        [files.base / "config.json", *(source / name for name in _PROCESSOR_FILES)],
        [files.base],
        processor.chat_template,
        type(processor).__name__,
        type(processor.image_processor).__name__,
        json.dumps([files.max_length, files.max_pixels, files.load_in_4bit, versions_of(*LIBRARIES)], sort_keys=True),
    )


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Base and adapter, proven: each tensor has its place, and a batch gives the losses of its records alone."""
    check_files(files)
    from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

    options: dict[str, Any] = {"config": library_config(files.base), "trust_remote_code": False}
    if files.load_in_4bit and not stored_in_4bit(read_config(files.base, in_4bit=True)):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = load_pretrained(AutoModelForImageTextToText, files.base, (device, dtype), **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' packed weights of a CPU give no gradients
            module.support_avx512bf16_for_cpu = False
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; its losses cannot be computed")
    layers, processor = decoder_layers(model), replace(load_processor(files), dtype=dtype)
    if files.model_base is not None:
        record = read_record(files.folder)
        if record is None:
            print_named_base(files.folder, files.base)
        elif record.template != hashlib.sha256(processor.library.chat_template.encode()).hexdigest():
            print(
                f"{files.folder} was trained with another chat template than the one that is used now ({RECORD_FILE})"
            )
        if record is not None and record.settings.get("assistant_only_loss") is False:
            print(
                f"{files.folder} was trained on questions and answers alike ({RECORD_FILE}); here answers alone count"
            )
        attach_adapter(model, files.folder, layers, dtype)
    if not files.load_in_4bit:  # those are there already
        model.to(device)  # not to(dtype): that would round the rotary frequencies
    freeze(model, gradient_checkpointing)
    return proven(Reference(model, layers, None, processor, device, dtype))


@torch.no_grad()
def proven(reference: Reference) -> Reference:
    """The model with the head that gives its losses, where batches of made-up records give what each gives alone."""
    what = f"{type(reference.model).__name__} with {type(reference.processor.library).__name__}"
    processor = replace(reference.processor, max_length=None, max_pixels=None)
    numbers = np.random.default_rng(0)

    def made_up(question: str, answer: str, *sizes: tuple[int, int]) -> Encoded:
        images = [Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        turns = [{"from": "human", "value": IMAGE_TAG * len(sizes) + question}, {"from": "gpt", "value": answer}]
        return encode_turns(processor, None, turns, images)

    try:
        seen = [made_up("What is it?", "Noise.", (64, 96)), made_up("Is this any better?", "No, also noise.", (90, 56))]
        text = [made_up("Hello.", "Hello!"), made_up("Count to five, please.", "One, two, three, four, five.")]
        reference = replace(reference, head=_head_of(reference, text))
        absolute, relative = _BATCH_TOLERANCE[reference.dtype]
        for records in (seen, text):
            together = record_losses(reference, records).losses
            alone = torch.cat([record_losses(reference, [record]).losses for record in records])
            difference = (together - alone).abs()
            if not (difference <= absolute + relative * alone.abs()).all():
                raise UserError(
                    f"{what}: a batch gives other losses than its records alone (by {float(difference.max()):.1g})"
                )
        return reference
    except UserError:
        raise
    except Exception as error:  # processors and models raise many kinds
        raise UserError(f"{what} is not supported: a made-up record cannot be computed: {first_line(error)}") from error


def _head_of(reference: Reference, records: Sequence[Encoded]) -> Callable[[Tensor], Tensor] | None:
    """The map from last hidden states to logits: the output embeddings, or these and a cap, if the model does no more.

    Tried on states that give logits of 100, so that a cap or a factor shows.
    """
    output: Any = reference.model.get_output_embeddings()
    states: list[Tensor] = []
    cap: Any = getattr(reference.model.config.get_text_config(), "final_logit_softcapping", None)

    def capped(hidden: Tensor) -> Tensor:
        return torch.tanh(output(hidden) / cap) * cap

    def enlarge(hidden: Tensor) -> Tensor:
        if states:  # called for the line below
            return hidden
        states.append(hidden.flatten(0, 1))
        states[0] = states[0] * (100 / output(states[0]).abs().max())
        return states[0]

    logits = _logits(reference, collate(reference, records), enlarge)
    for head in (output, *([capped] if cap else [])):
        if float((head(states[0]) - logits).abs().max()) <= 0.01 * float(logits.abs().max()):
            return head
    return None


def _logits(reference: Reference, batch: Collated, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The whole model's logits, from what `change` makes of the states `[B, T, H]` before the output embeddings."""

    def changed(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (change(arguments[0]), *arguments[1:])

    hook = reference.model.get_output_embeddings().register_forward_pre_hook(changed)
    try:
        logits: Tensor = reference.model(**batch.to(reference.device).inputs, use_cache=False).logits
        return logits
    finally:
        hook.remove()


def record_losses(reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, logits at those positions alone.

    Where it is not known what the model does to its logits, it makes all that are needed, at once.
    """
    batch = (records if isinstance(records, Collated) else collate(reference, records)).to(reference.device)
    states: list[Tensor] = []

    def at_supervised(hidden: Tensor) -> Tensor:
        states.append(hidden.flatten(0, 1).index_select(0, batch.positions))
        return states[0] if reference.head is None else states[0][:1]

    logits = _logits(reference, batch, at_supervised)
    return losses_at_supervised(logits if reference.head is None else states[0], reference.head, batch, el2n)


def collate(reference: Reference, records: Sequence[Encoded]) -> Collated:
    """The model's inputs by the processor's names, of which none is dropped.

    What a record has for each token is padded on the right, anything else (images, their sizes) with zeros in its
    trailing axes; then all are concatenated.
    """
    inputs = {}
    for name in dict.fromkeys(name for record in records for name in record.inputs.arrays):
        arrays = [record.inputs.arrays[name] for record in records if name in record.inputs.arrays]
        shape = [max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True)]
        joined, row = np.zeros((sum(map(len, arrays)), *shape), arrays[0].dtype), 0
        for array in arrays:
            place = (slice(row, row + len(array)), *map(slice, array.shape[1:]))
            joined[place] = array
            row += len(array)
        inputs[name] = unpacked(joined, reference.dtype)
    return collated(inputs, [record.inputs.labels for record in records], max(record.length for record in records))


@torch.no_grad()
def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, one after the other: positions of images are the model's own affair."""
    model, tokenizer = reference.model, reference.processor.library.tokenizer
    known = (tokenizer.eos_token_id, model.generation_config.eos_token_id)
    ends = {number for part in known if part is not None for number in (part if isinstance(part, list) else [part])}
    texts = []
    for prompt in prompts:
        inputs = collate(reference, [prompt]).to(reference.device).inputs
        (ids,) = greedy(model, model.generate, ends, max_new_tokens, **inputs)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True).strip())
    return texts
