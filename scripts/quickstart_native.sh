#!/usr/bin/env bash
# Run the five steps on a tiny Qwen2.5-VL with TRL's trainer, on the CPU, in a few minutes (docs/native.md).
#
#   bash scripts/quickstart_native.sh            into quickstart-native/
#   bash scripts/quickstart_native.sh FOLDER     into another folder
#
# Sets up .venv-native first where it is missing. The processor, the chat template and the trainer are the real ones;
# only paths and sizes differ from a real run. What is there already is skipped: remove the folder to start anew.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
# shellcheck source=scripts/shell/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/steps.sh"
begin quickstart-native native "${1:-}"
setting HF_DATASETS_CACHE="$folder/cache"

draw_data
step "Model: a tiny Qwen2.5-VL" "$folder/model" \
    "$PYTHON" scripts/quickstart/native_model.py --folder "$folder/model"

sample_warm_up

step "Step 2: the sample in TRL's form" "$folder/warm_up.jsonl" \
    "$PYTHON" scripts/convert_data.py --source_path "$folder/warm_up.json" --target_path "$folder/warm_up.jsonl" \
    --to parts

# For both trainings.
training=("$PYTHON" scripts/train_trl.py --image_folder "$folder/images" --model_name_or_path "$folder/model"
    --assistant_only_loss --max_length 2048 --per_device_train_batch_size 8 --gradient_checkpointing false
    --use_cpu --bf16 false --report_to none --logging_steps 10 --save_strategy no --disable_tqdm true)
reference=$folder/reference
step "Step 2: train the LoRA reference model with TRL" "$reference/adapter_model.safetensors" \
    "${training[@]}" --data_path "$folder/warm_up.jsonl" --output_dir "$reference" --num_train_epochs 3 \
    --learning_rate 1e-2 --use_peft --lora_r 8 --lora_alpha 16 --lora_target_modules all-linear

step "Step 3: gradient features" "$folder/gradients/manifest_0.json" \
    "$PYTHON" compute_gradient_features.py --input_file "$folder/data.json" --image_folder "$folder/images" \
    --model_path "$reference" --model_base "$folder/model" --output_file "$folder/gradients" --device cpu

select_subset

step "Step 5: the subset in TRL's form" "$folder/subset.jsonl" \
    "$PYTHON" scripts/convert_data.py --source_path "$subset.json" --target_path "$folder/subset.jsonl" --to parts

step "Step 5: train on the selected subset with TRL" "$folder/tuned/model.safetensors" \
    "${training[@]}" --data_path "$folder/subset.jsonl" --output_dir "$folder/tuned" --num_train_epochs 1 \
    --learning_rate 1e-3

write_report
