"""What is refused before anything is loaded: data, parts, settings that the gradient step could not follow."""

from __future__ import annotations

import json
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import tive.training.llava_trainer
from tests.helpers.training import assert_refused, launch
from tive.training.checks import check_data
from tive.util.errors import run

TURNS = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]
# What is wrong with a data file, and what the refusal names: the record, the image or the remedy.
BAD_DATA = {
    "no JSON": ("[{]", "data.json"),
    "JSON Lines": (json.dumps({"conversations": TURNS}) + "\n", "scripts/convert_data.py"),
    "no records": ("[]", "data.json"),
    "no conversations": ('[{"id": "a7"}]', "record 0 (id 'a7')"),
    "unknown role": ('[{"conversations": [{"from": "bot", "value": "x"}]}]', "'bot'"),
    "image in a list": (json.dumps([{"image": ["a.png"], "conversations": TURNS}]), "scripts/convert_data.py"),
    "no words": ('[{"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": ""}]}]', "record 0"),
    "image not there": (json.dumps([{"image": "chat/a.png", "conversations": TURNS}]), "chat/a.png"),
}
# A variable, a value that is not there or not one, and so the refusal names both.
BAD_VARIABLES = {
    "IMAGE_FOLDER": "nowhere",
    "MODEL": "./nowhere",
    "VISION_TOWER": "./nowhere",
    "PROJECTOR": "nowhere.bin",
    "PRECISION": "fp8",
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_the_trainer_cannot_take_is_refused(case: str, settings: dict[str, str], tmp_path: Path) -> None:
    text, reason = BAD_DATA[case]
    (tmp_path / "data.json").write_text(text)
    assert_refused(launch("finetune.sh", settings | {"DATA_PATH": f"{tmp_path}/data.json"}), reason)
    assert not (tmp_path / "trained").exists()


def test_records_without_a_last_answer_and_tags_without_an_image_are_counted(tmp_path: Path) -> None:
    asked = {"from": "human", "value": "<image> And then?"}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns} for turns in (TURNS, [*TURNS, asked])]))
    lines = check_data(f"{tmp_path}/data.json", None, "v1", tmp_path / "listing.json")
    assert sum(line.lstrip().startswith("1 ") and "record 1" in line for line in lines) == 2


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
    assert_refused(ended, "trained_bad_records.json")
    assert len(ended.stdout + ended.stderr) < 5000
    listed = json.loads((tmp_path / "trained_bad_records.json").read_text())
    assert [entry["row"] for entry in listed] == [1, 2, 3, 4]


