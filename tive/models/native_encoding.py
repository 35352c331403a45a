"""The processor of a model of transformers: what it makes of a record, and which of its tokens are supervised."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tive.data.conversations import image_paths, placeholder_in
from tive.data.images import BadImage, read_image
from tive.data.media import IMAGE_TAG, StoredImage
from tive.data.trained import conversation_of, is_trained_on
from tive.models import Encoded, LeftOut, ModelFiles
from tive.models.checkpoint import loading
from tive.models.common import IGNORE, packed, supervised_runs
from tive.util.errors import UserError
from tive.util.files import read_object
from tive.util.text import first_line

_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class NativeProcessor:
    """What a loader's worker needs to encode records; holds no weights."""

    library: Any  # transformers' processor: tokenizer, image processor and chat template
    image_tokens: frozenset[str]  # what stands for an image in a rendered conversation, and may stand in no text
    turn_ends: frozenset[int]  # ids that can end an assistant's turn: the tokenizer's added tokens, images apart
    max_length: int | None  # longer records are left out
    max_pixels: int | None  # larger images are made smaller before the processor sees them
    dtype: torch.dtype = torch.float32  # what the model computes in, to which pixels are rounded


@dataclass(frozen=True)
class ProcessedRecord:
    """Arrays by the processor's names (pixels `packed`), first axis 1 or the images; labels int64 `[t]`."""

    arrays: dict[str, np.ndarray]
    labels: np.ndarray


@functools.lru_cache(maxsize=1)
def load_processor(files: ModelFiles) -> NativeProcessor:
    """The processor of `model_path` where its files are there, else of the base; the template likewise."""
    from transformers import AutoProcessor

    source = processor_folder(files)
    with loading(source):
        processor = AutoProcessor.from_pretrained(source, trust_remote_code=False)
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{source} holds no processor of text and images ({type(processor).__name__})")
    if not getattr(processor.tokenizer, "is_fast", False):
        raise UserError(f"{source}: a tokenizer without tokenizer.json is not supported; convert it with transformers")
    given = _template_in(files.folder)
    if files.chat_template is not None:
        if not os.path.isfile(files.chat_template):
            raise UserError(f"the chat template {files.chat_template} is not there; check the path (chat_template)")
        with loading(files.chat_template):
            given = Path(files.chat_template).read_text(encoding="utf-8")
    processor.chat_template = given or processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(processor.chat_template, str):
        raise UserError(
            f"neither {files.folder} nor {files.base} holds one chat template; name a file as chat_template"
        )
    tokens = image_tokens(processor)
    added = processor.tokenizer.added_tokens_decoder.items()
    ends = {number for number, token in added if token.content.strip() and token.content not in tokens}
    return NativeProcessor(processor, tokens, frozenset(ends), files.max_length, files.max_pixels)


