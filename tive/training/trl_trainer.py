"""TRL's trainer, started by `scripts/train_trl.py`, which leaves beside each model what step 3 needs to know."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before transformers and TRL: it makes a torchvision importable that does not fit the installed torch.
import tive.models.common  # noqa: F401  # isort: skip

import torch
from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from tive.data.conversations import from_llava, image_of, image_paths
from tive.data.images import BadImage, read_image
from tive.data.records import name_of, open_records
from tive.data.trained import conversation_of, is_trained_on
from tive.models.optimizer_state import save_moments
from tive.models.training_record import TrainingRecord, lora_of, recorded_model, versions_of, write_record
from tive.util.device import leave_a_core
from tive.util.errors import UserError
from tive.util.text import first_line


@dataclass
class DataArguments:
    """Where the records and their images lie."""

    data_path: str
    image_folder: str = ""


class RecordingTrainer(SFTTrainer):
    """TRL's trainer, which leaves beside each model what step 3 needs to know of the training."""

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        write_record(Path(output_dir or self.args.output_dir), self.record)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        save_moments(self, output_dir)


def opened(data: DataArguments) -> Any:
    """TRL's data set of records in any form; each is read with its images when it is used, else a `UserError`."""
    if data.image_folder and not os.path.isdir(data.image_folder):
        raise UserError(f"--image_folder {data.image_folder} is not a folder; name the one that images lie in")
    records = open_records(data.data_path)
    rows = list(range(len(records)))
    columns = {"messages": rows}
    if any(image_of(record) is not None for record in records if isinstance(record, dict)):
        columns["images"] = rows
    folder = os.path.abspath(data.image_folder)

    def record_of_row(row: int) -> tuple[list[Any], list[Any]]:
        record = records[row]
        try:
            conversation = conversation_of(record)
            if not all(is_trained_on(turn) for turn in conversation["conversations"]):
                raise ValueError("takes an answer out of training, and TRL trains on every answer")
            images = [read_image(folder, image, upright=True) for image in image_paths(conversation)]
            return from_llava(conversation, "parts")["messages"], images
        except (BadImage, ValueError) as error:
            raise UserError(f"{records.path}: {name_of(row, record)}: {error}; repair it, or leave it out") from error

    def read(batch: dict[str, list[int]]) -> dict[str, list[Any]]:
        pairs = [record_of_row(row) for row in batch["messages"]]
        return {name: [pair[number] for pair in pairs] for number, name in enumerate(columns)}

    return Dataset.from_dict(columns).with_transform(read)


def record_of(trainer: Any, model: ModelConfig) -> TrainingRecord:
    """What this training uses, from the files that it was loaded from."""
    return TrainingRecord(
        trainer="trl",
        template=hashlib.sha256((trainer.processing_class.chat_template or "").encode()).hexdigest(),
        base=recorded_model(model.model_name_or_path, revision=model.model_revision),
        lora=lora_of(trainer.model) if model.use_peft else None,
        versions=versions_of("tive", "trl", "torch", "transformers", "peft"),
        settings={name: getattr(trainer.args, name) for name in ("assistant_only_loss", "max_length")},
    )


def train() -> None:
    """Train as the arguments of the command line say: `DataArguments`, and TRL's own."""
    try:
        data, training, model = TrlParser((DataArguments, SFTConfig, ModelConfig)).parse_args_and_config()
        training.model_init_kwargs = {
            "dtype": model.dtype,
            "attn_implementation": model.attn_implementation,
            "revision": model.model_revision,
        }
        name, adapter = model.model_name_or_path, get_peft_config(model)
        trainer = RecordingTrainer(model=name, args=training, train_dataset=opened(data), peft_config=adapter)
    except (OSError, ValueError) as error:  # arguments that TRL or peft refuses, a model or a folder that is not there
        raise UserError(f"{first_line(error)}; check the arguments (--help lists them)") from error
    trainer.record = record_of(trainer, model)
    if training.device.type == "cpu":
        leave_a_core(trainer.model.config.get_text_config().hidden_size)
        print(f"{torch.get_num_threads()} threads on the CPU (OMP_NUM_THREADS sets another number)")
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)
