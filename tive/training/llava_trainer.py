"""LLaVA's own trainer, started by `finetune_lora.sh` and `finetune.sh`, whose checkpoints and model are complete.

The training is `llava.train.train.train`, untouched. What this entry adds keeps a run from being lost, or its model
from being of no use to the gradient step; docs/training.md lists it with the reasons.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llava.train.train as llava_train
import numpy as np
import torch
import transformers.trainer
from llava.train.llava_trainer import LLaVATrainer
from transformers import GenerationConfig, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import is_flash_attn_2_available, is_torch_sdpa_available

from tive.models.adapter import TRAINED_FILE, read_tensors
from tive.models.optimizer_state import save_moments
from tive.models.training_record import (
    RECORD_FILE,
    TrainingRecord,
    check_llava,
    lora_of,
    read_record,
    recorded_model,
    versions_of,
    write_record,
)
from tive.training.checks import base_config, has_projector, model_config, projector_of, read_settings
from tive.util.device import leave_a_core
from tive.util.errors import UserError, run
from tive.util.files import sha256_of

# What LLaVA's trainer warns of in every run, and nobody has to act on.
_WARNED_IN_VAIN = (
    r"`do_sample` is set to `False`",  # Vicuna's generation config, which is put right
    r"torch\.utils\.checkpoint: the use_reentrant",
    r"None of the inputs have requires_grad",  # of the frozen vision tower
)


class CompleteTrainer(LLaVATrainer):
    """LLaVA's trainer; what it saves and loads is completed, the training is not touched. `describe` is `record_of`."""

    def __init__(self, *args: Any, describe: Callable[[Any], TrainingRecord], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_savable(self.model)
        self.record = describe(self.model) if self.is_world_process_zero() else None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if self.record is not None:
            folder = Path(self.args.output_dir)
            last = get_last_checkpoint(str(folder)) if resume_from_checkpoint else None
            if last:
                refuse_other_training(Path(last), self.record)
            write_record(folder, self.record)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self) -> torch.optim.Optimizer:
        """LLaVA's optimizer without its empty parameter groups."""
        optimizer = super().create_optimizer()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_moments(self, output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if self.record is not None and folder != Path(self.args.output_dir):
            write_record(folder, self.record)
        if self.args.lora_enable:
            # Under DeepSpeed `state_dict` holds the gathered weights, and the model only this process's share.
            weights = self.model.state_dict() if state_dict is None else state_dict
            beside = {name: weights[name].detach().cpu() for name in self._trained_beside_lora()}
            torch.save(beside, folder / TRAINED_FILE)
            self.model.config.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            path = Path(resume_from_checkpoint) / TRAINED_FILE
            beside = read_tensors(path)
            missing = set(self._trained_beside_lora()) - set(beside)
            if missing or (model or self.model).load_state_dict(beside, strict=False).unexpected_keys:
                raise UserError(f"{path} is of another model; remove {path.parent} to start anew")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # torch's `weights_only` refuses the state of numpy's generator, older torch reads it anyway.
        allowed = [np.core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]  # type: ignore[attr-defined]
        with getattr(torch.serialization, "safe_globals", contextlib.nullcontext)(allowed):
            super()._load_rng_state(checkpoint)

    def _trained_beside_lora(self) -> list[str]:
        return [name for name, p in self.model.named_parameters() if p.requires_grad and "lora_" not in name]


def record_of(settings: argparse.Namespace, projector: str | None, model: Any) -> TrainingRecord:
    """What this training uses, from the files that it was loaded from."""
    # A LLaVA model loads the tower that its own config names, whatever the argument says.
    tower = model.get_vision_tower() if settings.vision_tower else None
    start: dict[str, Any] = {"start": "base" if has_projector(base_config(settings)) else "random"}
    if projector is not None:
        start = {"start": "file", "path": os.path.abspath(projector), "sha256": sha256_of(projector)}
    return TrainingRecord(
        template=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        base=recorded_model(settings.model_name_or_path, settings.cache_dir),
        vision_tower=recorded_model(tower.vision_tower_name) if tower is not None else None,
        projector=start,
        lora=lora_of(model) if settings.lora_enable else None,
        versions={"llava": check_llava()[1]} | versions_of("tive", "torch", "transformers", "peft", "deepspeed"),
    )


def refuse_other_training(checkpoint: Path, record: TrainingRecord) -> None:
    """Raise a `UserError` where a checkpoint was begun with something else; one without a record is not known."""
    before = read_record(checkpoint)
    if before is None:
        return
    for name in TrainingRecord.__struct_fields__:
        old, new = getattr(before, name), getattr(record, name)
        if isinstance(old, dict) and isinstance(new, dict):  # the same files may lie elsewhere now
            old, new = old | {"path": ""}, new | {"path": ""}
        if name != "versions" and old != new:
            raise UserError(
                f"{checkpoint} was trained with another {name.replace('_', ' ')} ({checkpoint / RECORD_FILE}); "
                "train with the same, or set another OUTPUT_DIR"
            )


def load_deepspeed_checkpoint(engine: Any, checkpoint_path: str, **_: Any) -> None:
    """Go on from a DeepSpeed checkpoint, which for LoRA holds the trained weights alone: the base is loaded already."""
    loaded, _ = engine.load_checkpoint(checkpoint_path, load_module_strict=False)
    if loaded is None:
        raise UserError(f"{checkpoint_path} holds no DeepSpeed checkpoint; remove it to start anew")


def make_savable(model: Any) -> None:
    """Give a model a generation config that transformers agrees to save; the base's files stay as they are."""
    config = model.generation_config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for do_sample in (config.do_sample, True):
            config.do_sample = do_sample
            with contextlib.suppress(UserWarning, ValueError):
                config.validate()
                return
    model.generation_config = GenerationConfig.from_model_config(model.config)


def check_projector(path: str, settings: argparse.Namespace, base: dict[str, Any]) -> None:
    """Fail before the base is loaded when the projector belongs to another base or another vision tower."""
    matrices = [value for name, value in read_tensors(Path(path)).items() if "mm_projector" in name and value.ndim == 2]
    if not matrices:
        raise UserError(f"{path} holds no mm_projector weights; name LLaVA's mm_projector.bin")
    vision = model_config(settings.vision_tower, "vision tower", "VISION_TOWER")
    for part, name, config, expected in (
        ("vision tower", settings.vision_tower, vision.get("vision_config", vision), matrices[0].shape[1]),
        ("base model", settings.model_name_or_path, base, matrices[-1].shape[0]),
    ):
        if config.get("hidden_size", expected) != expected:
            raise UserError(
                f"{path} is for width {expected}, the {part} {name} has {config['hidden_size']}; name the projector "
                "that was trained for both"
            )


def llava_arguments(arguments: list[str], settings: argparse.Namespace, projector: str | None) -> list[str]:
    """The arguments as LLaVA's trainer gets them: the projector as it was settled, paths that hold from any folder."""
    parts = {name: getattr(settings, name) for name in ("model_name_or_path", "vision_tower")}
    parts["pretrain_mm_mlp_adapter"] = projector
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for name in parts:
        parser.add_argument(f"--{name}")
    _, others = parser.parse_known_args(arguments)
    paths = {name: os.path.abspath(part) if os.path.exists(part) else part for name, part in parts.items() if part}
    return others + [word for name, path in paths.items() for word in (f"--{name}", path)]


def main() -> None:
    parser = HfArgumentParser(
        (llava_train.ModelArguments, llava_train.DataArguments, llava_train.TrainingArguments), allow_abbrev=False
    )
    arguments, unknown = parser.parse_known_args()
    if unknown:
        raise UserError(
            f"LLaVA's trainer has no argument {unknown[0]}; `python -m llava.train.train --help` lists those it has"
        )
    settings = read_settings()
    base = base_config(settings)
    projector = projector_of(settings, base)
    if projector is not None and settings.vision_tower:
        check_projector(projector, settings, base)
    sys.argv[1:] = llava_arguments(sys.argv[1:], settings, projector)

    if arguments.use_cpu:
        leave_a_core(base.get("hidden_size", 0))
        print(f"threads       {torch.get_num_threads()} (OMP_NUM_THREADS sets another number)", flush=True)
    for message in _WARNED_IN_VAIN:
        warnings.filterwarnings("ignore", message)
    # A LLaMA base becomes a LLaVA model, which is what is wanted.
    logging.getLogger("transformers.configuration_utils").addFilter(
        lambda record: "to instantiate a model of type llava" not in record.getMessage()
    )
    describe = functools.partial(record_of, settings, projector)
    llava_train.LLaVATrainer = functools.partial(CompleteTrainer, describe=describe)
    if settings.lora_enable:
        transformers.trainer.deepspeed_load_checkpoint = load_deepspeed_checkpoint
    set_seed(arguments.seed)  # LLaVA draws the adapter before transformers' trainer sets it
    # LLaVA's own environment has torch 2.0, for which transformers has no SDPA.
    attention = "sdpa" if is_torch_sdpa_available() else "eager"
    if is_flash_attn_2_available():
        attention = "flash_attention_2"
    llava_train.train(attn_implementation=attention)


if __name__ == "__main__":
    run(main)
