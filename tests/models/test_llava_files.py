"""Step 3 computes what the training used: its template, base, tower and aspect ratio; what it does not know it refuses.

All of this is settled before a weight is loaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.golden_model import GOLDEN, RECORDS
from tests.helpers.reference import CPU, in_batches, load_golden, step_of
from tive.models import ModelFiles, Reference, llava
from tive.models.training_record import ASPECT_RATIOS, TEMPLATES, TrainingRecord, model_fingerprint, write_record
from tive.util.errors import UserError


@pytest.fixture
def model(tmp_path: Path) -> SimpleNamespace:
    """A copy of the golden model's parts with the record of a training; a test may spoil each."""
    for name in ("llava-lora", "vicuna", "clip"):
        shutil.copytree(GOLDEN / name, tmp_path / name)
    lora, base, tower = tmp_path / "llava-lora", tmp_path / "vicuna", tmp_path / "clip"
    record = TrainingRecord(
        template="v1",
        image_aspect_ratio="pad",
        base={"path": "the/base", **model_fingerprint(base)},
        vision_tower={"path": "the/tower", **model_fingerprint(tower)},
        projector={"start": "random"},
        lora={"r": 8},
        versions={},
    )
    write_record(lora, record)
    return SimpleNamespace(
        lora=lora, base=base, tower=tower, record=record, files=ModelFiles(str(lora), str(base), str(tower))
    )


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def other_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({name: weight + 1e-3 for name, weight in weights.items()}, path, {"format": "pt"})


def test_what_a_training_recorded_is_accepted(model: SimpleNamespace) -> None:
    llava.check_files(model.files)
    edit(model.base / "config.json", transformers_version="4.99", use_cache=False)  # another transformers saved it
    llava.check_files(model.files)


def test_a_projector_of_another_kind_than_its_files_is_refused(model: SimpleNamespace) -> None:
    edit(model.lora / "config.json", mm_projector_type="ldp")
    with pytest.raises(UserError, match="ldp"):
        llava.load(model.files, CPU, torch.float32)


