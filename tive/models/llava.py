"""LLaVA (1.5 and its kin): encode a record, the losses of a batch, the answers that the model generates.

The template, the masking and the splicing of image features are LLaVA's own functions, called, not rewritten.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tive.data.conversations import problem_of
from tive.data.images import BadImage, find_image, open_image, resize_padded
from tive.data.media import image_of
from tive.models import Answer, Encoded, Hints, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.common import IGNORE, library_versions, losses_at_supervised, refuse_options
from tive.models.generation import generate_ids, supervised_runs
from tive.models.llava_files import check_model
from tive.models.llava_files import identity as identity
from tive.models.llava_loading import Processor
from tive.models.llava_loading import load as load
from tive.util.files import read_json

HINTS = Hints(template="the training's, v1 where none is recorded", trainer="finetune_lora.sh")


@dataclass(frozen=True)
class Inputs:
    """A record's arrays.

    Attributes:
        input_ids: int64 `[t]`; an image stands as one token.
        labels: int64 `[t]`; -100 where nothing is supervised.
        pixels: float32 `[3, height, width]`, or None for a record without an image.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None


def check_files(files: ModelFiles) -> None:
    """What can be known about the model without loading it.

    Raises:
        UserError: a file is missing, or adapter, base and options do not fit together.
    """
    refuse_options(files, "chat_template", "max_length", "max_pixels")
    check_model(files)


def record_problem(record: Any) -> str | None:
    """What keeps LLaVA from training on a record; None when nothing does."""
    return problem_of(record)


def pads_images(files: ModelFiles) -> bool:
    """Whether images are padded to a square."""
    return read_json(Path(files.model_path) / "config.json").get("image_aspect_ratio") == "pad"


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return library_versions("transformers", "peft", "accelerate")


