#!/usr/bin/env python
"""Train a vision-language model of transformers with TRL's SFTTrainer, on records and images as they lie on disk.

What it adds to `trl sft`: images are opened from --image_folder. Every other argument is TRL's own (SFTConfig and
ModelConfig), so this is steps 2 and 5 for TRL (docs/native.md):

  python scripts/convert_data.py --source_path warm_up.json --target_path warm_up.jsonl --to parts
  python scripts/train_trl.py --data_path warm_up.jsonl --image_folder images --model_name_or_path BASE \\
      --output_dir reference --assistant_only_loss --max_length 4096 --use_peft --lora_target_modules all-linear
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

# Before transformers and TRL: it makes a torchvision importable that does not fit the installed torch.
from tive.models.common import prepare_torchvision
from tive.util.errors import UserError, run

prepare_torchvision()

from datasets import Image, List, load_dataset  # noqa: E402
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config  # noqa: E402


@dataclass
class DataArguments:
    """Where the records and their images lie."""

    data_path: str
    image_folder: str = ""


def opened(data: DataArguments) -> Any:
    """TRL's data set of a file of records in the form `parts`; an image is read when its record is."""
    if not os.path.isfile(data.data_path):
        raise UserError(f"--data_path {data.data_path} is not a file")
    dataset = load_dataset("json", data_files=data.data_path, split="train")
    if "messages" not in dataset.column_names:
        raise UserError(f"{data.data_path} has no messages; convert it with scripts/convert_data.py --to parts")
    dataset = dataset.select_columns([name for name in ("messages", "images") if name in dataset.column_names])
    if "images" not in dataset.column_names:
        return dataset
    folder = os.path.abspath(data.image_folder)
    dataset = dataset.map(
        lambda record: {"images": [os.path.join(folder, image) for image in record["images"] or []]},
        load_from_cache_file=False,
    )
    return dataset.cast_column("images", List(Image()))


def main() -> None:
    data, training, model = TrlParser((DataArguments, SFTConfig, ModelConfig)).parse_args_and_config()
    training.model_init_kwargs = {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation,
        "revision": model.model_revision,
    }
    trainer = SFTTrainer(
        model=model.model_name_or_path, args=training, train_dataset=opened(data), peft_config=get_peft_config(model)
    )
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    run(main)
