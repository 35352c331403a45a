#!/usr/bin/env bash
# Run the five steps of TIVE on a tiny LLaVA-1.5 and a small multi-task data set, on the CPU, in a few minutes.
#
#   bash scripts/quickstart.sh            into quickstart/
#   bash scripts/quickstart.sh FOLDER     into another folder
#
# Sets up .venv first where it is missing. The steps are the README's, with the scripts and LLaVA's trainer that a 7B
# model takes; only paths and sizes differ. What is there already is skipped: remove the folder to start anew.
set -euo pipefail
# shellcheck source=scripts/shell/help.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/help.sh" "${1:-}"
# shellcheck source=scripts/shell/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell/steps.sh"
begin quickstart '' "${1:-}"

draw_data
step "Model: a tiny Vicuna, CLIP and projector" "$folder/model" \
    "$PYTHON" scripts/quickstart/model.py --data "$folder/data.json" --folder "$folder/model"

# For all the trainings.
setting MODEL="$folder/model/vicuna" VISION_TOWER="$folder/model/clip" PROJECTOR="$folder/model/mm_projector.bin" \
    IMAGE_FOLDER="$folder/images" GPUS=none WORKERS=0 BATCH_SIZE=8

sample_warm_up

reference=$folder/reference
# What a training that broke off left behind is no finished model.
[[ -e $reference/non_lora_trainables.bin ]] || rm -rf "$reference"
step "Step 2: train the LoRA reference model" "$reference/non_lora_trainables.bin" \
    env DATA_PATH="$folder/warm_up.json" OUTPUT_DIR="$reference" LORA_R=8 LORA_ALPHA=16 EPOCHS=3 \
    LEARNING_RATE=2e-3 PROJECTOR_LEARNING_RATE=2e-3 bash finetune_lora.sh --logging_steps 10

for chunk in 0 1; do
    step "Step 3: gradient features, chunk $chunk of 2" "$folder/gradients/manifest_$chunk.json" \
        "$PYTHON" compute_gradient_features.py --input_file "$folder/data.json" --image_folder "$folder/images" \
        --model_path "$reference" --model_base "$MODEL" --output_file "$folder/gradients" \
        --num_chunks 2 --chunk_idx $chunk --device cpu
done

select_subset

tuned=$folder/tuned
[[ -e $tuned/training_args.bin ]] || rm -rf "$tuned"
step "Step 5: train on the selected subset" "$tuned/training_args.bin" \
    env DATA_PATH="$subset.json" OUTPUT_DIR="$tuned" LEARNING_RATE=1e-3 bash finetune.sh --logging_steps 10

write_report
