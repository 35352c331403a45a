"""LLaVA (1.5 and its kin): base, projector, tower and adapter, or a whole model, in LLaVA's own class.

Template and masking are LLaVA's own functions, called, not rewritten. Every setting that changes the numbers is checked
against what is computed here; an unknown one is refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tive.data.trained import problem_of
from tive.models import LeftOut, ModelFiles, Reference, pads_images, spliced
from tive.models.adapter import place_tensors, read_tensors
from tive.models.checkpoint import load_pretrained, loading, print_named_base, read_config, refuse_other
from tive.models.common import decoder_layers, freeze
from tive.models.training_record import (
    ASPECT_RATIOS,
    RECORD_FILE,
    TEMPLATES,
    check_llava,
    lacks_tokenizer,
    read_record,
    weight_files,
)
from tive.util.errors import UserError

LIBRARIES: tuple[str, ...] = ("transformers", "peft", "accelerate")
record_problem = problem_of
encode, answers, generate = spliced.encode, spliced.answers, spliced.generate
collate, record_losses = spliced.collate, spliced.record_losses

# The template of a model without a record: the one that LLaVA-1.5's own scripts name.
DEFAULT_TEMPLATE = "v1"
# Settings of LLaVA-1.5's models and the values that are computed; None where the key may be missing or null.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "image_aspect_ratio": (None, *ASPECT_RATIOS),
    "mm_patch_merge_type": (None, "flat"),
    "mm_vision_select_feature": (None, "patch", "cls_patch"),
    "mm_use_im_start_end": (None, False),
    "mm_use_im_patch_token": (None, False),
    "use_mm_proj": (None, True),
}
# Those that are computed whatever they are, or say how the training went.
_READ = ("mm_vision_tower", "mm_vision_select_layer", "mm_projector_type", "mm_hidden_size", "unfreeze_mm_vision_tower")
_OF_THE_TRAINING = ("mm_projector_lr", "mm_vision_tower_lr", "tune_mm_mlp_adapter", "freeze_mm_mlp_adapter")


@dataclass(frozen=True)
class LlavaTemplate:
    """A conversation template of LLaVA's, by its name there."""

    name: str
    tokenizer: Any

    @property
    def ends(self) -> Sequence[int]:
        return (self.tokenizer.eos_token_id,)

    def encode(self, turns: list[dict[str, Any]], has_image: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels as LLaVA's trainer makes them; `LeftOut` where it takes or keeps nothing of the record."""
        from llava import conversation
        from llava.train.train import preprocess, preprocess_multimodal

        conversation.default_conversation = conversation.conv_templates[self.name]
        sources = [[dict(turn) for turn in turns]]
        if has_image:
            sources = preprocess_multimodal(sources, SimpleNamespace(is_multimodal=True, mm_use_im_start_end=False))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            try:
                tokens = preprocess(sources, self.tokenizer, has_image=has_image)
            except AssertionError as error:  # Llama-2's templates take no empty question at the beginning
                raise LeftOut(f"the template {self.name} does not take the conversation") from error
        # LLaVA calls a conversation without an answer a mismatch too.
        if "tokenization mismatch" in printed.getvalue() and turns[-1]["from"] == "gpt":
            raise LeftOut("template mismatch")
        return tokens["input_ids"][0].numpy(), tokens["labels"][0].numpy()

    def decode(self, ids: list[int]) -> str:
        """An answer's text; some templates end it with a text, which no token stands for."""
        from llava.conversation import SeparatorStyle, conv_templates

        template = conv_templates[self.name]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return (text.split(template.sep)[0] if template.sep_style == SeparatorStyle.SINGLE else text).strip()

    def begin(self, ids: np.ndarray, start: int) -> int:
        """With some tokenizers LLaVA supervises the last token of `ASSISTANT:` with the answer."""
        before, first = self.tokenizer.convert_ids_to_tokens(ids[start - 1 : start + 1].clip(0).tolist())
        return start + 1 if first in (":", "]") and before != first else start


def check_files(files: ModelFiles) -> None:
    """What would not show at loading: files that do not fit each other, settings that are not computed."""
    check_llava()
    folder, base = files.folder, files.base
    config = spliced.check_parts(
        files,
        "when training ends; run finetune_lora.sh, which writes it beside every checkpoint, or go on to the end with "
        "it (the same OUTPUT_DIR) and name that OUTPUT_DIR as the model",
    )
    for key, value in config.items():
        # What starts with mm_ and is not known here is another LLaVA's setting: it has to be off.
        is_another = key.startswith("mm_") and key not in (*_READ, *_OF_THE_TRAINING)
        known = _ALLOWED.get(key, (None, False) if is_another else (value,))
        if value not in known:
            taken = ", ".join(str(one) for one in known if one is not None)
            raise UserError(
                f"{folder}/config.json: {key} {value!r} is not supported, only {taken}; train a reference model "
                "with finetune_lora.sh"
            )
    lacking = lacks_tokenizer(base)
    if lacking:
        raise UserError(f"the base model {lacking}")
    name, tower = spliced.tower_of(files)
    if tower is None and not name.startswith(("openai/", "laion/")):
        raise UserError(f"the vision tower {name} is not there; name its folder as vision_tower")
    record = read_record(folder)
    if record is None:
        return
    if record.template not in TEMPLATES:
        raise UserError(
            f"{folder / RECORD_FILE}: the template {record.template} is none of {', '.join(TEMPLATES)}; train a "
            "reference model with one of them"
        )
    ratio = config.get("image_aspect_ratio")
    if record.image_aspect_ratio != ratio:
        raise UserError(
            f"{folder}/config.json: image_aspect_ratio {ratio!r}, and the training used {record.image_aspect_ratio!r} "
            f"({RECORD_FILE}); put config.json back"
        )
    refuse_other(folder, "base model", record.base, None if files.model_base is None else base)
    refuse_other(folder, "vision tower", record.vision_tower, tower)


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, base, tower, and how records are encoded."""
    config, record = read_config(files.folder), read_record(files.folder)
    settings = {key: config.get(key) for key in (*_ALLOWED, *_READ, "tokenizer_model_max_length")}
    template = DEFAULT_TEMPLATE if record is None else record.template
    return spliced.identity_of(files, settings | {"mm_vision_tower": None, "template": template})


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """The model in LLaVA's own class, proven to be what is on disk."""
    check_files(files)
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel
    from transformers.utils import is_torch_sdpa_available

    folder, base, record = files.folder, files.base, read_record(files.folder)
    if record is None:
        print(f"{folder} has no {RECORD_FILE}: taken as trained with template {DEFAULT_TEMPLATE}")
        if files.model_base is not None:
            print_named_base(folder, base)
    with loading(folder):
        config = LlavaConfig.from_pretrained(files.model_path)
    config.mm_vision_tower, _ = spliced.tower_of(files)
    config.tokenizer_padding_side = "right"
    # LLaVA would load the tower with the model; its weights come from where the training had them.
    tower_in_base, config.unfreeze_mm_vision_tower = getattr(config, "unfreeze_mm_vision_tower", False), False
    with loading(base):
        tokenizer = AutoTokenizer.from_pretrained(base, use_fast=False, trust_remote_code=False)
    tokenizer.model_max_length = getattr(config, "tokenizer_model_max_length", None) or 2048
    tokenizer.pad_token = tokenizer.unk_token

    model = load_pretrained(
        LlavaLlamaForCausalLM,
        base,
        (device, dtype),
        ("model.vision_tower.", *([] if files.model_base is None else ["model.mm_projector."])),
        config=config,
        low_cpu_mem_usage=True,
        attn_implementation="sdpa" if is_torch_sdpa_available() else "eager",
    )
    tower = model.get_vision_tower()
    # As LLaVA's `load_model`, which would start what the tower's files lack from random numbers.
    with loading(tower.vision_tower_name):
        tower.image_processor = CLIPImageProcessor.from_pretrained(tower.vision_tower_name)
    # A whole CLIP has a text model beside the tower.
    apart = ("text_", "logit_", "visual_projection")
    tower.vision_tower = load_pretrained(CLIPVisionModel, tower.vision_tower_name, (device, torch.float32), apart)
    tower.is_loaded = True
    if tower_in_base:
        tensors: dict[str, Tensor] = {}
        for path in weight_files(base):
            tensors |= {name: value for name, value in read_tensors(path).items() if ".vision_tower." in name}
        if not tensors:
            raise UserError(
                f"{base} says that its vision tower was tuned and holds no weights of it; name the whole model"
            )
        place_tensors(model, tensors, base, dtype)
    layers = decoder_layers(model)
    if files.model_base is not None:
        spliced.attach_trained(model, folder, layers, dtype)
    # A base has no projector: transformers leaves placeholders without memory.
    lacking = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if lacking:
        raise UserError(f"{base} lacks {lacking[0]}; name a model that finetune.sh wrote, or train it again")
    model.to(device=device, dtype=dtype)
    freeze(model, gradient_checkpointing)
    model.config.use_cache = False
    template = LlavaTemplate(DEFAULT_TEMPLATE if record is None else record.template, tokenizer)
    features = tower.num_patches + (tower.select_feature == "cls_patch")
    processor = spliced.SplicedProcessor(
        template, tower.image_processor, pads_images(files), features, tokenizer.model_max_length, dtype
    )
    return Reference(model, layers, model.lm_head, processor, device, dtype)