BAD_ARGUMENTS = {
    "anyres": ("image_aspect_ratio", "anyres"),
    "image tokens": ("mm_use_im_start_end", "True"),
    "bits": ("bits", "4"),
    "template of MPT": ("version", "mpt"),
    "no template": ("version", "vicuna_v2"),
    "tiles": ("mm_patch_merge_type", "spatial"),
    "frozen adapter": ("tune_mm_mlp_adapter", "True"),
    "frozen projector": ("freeze_mm_mlp_adapter", "True"),
    "sharded": ("fsdp", "full_shard"),
    "an empty batch": ("per_device_train_batch_size", "0"),
    "neither true nor false": ("lora_enable", "maybe"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_what_the_gradient_step_could_not_follow_is_refused_before_training(
    case: str, settings: dict[str, str]
) -> None:
    name, value = BAD_ARGUMENTS[case]
    assert_refused(launch("finetune_lora.sh", settings, f"--{name}", value), f"--{name} {value}")


def test_a_base_without_a_projector_needs_one(settings: dict[str, str]) -> None:
    assert_refused(launch("finetune_lora.sh", settings | {"PROJECTOR": ""}), "set PROJECTOR")


def test_a_base_with_the_fast_tokenizer_alone_is_refused(settings: dict[str, str], parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "model" / "vicuna", tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").rename(tmp_path / "fast" / "tokenizer.json")
    ended = launch("finetune_lora.sh", settings | {"MODEL": f"{tmp_path}/fast"})
    assert_refused(ended, "tokenizer.model")


def test_a_lora_adapter_is_no_base(settings: dict[str, str], parts: Path, tmp_path: Path) -> None:
    shutil.copytree(parts / "model" / "vicuna", tmp_path / "lora")
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    assert_refused(launch("finetune_lora.sh", settings | {"MODEL": f"{tmp_path}/lora"}), "set MODEL")


@pytest.mark.parametrize("variable", BAD_VARIABLES)
def test_a_part_that_is_missing_is_named_with_its_variable(variable: str, settings: dict[str, str]) -> None:
    refusal = assert_refused(launch("finetune_lora.sh", settings | {variable: BAD_VARIABLES[variable]}), variable)
    assert BAD_VARIABLES[variable] in refusal


def test_a_projector_that_is_missing_is_said_to_be_missing(settings: dict[str, str]) -> None:
    refusal = assert_refused(launch("finetune_lora.sh", settings | {"PROJECTOR": "nowhere.bin"}), "nowhere.bin")
    assert "not there" in refusal


def test_an_archive_in_place_of_the_images_is_named_with_its_command(settings: dict[str, str], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        archive.writestr("a.png", "")
    ended = launch("finetune_lora.sh", settings | {"IMAGE_FOLDER": f"{tmp_path}/images.zip"})
    assert_refused(ended, f"-m zipfile -e {tmp_path}/images.zip")


def test_data_that_are_not_there_are_named(settings: dict[str, str]) -> None:
    assert_refused(launch("finetune_lora.sh", settings | {"DATA_PATH": "nowhere.json"}), "nowhere.json")


def test_a_hub_name_that_cannot_be_reached_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    ended = launch("finetune.sh", settings | {"MODEL": "someone/some-vicuna", "HF_HOME": f"{tmp_path}/cache"})
    assert_refused(ended, "someone/some-vicuna")


def test_a_folder_without_a_config_is_no_base(settings: dict[str, str], tmp_path: Path) -> None:
    assert_refused(launch("finetune.sh", settings | {"MODEL": str(tmp_path)}), "config.json")


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "model.safetensors.index.json"])
def test_a_trained_model_is_never_overwritten(name: str, settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "trained").mkdir()
    (tmp_path / "trained" / name).write_text("weights")
    assert_refused(launch("finetune.sh", settings), name)
    assert (tmp_path / "trained" / name).read_text() == "weights"


def test_an_output_folder_that_cannot_be_written_is_told_before_the_training(settings: dict[str, str]) -> None:
    assert_refused(launch("finetune.sh", settings | {"OUTPUT_DIR": "/proc/trained"}), "cannot write /proc/trained")


def test_a_checkpoint_that_broke_off_is_refused(settings: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "trained" / "checkpoint-9").mkdir(parents=True)
    assert_refused(launch("finetune.sh", settings), "checkpoint-9")


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
    monkeypatch.setattr(sys, "argv", ["tive.training.llava_trainer", *words])
    run(tive.training.llava_trainer.main)


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
    assert "--learning_rat" in refusal


@pytest.mark.parametrize(
    ("layer", "shape", "part"),
    [("0", (128, 80), "for width 80, the vision tower"), ("2", (160, 128), "for width 160, the base model")],
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
    assert refusal.startswith("error: ") and part in refusal


def test_the_seed_holds_for_what_llava_draws_first(settings: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter is drawn before transformers' trainer sets the seed."""
    drawn: list[float] = []
    monkeypatch.setattr(
        tive.training.llava_trainer.llava_train, "train", lambda **_: drawn.append(torch.rand(1).item())
    )
    for seed in ("1", "1", "2"):
        enter(monkeypatch, settings, seed=seed, use_cpu="True")
    assert drawn[0] == drawn[1] != drawn[2]
