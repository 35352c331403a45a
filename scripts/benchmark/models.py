"""Models of any shape with random weights and LoRA, made on the device itself, and records of random tokens for them.

A language model alone and LLaVA-1.5's form need torch, transformers and peft of any version, so that other tools can be
measured on them in environments of their own; Qwen2.5-VL's needs transformers' class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.models import Encoded, Reference
from tive.models.common import IGNORE, decoder_layers, freeze, packed
from tive.models.native_encoding import ProcessedRecord
from tive.models.spliced import IMAGE_ID, spliced_record

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
# Of Qwen2.5-VL: the side of a patch, patches that make one feature on each side; ids around an image and for its parts.
PATCH, MERGED = 14, 2
START, END, PART = 1, 2, 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by the names of transformers' configs.

    Attributes:
        vision: of the tower; empty for a language model alone.
        rank: of LoRA.
        grid: of Qwen2.5-VL, an image's patches in rows and columns.
    """

    text: dict[str, int]
    vision: dict[str, Any]
    rank: int
    grid: tuple[int, int] = (0, 0)


def _text(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "vocab_size": vocabulary}


def _clip(width: int, layers: int, heads: int, image: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "image_size": image, "patch_size": PATCH}


def _qwen_tower(width: int, inner: int, layers: int, heads: int, whole_attention: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "depth": layers, "num_heads": heads}
    return sizes | {"fullatt_block_indexes": whole_attention}


# LLaVA-1.5-7B with its reference model's LoRA, and Qwen2.5-VL-3B; and small ones of their forms.
LLAVA_7B = Shape(_text(4096, 11008, 32, 32, 32000), _clip(1024, 24, 16, 336), 128)
SMALL_LLAVA = Shape(_text(64, 128, 2, 4, 300), _clip(32, 2, 4, 56), 4)
_QWEN_HEADS = {"num_key_value_heads": 2}
QWEN_3B = Shape(
    _text(2048, 11008, 36, 16, 151936) | _QWEN_HEADS, _qwen_tower(1280, 3420, 32, 16, [7, 15, 23, 31]), 64, (36, 48)
)
SMALL_QWEN = Shape(_text(64, 128, 2, 4, 512) | _QWEN_HEADS, _qwen_tower(32, 64, 2, 4, [1]), 4, (4, 8))


