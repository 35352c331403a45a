"""A Qwen2.5-VL of any shape with random weights, made on the device itself, and records of random tokens for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import numpy as np
import torch

from tive.models import Encoded, Reference
from tive.models.common import IGNORE, decoder_layers, freeze, packed
from tive.models.native_encoding import ProcessedRecord

from .model import fill

PATCH, MERGED = 14, 2
START, END, IMAGE = 1, 2, 3  # ids that stand around an image, and for a part of it


@dataclass(frozen=True)
class QwenShape:
    """Sizes of a Qwen2.5-VL; the defaults are Qwen2.5-VL-3B's, with LoRA on its attention."""

    hidden: int = 2048
    intermediate: int = 11008
    layers: int = 36
    heads: int = 16
    groups: int = 2
    vocabulary: int = 151936
    vision_hidden: int = 1280
    vision_intermediate: int = 3420
    vision_layers: int = 32
    vision_heads: int = 16
    whole_attention: tuple[int, ...] = (7, 15, 23, 31)
    lora_rank: int = 64


def random_qwen(shape: QwenShape, device: torch.device, dtype: torch.dtype) -> Reference:
    """A reference model with random weights in `dtype`; its LoRA B matrices are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    pairs = shape.hidden // shape.heads // 2  # of rotary frequencies, shared by time, height and width
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.groups,
            "vocab_size": shape.vocabulary,
            "rope_theta": 1e6,
            "rope_scaling": {
                "type": "default",
                "rope_type": "default",
                "mrope_section": [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8],
            },
            "use_cache": False,
        },
        vision_config={
            "hidden_size": shape.vision_hidden,
            "intermediate_size": shape.vision_intermediate,
            "depth": shape.vision_layers,
            "num_heads": shape.vision_heads,
            "out_hidden_size": shape.hidden,
            "fullatt_block_indexes": list(shape.whole_attention),
        },
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen2_5_VLForConditionalGeneration(config)
            attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
            get_peft_model(
                model, LoraConfig(r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules=attention)
            )
    finally:
        torch.set_default_dtype(default)
    fill(model)
    model.to(device)
    freeze(model, gradient_checkpointing=False)
    return Reference(model, decoder_layers(model), model.get_output_embeddings(), None, device, dtype)


def random_qwen_records(
    count: int, shape: QwenShape, reference: Reference, grid: tuple[int, int] = (36, 48)
) -> list[Encoded]:
    """Records with an image of a grid of patches each and some 150 tokens of text, half of them an answer."""
    generator = np.random.default_rng(0)
    patches = grid[0] * grid[1]
    takes = inspect.signature(type(reference.model).forward).parameters
    records = []
    for _ in range(count):
        text = generator.integers(IMAGE + 1, shape.vocabulary, int(np.clip(generator.lognormal(5.0, 0.6), 40, 1000)))
        image = [START, *[IMAGE] * (patches // MERGED**2), END]
        ids = np.concatenate([image, text])[None].astype(np.int64)
        labels = np.where(np.arange(ids.shape[1]) < len(image) + len(text) // 2, IGNORE, ids[0])
        pixels = generator.standard_normal((patches, 3 * 2 * PATCH**2), dtype=np.float32)
        arrays = {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "pixel_values": packed(pixels, reference.dtype),
            "image_grid_thw": np.array([[1, *grid]]),
        }
        if "mm_token_type_ids" in takes:  # from transformers 5 on
            arrays["mm_token_type_ids"] = (ids == IMAGE).astype(np.int64)
        supervised = int((labels[1:] != IGNORE).sum())
        records.append(Encoded(ids.shape[1], supervised, "image", ProcessedRecord(arrays, labels)))
    return records
