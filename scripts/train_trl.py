#!/usr/bin/env python
"""Train a vision-language model of transformers with TRL's SFTTrainer, on records and images as they lie on disk.

What it adds to `trl sft`: images are opened from --image_folder, by the same function as in step 3;
`tive_training.json` beside the model tells step 3 what it was trained on; and a checkpoint holds Adam's moments by name
(docs/less.md).
Every other argument is TRL's own (SFTConfig and ModelConfig), so this is steps 2 and 5 for TRL (docs/native.md):

  python scripts/convert_data.py --source_path warm_up.json --target_path warm_up.jsonl --to parts
  python scripts/train_trl.py --data_path warm_up.jsonl --image_folder images --model_name_or_path BASE \\
      --output_dir reference --assistant_only_loss --max_length 4096 --use_peft --lora_target_modules all-linear
"""

from __future__ import annotations

import sys

from tive.util.errors import UserError, run
from tive.util.text import of_project


def main() -> None:
    try:
        from tive.training.trl_trainer import train
    except ModuleNotFoundError as error:
        raise UserError(
            f"{sys.executable} has no {error.name}; `bash {of_project('scripts/setup.sh')} native` makes an "
            f"environment that has, and `source {of_project('.venv-native/bin/activate')}` takes it (docs/native.md)"
        ) from error
    train()


if __name__ == "__main__":
    run(main)
