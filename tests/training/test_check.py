"""What is refused before anything is loaded: data, parts, settings that the gradient step could not follow."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import tive.training.train
from tests.helpers.training import assert_refused, launch
from tive.training.data_check import check_data
from tive.util.errors import run

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


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_the_trainer_cannot_take_is_refused(case: str, settings: dict[str, str], tmp_path: Path) -> None:
    text, reason = BAD_DATA[case]
    (tmp_path / "data.json").write_text(text)
    assert_refused(launch("finetune.sh", settings | {"DATA_PATH": f"{tmp_path}/data.json"}), reason)
    assert not (tmp_path / "trained").exists()


def test_records_without_a_last_answer_and_tags_without_an_image_are_counted(tmp_path: Path) -> None:
    asked = {"from": "human", "value": "<image> And then?"}
    (tmp_path / "data.json").write_text(json.dumps([{"conversations": turns} for turns in (TURNS, [*TURNS, asked])]))
    data = check_data(f"{tmp_path}/data.json", None, "v1", tmp_path / "listing.json")
    assert (data.records, data.with_image, data.tags_alone, data.unanswered) == (2, 0, 1, 1)


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
