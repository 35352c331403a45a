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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tive.data.training_record import RECORD_FILE, read_record, versions_of
from tive.models import Encoded, ModelFiles, Reference
from tive.models.adapter import CONFIG_FILE, adapter_file, attach_adapter, check_adapter
from tive.models.checkpoint import (
    load_pretrained,
    loading,
    print_named_base,
    read_config,
    refuse_other,
    stored_in_4bit,
)
from tive.models.common import (
    base_of,
    decoder_layers,
    fingerprint,
    freeze,
    greedy,
    refuse_options,
    until_end,
)
from tive.models.native_encoding import NativeProcessor, load_processor, processor_folder
from tive.models.native_encoding import answers as answers
from tive.models.native_encoding import encode as encode
from tive.models.native_encoding import record_problem as record_problem
from tive.models.native_losses import collate as collate
from tive.models.native_losses import proven as proven
from tive.models.native_losses import record_losses as record_losses
from tive.models.optimizer_state import MOMENTS_FILE
from tive.util.errors import UserError

LIBRARIES: tuple[str, ...] = ("transformers", "tokenizers", "peft", "accelerate", "pillow", "torchvision")
OLDEST = (4, 57)
_PROCESSOR_FILES = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
# Files beside an adapter that hold no weights of its training, or hold the frozen base once more (FSDP).
_NO_TRAINED_WEIGHTS = re.compile(
    r"adapter_model\.(safetensors|bin)|(training_args|optimizer|scheduler)(_\d+)?\.bin|pytorch_model_fsdp(_\d+)?\.bin"
    rf"|{re.escape(MOMENTS_FILE)}"
)


def check_files(files: ModelFiles) -> None:
    """What can be known of the model without loading it.

    Raises:
        UserError: a file is missing, not supported, or does not fit the others.
    """
    _check_library(files.load_in_4bit)
    refuse_options(files, "vision_tower")
    folder, base = Path(files.model_path), base_of(files)
    if files.model_base is not None:
        check_adapter(folder)
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
            if not _NO_TRAINED_WEIGHTS.fullmatch(file.name):
                raise UserError(
                    f"{file}: trained weights beside the adapter are not supported; train with LoRA alone (in ms-swift "
                    "with freeze_vit true), or with modules_to_save, which the adapter's file holds"
                )
    from transformers import AutoConfig, AutoModelForImageTextToText

    model_type = read_config(base, files.load_in_4bit).get("model_type")
    with loading(base):
        config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    record = read_record(folder)
    if record is not None and files.model_base is not None:
        refuse_other(folder, "base model", record.base, base)
    if type(config) not in AutoModelForImageTextToText._model_mapping:
        raise UserError(f"{base}/config.json: {model_type!r} is no vision-language model of transformers")
    if files.chat_template is not None and not Path(files.chat_template).is_file():
        raise UserError(f"the chat template {files.chat_template} is not a file")
    load_processor(files)


def _check_library(load_in_4bit: bool) -> None:
    import transformers

    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise UserError(
            f"this reference model needs transformers {'.'.join(map(str, OLDEST))} or newer, and this environment has "
            f"{transformers.__version__}; make the other environment with `bash scripts/setup.sh native` and run the "
            "same command with .venv-native/bin/python"
        )
    if load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit needs the package bitsandbytes; install it with `pip install bitsandbytes`")
    # What it warns of is proven below, or known: processors of two backends, numbers of tokens out of range.
    transformers.utils.logging.set_verbosity_error()


def pads_images(files: ModelFiles) -> bool:
    """Whether images are padded to a square: no processor of transformers' models does."""
    return False


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, base, processor, template, limits, libraries.

    Image processors of two backends, and of two releases, resize differently: their class and the versions count.
    """
    folder, base, source = Path(files.model_path), base_of(files), processor_folder(files)
    processor = load_processor(files).library
    adapter = [] if files.model_base is None else [adapter_file(folder), folder / CONFIG_FILE]
    read = [*adapter, base / "config.json", *(source / name for name in _PROCESSOR_FILES)]
    return fingerprint(
        [file for file in read if file.is_file()],
        [base],
        processor.chat_template,
        type(processor).__name__,
        type(processor.image_processor).__name__,
        json.dumps([files.max_length, files.max_pixels, files.load_in_4bit, versions_of(*LIBRARIES)], sort_keys=True),
    )


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Load base and adapter, and prove that each tensor found its place and that batches do not mix records.

    Raises:
        UserError: a part is missing or does not fit, or a batch gives other losses than its records alone.
    """
    check_files(files)
    from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

    base = base_of(files)
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    _turn_off_dropout(config)
    options: dict[str, Any] = {"config": config, "trust_remote_code": False}
    if files.load_in_4bit and not stored_in_4bit(read_config(base, in_4bit=True)):
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
    model = load_pretrained(AutoModelForImageTextToText, base, (device, dtype), **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes' packed weights of a CPU give no gradients
            module.support_avx512bf16_for_cpu = False
    if model.get_output_embeddings() is None:
        raise UserError(f"{type(model).__name__} has no output embeddings; its losses cannot be computed")
    layers, processor = decoder_layers(model), replace(load_processor(files), dtype=dtype)
    if files.model_base is not None:
        _print_training(files, processor)
        attach_adapter(model, Path(files.model_path), layers, dtype)
    if not files.load_in_4bit:  # those are there already
        model.to(device)  # not to(dtype): that would round the rotary frequencies
    freeze(model, gradient_checkpointing)
    return proven(Reference(model, layers, None, processor, device, dtype))


def _print_training(files: ModelFiles, processor: NativeProcessor) -> None:
    """Print where the training, as far as it is recorded, did otherwise than what is computed now."""
    folder = Path(files.model_path)
    record = read_record(folder)
    if record is None:
        print_named_base(folder, base_of(files), files.load_in_4bit)
        return
    if record.template != hashlib.sha256(processor.library.chat_template.encode()).hexdigest():
        print(f"{folder} was trained with another chat template than the one that is used now ({RECORD_FILE})")
    if record.settings.get("assistant_only_loss") is False:
        print(f"{folder} was trained on questions and answers alike ({RECORD_FILE}); here answers alone count")


def _turn_off_dropout(config: Any) -> None:
    """Set every dropout of a model's config and of its parts to 0: some are functions that no mode of a module ends."""
    for name, value in vars(config).items():
        if "drop" in name and isinstance(value, float):
            setattr(config, name, 0.0)
        elif hasattr(value, "to_dict"):
            _turn_off_dropout(value)


@torch.no_grad()
def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, one after the other: positions of images are the model's own affair."""
    model, tokenizer = reference.model, reference.processor.library.tokenizer
    known = (tokenizer.eos_token_id, model.generation_config.eos_token_id)
    ends = {number for part in known if part is not None for number in (part if isinstance(part, list) else [part])}
    texts = []
    for prompt in prompts:
        with greedy(model, ends, max_new_tokens):
            inputs = collate(reference, [prompt]).to(reference.device).inputs
            ids = model.generate(**inputs, use_cache=True)[0, prompt.length :].tolist()
        texts.append(tokenizer.decode(until_end(ids, ends), skip_special_tokens=True).strip())
    return texts
