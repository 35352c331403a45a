"""Tiny random models of transformers' own classes, each with its real processor, and a LoRA adapter that peft wrote."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tive.models import ModelFiles
from tive.models.common import prepare_torchvision

prepare_torchvision()  # before transformers and peft are imported
library = importlib.import_module("transformers")

QWEN = Path(__file__).parents[1] / "golden" / "native" / "qwen2_5_vl" / "base"
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VISION |= {"image_size": 56, "patch_size": 14}
SIGLIP = VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}
TURNS = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|im_end|>\n"
    "{% endfor %}"
)


def tokenizer_with(*tokens: str, **named: str) -> tuple[Any, Callable[[str], int]]:
    """The golden's tokenizer with more tokens, some under names that a processor asks for, and their ids."""
    first = {"bos_token": named.pop("bos_token")} if "bos_token" in named else {}
    tokenizer = library.AutoTokenizer.from_pretrained(QWEN, extra_special_tokens=named, **first)
    tokenizer.add_tokens(sorted(tokens), special_tokens=True)
    return tokenizer, tokenizer.convert_tokens_to_ids


def qwen3_vl() -> tuple[Any, Any]:
    tokenizer, id_of = tokenizer_with()
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "mrope_interleaved": True}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64}
    vision |= {"patch_size": 14, "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    config = library.Qwen3VLConfig(
        text_config=TEXT | {"vocab_size": len(tokenizer), "rope_scaling": rope},
        vision_config=vision,
        image_token_id=id_of("<|image_pad|>"),
        video_token_id=id_of("<|video_pad|>"),
        vision_start_token_id=id_of("<|vision_start|>"),
        vision_end_token_id=id_of("<|vision_end|>"),
    )
    processor = library.Qwen3VLProcessor(
        image_processor=library.AutoImageProcessor.from_pretrained(QWEN),
        tokenizer=tokenizer,
        video_processor=library.AutoVideoProcessor.from_pretrained(QWEN),
        chat_template=(QWEN / "chat_template.jinja").read_text(),
    )
    return config, processor


def llava_onevision() -> tuple[Any, Any]:
    tokenizer, id_of = tokenizer_with("<image>", "<video>")
    tiles = [[56, 56], [56, 112], [112, 56], [112, 112]]
    config = library.LlavaOnevisionConfig(
        text_config=TEXT | {"model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config=SIGLIP,
        image_token_index=id_of("<image>"),
        video_token_index=id_of("<video>"),
        image_grid_pinpoints=tiles,
    )
    processor = library.LlavaOnevisionProcessor(
        image_processor=library.LlavaOnevisionImageProcessor(
            size={"height": 56, "width": 56}, image_grid_pinpoints=tiles
        ),
        tokenizer=tokenizer,
        video_processor=library.LlavaOnevisionVideoProcessor(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=TURNS,
    )
    return config, processor


def gemma3() -> tuple[Any, Any]:
    """Bidirectional attention between an image's tokens, logits that are capped, and a first token in the template."""
    tokenizer, id_of = tokenizer_with(
        bos_token="<bos>", boi_token="<boi>", eoi_token="<eoi>", image_token="<image_soft_token>"
    )
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    config = library.Gemma3Config(
        text_config=TEXT
        | {"vocab_size": len(tokenizer), "sliding_window": 32, "layer_types": layers, "query_pre_attn_scalar": 16}
        | {"final_logit_softcapping": 5.0, "pad_token_id": 0},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=id_of("<boi>"),
        eoi_token_index=id_of("<eoi>"),
        image_token_index=id_of("<image_soft_token>"),
    )
    processor = library.Gemma3Processor(
        image_processor=library.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer=tokenizer,
        image_seq_length=4,
        chat_template="{{ bos_token }}" + TURNS.replace("<image>\n", "<boi>").replace("['text']", "['text'] | trim"),
    )
    return config, processor


def smolvlm() -> tuple[Any, Any]:
    """Images in rows and columns of tiles with tokens of their own; the processor names the end of turns."""
    tiles = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    tokenizer, id_of = tokenizer_with(
        *tiles,
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
    )
    config = library.SmolVLMConfig(
        text_config=TEXT | {"model_type": "llama", "vocab_size": len(tokenizer), "pad_token_id": 0},
        vision_config=VISION,
        scale_factor=2,
        image_token_id=id_of("<image>"),
        pad_token_id=0,
    )
    processor = library.SmolVLMProcessor(
        image_processor=library.SmolVLMImageProcessor(size={"longest_edge": 112}, max_image_size={"longest_edge": 56}),
        tokenizer=tokenizer,
        video_processor=library.SmolVLMVideoProcessor(),
        image_seq_len=4,
        chat_template=TURNS.replace("<image>\n", "<image>").replace("<|im_end|>", "<end_of_utterance>"),
    )
    return config, processor


CLASSES = {"qwen3_vl": qwen3_vl, "llava_onevision": llava_onevision, "gemma3": gemma3, "smolvlm": smolvlm}


def write(name: str, folder: Path) -> ModelFiles:
    """Write one of `CLASSES` and an adapter on all its linear maps."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config, processor = CLASSES[name]()
    model = library.AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.1))
    for key, parameter in adapted.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.05)
    adapted.save_pretrained(folder / "adapter")
    return ModelFiles(str(folder / "adapter"), str(folder / "base"))
