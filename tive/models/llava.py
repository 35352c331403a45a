"""LLaVA (1.5 and its kin): load a model, encode a record, the losses of a batch, the answers that it generates.

The template, the masking and the splicing of image features are LLaVA's own functions, called, not rewritten.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tive.data.images import BadImage, find_image, open_image, resize_padded
from tive.data.records import image_of, problem_of
from tive.data.training_record import RECORD_FILE, read_record, weight_files
from tive.models import Answer, Encoded, Hints, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import adapter_file, copy_into, load_adapter, read_tensors, tensor_names
from tive.models.common import IGNORE, base_of, freeze, library_versions, loading, losses_at_supervised, refuse_options
from tive.models.generation import generate_ids, supervised_runs
from tive.models.llava_files import DEFAULT_TEMPLATE, PROJECTOR_FILE, check_model
from tive.models.llava_files import identity as identity
from tive.util.errors import UserError
from tive.util.files import read_json

HINTS = Hints(template="the training's, v1 where none is recorded", trainer="finetune_lora.sh")
TOWER = ".vision_tower."


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


@dataclass(frozen=True)
class Processor:
    """What a loader's worker needs to encode records; holds no weights."""

    template: str
    tokenizer: Any
    image_processor: Any
    image_config: SimpleNamespace
    image_features: int
    max_length: int


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base, projector and LoRA adapter, or a whole model, into LLaVA's own class, proven to be what is on disk.

    Raises:
        UserError: a part is missing or does not fit the others; the file is named.
    """
    template = check_model(files)
    folder, base = Path(files.model_path), base_of(files)
    if read_record(folder) is None and files.model_base is None:
        print(f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE}")
    elif read_record(folder) is None:
        named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        print(
            f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE} on {files.model_base} "
            f"(its adapter_config.json names the base {named})"
        )
    from llava.model.language_model.llava_llama import LlavaConfig
    from transformers import AutoTokenizer

    config = LlavaConfig.from_pretrained(files.model_path)
    if files.vision_tower is not None:
        config.mm_vision_tower = files.vision_tower
    config.tokenizer_padding_side = "right"
    # LLaVA would load the tower with the model; its weights come last here, from where the training had them.
    tower_in_base, config.unfreeze_mm_vision_tower = getattr(config, "unfreeze_mm_vision_tower", False), False
    with loading(f"the tokenizer of {base}"):
        tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False, trust_remote_code=False)
    tokenizer.model_max_length = getattr(config, "tokenizer_model_max_length", None) or 2048
    tokenizer.pad_token = tokenizer.unk_token

    model = _load_language_model(base, config, dtype)
    adapter = None if files.model_base is None else adapter_file(folder)
    if adapter is None:
        _load_tower(model.get_vision_tower())
        if tower_in_base:
            copy_into(model, _tower_of_base(base), base)
    else:
        _load_trained(model, folder, adapter, base if tower_in_base else None)
    placeholders = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if placeholders:
        raise UserError(f"no file of {folder} or {base} holds {placeholders[0]}; train the model again")
    model.to(device=device, dtype=dtype)

    freeze(model, gradient_checkpointing)
    model.config.use_cache = False
    image_config = SimpleNamespace(image_aspect_ratio=getattr(config, "image_aspect_ratio", None))
    tower = model.get_vision_tower()
    features = tower.num_patches + (tower.select_feature == "cls_patch")
    processor = Processor(
        template, tokenizer, tower.image_processor, image_config, features, tokenizer.model_max_length
    )
    return Reference(model, model.model.layers, processor, device, dtype)


def _load_trained(model: Any, folder: Path, adapter: Path, tower_base: Path | None) -> None:
    """Put projector, tower and adapter into the base's model, in the order of the training.

    Args:
        tower_base: where the tower's weights are, if the base's tower was tuned.
    """
    beside = _trained_beside_lora(folder / PROJECTOR_FILE)
    copy_into(model, {name: value for name, value in beside.items() if TOWER not in name}, folder / PROJECTOR_FILE)
    tower_has_lora = any(TOWER in name for name in tensor_names(adapter))
    if not tower_has_lora:  # else the tower's q_proj, k_proj ... would get adapters that were not trained
        load_adapter(model, folder)
    _load_tower(model.get_vision_tower())
    if tower_base is not None:
        copy_into(model, _tower_of_base(tower_base), tower_base)
    copy_into(model, {name: value for name, value in beside.items() if TOWER in name}, folder / PROJECTOR_FILE)
    if tower_has_lora:
        load_adapter(model, folder)


def _load_language_model(base: Path, config: Any, dtype: torch.dtype) -> Any:
    """LLaVA's model with the weights of a base or a whole model; of a base, projector and tower are still to come."""
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM
    from transformers.utils import is_torch_sdpa_available, logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the projector is reported missing here because it comes from its own file
    warnings.filterwarnings("ignore", message=".*do_sample.*")  # Vicuna's generation config, which is not used here
    try:
        with loading(str(base)):
            model, found = LlavaLlamaForCausalLM.from_pretrained(
                base,
                config=config,
                torch_dtype=dtype,
                low_cpu_mem_usage=True,
                attn_implementation="sdpa" if is_torch_sdpa_available() else "eager",
                output_loading_info=True,
            )
    finally:
        logging.set_verbosity(level)
    missing = [key for key in found["missing_keys"] if not key.startswith("model.mm_projector.")]
    if missing:
        raise UserError(f"{base} lacks {len(missing)} weights, {missing[0]} among them")
    return model


def _trained_beside_lora(path: Path) -> dict[str, Tensor]:
    """The projector and whatever else was trained whole, by the names that the model without LoRA has."""
    tensors = {}
    for key, value in read_tensors(path).items():
        key = key.removeprefix("base_model.")
        tensors[key.removeprefix("model.") if key.startswith("model.model.") else key] = value
    if not any("mm_projector" in key for key in tensors):
        raise UserError(f"{path} holds no mm_projector weights; train the reference model again")
    return tensors


def _load_tower(tower: Any) -> None:
    """LLaVA's `load_model` for the vision tower, which would start what its files lack from random numbers."""
    from transformers import CLIPImageProcessor, CLIPVisionModel

    with loading(f"the vision tower {tower.vision_tower_name}"):
        tower.image_processor = CLIPImageProcessor.from_pretrained(tower.vision_tower_name)
        tower.vision_tower, found = CLIPVisionModel.from_pretrained(tower.vision_tower_name, output_loading_info=True)
    missing = found["missing_keys"]
    if missing:
        raise UserError(
            f"the vision tower {tower.vision_tower_name} lacks {len(missing)} weights, {missing[0]} among them; "
            "download it again"
        )
    tower.is_loaded = True


def _tower_of_base(base: Path) -> dict[str, Tensor]:
    """The tuned tower that a LLaVA base holds."""
    found: dict[str, Tensor] = {}
    for path in weight_files(base):
        if any(TOWER in name for name in tensor_names(path)):
            found |= {name: value for name, value in read_tensors(path).items() if TOWER in name}
    if not found:
        raise UserError(f"{base} says that its vision tower was tuned and holds no weights of it; name the whole model")
    return found


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
