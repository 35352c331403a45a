"""A LLaVA of a real pre-trained language model with a small random tower, and a LoRA adapter that nobody trained."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.experiment.smollm2 import LANGUAGE_MAPS, write_base
from tive.models import ModelFiles

TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
TOWER |= {"image_size": 56, "patch_size": 14}


def write(folder: Path) -> ModelFiles:
    """Write base and adapter."""
    from peft import LoraConfig, get_peft_model

    model = write_base(folder / "base", TOWER)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_MAPS))
    for key, parameter in adapted.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    return ModelFiles(str(folder / "adapter"), str(folder / "base"))