def image_tokens(processor: Any) -> frozenset[str]:
    """The tokens that the processor names, without those of a conversation without images: they end turns."""
    turns = [text_message("user", "Hello."), text_message("assistant", "Hello!")]
    try:
        plain = processor.apply_chat_template(turns, tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise UserError(f"the chat template refuses one question with its answer: {first_line(error)}") from error
    named = {value for name, value in vars(processor).items() if name.endswith("_token") and isinstance(value, str)}
    return frozenset(token for token in named if token not in plain)


def processor_folder(files: ModelFiles) -> Path:
    there = {path.name for path in files.folder.glob("*.json")}
    has_images = there & {"preprocessor_config.json", "processor_config.json"}
    return files.folder if has_images and there >= {"tokenizer.json", "tokenizer_config.json"} else files.base


def _template_in(folder: Path) -> str | None:
    """The chat template in a folder, in any of the three files that releases have written it to."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    files = [file for name in ("chat_template.json", "tokenizer_config.json") if (file := folder / name).is_file()]
    templates = [read_object(file).get("chat_template") for file in files]
    return next((template for template in templates if isinstance(template, str)), None)


def record_problem(record: Any) -> str | None:
    """What keeps a record from being encoded, as far as its text tells; None if nothing does."""
    try:
        _read(record)
    except (LeftOut, ValueError) as problem:
        return str(problem)
    return None


def _read(record: Any) -> tuple[str | None, list[dict[str, str]], list[str | StoredImage]]:
    """A record's system prompt, its turns and its images, paths or the images themselves."""
    converted = conversation_of(record)
    turns, images = converted["conversations"], list(image_paths(converted))
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
    if images and tags != len(images):
        mark = placeholder_in(turns)
        raise LeftOut(f"has {len(images)} images and {tags} tags {IMAGE_TAG}" + (f" (but `{mark}`)" if mark else ""))
    if images and any(IMAGE_TAG in turn["value"] for turn in turns if turn["from"] == "gpt"):
        raise LeftOut("has an image in an answer")
    return converted.get("system"), turns, images


def encode(processor: NativeProcessor, record: dict[str, Any], image_folder: str) -> Encoded:
    """One record by processor and chat template; answers and the ends of their turns are supervised."""
    try:
        system, turns, paths = _read(record)
        images = [read_image(image_folder, path, upright=True) for path in paths]
    except (BadImage, ValueError) as error:
        raise LeftOut(str(error)) from error
    return encode_turns(processor, system, turns, images)


def encode_turns(
    processor: NativeProcessor, system: str | None, turns: list[dict[str, str]], images: list[Image.Image]
) -> Encoded:
    """`encode` for a conversation whose images are open."""
    library, tokenizer = processor.library, processor.library.tokenizer
    messages = [] if system is None else [text_message("system", system)]
    messages += [_message(turn, bool(images)) for turn in turns]
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    if any(token in text for token in processor.image_tokens for text in texts):
        raise LeftOut("an image token in its text")
    trained = [is_trained_on(turn) for turn in turns if turn["from"] == "gpt"]
    shown = [_shrunk(image, processor.max_pixels) for image in images]
    try:
        text, spans = answer_spans(lambda messages: library.apply_chat_template(messages, tokenize=False), messages)
        # A template that prints the first token itself would get it twice.
        add_first = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
        tokens = tokenizer(text, add_special_tokens=add_first, return_offsets_mapping=True)
        outputs = library(
            text=[text], images=[shown] if shown else None, return_tensors="pt", add_special_tokens=add_first
        )
    except (LeftOut, MemoryError):
        raise
    # They raise what they like: at a role out of turn, at an image of a shape that is not taken.
    except Exception as error:
        raise LeftOut(f"the chat template or the processor refuses it: {first_line(error)}") from error
    spans = [span for span, counts in zip(spans, trained, strict=True) if counts]
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    arrays |= {name: packed(a, processor.dtype) for name, a in arrays.items() if np.issubdtype(a.dtype, np.floating)}
    ids, plain = arrays["input_ids"][0], tokens["input_ids"]
    if processor.max_length is not None and len(ids) > processor.max_length:
        raise LeftOut("longer than the maximum length")
    labels = np.full(len(ids), IGNORE)
    answers = token_spans(text, tokens["offset_mapping"], plain, spans, processor.turn_ends)
    for start, stop in align(np.asarray(plain), ids, answers):
        labels[start:stop] = ids[start:stop]
    supervised = int((labels[1:] != IGNORE).sum())
    if not supervised:
        raise LeftOut("no supervised token")
    return Encoded(len(ids), supervised, "image" if images else "text", ProcessedRecord(arrays, labels))


def answers(processor: NativeProcessor, record: Encoded) -> list[tuple[Encoded, str]]:
    """Each answer of a record, the true earlier turns before it, unless a later turn brings an image."""
    inputs, asked = record.inputs, []
    tokenizer = processor.library.tokenizer
    ids = inputs.arrays["input_ids"][0]
    images = np.isin(ids, tokenizer.convert_tokens_to_ids(sorted(processor.image_tokens)))
    for start, stop in supervised_runs(inputs.labels):
        if images[start:].any():
            continue
        # What has the shape of the ids is cut; the images are all before the cut.
        cut = {name: a[:, :start] if a.shape == (1, len(ids)) else a for name, a in inputs.arrays.items()}
        prompt = Encoded(start, 0, record.group, ProcessedRecord(cut, inputs.labels[:start]))
        asked.append((prompt, tokenizer.decode(ids[start:stop], skip_special_tokens=True).strip()))
    return asked


def _message(turn: dict[str, str], has_images: bool) -> dict[str, Any]:
    """A turn as a message of parts; white space around an image belongs to its tag."""
    pieces = turn["value"].split(IMAGE_TAG) if has_images else [turn["value"]]
    if len(pieces) == 1:
        return text_message(_ROLES[turn["from"]], pieces[0])
    content = []
    for number, piece in enumerate(map(str.strip, pieces)):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece}] if piece else []
    return {"role": _ROLES[turn["from"]], "content": content}


