"""What trainers and others leave on disk of transformers' own models: read as it is meant, or refused in one line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.golden_native import (
    CPU,
    GOLDEN,
    MODELS,
    change_base,
    change_config,
    change_tensors,
    conversation,
    copied,
    encoded,
    files_of,
    ids_of,
    loaded,
)
from tive.models import Encoded, ModelFiles, family_of, native
from tive.models.native_encoding import load_processor
from tive.models.training_record import TrainingRecord, recorded_model, write_record
from tive.util.errors import UserError


def losses_of(files: ModelFiles, records: tuple[Encoded, ...]) -> torch.Tensor:
    with torch.no_grad():
        return native.record_losses(native.load(files, CPU, torch.float32), records).losses


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("now", "before"),
    [
        (r"^base_model\.model\.model\.language_model\.", "base_model.model.language_model.model."),
        (r"^base_model\.model\.model\.language_model\.", "base_model.model.model."),
        (r"^base_model\.model\.", ""),
        (r"\.lora_(A|B)\.", r".lora_\1.default."),
        (r"^base_model\.model\.model\.(multi_modal_projector)\.", r"base_model.model.\1.modules_to_save.default."),
    ],
)
def test_adapters_of_other_releases_give_the_same_losses(model: str, now: str, before: str, tmp_path: Path) -> None:
    files = copied(model, tmp_path)
    change_tensors(
        files.model_path, lambda tensors: {re.sub(now, before, key): value for key, value in tensors.items()}
    )
    records = encoded(model)[:3]
    with torch.no_grad():
        torch.testing.assert_close(losses_of(files, records), native.record_losses(loaded(model), records).losses)


def test_an_adapter_that_does_not_fit_is_refused_with_its_file(tmp_path: Path) -> None:
    files = copied("llava_hf", tmp_path)
    change_tensors(files.model_path, lambda t: {key: value for key, value in t.items() if ".layers.1." not in key})
    with pytest.raises(UserError, match="lacks the weights of") as refused:
        native.load(files, CPU, torch.float32)
    assert str(tmp_path / "adapter") in str(refused.value)


def test_trained_weights_beside_the_adapter_are_refused(tmp_path: Path) -> None:
    files = copied("internvl", tmp_path)
    save_file({"weight": torch.ones(2)}, tmp_path / "adapter" / "vit.safetensors")
    with pytest.raises(UserError, match=r"vit\.safetensors: trained weights beside the adapter"):
        native.check_files(files)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        ({"model_type": "a_model_of_tomorrow"}, "a_model_of_tomorrow"),
        ({"model_type": "llama"}, "is no vision-language model of transformers"),
    ],
)
def test_a_base_that_cannot_serve_is_refused_before_loading(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    files = copied("internvl", tmp_path)
    change_config(files.model_base, "config.json", **values)
    with pytest.raises(UserError, match=message):
        native.check_files(files)


@pytest.mark.parametrize("key", ["quantization_config", "text_config"])
def test_a_quantised_base_is_one_wherever_its_config_says_so_and_null_says_nothing(key: str, tmp_path: Path) -> None:
    files = copied("internvl", tmp_path)
    inner = json.loads((tmp_path / "base" / "config.json").read_text())["text_config"]
    rests = {"quantization_config": None, "text_config": inner | {"quantization_config": None}}
    change_config(str(files.model_base), "config.json", **rests)
    native.check_files(files)
    method = {"quant_method": "fp8"}
    value = method if key == "quantization_config" else inner | {"quantization_config": method}
    change_config(str(files.model_base), "config.json", **{key: value})
    with pytest.raises(UserError, match=r"config\.json: quantization_config"):
        native.check_files(files)


@pytest.mark.parametrize("name", ["q_proj.weight", "q_proj.bias"])
def test_weights_of_eight_bits_are_refused_before_loading(name: str, tmp_path: Path) -> None:
    files, kind = copied("internvl", tmp_path), torch.float8_e4m3fn
    change_base(files, lambda t: {key: value.to(kind) if name in key else value for key, value in t.items()})
    with pytest.raises(UserError, match=rf"model\.safetensors: .*{name} is stored as F8"):
        native.check_files(files)


def test_what_no_parameter_takes_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = copied("internvl", tmp_path)
    change_base(files, lambda t: t | {"a_part_of_another_release.weight": torch.ones(2), "logit_scale": torch.ones(1)})
    native.load(files, CPU, torch.float32)
    assert "a_part_of_another_release.weight" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.q_proj.weight_scale_inv",
        "self_attn.q_proj.weight_scale_2",
        "self_attn.q_proj.input_global_scale",
        "self_attn.q_proj.weight._scale",
        "mlp.experts.gate_up_proj_scale",
        "self_attn.q_proj.qweight",
    ],
)
def test_what_belongs_to_quantised_weights_and_no_parameter_takes_is_refused(name: str, tmp_path: Path) -> None:
    files = copied("internvl", tmp_path)
    change_base(files, lambda t: t | {f"language_model.layers.0.{name}": torch.ones(1)})
    with pytest.raises(UserError, match=rf"{re.escape(name)}.*full precision"):
        native.load(files, CPU, torch.float32)


def test_packed_weights_in_place_of_a_parameters_are_called_quantised(tmp_path: Path) -> None:
    files, name = copied("internvl", tmp_path), "language_model.layers.0.self_attn.q_proj."
    change_base(files, lambda t: {key: t[key] for key in t if name not in key} | {f"{name}qweight": torch.ones(1)})
    with pytest.raises(UserError, match=r"qweight.*full precision"):
        native.load(files, CPU, torch.float32)


def test_the_base_that_an_adapter_names_is_printed_where_it_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = copied("internvl", tmp_path)

    def printed(named: str | None) -> str:
        change_config(files.model_path, base_model_name_or_path=named)
        native.load(files, CPU, torch.float32)
        return capsys.readouterr().out

    assert "names the base" not in printed(files.model_base)
    other = printed("someone/another-base")
    assert "someone/another-base" in other and str(files.model_base) in other and "load_in_4bit" in other


def test_the_base_has_to_be_the_one_that_the_training_recorded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = copied("internvl", tmp_path)
    template = (tmp_path / "base" / "chat_template.jinja").read_text()
    record = TrainingRecord(
        trainer="trl",
        template=hashlib.sha256(template.encode()).hexdigest(),
        base=recorded_model(str(files.model_base)),
        lora={},
        versions={},
        settings={"assistant_only_loss": False},
    )
    write_record(Path(files.model_path), record)
    native.load(files, CPU, torch.float32)
    printed = capsys.readouterr().out
    assert "questions and answers" in printed and "chat template" not in printed
    write_record(
        Path(files.model_path),
        msgspec.structs.replace(record, template="another", settings={"assistant_only_loss": True}),
    )
    native.load(files, CPU, torch.float32)
    printed = capsys.readouterr().out
    assert "another chat template" in printed and "questions" not in printed
    change_base(files, lambda t: {key: value + 0.001 for key, value in t.items()})
    with pytest.raises(UserError, match="is not the one") as refused:
        native.check_files(files)
    assert str(files.model_base) in str(refused.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_code_beside_a_model_is_neither_offered_nor_run(name: str, tmp_path: Path) -> None:
    """Under a standard input that answers yes to whatever is asked."""
    files = copied("internvl", tmp_path)
    base = tmp_path / "base"
    (base / "custom.py").write_text("import pathlib\npathlib.Path('CODE_RAN').touch()\nclass Custom: pass\n")
    values: dict[str, Any] = {"auto_map": dict.fromkeys(("AutoConfig", "AutoModel", "AutoProcessor"), "custom.Custom")}
    if name == "config.json":
        values["model_type"] = "custom"
    else:
        (base / "processor_config.json").unlink(missing_ok=True)
        values["processor_class"] = "CustomProcessor"
    change_config(str(base), name, **values)
    program = (
        "from tive.models import ModelFiles, native\n"
        "from tive.util.errors import run\n"
        f"run(lambda: native.check_files(ModelFiles({files.model_path!r}, {str(base)!r})))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        input="y\n" * 100,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 2 and not (tmp_path / "CODE_RAN").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert str(base / name) in line and "-hf" in line and "[y/N]" not in done.stdout + done.stderr


@pytest.mark.parametrize("name", ["optimizer.bin", "scheduler.bin", "pytorch_model_fsdp.bin", "optimizer_1.bin"])
def test_what_fsdp_leaves_beside_an_adapter_is_no_trained_weights(name: str, tmp_path: Path) -> None:
    files = copied("internvl", tmp_path)
    (Path(files.model_path) / name).write_bytes(b"")
    native.check_files(files)


def test_a_base_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    files = copied("internvl", tmp_path)
    path = Path(files.model_base) / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(path).items() if "layers.0.self_attn.k_proj" not in key},
        path,
        {"format": "pt"},
    )
    with pytest.raises(UserError, match="lacks 2 weights"):
        native.load(files, CPU, torch.float32)


def test_an_old_library_is_refused_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.37.2")
    with pytest.raises(UserError, match=r"4\.57 or newer.*scripts/setup\.sh native.*\.venv-native/bin/python"):
        native.check_files(files_of("internvl"))


def test_the_family_is_known_by_the_files(tmp_path: Path) -> None:
    for model in MODELS:
        assert family_of(files_of(model)) is native
    llava = {"model_type": "llava", "mm_vision_tower": "clip"}
    shutil.copytree(GOLDEN / "internvl" / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps(llava))
    assert family_of(ModelFiles(str(tmp_path / "adapter"), str(GOLDEN / "internvl" / "base"))) is not native


def test_whatever_changes_the_numbers_changes_the_identity(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text((GOLDEN / "qwen2_5_vl" / "base" / "chat_template.jinja").read_text() + " ")
    files = copied("qwen2_5_vl", tmp_path)
    seen = {native.identity(files)}
    assert native.identity(files_of("qwen2_5_vl")) in seen
    for changed in (
        replace(files, chat_template=str(template)),
        replace(files, max_length=100),
        replace(files, max_pixels=10_000),
    ):
        seen.add(native.identity(changed))
    change_config(files.model_base, "preprocessor_config.json", image_mean=[0.5, 0.5, 0.5])
    load_processor.cache_clear()
    seen.add(native.identity(files))
    assert len(seen) == 5


def test_processor_and_template_are_the_adapters_where_it_has_them(tmp_path: Path) -> None:
    files = copied("qwen2_5_vl", tmp_path)
    template = Path(files.model_path) / "chat_template.jinja"
    template.write_text("{{ 'its own ' }}" + (Path(files.model_base) / "chat_template.jinja").read_text())
    assert load_processor(files).library.chat_template.startswith("{{ 'its own ' }}")
    load_processor(files).library.save_pretrained(files.model_path)
    for file in Path(files.model_base).iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    load_processor.cache_clear()
    item = native.encode(load_processor(files), conversation("Hi", "Hello."), "")
    assert load_processor(files).library.tokenizer.decode(ids_of(item)).startswith("its own ")
