"""LLaVA (1.5 and its kin): load a LoRA reference model, encode a record, the losses of a batch.

The template, the masking and the splicing of image features are LLaVA's own functions, called, not rewritten.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.data.images import BadImage, find_image, open_image
from tive.data.records import image_of, problem_of
from tive.models import Encoded, Hints, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import adapter_file, copy_into, load_adapter, read_tensors
from tive.models.common import IGNORE, fingerprint, freeze, library_versions, loading, losses_at_supervised
from tive.util.errors import UserError
from tive.util.files import read_json

HINTS = Hints(template="v1", trainer="finetune_lora.sh")
_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


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

    tokenizer: Any
    image_processor: Any
    image_config: SimpleNamespace
    image_features: int
    max_length: int


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base, projector and LoRA adapter into LLaVA's own class, and prove that they are what is on disk.

    Raises:
        UserError: a part is missing or does not fit the others; the file is named.
    """
    check_files(files)
    model_path, model_base = files.model_path, files.model_base
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import AutoTokenizer
    from transformers.utils import is_torch_sdpa_available, logging

    config = LlavaConfig.from_pretrained(model_path)
    if files.vision_tower is not None:
        config.mm_vision_tower = files.vision_tower
    config.tokenizer_padding_side = "right"
    with loading(f"the tokenizer of --model_base {model_base}"):
        tokenizer = AutoTokenizer.from_pretrained(model_base, use_fast=False, trust_remote_code=False)
    tokenizer.model_max_length = getattr(config, "tokenizer_model_max_length", None) or 2048
    tokenizer.pad_token = tokenizer.unk_token

    level = logging.get_verbosity()
    logging.set_verbosity_error()  # the projector is reported missing here because it comes from its own file
    warnings.filterwarnings("ignore", message=".*do_sample.*")  # Vicuna's generation config, which is not used here
    try:
        with loading(f"--model_base {model_base}"):
            model, found = LlavaLlamaForCausalLM.from_pretrained(
                model_base,
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
        raise UserError(f"--model_base {model_base} lacks {len(missing)} weights, {missing[0]} among them")

    _load_projector(model, Path(model_path) / "non_lora_trainables.bin")
    # LoRA goes on before the vision tower is loaded, or the tower's q_proj, k_proj ... get adapters too.
    load_adapter(model, Path(model_path))
    tower = model.get_vision_tower()
    _load_tower(tower)
    placeholders = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if placeholders:
        raise UserError(f"no file of {model_path} or {model_base} holds {placeholders[0]}; train the model again")
    model.to(device=device, dtype=dtype)

    freeze(model, [tower], gradient_checkpointing)
    model.config.use_cache = False
    image_config = SimpleNamespace(image_aspect_ratio=getattr(config, "image_aspect_ratio", None))
    features = tower.num_patches + (tower.select_feature == "cls_patch")
    processor = Processor(tokenizer, tower.image_processor, image_config, features, tokenizer.model_max_length)
    return Reference(model, model.model.layers, processor, device, dtype)


def _load_tower(tower: nn.Module) -> None:
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


def check_files(files: ModelFiles) -> None:
    """What can be known about the model without loading it, in milliseconds.

    Raises:
        UserError: a file is missing, or adapter, base and options do not fit together.
    """
    folder, model_base = Path(files.model_path), files.model_base
    config = read_json(folder / "config.json")
    if not (folder / "adapter_config.json").is_file() or adapter_file(folder) is None:
        raise UserError(
            f"{folder} holds no LoRA adapter (adapter_config.json and adapter_model.safetensors or .bin); "
            "train one with finetune_lora.sh"
        )
    if not (folder / "non_lora_trainables.bin").is_file():
        raise UserError(
            f"{folder} lacks non_lora_trainables.bin, the trained projector, which LLaVA's own trainer writes only "
            "when training ends; run finetune_lora.sh, which writes it beside every checkpoint, or go on to the end with it "
            "(the same OUTPUT_DIR) and name that OUTPUT_DIR as --model_path"
        )
    if not Path(model_base, "config.json").is_file():
        raise UserError(f"--model_base {model_base} is not a model folder (no config.json); name the base's folder")
    base = read_json(Path(model_base) / "config.json")
    for key in _SHAPE_KEYS:
        if key in base and key in config and base[key] != config[key]:
            raise UserError(
                f"--model_base {model_base} has {key} {base[key]}, the adapter in {folder} was trained on "
                f"{config[key]}; name the base model that finetune_lora.sh used"
            )
    if config.get("mm_use_im_start_end") or config.get("mm_use_im_patch_token"):
        raise UserError(f"{folder}/config.json: image start, end and patch tokens are not supported")
    if config.get("image_aspect_ratio") == "anyres" or config.get("mm_patch_merge_type", "flat") != "flat":
        raise UserError(f"{folder}/config.json: images of several tiles (anyres) are not supported")
    tower = files.vision_tower or config.get("mm_vision_tower")
    if not tower or (not os.path.isdir(tower) and not tower.startswith(("openai/", "laion/"))):
        raise UserError(f"the vision tower {tower} is not there; name its folder with --vision_tower")


def _load_projector(model: nn.Module, path: Path) -> None:
    tensors = {}
    for key, value in read_tensors(path).items():
        key = key.removeprefix("base_model.")
        tensors[key.removeprefix("model.") if key.startswith("model.model.") else key] = value
    if not any("mm_projector" in key for key in tensors):
        raise UserError(f"{path} holds no mm_projector weights; train the reference model again")
    copy_into(model, tensors, path)


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, and what is known of base and vision tower."""
    folder, base = Path(files.model_path), Path(files.model_base)
    adapter = adapter_file(folder)
    assert adapter is not None
    tower = files.vision_tower or read_json(folder / "config.json")["mm_vision_tower"]
    return fingerprint([adapter, folder / "non_lora_trainables.bin", base / "config.json"], [base, Path(tower)])


def record_problem(record: Any) -> str | None:
    """What keeps LLaVA from training on a record; None when nothing does."""
    return problem_of(record)


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers depend on."""
    return library_versions("transformers", "peft", "accelerate")


def encode(processor: Processor, record: dict[str, Any], image_folder: str) -> Encoded:
    """Encode one record as LLaVA's trainer does (v1 template, answers supervised).

    Raises:
        LeftOut: the record's image cannot be used, or nothing in it is supervised.
    """
    from llava import conversation
    from llava.mm_utils import process_images
    from llava.train.train import preprocess, preprocess_multimodal

    conversation.default_conversation = conversation.conv_templates["v1"]
    turns = [[dict(turn) for turn in record["conversations"]]]
    image, pixels = image_of(record), None
    if image is not None:
        try:
            picture = open_image(find_image(image_folder, image))
            pixels = process_images([picture], processor.image_processor, processor.image_config)[0].numpy()
        except BadImage as error:
            raise LeftOut(str(error)) from error
        except ValueError as error:  # LLaVA's image processor takes 1x1 and 3x3 pixels for a list of channels
            raise LeftOut(f"unreadable image: {str(error).splitlines()[0]}") from error
        turns = preprocess_multimodal(turns, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        tokens = preprocess(turns, processor.tokenizer, has_image=image is not None)
    input_ids, labels = tokens["input_ids"][0].numpy(), tokens["labels"][0].numpy()
    spliced = _spliced_labels(input_ids, labels, processor)
    if not (spliced[1:] != IGNORE).any():
        # LLaVA calls a conversation without an answer a mismatch too.
        mismatch = "tokenization mismatch" in printed.getvalue() and record["conversations"][-1]["from"] == "gpt"
        raise LeftOut("template mismatch" if mismatch else "no supervised token")
    group = "text" if pixels is None else "image"
    supervised = int((spliced[1:] != IGNORE).sum())
    return Encoded(len(spliced), supervised, group, Inputs(input_ids, labels, pixels))


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
