"""Real training runs of a tiny LLaVA on the CPU: what they leave, how they go on, what they start from."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from importlib.metadata import version
from pathlib import Path

import llava
import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.forked_python import PYTHON
from tests.helpers.training import (
    ROOT,
    assert_refused,
    assert_same_weights,
    command_on,
    complete_settings,
    launch,
    make,
    stand_in,
    trained_weights,
)
from tive.models import ModelFiles
from tive.models import llava as llava_family
from tive.models.common import target_modules
from tive.models.optimizer_state import MOMENTS_FILE, find_optimizer_state, moments_of_matrices, read_optimizer_state


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
        assert reference.processor.template.name == "llava_llama_2"
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


def test_a_checkpoint_holds_the_moments_by_name_that_its_optimizer_holds_by_number(
    lora_run: Path, parts: Path, tmp_path: Path
) -> None:
    checkpoint = lora_run / "checkpoint-2"
    reference = llava_family.load(
        ModelFiles(str(checkpoint), str(parts / "model" / "vicuna")), torch.device("cpu"), torch.float32
    )
    matrices = target_modules(reference, "all")
    by_name, by_number = (
        moments_of_matrices(read_optimizer_state(checkpoint / name, 2), reference.model, matrices, str(checkpoint))
        for name in (MOMENTS_FILE, "optimizer.pt")
    )
    assert len(by_name) == 2 * 7 * 2
    for name, of in by_name.items():
        assert of.m.any() or name.endswith(".A")  # B was 0, so A had no gradient yet
        assert torch.equal(of.m, by_number[name].m) and torch.equal(of.v, by_number[name].v)
    assert find_optimizer_state(str(checkpoint)).name == MOMENTS_FILE


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
    assert_refused(ended, "set VISION_TOWER")


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
        start = command.index("tive.training.llava_trainer")
        command[start - 1 : start + 1] = [str(ROOT / "tests" / "helpers" / "deepspeed_on_cpu.py")]
        changed = ["--output_dir", str(folder), "--bf16", "False", "--tf32", "False", "--save_total_limit", "2"]
        device = {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu", "PYTHON_EXEC": PYTHON}
        command[command.index("--master_port") + 1] = str(port)
        ended = subprocess.run([PYTHON, *command, *changed], env=settings | device, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr

    train(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "stopped" / "checkpoint-2")
    train(tmp_path / "stopped")
    whole = trained_weights(tmp_path / "whole")
    assert all(tensor.abs().max() > 1e-3 for name, tensor in whole.items() if "lora_B" in name)
    assert_same_weights(whole, trained_weights(tmp_path / "stopped"))
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert trained_weights(checkpoint).keys() == whole.keys()
    held = {name.rpartition(".")[0].replace(".default", "") for name in load_file(checkpoint / MOMENTS_FILE)}
    assert held == {name for name in whole if "lora_" in name}


def test_the_quickstart_data_are_the_same_for_the_same_seed(parts: Path, tmp_path: Path) -> None:
    make("quickstart/data.py", "--folder", tmp_path)
    assert (tmp_path / "data.json").read_bytes() == (parts / "data.json").read_bytes()
    images = sorted(path.relative_to(tmp_path) for path in tmp_path.glob("images/*/*.png"))
    assert len(images) == 680
    assert all((tmp_path / path).read_bytes() == (parts / path).read_bytes() for path in images)
