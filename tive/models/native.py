"""Vision-language models of transformers' own (Qwen-VL, InternVL, LLaVA-OneVision and others), as one family.

Nothing here knows a model by its name: the processor makes the inputs, the chat template the text, transformers' class
the logits. What would be wrong without a sign is proven at loading instead: every tensor of the adapter has its one
place, and a batch gives what its records give alone.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tive.data.formats import to_llava
from tive.data.images import BadImage, find_image, open_image
from tive.data.records import IMAGE_TAG
from tive.models import Encoded, Hints, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import adapter_file, read_tensors
from tive.models.common import IGNORE, fingerprint, freeze, library_versions, loading, losses_of_logits
from tive.models.native_adapter import attach_adapter, check_adapter
from tive.models.native_labels import align, answer_spans, text_message, token_spans
from tive.util.errors import UserError
from tive.util.files import read_json

NAME = "native"
HINTS = Hints(template="the processor's chat template", trainer="TRL, ms-swift or LLaMA-Factory")
OLDEST = (4, 57)
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")
_ROLES = {"human": "user", "gpt": "assistant"}
# Largest relative difference between a loss in a batch and alone.
_BATCH_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Processor:
    """What a loader's worker needs to encode records; holds no weights.

    Attributes:
        library: transformers' processor: tokenizer, image processor and chat template.
        max_length: longer records are left out; None for no limit.
        max_pixels: larger images are made smaller before the processor sees them; None for no limit.
    """

    library: Any
    max_length: int | None
    max_pixels: int | None


@dataclass(frozen=True)
class Inputs:
    """One record's arrays by the processor's names, first axis 1 or the images, and its labels int64 `[t]`."""

    arrays: dict[str, np.ndarray]
    labels: np.ndarray


def prepare_torchvision() -> None:
    """Make torchvision importable where its operators do not fit the installed torch.

    PyPI's torchvision beside a CPU build of torch (and any other mismatch) fails on an operator that image processors
    never call; declaring it is enough for them.
    """
    import importlib.util
    import sys

    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (RuntimeError, ImportError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
# Here and not at the first use: a loader's worker that is not forked imports this file, then the pickled processor.
prepare_torchvision()


def check_files(files: ModelFiles) -> None:
    """What can be known of the model without loading it.

    Raises:
        UserError: a file is missing, not supported, or does not fit the others.
    """
    _check_library()
    folder, base = Path(files.model_path), Path(files.model_base)
    check_adapter(folder)
    beside = [
        file.name
        for pattern in ("*.safetensors", "*.bin")
        for file in sorted(folder.glob(pattern))
        if file.name not in ("adapter_model.safetensors", "adapter_model.bin", "training_args.bin")
    ]
    if beside:
        raise UserError(
            f"{folder / beside[0]}: trained weights beside the adapter are not supported; train with LoRA alone "
            "(in ms-swift with --freeze_vit true), or with modules_to_save, which the adapter's file holds"
        )
    config = read_json(base / "config.json")
    if "quantization_config" in config:
        raise UserError(f"{base} is quantised; name the same base without quantisation as --model_base")
    from transformers import AutoConfig, AutoModelForImageTextToText

    try:
        loaded = AutoConfig.from_pretrained(base)
        known = type(loaded) in AutoModelForImageTextToText._model_mapping
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{base}/config.json: {next(iter(str(error).splitlines()), error)}") from error
    if not known:
        raise UserError(f"{base}/config.json: {config.get('model_type')!r} is no vision-language model of transformers")
    if files.chat_template is not None and not Path(files.chat_template).is_file():
        raise UserError(f"--chat_template {files.chat_template} is not a file")
    _processor(files)


def _check_library() -> None:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise UserError(
            f"this reference model needs transformers {'.'.join(map(str, OLDEST))} or newer, and this environment has "
            f"{transformers.__version__}; make the other environment with `bash scripts/setup.sh native` and run the "
            "same command with .venv-native/bin/python"
        )


@functools.lru_cache(maxsize=1)
def _processor(files: ModelFiles) -> Any:
    """The processor of `model_path` where its files are there, else of the base; the template likewise.

    Raises:
        UserError: it cannot be loaded, or has no tokenizer, image processor or template.
    """
    from transformers import AutoProcessor

    folder, base = Path(files.model_path), Path(files.model_base)
    source = _processor_folder(files)
    try:
        processor = AutoProcessor.from_pretrained(source)
    except ImportError as error:
        needed = next((line for line in str(error).splitlines() if line.strip()), "")
        raise UserError(f"the processor of {source} needs a library that is not installed: {needed}") from error
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise UserError(f"cannot load the processor of {source}: {reason}") from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise UserError(f"{source} holds no processor of text and images ({type(processor).__name__})")
    if not getattr(processor.tokenizer, "is_fast", False):
        raise UserError(f"{source}: a tokenizer without tokenizer.json is not supported; convert it with transformers")
    if files.chat_template is not None:
        processor.chat_template = Path(files.chat_template).read_text(encoding="utf-8")
    elif template := _template_in(folder):
        processor.chat_template = template
    else:
        processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not isinstance(processor.chat_template, str):
        raise UserError(f"neither {folder} nor {base} holds one chat template; name a file with --chat_template")
    return processor


def _processor_folder(files: ModelFiles) -> Path:
    folder = Path(files.model_path)
    has_tokenizer = (folder / "tokenizer.json").is_file() and (folder / "tokenizer_config.json").is_file()
    has_images = any((folder / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    return folder if has_tokenizer and has_images else Path(files.model_base)


def _template_in(folder: Path) -> str | None:
    """The chat template in a folder, in any of the three files that releases have written it to."""
    jinja, in_json, tokenizer = (folder / name for name in (*_TEMPLATE_FILES, "tokenizer_config.json"))
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    for file in (in_json, tokenizer):
        template = read_json(file).get("chat_template") if file.is_file() else None
        if isinstance(template, str):
            return template
    return None


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, base, processor, template, limits, libraries.

    Image processors of two backends, and of two releases, resize differently: their class and the versions count.
    """
    folder, base = Path(files.model_path), Path(files.model_base)
    source = _processor_folder(files)
    processor = _processor(files)
    adapter = adapter_file(folder)
    assert adapter is not None
    read = [adapter, folder / "adapter_config.json", base / "config.json", *(source / name for name in _PROCESSOR_FILES)]
    parts = [
        fingerprint([file for file in read if file.is_file()], [base]),
        processor.chat_template,
        type(processor).__name__,
        type(processor.image_processor).__name__,
        json.dumps([files.max_length, files.max_pixels, versions()], sort_keys=True),
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def versions() -> dict[str, str]:
    return library_versions("transformers", "tokenizers", "peft", "accelerate", "pillow", "torchvision")


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base and adapter, and prove that each tensor found its place and that batches do not mix records.

    Raises:
        UserError: a part is missing or does not fit, or a batch gives other losses than its records alone.
    """
    check_files(files)
    from transformers import AutoConfig, AutoModelForImageTextToText
    from transformers.utils import logging

    with loading(f"--model_base {files.model_base}"):
        config = AutoConfig.from_pretrained(files.model_base)
        _turn_off_dropout(config)
        level = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            model, found = AutoModelForImageTextToText.from_pretrained(
                files.model_base, config=config, dtype=dtype, output_loading_info=True
            )
        finally:
            logging.set_verbosity(level)
    missing = sorted(found["missing_keys"])
    if missing:
        raise UserError(f"--model_base {files.model_base} lacks {len(missing)} weights, {missing[0]} among them")
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; its losses cannot be computed")
    embedding = model.get_input_embeddings()
    owner = next(module for module in model.modules() if any(child is embedding for child in module.children()))
    if not isinstance(getattr(owner, "layers", None), nn.ModuleList):
        raise UserError(f"{type(model).__name__} keeps its language model's layers in a way that is not supported")
    path = adapter_file(Path(files.model_path))
    assert path is not None
    attach_adapter(model, Path(files.model_path), read_tensors(path), dtype)
    # Not to(dtype): that would round the rotary frequencies.
    model.to(device)
    freeze(model, gradient_checkpointing)
    processor = Processor(_processor(files), files.max_length, files.max_pixels)
    reference = Reference(model, owner.layers, processor, device, dtype)
    _prove_batches(reference)
    return reference


def _turn_off_dropout(config: Any) -> None:
    """Set every dropout of a model's config and of its parts to 0: some are functions that no mode of a module ends."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _turn_off_dropout(value)


def _prove_batches(reference: Reference) -> None:
    """Compare the losses of made-up records in one batch with their losses alone.

    Raises:
        UserError: they differ, or such records cannot be computed.
    """
    what = f"{type(reference.model).__name__} with {type(reference.processor.library).__name__}"
    numbers = np.random.default_rng(0)

    def made_up(question: str, answer: str, *sizes: tuple[int, int]) -> Encoded:
        images = [Image.fromarray(numbers.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
        turns = [{"from": "human", "value": IMAGE_TAG * len(sizes) + question}, {"from": "gpt", "value": answer}]
        return _encode(Processor(reference.processor.library, None, None), None, turns, images)

    groups = [
        [made_up("What is it?", "Noise.", (64, 96)), made_up("And this, is it any better?", "No, noise too.", (90, 56))],
        [made_up("Hello.", "Hello!"), made_up("Count to five, please.", "One, two, three, four, five.")],
    ]
    try:
        with torch.no_grad():
            for records in groups:
                together = record_losses(reference, records).losses
                alone = torch.cat([record_losses(reference, [record]).losses for record in records])
                difference = float(((together - alone) / alone).abs().max())
                if not difference <= _BATCH_TOLERANCE[reference.dtype]:
                    raise UserError(f"{what}: a batch gives other losses than its records alone (by {difference:.1g})")
    except LeftOut as reason:
        raise UserError(f"{what}: a made-up record cannot be encoded: {reason}") from reason


def record_problem(record: Any) -> str | None:
    """What keeps a record from being encoded, as far as its text tells; None if nothing does."""
    try:
        _read(record)
    except (LeftOut, ValueError) as problem:
        return str(problem)
    return None


def _read(record: Any) -> tuple[str | None, list[dict[str, str]], list[str]]:
    """A record's system prompt, its turns and its images' paths."""
    converted = to_llava(record)
    turns, images = converted["conversations"], converted.get("image") or []
    images = [images] if isinstance(images, str) else images
    tags = sum(turn["value"].count(IMAGE_TAG) for turn in turns)
    if images and tags != len(images):
        raise LeftOut(f"has {len(images)} images and {tags} tags {IMAGE_TAG}")
    if images and any(IMAGE_TAG in turn["value"] for turn in turns if turn["from"] == "gpt"):
        raise LeftOut("has an image in an answer")
    return converted.get("system"), turns, images


def encode(processor: Processor, record: dict[str, Any], image_folder: str) -> Encoded:
    """Encode one record with its processor and chat template; answers and the ends of their turns are supervised.

    Raises:
        LeftOut: an image cannot be used, template or processor refuse the record, or nothing in it is supervised.
    """
    try:
        system, turns, paths = _read(record)
        images = [open_image(find_image(image_folder, path)) for path in paths]
    except (BadImage, ValueError) as error:
        raise LeftOut(str(error)) from error
    return _encode(processor, system, turns, images)


def _encode(
    processor: Processor, system: str | None, turns: list[dict[str, str]], images: list[Image.Image]
) -> Encoded:
    library, tokenizer = processor.library, processor.library.tokenizer
    messages = [] if system is None else [text_message("system", system)]
    messages += [_message(turn, bool(images)) for turn in turns]
    special = {value for name, value in vars(library).items() if name.endswith("_token") and isinstance(value, str)}
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    if any(token in text for token in special for text in texts):
        raise LeftOut("an image token in its text")
    try:
        text, spans = answer_spans(lambda messages: library.apply_chat_template(messages, tokenize=False), messages)
    except LeftOut:
        raise
    except Exception as error:  # a template raises what it likes
        raise LeftOut(f"the chat template refuses it: {next(iter(str(error).splitlines()), '')}") from error
    # A template that prints the first token itself would get it twice.
    add_first = not (tokenizer.bos_token and text.startswith(tokenizer.bos_token))
    tokens = tokenizer(text, add_special_tokens=add_first, return_offsets_mapping=True)
    images = [_shrunk(image, processor.max_pixels) for image in images]
    try:
        outputs = library(
            text=[text], images=[images] if images else None, return_tensors="pt", add_special_tokens=add_first
        )
    except Exception as error:  # an image of a shape that it does not take, for example
        raise LeftOut(f"the processor refuses it: {next(iter(str(error).splitlines()), '')}") from error
    arrays = {name: np.asarray(value) for name, value in outputs.items()}
    ids = arrays["input_ids"][0]
    if processor.max_length is not None and len(ids) > processor.max_length:
        raise LeftOut("longer than the maximum length")
    ends = {number for number, token in tokenizer.added_tokens_decoder.items() if token.content.strip()}
    ends -= set(tokenizer.convert_tokens_to_ids(list(special)))
    plain = np.asarray(tokens["input_ids"])
    labels = np.full(len(ids), IGNORE)
    for start, stop in align(
        plain, ids, token_spans(text, tokens["offset_mapping"], tokens["input_ids"], spans, ends)
    ):
        labels[start:stop] = ids[start:stop]
    supervised = int((labels[1:] != IGNORE).sum())
    if not supervised:
        raise LeftOut("no supervised token")
    return Encoded(len(ids), supervised, "image" if images else "text", Inputs(arrays, labels))


def _message(turn: dict[str, str], has_images: bool) -> dict[str, Any]:
    """A turn as a message of parts; white space around an image belongs to its tag."""
    pieces = turn["value"].split(IMAGE_TAG) if has_images else [turn["value"]]
    if len(pieces) == 1:
        return text_message(_ROLES[turn["from"]], pieces[0])
    content: list[dict[str, str]] = []
    for number, piece in enumerate(pieces):
        content += [{"type": "image"}] if number else []
        content += [{"type": "text", "text": piece.strip()}] if piece.strip() else []
    return {"role": _ROLES[turn["from"]], "content": content}


def _shrunk(image: Image.Image, max_pixels: int | None) -> Image.Image:
    pixels = image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return image
    factor = math.sqrt(max_pixels / pixels)
    return image.resize((max(1, int(image.width * factor)), max(1, int(image.height * factor))))


def record_losses(reference: Reference, records: list[Encoded], el2n: bool = False) -> RecordLosses:
    """Mean cross-entropy of each record over its supervised tokens, logits at those positions alone.

    The whole model runs, so what it does to its logits is done; a hook keeps the supervised positions before the
    output embeddings.
    """
    inputs, labels = _collate(reference, records)
    targets = labels[:, 1:]
    supervised = targets != IGNORE

    def keep_supervised(_head: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][:, :-1][supervised], *arguments[1:])

    hook = reference.model.get_output_embeddings().register_forward_pre_hook(keep_supervised)
    try:
        logits = reference.model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return losses_of_logits(logits.float(), targets[supervised], supervised.sum(dim=1), el2n)


def _collate(reference: Reference, records: list[Encoded]) -> tuple[dict[str, Tensor], Tensor]:
    """The model's inputs and the labels `[B, T]`, padded on the right.

    What has the shape of the ids is padded; anything else (images, their sizes) is padded with zeros in its trailing
    axes and concatenated. No key of the processor is dropped.
    """
    width = max(record.length for record in records)
    labels = torch.full((len(records), width), IGNORE)
    by_name: dict[str, list[np.ndarray]] = {}
    for row, record in enumerate(records):
        labels[row, : record.length] = torch.from_numpy(record.inputs.labels)
        for name, array in record.inputs.arrays.items():
            per_token = array.shape == (1, record.length)
            by_name.setdefault(name, []).append(_padded(array, (width,)) if per_token else array)
    inputs = {}
    for name, arrays in by_name.items():
        shape = tuple(max(sizes) for sizes in zip(*(array.shape[1:] for array in arrays), strict=True))
        joined = torch.from_numpy(np.concatenate([_padded(array, shape) for array in arrays])).to(reference.device)
        inputs[name] = joined.to(reference.dtype) if joined.is_floating_point() else joined
    return inputs, labels.to(reference.device)


def _padded(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An array with zeros behind its entries, up to `shape` in all axes but the first."""
    missing = [(0, size - have) for size, have in zip(shape, array.shape[1:], strict=True)]
    return np.pad(array, [(0, 0), *missing]) if any(behind for _, behind in missing) else array
