#!/usr/bin/env bash
# Step 5: train the whole model on the selected subset, with LLaVA's own trainer.
#
#   bash finetune.sh                                                  on every GPU; on the CPU where there is none
#   DATA_PATH=selected/Tive_q_0.01_p_0.15.json bash finetune.sh --num_train_epochs 2
#   DEEPSPEED_CONFIG=scripts/deepspeed/zero2.json bash finetune.sh
#
# Every variable below can be set from the environment. Any further argument goes to LLaVA's trainer as it is, after
# those given here, and the later one counts.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/shell/train.sh"

DATA_PATH=${DATA_PATH:-./selected/Tive_q_0.001_p_0.15.json}
IMAGE_FOLDER=${IMAGE_FOLDER:-./playground/data}
OUTPUT_DIR=${OUTPUT_DIR:-./checkpoints/llava-v1.5-7b-tive}
LEARNING_RATE=${LEARNING_RATE:-2e-5}

train_llava "$@"
