"""Models of any shape with random weights and LoRA, made on the device itself, and records of random tokens for them.

A language model alone and LLaVA-1.5's form need torch, transformers and peft of any version, so that other tools can be
measured on them in environments of their own; Qwen2.5-VL's needs transformers' class.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.models import Encoded, Reference, spliced
from tive.models.common import IGNORE, decoder_layers, freeze, packed
from tive.models.native_encoding import ProcessedRecord
from tive.models.spliced import IMAGE_ID, spliced_record

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# Of Qwen2.5-VL: the side of a patch, patches that make one feature on each side; ids around an image and for its parts.
PATCH, MERGED = 14, 2
START, END, PART = 1, 2, 3


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, by the names of transformers' configs, and of the records that are made for it.

    Attributes:
        vision: of the tower; empty for a language model alone.
        rank: of LoRA.
        tokens: of every record; 0 for texts of lengths like LLaVA-1.5's.
        grid: of Qwen2.5-VL, an image's patches in rows and columns; None for the other forms.
    """

    text: dict[str, int]
    vision: dict[str, Any]
    rank: int
    tokens: int = 0
    grid: tuple[int, int] | None = None


def _text(width: int, inner: int, layers: int, heads: int, vocabulary: int) -> dict[str, int]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "vocab_size": vocabulary}


def _clip(width: int, layers: int, heads: int, image: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    return sizes | {"num_attention_heads": heads, "image_size": image, "patch_size": PATCH}


def _qwen(width: int, inner: int, layers: int, heads: int, whole_attention: list[int]) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": inner, "depth": layers, "num_heads": heads}
    return sizes | {"fullatt_block_indexes": whole_attention}


def text_shape(width: int, layers: int, tokens: int) -> Shape:
    """A language model with heads of 32, an MLP of twice the width, and LoRA of rank 8."""
    return Shape(_text(width, 2 * width, layers, width // 32, 4096), {}, 8, tokens)


# LLaVA-1.5-7B with its reference model's LoRA, and Qwen2.5-VL-3B; and small ones of their forms.
LLAVA_7B = Shape(_text(4096, 11008, 32, 32, 32000), _clip(1024, 24, 16, 336), 128)
SMALL_LLAVA = Shape(_text(64, 128, 2, 4, 300), _clip(32, 2, 4, 56), 4)
_TOWER = _qwen(1280, 3420, 32, 16, [7, 15, 23, 31])
QWEN_3B = Shape(_text(2048, 11008, 36, 16, 151936) | {"num_key_value_heads": 2}, _TOWER, 64, grid=(36, 48))
SMALL_QWEN = Shape(_text(64, 128, 2, 4, 512) | {"num_key_value_heads": 2}, _qwen(32, 64, 2, 4, [1]), 4, grid=(4, 8))


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


def random_model(
    shape: Shape, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> tuple[Any, Reference]:
    """The family that computes the losses, and a reference model with random weights.

    LoRA is on the attention's linear maps, in LLaVA's form on the MLP's too.

    Raises:
        ImportError: transformers does not have Qwen2.5-VL.
    """
    from peft import LoraConfig, get_peft_model

    family: Any = importlib.import_module("tive.models.native") if shape.grid else spliced
    maps = [*ATTENTION, *MLP] if shape.vision and not shape.grid else ATTENTION
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:  # weights are made in their dtype on the device: at no time are they there twice
            model: Any = _qwen_model(shape) if shape.grid else _llava_model(shape)
            language_model = model.language_model if isinstance(model, Llava) else model
            get_peft_model(language_model, LoraConfig(r=shape.rank, lora_alpha=2 * shape.rank, target_modules=maps))
    finally:
        torch.set_default_dtype(default)
    _fill(model, dtype)
    model.requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    head = language_model.get_output_embeddings()
    return family, Reference(model, decoder_layers(language_model), head, None, device, dtype)


def _llava_model(shape: Shape) -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM

    text = LlamaConfig(**shape.text, use_cache=False)
    return Llava(text, CLIPVisionConfig(**shape.vision)) if shape.vision else LlamaForCausalLM(text)


def _qwen_model(shape: Shape) -> nn.Module:
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
    return Qwen2_5_VLForConditionalGeneration(config)


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


def random_records(shape: Shape, count: int, reference: Reference) -> list[Encoded]:
    """Records of random tokens: half of each text is an answer, and all have an image where there is a tower.

    In LLaVA's form one of 16 has none.
    """
    generator, side, records = np.random.default_rng(0), shape.vision.get("image_size", 0), []
    patches = (side // PATCH) ** 2
    for number in range(count):
        length = shape.tokens or int(np.clip(generator.lognormal(5.0, 0.6), 40, 1000))
        text = generator.integers(PART + 1, shape.text["vocab_size"], length)
        labels, pixels = np.where(np.arange(length) < length // 2, IGNORE, text), None
        if shape.grid:
            patches = shape.grid[0] * shape.grid[1]
            pixels = generator.standard_normal((patches, 3 * 2 * PATCH**2), dtype=np.float32)
            records.append(_qwen_record(text, labels, pixels, shape.grid, reference))
            continue
        if side and number % 16 != 15:
            text[35], labels[35] = IMAGE_ID, IGNORE
            pixels = generator.standard_normal((3, side, side), dtype=np.float32)
        records.append(spliced_record(text, labels, pixels, patches, length + patches))
    return records


def _qwen_record(
    text: np.ndarray, labels: np.ndarray, pixels: np.ndarray, grid: tuple[int, int], reference: Reference
) -> Encoded:
    image = [START, *[PART] * (len(pixels) // MERGED**2), END]
    ids = np.concatenate([image, text])[None].astype(np.int64)
    labels = np.concatenate([np.full(len(image), IGNORE), labels])
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": packed(pixels, reference.dtype)}
    arrays["image_grid_thw"] = np.array([[1, *grid]])
    if "mm_token_type_ids" in inspect.signature(type(reference.model).forward).parameters:  # from transformers 5 on
        arrays["mm_token_type_ids"] = (ids == PART).astype(np.int64)
    return Encoded(ids.shape[1], int((labels != IGNORE).sum()), "image", ProcessedRecord(arrays, labels))
