"""A LLaVA of any shape with random weights, made on the device itself, and records of random tokens for it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass

import numpy as np
import torch

from tive.models import Encoded, Reference
from tive.models.common import IGNORE, freeze
from tive.models.spliced import IMAGE_ID, spliced_record


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaVA; the defaults are LLaVA-1.5-7B's with the reference model's LoRA."""

    hidden: int = 4096
    intermediate: int = 11008
    layers: int = 32
    heads: int = 32
    vocabulary: int = 32000
    vision_hidden: int = 1024
    vision_intermediate: int = 4096
    vision_layers: int = 24
    vision_heads: int = 16
    image_size: int = 336
    patch_size: int = 14
    lora_rank: int = 128


def random_llava(
    shape: Shape, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """A reference model with random weights, made in `dtype` on the device: at no time are they there twice.

    Its LoRA B matrices are not zero, so every gradient that counts is there.
    """
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
    from peft import LoraConfig, get_peft_model
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.modeling_utils import no_init_weights

    vision = CLIPVisionConfig(
        hidden_size=shape.vision_hidden,
        intermediate_size=shape.vision_intermediate,
        num_hidden_layers=shape.vision_layers,
        num_attention_heads=shape.vision_heads,
        image_size=shape.image_size,
        patch_size=shape.patch_size,
    )
    with tempfile.TemporaryDirectory() as folder:
        vision.save_pretrained(folder)  # LLaVA reads the tower's config from a folder
        config = LlavaConfig(
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            vocab_size=shape.vocabulary,
            mm_vision_tower=folder,
            mm_hidden_size=shape.vision_hidden,
            mm_projector_type="mlp2x_gelu",
            mm_vision_select_layer=-2,
            tokenizer_model_max_length=2048,
            use_cache=False,
        )
        config._attn_implementation = "sdpa"
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with device, no_init_weights():
                model = LlavaLlamaForCausalLM(config)
                linear = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
                lora = LoraConfig(r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules=list(linear))
                get_peft_model(model, lora)
                tower = model.get_vision_tower()
                tower.vision_tower = CLIPVisionModel(vision)
        finally:
            torch.set_default_dtype(default)
    tower.is_loaded = True
    fill(model)
    model.to(device=device, dtype=dtype)
    freeze(model, gradient_checkpointing)
    # Nothing is encoded with it: its records are made of random tokens.
    return Reference(model, model.model.layers, model.lm_head, None, device, dtype)


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Weights from a pool of random numbers, which takes seconds where a number for each of 7 billion takes minutes."""
    device = next(model.parameters()).device
    pool = torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0)).to(device)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            scaled = pool * (0.01 if "lora_B" in name else 0.02)
            for part in parameter.view(-1).split(len(pool)):
                part.copy_(scaled[: len(part)])


def random_records(count: int, shape: Shape, seed: int = 0) -> list[Encoded]:
    """Records of lengths like LLaVA-1.5's: 15 of 16 with an image, texts of 40 to 1000 tokens, half of them answers."""
    generator = np.random.default_rng(seed)
    patches = (shape.image_size // shape.patch_size) ** 2
    records = []
    for number in range(count):
        size = int(np.clip(generator.lognormal(5.0, 0.6), 40, 1000))
        tokens = generator.integers(3, shape.vocabulary, size)
        labels = np.where(np.arange(size) < size // 2, IGNORE, tokens)
        pixels = None
        if number % 16 != 15:
            tokens[35], labels[35] = IMAGE_ID, IGNORE
            pixels = generator.standard_normal((3, shape.image_size, shape.image_size), dtype=np.float32)
        records.append(spliced_record(tokens, labels, pixels, patches, size + patches))
    return records