def _shrunk(image: Image.Image, max_pixels: int | None) -> Image.Image:
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / pixels)
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))


# Which tokens are an answer's

Message = dict[str, Any]
Span = tuple[int, int]


def text_message(role: str, text: str) -> Message:
    """A message of one text part."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def answer_spans(render: Callable[[list[Message]], str], messages: Sequence[Message]) -> tuple[str, list[Span]]:
    """The rendered conversation, and where each answer's characters stand in it.

    A template (`render`) may strip an answer's outer white space, and print something in front of it or behind it. A
    `LeftOut` where it prints an answer otherwise than it is, not at all, or more than once.
    """
    answers = [message["content"][0]["text"] for message in messages if message["role"] == "assistant"]

    def rendered(texts: Sequence[str]) -> str:
        rest = iter(texts)
        return render([text_message("assistant", next(rest)) if m["role"] == "assistant" else m for m in messages])

    whole = rendered(answers)
    marks = [f"\uf8f0{number}\uf8f1" for number in range(len(answers))]
    letters = [len(answer.rstrip()) for answer in answers]
    rest = rendered([text[:end] + mark + text[end:] for text, end, mark in zip(answers, letters, marks, strict=True)])
    pieces = []
    for mark in marks:
        piece, is_there, rest = rest.partition(mark)
        if not is_there or mark in rest:
            raise LeftOut("the chat template does not print each answer once")
        pieces.append(piece)
    if "".join([*pieces, rest]) != whole:
        raise LeftOut("the chat template changes an answer")
    if rendered([answer.lstrip() for answer in answers]) == whole:
        answers = [answer.lstrip() for answer in answers]
    if rendered([answer.rstrip() for answer in answers]) == whole:
        answers = [answer.rstrip() for answer in answers]
    spans, end = [], 0
    for piece, answer in zip(pieces, answers, strict=True):
        end += len(piece)
        start = end - len(answer.rstrip())
        spans.append((start, start + len(answer)))
        if whole[slice(*spans[-1])] != answer:
            raise LeftOut("the chat template changes an answer")
    return whole, spans


def token_spans(
    text: str, offsets: Sequence[Span], ids: Sequence[int], spans: Sequence[Span], ends: Collection[int]
) -> list[Span]:
    """Tokens that overlap each answer's characters, and the end of the turn where one follows.

    Args:
        offsets: each token's characters in `text`.
        ends: ids that can end a turn: the tokenizer's added tokens, images apart. One does where only white space
            stands between it and the answer.
    """
    tokens = []
    first = 0
    for start, stop in spans:
        while first < len(ids) and offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(ids) and offsets[last][0] < stop and offsets[last][1] > start:
            last += 1
        end = last
        while end < len(ids) and ids[end] not in ends and not text[slice(*offsets[end])].strip():
            end += 1
        if end < len(ids) and ids[end] in ends and not text[stop : offsets[end][0]].strip():
            last = end + 1
        tokens.append((first, last))
        first = last
    return tokens


def align(ids: np.ndarray, expanded: np.ndarray, spans: Sequence[Span]) -> list[Span]:
    """Where spans of tokens stand once each image's placeholder has become the image's tokens.

    Each span is searched behind the one before it, with as many of the tokens in front of it as are there: all of them,
    back to the last image. That includes the template's opening of an answer, so no other text is taken for it.

    A `LeftOut` where a span is not there.

    Args:
        ids: int64 `[t]`, with placeholders.
        expanded: int64 `[T]`, as the processor returns it.
    """
    text, whole = ("".join(map(chr, row.tolist())) for row in (ids, expanded))  # a token a character, to search in
    aligned = []
    behind, behind_whole = 0, 0
    for start, stop in spans:
        if start == stop:
            continue
        for low in range(behind, max(start, behind + 1)):
            position = whole.find(text[low:stop], behind_whole)
            if position >= 0:
                break
        else:
            raise LeftOut("the processor changes the text around its images")
        behind, behind_whole = stop, position + stop - low
        aligned.append((position + start - low, behind_whole))
    tail = text[behind:]
    if tail and whole.endswith(tail) and len(whole) - len(tail) != behind_whole:
        raise LeftOut("the processor changes the text around its images")
    return aligned
