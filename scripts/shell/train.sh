# shellcheck shell=bash
# Sourced by finetune_lora.sh and finetune.sh: the settings that both share, and the launch of LLaVA's trainer.
# shellcheck source=scripts/shell/python.sh
source "$(dirname "${BASH_SOURCE[0]}")/python.sh"

MODEL=${MODEL:-lmsys/vicuna-7b-v1.5}
VISION_TOWER=${VISION_TOWER:-openai/clip-vit-large-patch14-336}
PROJECTOR=${PROJECTOR-auto}           # a file; auto: MODEL's own, else LLaVA-1.5's pre-trained one; empty: MODEL's own
EPOCHS=${EPOCHS:-1}
BATCH_SIZE=${BATCH_SIZE:-16}
GRADIENT_ACCUMULATION=${GRADIENT_ACCUMULATION:-1}
MAX_LENGTH=${MAX_LENGTH:-2048}
SAVE_STEPS=${SAVE_STEPS:-50000}
WORKERS=${WORKERS:-4}
REPORT_TO=${REPORT_TO:-none}
GPUS=${GPUS:-all}                     # all, none, or ids: 0,1
PRECISION=${PRECISION:-auto}          # bf16 (with tf32), fp16 or fp32
DEEPSPEED_CONFIG=${DEEPSPEED_CONFIG:-$ROOT/scripts/deepspeed/zero3.json}
MASTER_PORT=${MASTER_PORT:-29500}

# train_llava ARGUMENT...: checks what is there, then trains; the arguments go to LLaVA's trainer.
train_llava() {
    if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
        # shellcheck source=scripts/shell/help.sh
        (source "$ROOT/scripts/shell/help.sh" --help)
        echo
        sed -n 's/^\([A-Z_]*\)=\${[A-Z_]*:\{0,1\}-\([^}]*\)}/  \1=\2/p' "$0" "$ROOT/scripts/shell/train.sh"
        return
    fi
    # With a word behind it, it is LLaVA's: the template.
    [[ ${*: -1} != --version ]] || source "$ROOT/scripts/shell/help.sh" --version
    local recipe=(
        --model_name_or_path "$MODEL" --version v1
        --data_path "$DATA_PATH" --image_folder "$IMAGE_FOLDER" --output_dir "$OUTPUT_DIR"
        --vision_tower "$VISION_TOWER" --pretrain_mm_mlp_adapter "$PROJECTOR" --mm_projector_type mlp2x_gelu
        --mm_vision_select_layer -2 --mm_use_im_start_end False --mm_use_im_patch_token False
        --image_aspect_ratio pad --group_by_modality_length True
        --num_train_epochs "$EPOCHS" --per_device_train_batch_size "$BATCH_SIZE"
        --gradient_accumulation_steps "$GRADIENT_ACCUMULATION"
        --learning_rate "$LEARNING_RATE" --weight_decay 0. --warmup_ratio 0.03 --lr_scheduler_type cosine
        --evaluation_strategy no --save_strategy steps --save_steps "$SAVE_STEPS" --save_total_limit 1
        --model_max_length "$MAX_LENGTH" --gradient_checkpointing True --lazy_preprocess True
        --dataloader_num_workers "$WORKERS" --logging_steps 1 --report_to "$REPORT_TO"
    )
    [[ $PRECISION =~ ^(auto|bf16|fp16|fp32)$ ]] || fail "PRECISION=$PRECISION is none of auto, bf16, fp16, fp32"
    run_module tive.training.checks "${recipe[@]}" "$@"

    local count=0 capability=0 reason="GPUS=none"
    if [[ $GPUS != none ]]; then
        [[ $GPUS == all ]] || export CUDA_VISIBLE_DEVICES=$GPUS
        read -r count capability < <("$PYTHON" "$ROOT/scripts/shell/gpus.py")
        [[ $GPUS == all || $(tr -cd , <<<"$GPUS" | wc -c) -eq $((count - 1)) ]] ||
            fail "GPUS=$GPUS: torch sees $count of them; name GPUs of this machine (0,1), or none"
        reason="no GPU found"
    fi
    if ((count == 0)); then
        echo "device        CPU: $reason"
        export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}  # else DeepSpeed warns that it sees no GPU
        run_module tive.training.llava_trainer --use_cpu True "${recipe[@]}" "$@"
        return
    fi
    [[ $PRECISION != auto ]] || PRECISION=$( ((capability >= 8)) && echo bf16 || echo fp16)
    local precision=()
    case $PRECISION in
        bf16) precision=(--bf16 True --tf32 True) ;;
        fp16) precision=(--fp16 True) ;;
    esac
    echo "device        GPU $GPUS ($count seen), $PRECISION, $BATCH_SIZE records each x $GRADIENT_ACCUMULATION a step"
    run_module torch.distributed.run --nproc_per_node "$count" --master_port "$MASTER_PORT" \
        "$ROOT/scripts/shell/run_module.py" tive.training.llava_trainer \
        --deepspeed "$DEEPSPEED_CONFIG" "${recipe[@]}" "${precision[@]}" "$@"
}