REFUSED: dict[str, tuple[Callable[[SimpleNamespace], object], str]] = {
    "another base of the same shape": (lambda m: other_weights(m.base), "the base model"),
    "a base of another config": (lambda m: edit(m.base / "config.json", rope_theta=5e5), "config.json is another"),
    "another tower": (lambda m: other_weights(m.tower), "the vision tower"),
    "an unknown template": (
        lambda m: write_record(m.lora, msgspec.structs.replace(m.record, template="mpt")),
        "the template mpt is none of v1",
    ),
    "another aspect ratio": (lambda m: edit(m.lora / "config.json", image_aspect_ratio="square"), "image_aspect_ratio"),
    "a record of another version": (lambda m: edit(m.lora / "tive_training.json", more=1), "this version of TIVE"),
    "a record that breaks off": (lambda m: (m.lora / "tive_training.json").write_text("{"), "is not JSON"),
    "anyres": (lambda m: edit(m.lora / "config.json", image_aspect_ratio="anyres"), "'anyres' is not supported"),
    "anyres_max_9": (
        lambda m: edit(m.lora / "config.json", image_aspect_ratio="anyres_max_9"),
        "'anyres_max_9' is not supported, only pad, square",
    ),
    "tiles": (lambda m: edit(m.lora / "config.json", mm_patch_merge_type="spatial_unpad"), "'spatial_unpad'"),
    "image tokens": (lambda m: edit(m.lora / "config.json", mm_use_im_start_end=True), "mm_use_im_start_end"),
    "a setting of another LLaVA": (lambda m: edit(m.lora / "config.json", mm_newline_position="grid"), "mm_newline"),
    "a quantized base in training": (
        lambda m: edit(m.lora / "config.json", quantization_config={"load_in_4bit": True}),
        "llava-lora/config.json: quantization_config",
    ),
    "a base with a quantized part": (
        lambda m: edit(m.base / "config.json", text_config={"quantization_config": {"quant_method": "fp8"}}),
        "vicuna/config.json: quantization_config",
    ),
    "a quantized base": (
        lambda m: edit(m.base / "config.json", quantization_config={"quant_method": "gptq"}),
        "vicuna/config.json: quantization_config",
    ),
    "a base with the fast tokenizer alone": (
        lambda m: (m.base / "tokenizer.model").rename(m.base / "tokenizer.json"),
        "has no tokenizer.model, which LLaVA's trainer needs",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_computed_is_refused_before_anything_is_loaded(model: SimpleNamespace, name: str) -> None:
    change, message = REFUSED[name]
    change(model)
    with pytest.raises(UserError) as refusal:
        llava.check_files(model.files)
    assert message in str(refusal.value)


def test_another_base_has_another_identity(model: SimpleNamespace) -> None:
    before = llava.identity(model.files)
    write_record(model.lora, msgspec.structs.replace(model.record, template="llava_llama_2"))
    template = llava.identity(model.files)
    write_record(model.lora, model.record)
    assert llava.identity(model.files) == before != template
    other_weights(model.base)
    assert llava.identity(model.files) != before


@pytest.fixture(scope="module")
def golden() -> Reference:
    return load_golden()


def load(files: ModelFiles) -> Reference:
    return llava.load(files, CPU, torch.float32)


def assert_same_model(first: Any, second: Any) -> None:
    weights = second.state_dict()
    for name, tensor in first.state_dict().items():
        torch.testing.assert_close(tensor, weights[name], rtol=0, atol=0, msg=name)


def test_an_adapter_of_a_newer_peft_is_the_same_adapter(model: SimpleNamespace, golden: Reference) -> None:
    newer = dict.fromkeys(
        ("corda_config", "eva_config", "exclude_modules", "layer_replication", "target_parameters", "alora_tokens")
    )
    newer |= dict.fromkeys(("lora_bias", "use_dora", "use_qalora", "use_rslora"), False)
    edit(model.lora / "adapter_config.json", **newer, qalora_group_size=16, peft_version="0.18.0")
    assert_same_model(golden.model, load(model.files).model)


def test_a_model_without_a_record_is_taken_as_v1_and_said_so(
    model: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert load(model.files).processor.template.name == "v1"
    assert "tive_training.json" not in capsys.readouterr().out
    (model.lora / "tive_training.json").unlink()
    assert load(model.files).processor.template.name == "v1"
    assert "has no tive_training.json: taken as trained with template v1" in capsys.readouterr().out


def llava_norms(reference: Reference, template: str, records: list[Any], path: Path) -> torch.Tensor:
    """Norms `[n]` of LLaVA's own loss: its data set, its collator, its model, one record at a time."""
    from llava import conversation
    from llava.train.train import DataCollatorForSupervisedDataset, LazySupervisedDataset

    conversation.default_conversation = conversation.conv_templates[template]
    path.write_text(json.dumps(records))
    processor = reference.processor
    options = SimpleNamespace(
        image_folder=str(GOLDEN / "images"),
        image_processor=processor.image_processor,
        image_aspect_ratio="pad",
        is_multimodal=True,
        mm_use_im_start_end=False,
    )
    dataset = LazySupervisedDataset(str(path), processor.template.tokenizer, options)
    collate = DataCollatorForSupervisedDataset(processor.template.tokenizer)
    weights = [matrix.weight.requires_grad_(True) for matrix in step_of(reference).matrices.values()]
    norms = []
    for row in range(len(records)):
        loss = reference.model(**collate([dataset[row]])).loss
        norms.append(torch.cat([part.flatten() for part in torch.autograd.grad(loss, weights)]).norm())
    for weight in weights:
        weight.requires_grad_(False)
    return torch.stack(norms)


@pytest.mark.parametrize("ratio", ASPECT_RATIOS)
@pytest.mark.parametrize("size", [(30, 30), (20, 90), (91, 13), (400, 300), (2, 5)])
def test_pixels_are_those_of_llavas_own_function(
    golden: Reference, size: tuple[int, int], ratio: str, tmp_path: Path
) -> None:
    from llava.mm_utils import process_images

    picture = Image.effect_noise(size, 90).convert("RGB")
    picture.save(tmp_path / "noise.png")
    processor = dataclasses.replace(golden.processor, pad=ratio == "pad")
    record = {"image": "noise.png", "conversations": RECORDS[0]["conversations"]}
    pixels = llava.encode(processor, record, str(tmp_path)).inputs.pixels
    (wanted,) = process_images([picture], processor.image_processor, SimpleNamespace(image_aspect_ratio=ratio))
    assert (pixels == wanted.numpy()).all()


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_template_gives_the_gradients_of_llavas_own_loss(
    golden: Reference, template: str, tmp_path: Path
) -> None:
    with_image = [record for record in RECORDS if "image" in record]
    records = with_image[:3] + [record for record in RECORDS if "image" not in record][:3]
    processor = dataclasses.replace(
        golden.processor, template=dataclasses.replace(golden.processor.template, name=template)
    )
    encoded = [llava.encode(processor, record, str(GOLDEN / "images")) for record in records]
    norms = in_batches(step_of(golden), encoded, 3).norms
    torch.testing.assert_close(norms, llava_norms(golden, template, records, tmp_path / "data.json"), rtol=1e-4, atol=0)


def tower_of(reference: Reference) -> Any:
    return reference.model.get_vision_tower().vision_tower


def test_a_tower_that_was_tuned_is_not_overwritten(model: SimpleNamespace) -> None:
    path = model.lora / "non_lora_trainables.bin"
    tensors = torch.load(path, weights_only=True)
    tuned = torch.randn(64, 64)
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    torch.save(tensors | {f"base_model.model.model.vision_tower.vision_tower.{name}": tuned}, path)
    torch.testing.assert_close(tower_of(load(model.files)).state_dict()[name], tuned)


def test_a_tower_that_was_tuned_in_the_base_is_taken_from_it(model: SimpleNamespace) -> None:
    (model.lora / "tive_training.json").unlink()
    weights = load_file(model.base / "model.safetensors")
    tower = load_file(model.tower / "model.safetensors")
    tuned = {f"model.vision_tower.vision_tower.{name}": tensor + 1 for name, tensor in tower.items()}
    save_file(weights | tuned, model.base / "model.safetensors", {"format": "pt"})
    name = "vision_model.encoder.layers.1.self_attn.q_proj.weight"
    torch.testing.assert_close(tower_of(load(model.files)).state_dict()[name], tower[name])  # LLaVA passes it over
    edit(model.lora / "config.json", unfreeze_mm_vision_tower=True)
    torch.testing.assert_close(tower_of(load(model.files)).state_dict()[name], tower[name] + 1)


def test_lora_on_the_tower_is_loaded_and_not_counted(model: SimpleNamespace, golden: Reference) -> None:
    (path,) = model.lora.glob("adapter_model.*")
    tensors, place = load_file(path), "base_model.model.model.vision_tower.vision_tower.vision_model.encoder.layers"
    for layer in range(len(tower_of(golden).vision_model.encoder.layers)):
        for part in ("q_proj", "k_proj", "v_proj"):
            for half, shape in (("A", (8, 64)), ("B", (64, 8))):
                tensors[f"{place}.{layer}.self_attn.{part}.lora_{half}.weight"] = torch.randn(shape) / 8
    save_file(tensors, path, {"format": "pt"})
    reference = load(model.files)
    assert step_of(reference).matrices.keys() == step_of(golden).matrices.keys()
    plain, adapted = (tower_of(each).vision_model.encoder.layers[0].self_attn.q_proj for each in (golden, reference))
    x, name = torch.randn(2, 64), f"{place}.0.self_attn.q_proj"
    added = x @ tensors[f"{name}.lora_A.weight"].T @ tensors[f"{name}.lora_B.weight"].T * (16 / 8)
    torch.testing.assert_close(adapted(x), plain(x) + added)


def test_another_llava_on_the_path_is_named(tmp_path: Path) -> None:
    """As PYTHONPATH brings it; the base was blamed for the weights that such a class lacks."""
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "__init__.py").write_text("raise SystemExit('not the installed package')")
    program = f"""
from tive.models import ModelFiles, llava
llava.check_files(ModelFiles({str(GOLDEN / "llava-lora")!r}, {str(GOLDEN / "vicuna")!r}, {str(GOLDEN / "clip")!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = ended.stderr.splitlines()[-1]
    assert f"llava is taken from {tmp_path / 'llava'}" in last and "is PYTHONPATH set?" in last
