"""A LLaVA of a real pre-trained language model with a small random tower, and a LoRA adapter that nobody trained."""

from __future__ import annotations

from pathlib import Path

import torch

from scripts.experiment.smollm2 import LANGUAGE_MAPS, Tower, write_base
from tive.models import ModelFiles


def write(folder: Path) -> ModelFiles:
    """Write base and adapter."""
    from peft import LoraConfig, get_peft_model

    model = write_base(folder / "base", Tower(width=48, layers=2, heads=4, image=56, patch=14))
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=LANGUAGE_MAPS))
    for key, parameter in adapted.named_parameters():
        if ".lora_B." in key:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "adapter")
    return ModelFiles(str(folder / "adapter"), str(folder / "base"))
