#!/usr/bin/env bash
# Step 2: train the LoRA reference model on the warm-up sample, with LLaVA's own trainer.
#
#   bash finetune_lora.sh                                                 on every GPU; on the CPU where there is none
#   GPUS=0,1 BATCH_SIZE=8 GRADIENT_ACCUMULATION=8 bash finetune_lora.sh   on two GPUs, 128 records a step as on eight
#   DATA_PATH=mine.json OUTPUT_DIR=checkpoints/mine bash finetune_lora.sh --learning_rate 2e-4
#
# Every variable below can be set from the environment. Any further argument goes to LLaVA's trainer as it is, after
# those given here, and the later one counts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/shell/train.sh"

DATA_PATH=${DATA_PATH:-./playground/data/warm_up.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-./playground/data}
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-warm-up-lora}
LORA_R=${LORA_R:-128}
LORA_ALPHA=${LORA_ALPHA:-256}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
PROJECTOR_LEARNING_RATE=${PROJECTOR_LEARNING_RATE:-2e-5}

train_llava --lora_enable True --lora_r "$LORA_R" --lora_alpha "$LORA_ALPHA" \
    --mm_projector_lr "$PROJECTOR_LEARNING_RATE" "$@"