def encode(processor: Processor, record: dict[str, Any], image_folder: str) -> Encoded:
    """Encode one record as LLaVA's trainer does (the training's template, answers supervised).

    Raises:
        LeftOut: the record's image cannot be used, or nothing in it is supervised.
    """
    from llava import conversation
    from llava.train.train import preprocess, preprocess_multimodal

    conversation.default_conversation = conversation.conv_templates[processor.template]
    turns = [[dict(turn) for turn in record["conversations"]]]
    image, pixels = image_of(record), None
    if image is not None:
        try:
            pixels = _pixels(processor, find_image(image_folder, image))
        except BadImage as error:
            raise LeftOut(str(error)) from error
        except ValueError as error:  # LLaVA's image processor takes 1x1 and 3x3 pixels for a list of channels
            raise LeftOut(f"unreadable image: {str(error).splitlines()[0]}") from error
        turns = preprocess_multimodal(turns, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            tokens = preprocess(turns, processor.tokenizer, has_image=image is not None)
        except AssertionError as error:  # Llama-2's templates take no empty question at the beginning
            raise LeftOut(f"the template {processor.template} does not take the conversation") from error
    input_ids, labels = tokens["input_ids"][0].numpy(), tokens["labels"][0].numpy()
    spliced = _spliced_labels(input_ids, labels, processor)
    if not (spliced[1:] != IGNORE).any():
        # LLaVA calls a conversation without an answer a mismatch too.
        mismatch = "tokenization mismatch" in printed.getvalue() and record["conversations"][-1]["from"] == "gpt"
        raise LeftOut("template mismatch" if mismatch else "no supervised token")
    group = "text" if pixels is None else "image"
    supervised = int((spliced[1:] != IGNORE).sum())
    return Encoded(len(spliced), supervised, group, Inputs(input_ids, labels, pixels))


def _pixels(processor: Processor, path: str) -> np.ndarray:
    """The pixels of an image file as LLaVA's `process_images` gives them, float32 `[3, height, width]`."""
    from llava.mm_utils import process_images

    padded, images = processor.image_config.image_aspect_ratio == "pad", processor.image_processor
    picture = open_image(path, padded)
    edge = images.size.get("shortest_edge") if images.do_resize else None
    if padded and edge and max(picture.size) > edge:  # the same pixels, without the square
        red, green, blue = (int(part * 255) for part in images.image_mean)
        picture = resize_padded(picture, (red, green, blue), edge, images.resample)
    return process_images([picture], images, processor.image_config)[0].numpy()


def _spliced_labels(input_ids: np.ndarray, labels: np.ndarray, processor: Processor) -> np.ndarray:
    """The labels as the language model sees them: an image token becomes its features, then the cut."""
    from llava.constants import IMAGE_TOKEN_INDEX

    repeats = np.where(input_ids == IMAGE_TOKEN_INDEX, processor.image_features, 1)
    return np.repeat(labels, repeats)[: processor.max_length]


def record_losses(reference: Reference, records: Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """Losses of a batch whose records all have an image, or none has one.

    They are padded on the right and attention is causal, so no position of a record sees the padding and no mask is
    needed.
    """
    embeddings, labels = _embed(reference, [record.inputs for record in records])
    model = reference.model
    hidden = model.model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    return losses_at_supervised(hidden, model.lm_head, labels, el2n)


@torch.no_grad()
def _embed(reference: Reference, records: list[Inputs]) -> tuple[Tensor, Tensor]:
    """Input embeddings `[B, T, hidden]` with image features in place, and labels `[B, T]`."""
    device, model = reference.device, reference.model
    width = max(len(record.input_ids) for record in records)
    input_ids = torch.zeros(len(records), width, dtype=torch.long)
    labels = torch.full((len(records), width), IGNORE)
    mask = torch.zeros(len(records), width, dtype=torch.bool)
    for row, record in enumerate(records):
        size = len(record.input_ids)
        input_ids[row, :size] = torch.from_numpy(record.input_ids)
        labels[row, :size] = torch.from_numpy(record.labels)
        mask[row, :size] = True
    input_ids, labels, mask = input_ids.to(device), labels.to(device), mask.to(device)
    if records[0].pixels is None:
        return model.model.embed_tokens(input_ids), labels
    pixels = torch.from_numpy(np.stack([np.asarray(record.pixels) for record in records])).to(device, reference.dtype)
    _, _, _, _, embeddings, labels = model.prepare_inputs_labels_for_multimodal(
        input_ids, None, mask, None, labels, pixels
    )
    return embeddings, labels


def answers(processor: Processor, record: Encoded) -> list[Answer]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it."""
    inputs, found = record.inputs, []
    for start, stop in supervised_runs(inputs.labels):
        if len(_spliced_labels(inputs.input_ids[:stop], inputs.labels[:stop], processor)) == processor.max_length:
            continue
        start = _behind_role(processor, inputs.input_ids, start)
        before = replace(inputs, input_ids=inputs.input_ids[:start], labels=inputs.labels[:start])
        length = len(_spliced_labels(before.input_ids, before.labels, processor))
        expected = _text(processor, inputs.input_ids[start:stop].tolist())
        found.append(Answer(Encoded(length, 0, record.group, before), expected))
    return found


def _behind_role(processor: Processor, ids: np.ndarray, start: int) -> int:
    """Where an answer starts: with some tokenizers LLaVA supervises the last token of `ASSISTANT:` with it."""
    first, before = processor.tokenizer.convert_ids_to_tokens(ids[start - 1 : start + 1].clip(0).tolist())[::-1]
    return start + 1 if first in (":", "]") and before != first else start


def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts that all have an image, or none has one."""
    embeddings, _ = _embed(reference, [prompt.inputs for prompt in prompts])
    ends = (reference.processor.tokenizer.eos_token_id,)
    lengths = [prompt.length for prompt in prompts]
    found = generate_ids(reference.model, embeddings, lengths, ends, max_new_tokens)
    return [_text(reference.processor, ids) for ids in found]


def _text(processor: Processor, ids: list[int]) -> str:
    """An answer's text, without what ends it; some templates end it with a text, which no token stands for."""
    from llava.conversation import SeparatorStyle, conv_templates

    template = conv_templates[processor.template]
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return (text.split(template.sep)[0] if template.sep_style == SeparatorStyle.SINGLE else text).strip()
