"""LLaVA's trainer, whose checkpoints are complete, whose optimizer can be read later, and whose model can be saved."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.train.llava_trainer import LLaVATrainer
from transformers import GenerationConfig
from transformers.trainer_utils import get_last_checkpoint

from tive.data.training_record import (
    RECORD_FILE,
    TrainingRecord,
    model_fingerprint,
    model_folder,
    read_record,
    write_record,
)
from tive.training.moments import save_moments
from tive.training.settings import LLAVA_DISTRIBUTIONS, base_config, has_projector
from tive.util.errors import UserError
from tive.util.files import sha256_of
from tive.util.packages import package_in_use

PROJECTOR_FILE = "non_lora_trainables.bin"


class ReferenceTrainer(LLaVATrainer):
    """LLaVA's trainer; what it saves and loads is completed, the training is not touched.

    Args:
        settings: as `read_settings` gives them.
        projector: the file that the projector starts from, or None.
    """

    def __init__(self, *args: Any, settings: argparse.Namespace, projector: str | None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_savable(self.model)
        self.record = describe(settings, projector, self.model) if self.is_world_process_zero() else None

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


def describe(settings: argparse.Namespace, projector: str | None, model: Any) -> TrainingRecord:
    """What this training uses, from the files that it was loaded from."""
    # A LLaVA model loads the tower that its own config names, whatever the argument says.
    tower = model.get_vision_tower() if settings.vision_tower else None
    lora = None
    if settings.lora_enable:
        (adapter,) = model.peft_config.values()
        lora = {"r": adapter.r, "alpha": adapter.lora_alpha, "dropout": adapter.lora_dropout, "bias": adapter.bias}
    start: dict[str, Any] = {"start": "base" if has_projector(base_config(settings)) else "random"}
    if projector is not None:
        start = {"start": "file", "path": os.path.abspath(projector), "sha256": sha256_of(projector)}
    return TrainingRecord(
        template=settings.version,
        image_aspect_ratio=settings.image_aspect_ratio,
        base=_part(settings.model_name_or_path, settings.cache_dir),
        vision_tower=_part(tower.vision_tower_name) if tower is not None else None,
        projector=start,
        lora=lora,
        versions=_versions(),
    )


def _part(name: str, cache_dir: str | None = None) -> dict[str, Any]:
    folder = model_folder(name, cache_dir)
    if folder is None:
        raise UserError(f"{name} was loaded, and its files cannot be found; name a folder")
    return {"path": os.path.abspath(name) if os.path.isdir(name) else name, **model_fingerprint(folder)}


def _versions() -> dict[str, str]:
    llava = package_in_use("llava", LLAVA_DISTRIBUTIONS)
    found = {"llava": (llava and llava[1]) or "unknown", "torch": torch.__version__}
    return {"tive": version("tive"), **found, **{name: version(name) for name in ("transformers", "peft", "deepspeed")}}


def refuse_other_training(checkpoint: Path, record: TrainingRecord) -> None:
    """A checkpoint is gone on from with what it was begun with; one without a record is not known.

    Raises:
        UserError: something differs.
    """
    before = read_record(checkpoint)
    if before is None:
        return
    for field in dataclasses.fields(TrainingRecord):
        old, new = getattr(before, field.name), getattr(record, field.name)
        if isinstance(old, dict) and isinstance(new, dict):  # the same files may lie elsewhere now
            old, new = ({key: value for key, value in part.items() if key != "path"} for part in (old, new))
        if field.name != "versions" and old != new:
            raise UserError(
                f"{checkpoint} was trained with another {field.name.replace('_', ' ')} ({checkpoint / RECORD_FILE}); "
                "train with the same, or set another OUTPUT_DIR"
            )


def _numpy_state_allowed() -> contextlib.AbstractContextManager[Any]:
    """Lets `torch.load(weights_only=True)` read the state of numpy's generator; older torch reads it anyway."""
    if not hasattr(torch.serialization, "safe_globals"):
        return contextlib.nullcontext()
    reconstruct = np.core.multiarray._reconstruct  # type: ignore[attr-defined]
    return torch.serialization.safe_globals([reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))])


def load_deepspeed_checkpoint(engine: Any, checkpoint_path: str, **_: Any) -> None:
    """Go on from a DeepSpeed checkpoint, which for LoRA holds the trained weights alone: the base is loaded already."""
    loaded, _ = engine.load_checkpoint(checkpoint_path, load_module_strict=False)
    if loaded is None:
        raise UserError(f"{checkpoint_path} holds no DeepSpeed checkpoint; remove it to start anew")


def make_savable(model: Any) -> None:
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
