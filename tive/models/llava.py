"""LLaVA (1.5 and its kin): encode a record, the losses of a batch, the answers that the model generates.

The template, the masking and the pixels are LLaVA's own functions, called, not rewritten.
"""

from __future__ import annotations

import contextlib
import functools
import io
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from tive.data.conversations import image_of
from tive.data.images import BadImage, read_image, resize_padded
from tive.data.media import StoredImage
from tive.data.problems import problem_of
from tive.models import Answer, Encoded, LeftOut, Reference, spliced
from tive.models.common import library_versions
from tive.models.llava_checkpoint import LlavaProcessor
from tive.models.llava_checkpoint import check_files as check_files
from tive.models.llava_checkpoint import identity as identity
from tive.models.llava_checkpoint import load as load
from tive.models.losses import IGNORE, packed
from tive.models.spliced import collate as collate
from tive.models.spliced import pads_images as pads_images
from tive.models.spliced import record_losses as record_losses

record_problem = problem_of


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return library_versions("transformers", "peft", "accelerate")


def encode(processor: LlavaProcessor, record: dict[str, Any], image_folder: str) -> Encoded:
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
            pixels = _pixels(processor, image_folder, image)
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
    ids, labels = tokens["input_ids"][0].numpy(), tokens["labels"][0].numpy()
    ids, labels = spliced.splice(ids, labels, processor.image_features, processor.max_length)
    # LLaVA calls a conversation without an answer a mismatch too.
    mismatch = "tokenization mismatch" in printed.getvalue() and record["conversations"][-1]["from"] == "gpt"
    if mismatch and not (labels[1:] != IGNORE).any():
        raise LeftOut("template mismatch")
    return spliced.spliced_record(ids, labels, pixels)


def _pixels(processor: LlavaProcessor, folder: str, image: str | StoredImage) -> np.ndarray:
    """The pixels of an image as LLaVA's `process_images` gives them, `[3, height, width]`, `packed`."""
    from llava.mm_utils import process_images

    padded, images = processor.image_config.image_aspect_ratio == "pad", processor.image_processor
    picture = read_image(folder, image, padded)
    edge = images.size.get("shortest_edge") if images.do_resize else None
    if padded and edge and max(picture.size) > edge:  # the same pixels, without the square
        red, green, blue = (int(part * 255) for part in images.image_mean)
        picture = resize_padded(picture, (red, green, blue), edge, images.resample)
    return packed(process_images([picture], images, processor.image_config)[0].numpy(), processor.dtype)


def answers(processor: LlavaProcessor, record: Encoded) -> list[Answer]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it."""
    begin = functools.partial(_behind_role, processor)
    return spliced.answers_of(record, processor.max_length, functools.partial(_text, processor), begin)


def _behind_role(processor: LlavaProcessor, ids: np.ndarray, start: int) -> int:
    """Where an answer begins: with some tokenizers LLaVA supervises the last token of `ASSISTANT:` with it."""
    first, before = processor.tokenizer.convert_ids_to_tokens(ids[start - 1 : start + 1].clip(0).tolist())[::-1]
    return start + 1 if first in (":", "]") and before != first else start


def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, with an image or without."""
    ends = (reference.processor.tokenizer.eos_token_id,)
    return [_text(reference.processor, ids) for ids in spliced.generate(reference, prompts, ends, max_new_tokens)]


def _text(processor: LlavaProcessor, ids: list[int]) -> str:
    """An answer's text, without what ends it; some templates end it with a text, which no token stands for."""
    from llava.conversation import SeparatorStyle, conv_templates

    template = conv_templates[processor.template]
    text: str = processor.tokenizer.decode(ids, skip_special_tokens=True)
    return (text.split(template.sep)[0] if template.sep_style == SeparatorStyle.SINGLE else text).strip()