def text_shape(width: int, layers: int) -> Shape:
    """A language model with heads of 32, an MLP of twice the width, and LoRA of rank 8."""
    return Shape(_text(width, 2 * width, layers, width // 32, 4096), {}, 8)


class Llava(nn.Module):
    """The parts of LLaVA-1.5; an image's features are its patches in the tower's last layer but one, projected."""

    def __init__(self, text: Any, vision: Any) -> None:
        super().__init__()
        from transformers import CLIPVisionModel, LlamaForCausalLM

        self.language_model, self.tower = LlamaForCausalLM(text), CLIPVisionModel(vision)
        layers = nn.Linear(vision.hidden_size, text.hidden_size), nn.Linear(text.hidden_size, text.hidden_size)
        self.projector = nn.Sequential(layers[0], nn.GELU(), layers[1])

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Features `[B, patches, hidden]` of images `[B, 3, side, side]`."""
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        features: Tensor = self.projector(states[:, 1:])
        return features


def random_llava(
    shape: Shape, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """A LLaVA with LoRA on its language model's linear maps; without a tower, that model with LoRA on its attention.

    The family `tive.models.spliced` computes its losses.
    """
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    text, lora = LlamaConfig(**shape.text, use_cache=False), (*ATTENTION, *MLP) if shape.vision else ATTENTION
    with _made_on(device, dtype):
        model: Any = Llava(text, CLIPVisionConfig(**shape.vision)) if shape.vision else LlamaForCausalLM(text)
        language_model = model.language_model if shape.vision else model
        _add_lora(language_model, shape.rank, lora)
    _fill(model, dtype)
    model.requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    return Reference(model, decoder_layers(language_model), language_model.lm_head, None, device, dtype)


def random_qwen(shape: Shape, device: torch.device, dtype: torch.dtype) -> Reference:
    """A Qwen2.5-VL with LoRA on its attention; the family `tive.models.native` computes its losses.

    Raises:
        ImportError: transformers does not have its class.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    width = shape.text["hidden_size"]
    pairs = width // shape.text["num_attention_heads"] // 2  # of rotary frequencies, for time, height and width
    sections = [pairs - 2 * (3 * pairs // 8), 3 * pairs // 8, 3 * pairs // 8]
    rope = {"type": "default", "rope_type": "default", "mrope_section": sections}
    config = Qwen2_5_VLConfig(
        text_config=shape.text | {"rope_theta": 1e6, "rope_scaling": rope, "use_cache": False},
        vision_config=shape.vision | {"out_hidden_size": width},
        image_token_id=PART,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    with _made_on(device, dtype):
        model = Qwen2_5_VLForConditionalGeneration(config)
        _add_lora(model, shape.rank, ATTENTION)
    _fill(model, dtype)
    freeze(model, gradient_checkpointing=False)
    return Reference(model, decoder_layers(model), model.get_output_embeddings(), None, device, dtype)


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in `dtype` on the device: at no time are they there twice."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(default)


def _add_lora(model: Any, rank: int, maps: tuple[str, ...]) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(maps)))


@torch.no_grad()
def _fill(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights from a pool of random numbers; LoRA's B matrices are not zero, so that every gradient is there."""
    device = next(model.parameters()).device
    pool = torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0)).to(device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtype)  # peft makes some in float32
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            scaled = pool * (0.01 if "lora_B" in name else 0.02)
            for part in parameter.view(-1).split(len(pool)):
                part.copy_(scaled[: len(part)])


def random_texts(count: int, tokens: int, vocabulary: int = 4096) -> list[Encoded]:
    """Records of as many random tokens each, so that a batch has no padding; the second half is supervised."""
    texts = np.random.default_rng(0).integers(3, vocabulary, (count, tokens))
    return [spliced_record(text, _answered(text), None, 0, tokens) for text in texts]


def random_records(shape: Shape, count: int) -> list[Encoded]:
    """Records of LLaVA's form: 15 of 16 with an image, the texts of lengths like LLaVA-1.5's."""
    generator, side = np.random.default_rng(0), shape.vision["image_size"]
    patches, records = (side // PATCH) ** 2, []
    for number in range(count):
        tokens = _random_text(generator, shape.text["vocab_size"])
        labels, pixels = _answered(tokens), None
        if number % 16 != 15:
            tokens[35], labels[35] = IMAGE_ID, IGNORE
            pixels = generator.standard_normal((3, side, side), dtype=np.float32)
        records.append(spliced_record(tokens, labels, pixels, patches, len(tokens) + patches))
    return records


def random_qwen_records(shape: Shape, count: int, reference: Reference) -> list[Encoded]:
    """Records of Qwen2.5-VL's form, each with an image of `shape.grid` patches before its text."""
    generator, patches = np.random.default_rng(0), shape.grid[0] * shape.grid[1]
    image = [START, *[PART] * (patches // MERGED**2), END]
    takes = inspect.signature(type(reference.model).forward).parameters
    records = []
    for _ in range(count):
        text = _random_text(generator, shape.text["vocab_size"])
        ids = np.concatenate([image, text])[None].astype(np.int64)
        labels = np.concatenate([np.full(len(image), IGNORE), _answered(text)])
        pixels = generator.standard_normal((patches, 3 * 2 * PATCH**2), dtype=np.float32)
        arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "image_grid_thw": np.array([[1, *shape.grid]])}
        arrays["pixel_values"] = packed(pixels, reference.dtype)
        if "mm_token_type_ids" in takes:  # from transformers 5 on
            arrays["mm_token_type_ids"] = (ids == PART).astype(np.int64)
        supervised = int((labels != IGNORE).sum())
        records.append(Encoded(ids.shape[1], supervised, "image", ProcessedRecord(arrays, labels)))
    return records


def _random_text(generator: np.random.Generator, vocabulary: int) -> np.ndarray:
    return generator.integers(PART + 1, vocabulary, int(np.clip(generator.lognormal(5.0, 0.6), 40, 1000)))


def _answered(tokens: np.ndarray) -> np.ndarray:
    """Labels: the second half of the tokens is an answer."""
    return np.where(np.arange(len(tokens)) < len(tokens) // 2, IGNORE, tokens)
