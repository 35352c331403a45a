"""Make the DeepSpeed checkpoints of `tests/golden/deepspeed`: real ones, of a LoRA of rank 1 on the model of 11 layers.

    python tests/helpers/make_deepspeed_states.py tests/golden/deepspeed

LLaVA's trainer runs three steps on three processes of the CPU (gloo), with ZeRO-2 in float32 and in bfloat16
and with ZeRO-3 in float32. Three ranks divide no matrix evenly, so every kind of padding is there. What is not needed
to read the optimizer's state is left out of the copy.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "less"
RANKS = 3
KINDS = {"zero2": (2, False), "zero2_bfloat16": (2, True), "zero3": (3, False)}
# A parameter kept whole on every rank, and a group that is not cut into sub-groups, would test less.
ZERO_3 = {"stage3_param_persistence_threshold": 0, "sub_group_size": 2000}


def train(output: Path, stage: int, bfloat16: bool) -> Path:
    """One training run; returns its checkpoint after the second of three steps."""
    settings = json.loads((ROOT / "scripts" / "deepspeed" / f"zero{stage}.json").read_text())
    settings["zero_optimization"] |= ZERO_3 if stage == 3 else {}
    (output / "deepspeed.json").write_text(json.dumps(settings))
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    arguments = {
        "deepspeed": output / "deepspeed.json",
        "model_name_or_path": GOLDEN / "vicuna",
        "vision_tower": GOLDEN / "clip",
        "pretrain_mm_mlp_adapter": GOLDEN / "mm_projector.bin",
        "data_path": GOLDEN / "target.json",
        "image_folder": GOLDEN / "images",
        "output_dir": output / "trained",
        "version": "v1",
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "group_by_modality_length": True,
        "lora_enable": True,
        "lora_r": 1,
        "lora_alpha": 2,
        "mm_projector_lr": 2e-3,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "max_steps": 3,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": 2,
        "bf16": bfloat16,
        "model_max_length": 2048,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "remove_unused_columns": False,
    }
    words = [str(word) for name, value in arguments.items() for word in (f"--{name}", value)]
    processes = []
    for rank in range(RANKS):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        cpu = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1}
        environment = os.environ | {name: str(value) for name, value in (place | cpu).items()}
        command = [sys.executable, str(ROOT / "tests" / "helpers" / "deepspeed_on_cpu.py"), *words]
        processes.append(subprocess.Popen(command, env=environment, cwd=ROOT))
    codes = [process.wait() for process in processes]
    if any(codes):
        sys.exit(f"training with ZeRO-{stage} failed")
    return output / "trained" / "checkpoint-2"


def copy_state(checkpoint: Path, target: Path) -> None:
    """The adapter and the optimizer's state, without what only a resumed training needs."""
    kept = (
        "adapter_*",
        "adam_moments.safetensors",
        "trainer_state.json",
        "latest",
        "global_step*",
        "non_lora_trainables.bin",
        "config.json",
    )
    for pattern in kept:
        for found in checkpoint.glob(pattern):
            if found.is_dir():
                shutil.copytree(found, target / found.name)
            else:
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(found, target / found.name)
    for part in target.glob("global_step*/zero_pp_rank_[1-9]*_model_states.pt"):
        part.unlink()  # the first rank's names them all
    for name, key, value in (
        ("config.json", "_name_or_path", "./vicuna"),
        ("config.json", "mm_vision_tower", "./clip"),
        ("adapter_config.json", "base_model_name_or_path", "./vicuna"),
    ):
        settings = json.loads((target / name).read_text())
        (target / name).write_text(json.dumps(settings | {key: value}, indent=2) + "\n")


def main() -> None:
    target = Path(sys.argv[1])
    for kind, (stage, bfloat16) in KINDS.items():
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = train(Path(folder), stage, bfloat16)
            shutil.rmtree(target / kind, ignore_errors=True)
            copy_state(checkpoint, target / kind)


if __name__ == "__main__":
    main()
