"""LLaVA's trainer, whose checkpoints are complete, whose optimizer can be read later, and whose model can be saved."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.train.llava_trainer import LLaVATrainer
from transformers import GenerationConfig

from tive.util.errors import UserError
from tive.util.files import write_json

PROJECTOR_FILE = "non_lora_trainables.bin"
# Beside the optimizer's state in a checkpoint: the parameter names of each of its groups, in the order of the state.
OPTIMIZER_NAMES_FILE = "optimizer_names.json"


class ReferenceTrainer(LLaVATrainer):
    """LLaVA's trainer; what it saves and loads is completed, the training is not touched."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        make_savable(self.model)

    def create_optimizer(self) -> torch.optim.Optimizer:
        """LLaVA's optimizer without its empty parameter groups, and the names of what is in the others."""
        optimizer = super().create_optimizer()
        optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.optimizer_names = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        if folder != Path(self.args.output_dir):  # a checkpoint, whose folder gets its name when it is complete
            write_json(folder / OPTIMIZER_NAMES_FILE, self.optimizer_names)
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
