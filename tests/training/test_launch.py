"""What is launched: the release's settings, on the GPUs that there are, with the user's arguments last."""

from __future__ import annotations

from pathlib import Path

from tests.helpers.training import ROOT, assert_refused, command_on, launch, stand_in, value_of


def test_on_gpus_deepspeed_starts_the_release_settings(settings: dict[str, str]) -> None:
    defaults = {name: value for name, value in settings.items() if name in ("PATH", "OUTPUT_DIR", "OMP_NUM_THREADS")}
    command = command_on("8 9", defaults | {"GPUS": "all"}, "finetune_lora.sh")
    run_module = str(ROOT / "scripts" / "shell" / "run_module.py")
    assert command[:2] == [run_module, "torch.distributed.run"]
    assert command[command.index("tive.training.llava_trainer") - 1] == run_module
    expected = {
        "--nproc_per_node": "8",
        "--deepspeed": str(ROOT / "scripts" / "deepspeed" / "zero3.json"),
        "--model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "--vision_tower": "openai/clip-vit-large-patch14-336",
        "--version": "v1",
        "--lora_enable": "True",
        "--lora_r": "128",
        "--lora_alpha": "256",
        "--mm_projector_lr": "2e-5",
        "--learning_rate": "2e-5",
        "--mm_projector_type": "mlp2x_gelu",
        "--mm_vision_select_layer": "-2",
        "--image_aspect_ratio": "pad",
        "--group_by_modality_length": "True",
        "--bf16": "True",
        "--tf32": "True",
        "--num_train_epochs": "1",
        "--per_device_train_batch_size": "16",
        "--gradient_accumulation_steps": "1",
        "--lr_scheduler_type": "cosine",
        "--warmup_ratio": "0.03",
        "--weight_decay": "0.",
        "--model_max_length": "2048",
        "--gradient_checkpointing": "True",
        "--lazy_preprocess": "True",
        "--dataloader_num_workers": "4",
    }
    assert {name: value_of(command, name) for name in expected} == expected
    assert not any(
        argument.startswith(("--lora", "--mm_projector_lr")) for argument in command_on("8 9", defaults, "finetune.sh")
    )


def test_the_gpus_named_are_used_with_the_precision_they_have(settings: dict[str, str]) -> None:
    command = command_on("2 7", settings | {"GPUS": "1,3"}, "finetune.sh")
    assert value_of(command, "--nproc_per_node") == "2"
    assert value_of(command, "--fp16") == "True" and "--bf16" not in command


def test_gpus_that_are_not_there_are_refused(settings: dict[str, str], tmp_path: Path) -> None:
    python = stand_in(tmp_path, "1 7")
    assert_refused(
        launch("finetune.sh", settings | {"GPUS": "1,3", "PYTHON": python}), "GPUS=1,3: torch sees 1 of them"
    )


def test_arguments_of_the_user_come_last(settings: dict[str, str]) -> None:
    command = command_on("1 9", settings | {"GPUS": "all"}, "finetune.sh", "--num_train_epochs", "2", "--bf16", "False")
    assert command[-4:] == ["--num_train_epochs", "2", "--bf16", "False"]
