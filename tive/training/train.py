"""Run LLaVA's own trainer; `finetune_lora.sh` and `finetune.sh` start this module.

The training is `llava.train.train.train`, untouched. This entry stands in for `llava.train.train_mem`, which demands
flash-attn, and for `llava.train.train`, to keep these from costing anybody a run:

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
- The optimizer's state in a checkpoint has no names, or is cut by DeepSpeed: Adam's moments are saved by name too.
- Nothing in a model tells its template, its base or its vision tower: `tive_training.json` does, and the gradient step
  computes what stands there. A setting that it could not follow is refused before anything is loaded.
- A base that is a LLaVA model lost its trained projector to the pre-trained one: it is kept unless another is named.

LLaVA's modality-grouped sampler takes records that all have images, or none, since its version 1.2 (issues 609, 715).
"""

from __future__ import annotations

import argparse
import functools
import os
import sys

import llava.train.train as llava_train
import torch
import transformers.trainer
from transformers import HfArgumentParser, PretrainedConfig, set_seed
from transformers.utils import is_flash_attn_2_available, is_torch_sdpa_available

from tive.training.settings import base_config, check_base, check_settings, projector_of, read_settings
from tive.training.trainer import ReferenceTrainer, load_deepspeed_checkpoint
from tive.util.errors import UserError, run


def check_projector(path: str, settings: argparse.Namespace) -> None:
    """Fail before the base is loaded when the projector belongs to another base or another vision tower."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises many kinds
        raise UserError(f"{path} cannot be read as a projector; download LLaVA's mm_projector.bin again") from error
    matrices = [tensor for name, tensor in weights.items() if "mm_projector" in name and tensor.ndim == 2]
    if not matrices:
        raise UserError(f"{path} holds no mm_projector weights; name LLaVA's mm_projector.bin")
    base, _ = PretrainedConfig.get_config_dict(settings.model_name_or_path, cache_dir=settings.cache_dir)
    vision, _ = PretrainedConfig.get_config_dict(settings.vision_tower)
    vision_width = vision.get("vision_config", vision).get("hidden_size")
    for what, name, width, expected in (
        ("vision tower", settings.vision_tower, vision_width, matrices[0].shape[1]),
        ("base model", settings.model_name_or_path, base.get("hidden_size"), matrices[-1].shape[0]),
    ):
        if width is not None and width != expected:
            raise UserError(
                f"{path} is the projector of another {what}: it has width {expected}, "
                f"{name} has {width}; name the one that was trained for both"
            )


def without(arguments: list[str], name: str) -> list[str]:
    """Arguments without an option and its value, in either form (`--name value`, `--name=value`)."""
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith(f"--{name}="):
            skip = False
        elif argument == f"--{name}":
            skip = True
        else:
            kept.append(argument)
    return kept


def llava_arguments(arguments: list[str], settings: argparse.Namespace, projector: str | None) -> list[str]:
    """The arguments as LLaVA's trainer gets them: the projector as it was settled, paths that hold anywhere."""
    arguments = without(arguments, "pretrain_mm_mlp_adapter")
    if projector is not None:
        arguments += ["--pretrain_mm_mlp_adapter", projector]
    for name in ("model_name_or_path", "vision_tower"):
        path = getattr(settings, name)
        if path and os.path.isdir(path):
            arguments += [f"--{name}", os.path.abspath(path)]
    return arguments


def main() -> None:
    parser = HfArgumentParser(
        (llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments), allow_abbrev=False
    )
    arguments, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(
            f"LLaVA's trainer has no argument {unknown[0]}; `python -m tive.training.train --help` lists those it has"
        )
    settings = read_settings()
    check_settings(settings)
    base = base_config(settings)
    check_base(settings, base)
    projector = projector_of(settings, base)
    if projector is not None and settings.vision_tower:
        check_projector(projector, settings)
    sys.argv[1:] = llava_arguments(sys.argv[1:], settings, projector)

    llava_train.LLaVATrainer = functools.partial(ReferenceTrainer, settings=settings, projector=projector)
    if settings.lora_enable:
        transformers.trainer.deepspeed_load_checkpoint = load_deepspeed_checkpoint
    set_seed(arguments.seed)
    # LLaVA's own environment has torch 2.0, for which transformers has no SDPA.
    attention = "sdpa" if is_torch_sdpa_available() else "eager"
    if is_flash_attn_2_available():
        attention = "flash_attention_2"
    llava_train.train(attn_implementation=attention)


if __name__ == "__main__":
    run(main)
