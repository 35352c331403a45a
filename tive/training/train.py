"""Run LLaVA's own trainer; `finetune_lora.sh` and `finetune.sh` start it as `python -m tive.training.train`.

The training is `llava.train.train.train`, untouched. This entry stands in for `llava.train.train_mem`, which demands
flash-attn, and for `llava.train.train`, to keep six things from costing anybody a run:

- A base whose generation config has sampling values without `do_sample`, as Vicuna-v1.5's has, cannot be saved by
  transformers 4.37: a full fine-tuning fails at its very end (LLaVA issues 1144, 1252). It is put right in memory.
- A LoRA checkpoint lacks the projector that is trained beside the adapter: who goes on from it silently starts with
  the projector's first weights, and it is of no use as a reference model. It is saved and loaded with the rest.
- From torch 2.6 on, `torch.load` refuses the random state that transformers 4.37 keeps in a checkpoint; and a LoRA
  checkpoint under DeepSpeed, which lacks the frozen base, is refused for that.
- With LoRA one of LLaVA's four parameter groups is empty. DeepSpeed drops it, the schedule of the learning rates does
  not: a new torch stops at the first step, an old one gives the groups each other's learning rate.
- transformers sets the seed after LLaVA has drawn the adapter: the same command gave another reference model each time.
- A relative path of the base or the vision tower is written into the model, which then loads from one folder only.

LLaVA's modality-grouped sampler takes records that all have images, or none, since its version 1.2 (issues 609, 715).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import llava.train.train as llava_train
import numpy as np
import torch
import transformers.trainer
from llava.train.llava_trainer import LLaVATrainer
from transformers import GenerationConfig, HfArgumentParser, PretrainedConfig, set_seed
from transformers.utils import is_flash_attn_2_available, is_torch_sdpa_available

from tive.util.errors import UserError, run

PROJECTOR_FILE = "non_lora_trainables.bin"


class ReferenceTrainer(LLaVATrainer):
    """LLaVA's trainer, whose checkpoints are complete and whose model can be saved."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        make_savable(self.model)

    def create_optimizer(self) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.lora_enable:
            # Under DeepSpeed `state_dict` holds the gathered weights, and the model only this process's share.
            weights = self.model.state_dict() if state_dict is None else state_dict
            beside = {name: weights[name].detach().cpu() for name in self._trained_beside_lora()}
            folder = Path(output_dir or self.args.output_dir)
            torch.save(beside, folder / PROJECTOR_FILE)
            self.model.config.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            path = Path(resume_from_checkpoint) / PROJECTOR_FILE
            if not path.exists():
                raise UserError(
                    f"{path} is not there: the checkpoint lacks the trained projector; "
                    f"remove {path.parent} to start anew"
                )
            beside = torch.load(path, map_location="cpu", weights_only=True)
            missing = set(self._trained_beside_lora()) - set(beside)
            if missing or (model or self.model).load_state_dict(beside, strict=False).unexpected_keys:
                raise UserError(f"{path} is of another model; remove {path.parent} to start anew")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with _numpy_state_allowed():
            super()._load_rng_state(checkpoint)

    def _trained_beside_lora(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name]


def _numpy_state_allowed() -> contextlib.AbstractContextManager:
    """Lets `torch.load(weights_only=True)` read the state of numpy's generator; older torch reads it anyway."""
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    reconstruct = np.core.multiarray._reconstruct
    return torch.serialization.safe_globals([reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


def load_deepspeed_checkpoint(engine: Any, checkpoint_path: str, **_: Any) -> None:
    """Go on from a DeepSpeed checkpoint, which for LoRA holds the trained weights alone: the base is loaded already."""
    loaded, _ = engine.load_checkpoint(checkpoint_path, load_module_strict=False)
    if loaded is None:
        raise UserError(f"{checkpoint_path} holds no DeepSpeed checkpoint; remove it to start anew")


def make_savable(model: torch.nn.Module) -> None:
    """Give a model a generation config that transformers agrees to save; the base's files stay as they are."""
    config = model.generation_config
    if _complaints(config):
        config.do_sample = True
    if _complaints(config):
        model.generation_config = GenerationConfig.from_model_config(model.config)


def _complaints(config: GenerationConfig) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            config.validate()
        except ValueError as error:
            return [str(error)]
    return [str(warning.message) for warning in caught]


def check_projector(arguments: argparse.Namespace) -> None:
    """Fail before the base is loaded when the projector belongs to another base or another vision tower."""
    if not (arguments.pretrain_mm_mlp_adapter and arguments.vision_tower):
        return
    weights = torch.load(arguments.pretrain_mm_mlp_adapter, map_location="cpu", weights_only=True)
    matrices = [tensor for name, tensor in weights.items() if "mm_projector" in name and tensor.ndim == 2]
    if not matrices:
        raise UserError(
            f"{arguments.pretrain_mm_mlp_adapter} holds no mm_projector weights; name LLaVA's mm_projector.bin"
        )
    base, _ = PretrainedConfig.get_config_dict(arguments.model_name_or_path, cache_dir=arguments.cache_dir)
    vision, _ = PretrainedConfig.get_config_dict(arguments.vision_tower)
    vision_width = vision.get("vision_config", vision).get("hidden_size")
    for what, name, width, expected in (
        ("vision tower", arguments.vision_tower, vision_width, matrices[0].shape[1]),
        ("base model", arguments.model_name_or_path, base.get("hidden_size"), matrices[-1].shape[0]),
    ):
        if width is not None and width != expected:
            raise UserError(
                f"{arguments.pretrain_mm_mlp_adapter} is the projector of another {what}: it has width {expected}, "
                f"{name} has {width}; name the one that was trained for both"
            )


def main() -> None:
    parser = HfArgumentParser(
        (llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments), allow_abbrev=False
    )
    arguments, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(
            f"LLaVA's trainer has no argument {unknown[0]}; `python -m tive.training.train --help` lists those it has"
        )
    check_projector(arguments)
    for name in ("model_name_or_path", "vision_tower"):
        path = getattr(arguments, name)
        if path and os.path.isdir(path):
            sys.argv += [f"--{name}", os.path.abspath(path)]

    llava_train.LLaVATrainer = ReferenceTrainer
    if arguments.lora_enable:
        transformers.trainer.deepspeed_load_checkpoint = load_deepspeed_checkpoint
    set_seed(arguments.seed)
    # LLaVA's own environment has torch 2.0, for which transformers has no SDPA.
    attention = "sdpa" if is_torch_sdpa_available() else "eager"
    if is_flash_attn_2_available():
        attention = "flash_attention_2"
    llava_train.train(attn_implementation=attention)


if __name__ == "__main__":
    run(main)
