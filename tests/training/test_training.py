"""The training scripts: what they refuse, what they launch, and real training runs of a tiny LLaVA on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import llava
import pytest
import torch
from safetensors.torch import load_file

import tive.training.train
from tive.models import ModelFiles
from tive.models import llava as llava_family
from tive.util.errors import run

ROOT = Path(__file__).resolve().parents[2]


def make(script: str, *arguments: object) -> None:
    subprocess.run([sys.executable, ROOT / "scripts" / script, *map(str, arguments)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the quickstart's data and images, its model of two layers, and small data files cut from it."""
    folder = tmp_path_factory.mktemp("parts")
    make("quickstart/data.py", "--folder", folder)
    make("quickstart/model.py", "--data", folder / "data.json", "--folder", folder / "model", "--layers", 2)
    records = json.loads((folder / "data.json").read_text())
    text = [record for record in records if "image" not in record][:5]
    images = [record for record in records if "image" in record][:7]
    for name, chosen in (("text", text), ("images", images), ("mixed", text[:2] + images)):
        (folder / f"{name}.json").write_text(json.dumps(chosen))
    return folder


def complete_settings(parts: Path, folder: Path) -> dict[str, str]:
    """The environment of a training run that lacks nothing and goes to `folder`/trained."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM")},
        "PYTHON": sys.executable,
        "MODEL": f"{parts}/model/vicuna",
        "VISION_TOWER": f"{parts}/model/clip",
        "PROJECTOR": f"{parts}/model/mm_projector.bin",
        "DATA_PATH": f"{parts}/mixed.json",
        "IMAGE_FOLDER": f"{parts}/images",
        "OUTPUT_DIR": f"{folder}/trained",
        "GPUS": "none",
        "WORKERS": "0",
        "BATCH_SIZE": "3",
        "LORA_R": "4",
        "LORA_ALPHA": "8",
        "LEARNING_RATE": "1e-2",
        "PROJECTOR_LEARNING_RATE": "1e-2",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def settings(parts: Path, tmp_path: Path) -> dict[str, str]:
    return complete_settings(parts, tmp_path)


def launch(script: str, settings: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / script), *arguments]
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, cwd=Path(settings["OUTPUT_DIR"]).parent
    )


def trained_weights(folder: Path) -> dict[str, torch.Tensor]:
    beside = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
    return {**load_file(folder / "adapter_model.safetensors"), **beside}


def assert_same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, msg=name)


# What is refused before anything is loaded.

TURNS = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]
BAD_DATA = {
    "no JSON": ("[{]", "not JSON"),
    "JSON Lines": (json.dumps({"conversations": TURNS}) + "\n", "scripts/convert_data.py"),
    "no records": ("[]", "holds no records"),
    "no conversations": ('[{"id": "a7"}]', "record 0 (id 'a7') has no `conversations`"),
    "unknown role": ('[{"conversations": [{"from": "bot", "value": "x"}]}]', "unknown role 'bot'"),
    "image in a list": (json.dumps([{"image": ["a.png"], "conversations": TURNS}]), "its image in a list"),
    "no words": ('[{"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": ""}]}]', "no text"),
    "image not there": (
        json.dumps([{"image": "chat/a.png", "conversations": TURNS}]),
        "chat/a.png",
    ),
}
BAD_SETTINGS = {
    "DATA_PATH": ("nowhere.json", "cannot read nowhere.json"),
    "IMAGE_FOLDER": ("nowhere", "the folder nowhere is not there; set IMAGE_FOLDER"),
    "MODEL": ("./nowhere", "base model: ./nowhere is not there; set MODEL"),
    "VISION_TOWER": ("./nowhere", "vision tower: ./nowhere is not there; set VISION_TOWER"),
    "PROJECTOR": ("nowhere.bin", "projector: nowhere.bin is not there; set PROJECTOR"),
    "PRECISION": ("fp8", "PRECISION=fp8 is none of auto, bf16, fp16, fp32"),
}


def assert_refused(ended: subprocess.CompletedProcess[str], reason: str) -> None:
    lines = ended.stderr.splitlines()
    assert ended.returncode == 2, ended.stderr
    assert len(lines) == 1 and lines[0].startswith("error: ") and reason in lines[0], ended.stderr


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_the_trainer_cannot_take_is_refused(case: str, settings: dict[str, str], tmp_path: Path) -> None:
    text, reason = BAD_DATA[case]
    (tmp_path / "data.json").write_text(text)
    assert_refused(launch("finetune.sh", settings | {"DATA_PATH": f"{tmp_path}/data.json"}), reason)
    assert not (tmp_path / "trained").exists()


def test_all_records_that_cannot_be_trained_on_are_listed(
    settings: dict[str, str], parts: Path, tmp_path: Path
) -> None:
    """Among them images in other clothes: the trainer opens a path, and nothing else."""
    records = json.loads((parts / "images.json").read_text())[:2]
    bad = [
        {"image": "chat/a.png", "conversations": TURNS},
        {"image": None, "conversations": TURNS},
        {"image": "data:image/png;base64," + "A" * 80_000, "conversations": TURNS},
        {"conversations": []},
    ]
    (tmp_path / "data.json").write_text(json.dumps([records[0], *bad, records[1]]))
    ended = launch("finetune_lora.sh", settings | {"DATA_PATH": f"{tmp_path}/data.json"})
    assert_refused(ended, "4 of 6 records cannot be used")
    assert len(ended.stdout + ended.stderr) < 5000
    listed = json.loads((tmp_path / "trained_bad_records.json").read_text())
    assert [entry["row"] for entry in listed] == [1, 2, 3, 4]


BAD_ARGUMENTS = {
    "anyres": (("--image_aspect_ratio", "anyres"), "--image_aspect_ratio anyres would be trained as square"),
    "image tokens": (("--mm_use_im_start_end", "True"), "--mm_use_im_start_end True adds tokens"),
    "bits": (("--bits", "4"), "--bits 4 would train on a quantized base"),
    "template of MPT": (("--version", "mpt"), "--version mpt is not a template that a reference model can have"),
    "no template": (("--version", "vicuna_v2"), "--version vicuna_v2 is not a template"),
    "tiles": (("--mm_patch_merge_type", "spatial"), "--mm_patch_merge_type spatial is for images of several tiles"),
    "frozen adapter": (("--tune_mm_mlp_adapter", "True"), "--tune_mm_mlp_adapter True freezes the LoRA adapter"),
    "frozen projector": (("--freeze_mm_mlp_adapter",), "--freeze_mm_mlp_adapter True leaves the model without"),
    "empty projector": (("--pretrain_mm_mlp_adapter", ""), "has no projector of its own; set PROJECTOR"),
    "neither true nor false": (("--lora_enable", "maybe"), "--lora_enable maybe is neither True nor False"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_what_the_gradient_step_could_not_follow_is_refused_before_training(
    name: str, settings: dict[str, str]
) -> None:
    arguments, reason = BAD_ARGUMENTS[name]
    assert_refused(launch("finetune_lora.sh", settings, *arguments), reason)


def test_a_base_with_the_fast_tokenizer_alone_is_refused(settings: dict[str, str], parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "model" / "vicuna", tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").rename(tmp_path / "fast" / "tokenizer.json")
    ended = launch("finetune_lora.sh", settings | {"MODEL": f"{tmp_path}/fast"})
    assert_refused(ended, "fast has no tokenizer.model, which LLaVA's trainer needs")


def test_a_lora_adapter_is_no_base(settings: dict[str, str], parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "model" / "vicuna", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert_refused(launch("finetune_lora.sh", settings | {"MODEL": f"{tmp_path}/lora"}), "is a LoRA adapter")


@pytest.mark.parametrize("variable", BAD_SETTINGS)
def test_a_part_that_is_missing_is_named_with_its_variable(variable: str, settings: dict[str, str]) -> None:
    value, reason = BAD_SETTINGS[variable]
    assert_refused(launch("finetune_lora.sh", settings | {variable: value}), reason)


def test_a_hub_name_that_cannot_be_reached_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    ended = launch("finetune.sh", settings | {"MODEL": "someone/some-vicuna", "HF_HOME": f"{tmp_path}/cache"})
    assert_refused(ended, "someone/some-vicuna is neither a folder here nor downloaded")


def test_a_folder_without_a_config_is_no_base(settings: dict[str, str], tmp_path: Path) -> None:
    assert_refused(launch("finetune.sh", settings | {"MODEL": str(tmp_path)}), "holds no config.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors.index.json"])
def test_a_trained_model_is_never_overwritten(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / name).write_text("weights")
    assert_refused(launch("finetune.sh", settings), f"already holds a trained model ({name})")
    assert (tmp_path / "trained" / name).read_text() == "weights"


def test_a_checkpoint_that_broke_off_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "trained" / "checkpoint-9").mkdir(parents=True)
    assert_refused(launch("finetune.sh", settings), "checkpoint-9 is incomplete")


def enter(monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], **changed: str) -> None:
    """Run the entry in this process on the settings, with arguments of LLaVA's added."""
    arguments = {
        "output_dir": "nowhere",
        "data_path": settings["DATA_PATH"],
        "model_name_or_path": settings["MODEL"],
        "vision_tower": settings["VISION_TOWER"],
        "pretrain_mm_mlp_adapter": settings["PROJECTOR"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": "False",
        "version": "v1",
        **changed,
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["tive.training.train", *words])
    run(tive.training.train.main)


def refusal_of_entry(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], settings: dict[str, str], **changed: str
) -> str:
    with pytest.raises(SystemExit) as stop:
        enter(monkeypatch, settings, **changed)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_an_argument_that_llava_lacks_is_refused(
    settings: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusal = refusal_of_entry(monkeypatch, capsys, settings, learning_rat="1")
    assert refusal.startswith("error: LLaVA's trainer has no argument --learning_rat;")


@pytest.mark.parametrize(
    ("layer", "shape", "part"),
    [("0", (128, 80), "vision tower: it has width 80"), ("2", (160, 128), "base model: it has width 160")],
)
def test_a_projector_of_another_model_is_refused(
    layer: str,
    shape: tuple[int, int],
    part: str,
    settings: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    weights = torch.load(settings["PROJECTOR"], weights_only=True)
    torch.save(weights | {f"model.mm_projector.{layer}.weight": torch.zeros(shape)}, tmp_path / "projector.bin")
    refusal = refusal_of_entry(monkeypatch, capsys, settings, pretrain_mm_mlp_adapter=f"{tmp_path}/projector.bin")
    assert refusal.startswith("error: ") and f"is the projector of another {part}" in refusal


def test_the_seed_holds_for_what_llava_draws_first(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is drawn before transformers' trainer sets the seed."""
    drawn: list[float] = []
    monkeypatch.setattr(tive.training.train.llava_train, "train", lambda **_: drawn.append(torch.rand(1).item()))
    for seed in ("1", "1", "2"):
        enter(monkeypatch, settings, seed=seed, use_cpu="True")
    assert drawn[0] == drawn[1] != drawn[2]


# What is launched. A stand-in for Python answers the question for GPUs and writes down the last command.


def stand_in(folder: Path, gpus: str, check: bool = False) -> str:
    """A program that says which GPUs there are, and writes down the command that it gets otherwise.

    Args:
        check: the check before the training is really run.
    """
    python = folder / "python"
    checked = f'exec {sys.executable} "$@"' if check else ":"
    python.write_text(
        f"""#!/bin/sh
case "$2" in
    tive.training.gpus) echo {gpus} ;;
    tive.training.check) {checked} ;;
    *) printf "%s\\n" "$@" >{folder}/command ;;
esac
"""
    )
    python.chmod(0o755)
    return str(python)


def command_on(gpus: str, settings: dict[str, str], script: str, *arguments: str) -> list[str]:
    folder = Path(settings["OUTPUT_DIR"]).parent
    launch(script, settings | {"PYTHON": stand_in(folder, gpus)}, *arguments).check_returncode()
    return (folder / "command").read_text().splitlines()


def value_of(command: list[str], name: str) -> str:
    return command[len(command) - command[::-1].index(name)]


def test_on_gpus_deepspeed_starts_the_release_settings(settings: dict[str, str]) -> None:
    defaults = {name: value for name, value in settings.items() if name in ("PATH", "OUTPUT_DIR", "OMP_NUM_THREADS")}
    command = command_on("8 9", defaults | {"GPUS": "all"}, "finetune_lora.sh")
    run_module = str(ROOT / "scripts" / "shell" / "run_module.py")
    assert command[:2] == [run_module, "torch.distributed.run"]
    assert command[command.index("tive.training.train") - 1] == run_module
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


# What is trained.


@pytest.fixture(scope="module")
def lora_run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA run of three steps with a checkpoint after the second, through finetune_lora.sh.

    It is called from a folder with packages of the same names, which PYTHONPATH names too.
    """
    folder = tmp_path_factory.mktemp("lora")
    for package in ("llava", "torch", "deepspeed"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise SystemExit('not the installed package')")
    environment = complete_settings(parts, folder) | {"SAVE_STEPS": "2", "PYTHONPATH": str(folder)}
    ended = launch("finetune_lora.sh", environment, "--save_total_limit", "2", "--version", "llava_llama_2")
    assert ended.returncode == 0, ended.stderr
    assert "9 records, 7 with an image" in ended.stdout and "7 files, all there" in ended.stdout
    installed = Path(llava.__path__[0]).resolve()
    assert f"LLaVA         {version('llava-torch')} ({installed})" in ended.stdout
    return folder / "trained"


def test_the_gradient_step_computes_with_what_the_training_used(
    lora_run: Path, parts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (lora_run, lora_run / "checkpoint-2"):
        files = ModelFiles(str(folder), str(parts / "model" / "vicuna"))
        reference = llava_family.load(files, torch.device("cpu"), torch.float32)
        assert reference.processor.template == "llava_llama_2"
    assert capsys.readouterr().out == ""


def test_a_checkpoint_of_another_training_is_not_gone_on_from(
    lora_run: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(lora_run / "checkpoint-2", tmp_path / "trained" / "checkpoint-2")
    ended = launch("finetune_lora.sh", settings)
    assert ended.returncode == 2
    assert "checkpoint-2 was trained with another template" in ended.stderr.splitlines()[-1]


def test_a_reference_model_has_adapter_and_projector(lora_run: Path, parts: Path) -> None:
    weights = trained_weights(lora_run)
    ups = [tensor for name, tensor in weights.items() if "lora_B" in name]
    assert len(ups) == 2 * 7 and all(tensor.abs().max() > 1e-3 for tensor in ups)
    before = torch.load(parts / "model" / "mm_projector.bin", weights_only=True)
    (name,) = [name for name in weights if name.endswith("mm_projector.0.weight")]
    assert not torch.equal(weights[name], before["model.mm_projector.0.weight"])


def names_and_state(checkpoint: Path) -> tuple[list[list[str]], dict]:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    return json.loads((checkpoint / "optimizer_names.json").read_text()), state


def test_every_moment_of_the_optimizer_has_the_name_of_its_parameter(lora_run: Path) -> None:
    names, state = names_and_state(lora_run / "checkpoint-2")
    assert [len(group) for group in names] == [len(group["params"]) for group in state["param_groups"]]
    weights = load_file(lora_run / "checkpoint-2" / "adapter_model.safetensors")
    weights |= torch.load(lora_run / "checkpoint-2" / "non_lora_trainables.bin", weights_only=True)
    flat = [name for group in names for name in group]
    assert sorted(name.replace(".default", "") for name in flat) == sorted(weights)
    for index, name in enumerate(flat):
        assert state["state"][index]["exp_avg"].shape == weights[name.replace(".default", "")].shape, name
    assert all("mm_projector" in name for name in names[-1])  # they have a learning rate of their own


def test_a_reference_model_loads_from_any_folder(settings: dict[str, str], parts: Path, lora_run: Path) -> None:
    assert json.loads((lora_run / "config.json").read_text())["mm_vision_tower"] == str(parts / "model" / "clip")
    adapter = json.loads((lora_run / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(parts / "model" / "vicuna")


def test_a_run_that_stopped_goes_on_to_the_same_weights(
    lora_run: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    shutil.copytree(lora_run / "checkpoint-2", tmp_path / "trained" / "checkpoint-2")
    more = ("--save_total_limit", "2", "--version", "llava_llama_2")
    ended = launch("finetune_lora.sh", settings | {"SAVE_STEPS": "2"}, *more)
    assert ended.returncode == 0, ended.stderr
    assert "going on from checkpoint-2" in ended.stdout
    assert_same_weights(trained_weights(lora_run), trained_weights(tmp_path / "trained"))


@pytest.fixture(scope="module")
def whole_run(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model, trained through finetune.sh on records that all have images."""
    folder = tmp_path_factory.mktemp("whole")
    ended = launch("finetune.sh", complete_settings(parts, folder) | {"DATA_PATH": f"{parts}/images.json"})
    assert ended.returncode == 0, ended.stderr
    return folder / "trained"


def test_a_base_with_an_invalid_generation_config_is_trained_and_saved(whole_run: Path, parts: Path) -> None:
    """As Vicuna-v1.5's."""
    saved = json.loads((whole_run / "generation_config.json").read_text())
    assert saved["do_sample"] is True and saved["temperature"] == 0.9
    assert (whole_run / "model.safetensors").exists()
    before = json.loads((parts / "model" / "vicuna" / "generation_config.json").read_text())
    assert "do_sample" not in before


@pytest.mark.parametrize("projector", ["", None], ids=["empty", "not set"])
def test_a_training_from_a_llava_model_keeps_its_projector(
    projector: str | None, whole_run: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """At a learning rate of 0 the projector ends as it began."""
    settings |= {"MODEL": str(whole_run), "PROJECTOR_LEARNING_RATE": "0"}
    settings |= {"PROJECTOR": projector} if projector is not None else {}
    if projector is None:
        del settings["PROJECTOR"]
        ended = launch("finetune_lora.sh", settings | {"PYTHON": stand_in(tmp_path, "0 0", check=True)})
    else:
        ended = launch("finetune_lora.sh", settings, "--max_steps", "1")
    assert ended.returncode == 0, ended.stderr
    assert "projector     the base's own" in ended.stdout
    if projector is not None:
        before, after = load_file(whole_run / "model.safetensors"), trained_weights(tmp_path / "trained")
        (name,) = [name for name in after if name.endswith("mm_projector.0.weight")]
        torch.testing.assert_close(after[name], before["model.mm_projector.0.weight"], rtol=0, atol=0)
        record = json.loads((tmp_path / "trained" / "tive_training.json").read_text())
        assert record["projector"] == {"start": "base"}


def test_a_llava_base_with_another_tower_is_refused(whole_run: Path, settings: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(settings["VISION_TOWER"], tmp_path / "clip")
    ended = launch("finetune_lora.sh", settings | {"MODEL": str(whole_run), "VISION_TOWER": f"{tmp_path}/clip"})
    assert_refused(ended, "is a LLaVA model with the vision tower")


def test_records_without_any_image_are_trained_on(settings: dict[str, str], parts: Path, tmp_path: Path) -> None:
    ended = launch("finetune_lora.sh", settings | {"DATA_PATH": f"{parts}/text.json", "IMAGE_FOLDER": "nowhere"})
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "trained" / "non_lora_trainables.bin").exists()


def test_under_zero3_a_stopped_lora_run_goes_on_to_the_same_weights(
    settings: dict[str, str], parts: Path, tmp_path: Path
) -> None:
    def train(folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        command = command_on("1 9", settings | {"GPUS": "all", "SAVE_STEPS": "2"}, "finetune_lora.sh")
        start = command.index("tive.training.train")
        command[start - 1 : start + 1] = [str(ROOT / "tests" / "helpers" / "deepspeed_on_cpu.py")]
        changed = ["--output_dir", str(folder), "--bf16", "False", "--tf32", "False", "--save_total_limit", "2"]
        device = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
        command[command.index("--master_port") + 1] = str(port)
        ended = subprocess.run(
            [sys.executable, *command, *changed], env=settings | device, capture_output=True, text=True
        )
        assert ended.returncode == 0, ended.stderr

    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    train(tmp_path / "stopped")
    whole = trained_weights(tmp_path / "whole")
    assert all(tensor.abs().max() > 1e-3 for name, tensor in whole.items() if "lora_B" in name)
    assert_same_weights(whole, trained_weights(tmp_path / "stopped"))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert trained_weights(checkpoint).keys() == whole.keys()
    names = json.loads((checkpoint / "optimizer_names.json").read_text())
    assert {name.replace(".default", "") for group in names for name in group} == whole.keys()


def test_the_quickstart_data_are_the_same_for_the_same_seed(parts: Path, tmp_path: Path) -> None:
    make("quickstart/data.py", "--folder", tmp_path)
    assert (tmp_path / "data.json").read_bytes() == (parts / "data.json").read_bytes()
    images = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("images/*/*.png"))
    assert len(images) == 680
    assert all((tmp_path / path).read_bytes() == (parts / path).read_bytes() for path in images)
