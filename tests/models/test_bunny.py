"""Bunny: what Bunny's own code gives, exactly; what cannot serve is refused from its files; steps 3 and 4 run on it."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import compute_gradient_features
import select_data_TIVE
from tests.helpers.feature_files import call, refusal
from tests.helpers.forked_python import PYTHON
from tests.helpers.reference import WholeGradients, in_batches
from tests.helpers.tiny_bunny import make_parts, make_records, train
from tests.helpers.visual_gain import visual_gains
from tive.features.step import GradientStep
from tive.models import Encoded, LeftOut, ModelFiles, Reference, bunny, family_of
from tive.models.bunny import read_template
from tive.models.common import target_modules
from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "bunny"
MODELS = ("phi-2", "qwen1.5-1.8b", "llama3-8b")
RECORDS = json.loads((GOLDEN / "data.json").read_text())
CPU = torch.device("cpu")


def files_of(folder: Path) -> ModelFiles:
    return ModelFiles(str(folder / "reference"), str(folder / "base"), str(folder / "siglip"))


@lru_cache(maxsize=4)
def load(model: str, dtype: torch.dtype = torch.float32, checkpointing: bool = False) -> Reference:
    torch.set_flush_denormal(True)
    return bunny.load(files_of(GOLDEN / model), CPU, dtype, checkpointing)


def encode(reference: Reference) -> list[Encoded]:
    return [bunny.encode(reference.processor, record, str(GOLDEN / "images")) for record in RECORDS]


def gradients(reference: Reference, records: list[Encoded], size: int) -> SimpleNamespace:
    matrices = target_modules(reference)
    return in_batches(GradientStep(bunny, reference, matrices, WholeGradients(matrices)), records, size)


def expected_of(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / model / "expected.json").read_text())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("size, checkpointing", [(1, False), (5, False), (16, False), (5, True)])
def test_losses_and_gradients_are_those_of_bunnys_code_at_any_batch_size(model, size, checkpointing):
    reference, expected = load(model, checkpointing=checkpointing), expected_of(model)
    found = gradients(reference, encode(reference), size)
    assert (found.losses - torch.tensor(expected["losses"])).abs().max() < 1e-5
    assert (found.norms / torch.tensor(expected["norms"]) - 1).abs().max() < 1e-5
    assert (found.cosines - torch.tensor(expected["cosines"])).abs().max() < 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_lengths_supervised_tokens_and_target_modules_are_those_of_bunnys_code(model):
    reference, expected = load(model), expected_of(model)
    records = encode(reference)
    assert [record.supervised for record in records] == expected["supervised_tokens"]
    assert [record.length for record in records] == expected["lengths"]
    matrices = target_modules(reference)
    assert list(matrices) == [name.replace(".lora_", ".") for name in expected["matrices"]]
    assert sum(matrix.weight.numel() for matrix in matrices.values()) == expected["counted_parameters"]
    assert not [name for name, _ in reference.model.vision_tower.named_parameters() if "lora" in name]


@pytest.mark.parametrize("model", MODELS)
def test_a_visual_gain_is_the_difference_of_the_losses_without_and_with_the_images(model):
    gains, differences = visual_gains(bunny, load(model), GOLDEN, 10)
    assert np.isfinite(gains).sum() >= 5
    np.testing.assert_allclose(gains, differences, rtol=0, atol=2e-5)


@pytest.mark.parametrize("model", MODELS)
def test_bfloat16_is_near_float32(model):
    reference = load(model, torch.bfloat16)
    found, expected = gradients(reference, encode(reference)[:16], 16), expected_of(model)
    assert (found.norms / torch.tensor(expected["norms"][:16]) - 1).abs().max() < 0.01
    assert (found.cosines - torch.tensor(expected["cosines"])[:16, :16]).abs().max() < 0.01


@pytest.mark.parametrize("model", MODELS)
def test_rotary_frequencies_are_not_rounded_in_half_precision(model):
    # Rounded to bfloat16, the angle at position 900 is off by more than a radian; no golden record is that long.
    buffers = dict(load(model, torch.bfloat16).model.language_model.named_buffers())
    frequencies = [buffer.double() for name, buffer in buffers.items() if name.endswith("rotary_emb.inv_freq")]
    config = json.loads((GOLDEN / model / "base" / "config.json").read_text())
    assert frequencies
    for frequency in frequencies:
        powers = torch.arange(len(frequency), dtype=torch.float64) / len(frequency)
        assert (frequency / config["rope_theta"] ** -powers - 1).abs().max() < 1e-6


# Text

ENCODINGS = json.loads((GOLDEN / "encodings" / "encodings.json").read_text())


def tokenizer_folder(name: str) -> Path:
    model = name.removesuffix("-tokenizer")
    return GOLDEN / model / "base" if model in MODELS else GOLDEN / "encodings" / name


@pytest.mark.parametrize("name", sorted({case["tokenizer"] for case in ENCODINGS}))
def test_ids_and_labels_of_odd_conversations_are_exactly_those_of_bunnys_code(name):
    cases = [case for case in ENCODINGS if case["tokenizer"] == name]
    assert len(cases) > 30 and any(set(case["labels"]) == {-100} for case in cases)
    for case in cases:
        template = read_template(tokenizer_folder(name), case["model_type"], case["maximum"])
        ids, labels = template.encode(case["record"]["conversations"], "image" in case["record"])
        assert (ids.tolist(), labels.tolist()) == (case["ids"], case["labels"]), case["record"]


@pytest.mark.parametrize(
    "turns",
    [
        ["What?", "A thing.", "And then?"],
        ["What?", ""],
        ["What?", "It ends <|endoftext|> here."],
        ["What? ASSISTANT: hm", "A thing."],
    ],
    ids=["a last human turn", "an empty turn", "the end token in a text", "the answer's mark in a text"],
)
def test_a_conversation_that_bunny_masks_whole_is_left_out(turns):
    speakers = ("human", "gpt")
    record = {"conversations": [{"from": speakers[n % 2], "value": text} for n, text in enumerate(turns)]}
    with pytest.raises(LeftOut, match=r"^no supervised token$"):
        bunny.encode(load("phi-2").processor, record, "")


def test_the_older_form_of_special_tokens_is_read(tmp_path):
    shutil.copytree(GOLDEN / "encodings" / "minicpm-like", tmp_path / "base")
    settings = {"add_bos_token": True, "eos_token": "</s>"}
    (tmp_path / "base" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "special_tokens_map.json").write_text(json.dumps({"unk_token": {"content": "<unk>"}}))
    assert read_template(tmp_path / "base", "bunny-minicpm", 64).pad == 0


# Pixels


@pytest.mark.parametrize("size", [(56, 56), (20, 90), (91, 13), (400, 300), (2, 5)])
def test_pixels_are_those_of_siglips_image_processor_on_the_padded_image(size, tmp_path):
    processor = load("phi-2").processor
    random = np.random.default_rng(0)
    picture = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    picture.save(tmp_path / "picture.png")
    square = Image.new("RGB", (max(size), max(size)), (127, 127, 127))
    square.paste(picture, tuple((max(size) - side) // 2 for side in size))
    for pad, shown in ((False, picture), (True, square)):
        record = bunny.encode(replace(processor, pad=pad), RECORDS[0] | {"image": "picture.png"}, str(tmp_path))
        wanted = processor.image_processor(shown, return_tensors="np")["pixel_values"][0]
        assert np.array_equal(record.inputs.pixels, wanted)


def test_an_image_whose_height_bunnys_processor_takes_for_channels_is_left_out(tmp_path):
    Image.new("RGB", (9, 3), "red").save(tmp_path / "low.png")
    Image.new("RGB", (3, 3), "red").save(tmp_path / "small.png")
    padded = load("phi-2").processor
    squashed = replace(padded, pad=False)
    for processor, image in ((padded, "small.png"), (squashed, "low.png")):
        with pytest.raises(LeftOut, match="3 pixels high"):
            bunny.encode(processor, RECORDS[0] | {"image": image}, str(tmp_path))
    assert bunny.encode(padded, RECORDS[0] | {"image": "low.png"}, str(tmp_path)).supervised == 3


def test_pixels_travel_in_16_bits_where_the_model_computes_in_16_bits():
    half, whole = load("phi-2", torch.bfloat16), load("phi-2")
    items = [bunny.encode(reference.processor, RECORDS[0], str(GOLDEN / "images")) for reference in (half, whole)]
    assert items[0].inputs.pixels.nbytes * 2 == items[1].inputs.pixels.nbytes
    assert torch.equal(*(bunny.record_losses(half, [item]).losses for item in items))


# Loading


@pytest.fixture
def model(tmp_path) -> SimpleNamespace:
    """A copy of a golden model, which a test may spoil."""
    shutil.copytree(GOLDEN / "phi-2", tmp_path / "model")
    folder = tmp_path / "model"
    return SimpleNamespace(
        folder=folder,
        files=files_of(folder),
        reference=folder / "reference",
        base=folder / "base",
        tower=folder / "siglip",
        trained=folder / "reference" / "non_lora_trainables.bin",
    )


def edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def spoil(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    else:
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)


def test_a_vision_tower_that_was_trained_too_is_taken_from_the_reference_model(model, tmp_path):
    shutil.copytree(model.folder, tmp_path / "other")
    other = files_of(tmp_path / "other")
    before = bunny.load(other, CPU, torch.float32)
    moved: dict[str, torch.Tensor] = {}

    def move(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: value + 0.1 * torch.randn_like(value) for name, value in tensors.items()})
        moved.update(tensors)

    torch.manual_seed(0)
    spoil(tmp_path / "other" / "siglip" / "model.safetensors", move)
    prefix = "base_model.model.model.vision_tower.vision_tower."
    spoil(model.trained, lambda tensors: tensors.update({prefix + name: value for name, value in moved.items()}))
    edit(model.reference / "config.json", unfreeze_vision_tower=True)

    records = encode(before)[:5]
    losses = [
        bunny.record_losses(reference, records).losses
        for reference in (before, bunny.load(other, CPU, torch.float32), bunny.load(model.files, CPU, torch.float32))
    ]
    assert torch.equal(losses[1], losses[2]) and not torch.allclose(losses[0], losses[1], atol=1e-3)


@pytest.mark.parametrize(
    "part, change, said",
    [
        (
            "trained",
            lambda t: t.pop("base_model.model.model.mm_projector.2.bias"),
            "lacks 1 weights, mm_projector.2.bias",
        ),
        ("trained", lambda t: t.update({"lm_head.bias": torch.zeros(2)}), "lm_head.bias"),
        ("base", lambda t: t.pop("model.layers.1.mlp.fc1.weight"), "lacks 1 weights, model.layers.1.mlp.fc1.weight"),
        ("tower", lambda t: t.pop("vision_model.encoder.layers.0.mlp.fc1.bias"), "layers.0.mlp.fc1.bias"),
    ],
    ids=["projector lacks a weight", "a weight of no part", "base lacks a weight", "tower lacks a weight"],
)
def test_parts_that_do_not_fit_are_refused_when_they_are_loaded(model, part, change, said):
    path = getattr(model, part)
    spoil(path / "model.safetensors" if path.is_dir() else path, change)
    with pytest.raises(UserError) as refused:
        bunny.load(model.files, CPU, torch.float32)
    assert said in str(refused.value) and str(path) in str(refused.value)


def test_the_identity_tells_reference_models_apart_and_not_their_folders(model):
    identity = bunny.identity(model.files)
    assert identity == bunny.identity(files_of(GOLDEN / "phi-2"))
    seen = {identity}
    for path, changes in [
        (model.reference / "config.json", {"image_aspect_ratio": "square"}),
        (model.reference / "config.json", {"tokenizer_model_max_length": 300}),
        (model.reference / "adapter_config.json", {"lora_alpha": 5}),
        (model.base / "config.json", {"rope_theta": 5000.0}),
        (model.base / "tokenizer_config.json", {"eos_token": "x"}),
        (model.tower / "preprocessor_config.json", {"image_mean": [0.4, 0.5, 0.5]}),
    ]:
        edit(path, **changes)
        seen.add(bunny.identity(model.files))
    assert len(seen) == 7


# Refused, from files alone


def refused(files: ModelFiles) -> str:
    with pytest.raises(UserError) as error:
        bunny.check_files(files)
    assert "\n" not in str(error.value)
    return str(error.value)


def other_tokenizer(model: SimpleNamespace, **changes: Any) -> None:
    path = model.base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"] |= changes
    path.write_text(json.dumps(content))


def without_padding(model: SimpleNamespace) -> None:
    edit(model.base / "tokenizer_config.json", unk_token=None)
    words = json.loads((model.base / "tokenizer.json").read_text())["model"]["vocab"]
    other_tokenizer(model, vocab=words | {"None": len(words)})  # a word like any other


def as_eva(model: SimpleNamespace) -> None:
    (model.folder / "EVA02_CLIP_L_336_psz14_s6B.pt").write_bytes(b"weights")
    edit(model.reference / "config.json", mm_vision_tower=str(model.folder / "EVA02_CLIP_L_336_psz14_s6B.pt"))
    model.files = ModelFiles(model.files.model_path, model.files.model_base)


CONFIG = "reference/config.json"
# name -> what is done to the model, the file that is named, what else is said
CANNOT_SERVE: dict[str, tuple[Callable[[SimpleNamespace], Any], str, str]] = {
    "S2": (lambda m: edit(m.reference / "config.json", use_s2=True), CONFIG, "without use_s2"),
    "a CLIP tower": (lambda m: edit(m.tower / "config.json", model_type="clip"), "siglip", "only SigLIP"),
    "an EVA tower": (as_eva, "EVA02_CLIP_L_336_psz14_s6B.pt", "only SigLIP"),
    "no tower": (lambda m: shutil.rmtree(m.tower), "siglip", "as vision_tower"),
    "a tower without processor": (lambda m: (m.tower / "preprocessor_config.json").unlink(), "preprocessor", "cannot"),
    "a processor of another size": (
        lambda m: edit(m.tower / "preprocessor_config.json", size={"height": 28, "width": 28}),
        "siglip/preprocessor_config.json",
        "56 by 56",
    ),
    "an unheard model type": (lambda m: edit(m.reference / "config.json", model_type="bunny-x"), CONFIG, "bunny-phi"),
    "no maximum": (
        lambda m: edit(m.reference / "config.json", tokenizer_model_max_length=None),
        CONFIG,
        "the model_max_length that it cut",
    ),
    "no config": (lambda m: (m.reference / "config.json").unlink(), "lacks config.json", "(save_strategy no)"),
    "no projector": (lambda m: m.trained.unlink(), "non_lora_trainables.bin", "(save_strategy no)"),
    "no adapter": (lambda m: (m.reference / "adapter_config.json").unlink(), "reference", "finetune_lora.sh"),
    "a Bunny as base": (
        lambda m: edit(m.base / "config.json", model_type="bunny-phi"),
        "base",
        "on a Bunny model",
    ),
    "a base of another type": (lambda m: edit(m.base / "config.json", model_type="qwen2"), "base", "bunny-phi"),
    "a base of another size": (
        lambda m: edit(m.base / "config.json", num_hidden_layers=3),
        "base",
        "num_hidden_layers",
    ),
    "a base without config": (lambda m: (m.base / "config.json").unlink(), "base", "config.json"),
    "a base without a fast tokenizer": (lambda m: (m.base / "tokenizer.json").unlink(), "base", "save_pretrained"),
    "a tokenizer of a newer library": (
        lambda m: other_tokenizer(m, type="Unheard"),
        "base/tokenizer.json",
        "setup.sh native",
    ),
    "an end of several tokens": (
        lambda m: (m.base / "tokenizer.json").write_text(
            (m.base / "tokenizer.json").read_text().replace("<|endoftext|>", "<|im_end|>")
        ),
        "base/tokenizer",
        "<|endoftext|>",
    ),
    "a tokenizer without padding": (
        without_padding,
        "base/tokenizer_config.json",
        "unk_token",
    ),
    "tokenizer files that contradict each other": (
        lambda m: edit(m.base / "tokenizer_config.json", add_bos_token=True),
        "base/tokenizer_config.json",
        "make the two agree",
    ),
}


@pytest.mark.parametrize("name", CANNOT_SERVE)
def test_what_cannot_serve_is_refused_before_anything_is_loaded(model, name):
    bunny.check_files(model.files)
    change, file, said = CANNOT_SERVE[name]
    change(model)
    line = refused(model.files)
    assert file in line and said in line, line


@pytest.mark.parametrize("kind", ["ldp", "mlp0x_gelu", "mlp3x_gelu", "linear"])
def test_a_projector_of_another_kind_than_its_files_is_refused(model, kind):
    edit(model.reference / "config.json", mm_projector_type=kind)
    with pytest.raises(UserError, match=r"config\.json|non_lora_trainables\.bin"):
        bunny.load(model.files, CPU, torch.float32)


@pytest.mark.parametrize(
    "option", [{"chat_template": "x"}, {"max_length": 9}, {"max_pixels": 9}, {"load_in_4bit": True}], ids=str
)
def test_an_option_that_only_other_families_have_is_refused(option):
    assert next(iter(option)) in refused(replace(files_of(GOLDEN / "phi-2"), **option))


def test_a_language_model_that_this_transformers_lacks_is_refused_with_the_environment_that_may_have_it(model):
    edit(model.reference / "config.json", model_type="bunny-minicpm")
    edit(model.base / "config.json", model_type="minicpm")
    line = refused(model.files)
    assert "base" in line and "minicpm" in line and "setup.sh native" in line


def test_a_tokenizer_whose_setting_this_library_does_not_heed_is_refused(model, monkeypatch):
    # Llama-3's; an older library reads the file and gives other ids without a word.
    other_tokenizer(model, ignore_merges=True)
    monkeypatch.setattr(bunny.tokenizers, "__version__", "0.15.2")
    line = refused(model.files)
    assert "base/tokenizer.json" in line and "ignore_merges" in line and "tokenizers 0.19.1 or later" in line
    monkeypatch.setattr(bunny.tokenizers, "__version__", "0.19.1")
    bunny.check_files(model.files)


def test_the_step_refuses_in_one_line_and_the_family_is_known_by_its_config(model, tmp_path, capsys):
    assert family_of(model.files) is bunny
    edit(model.reference / "config.json", use_s2=True)
    arguments = ("--model_path", model.reference, "--model_base", model.base, "--vision_tower", model.tower)
    line = refusal(
        capsys,
        compute_gradient_features.main,
        *("--input_file", GOLDEN / "data.json", "--output_file", tmp_path / "features", *arguments),
    )
    assert "use_s2" in line and not (tmp_path / "features").exists()


# End to end


def test_a_trained_tiny_bunny_goes_through_gradients_selection_and_report(tmp_path, capsys):
    data, features, selected = make_records(tmp_path), tmp_path / "features", tmp_path / "selected"
    files = make_parts(tmp_path)
    losses = train(files, data)
    assert losses[-1] < losses[0]
    arguments = ("--input_file", data, "--image_folder", tmp_path / "images", "--output_file", features)
    more = ("--proj_dim", 256, "--device", "cpu", "--num_workers", 0)
    model = ("--model_path", files.model_path, "--model_base", files.model_base)
    call(compute_gradient_features.main, *arguments, *model, *more)
    manifest = json.loads((features / "manifest_0.json").read_text())
    assert manifest["left_out"] == [] and {"tokenizers", "peft"} <= set(manifest["versions"])
    call(select_data_TIVE.main, "--data_path", data, "--gradient_path", features, "--save_path", selected, "--p", 0.3)
    chosen = json.loads((selected / "Tive_q_0.001_p_0.3.json").read_text())
    assert 0 < len(chosen) <= math.floor(0.3 * 36) and all(record in json.loads(data.read_text()) for record in chosen)
    report = [PYTHON, ROOT / "scripts" / "report.py", selected, "--image_folder", tmp_path / "images"]
    done = subprocess.run(list(map(str, report)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (selected / "report.html").stat().st_size > 10_000


@pytest.mark.parametrize("kind", ["phi3", "stablelm"])
def test_the_language_models_of_newer_transformers_give_the_same_in_a_batch_and_alone(tmp_path, kind):
    if not hasattr(transformers, {"phi3": "Phi3ForCausalLM", "stablelm": "StableLmForCausalLM"}[kind]):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    data = make_records(tmp_path, 12)
    files = make_parts(tmp_path, kind)
    train(files, data, steps=3)
    reference = bunny.load(files, CPU, torch.float32)
    images = str(tmp_path / "images")
    records = [bunny.encode(reference.processor, record, images) for record in json.loads(data.read_text())]
    alone, together = gradients(reference, records, 1), gradients(reference, records, 12)
    assert (together.norms / alone.norms - 1).abs().max() < 1e-5
    assert (together.cosines - alone.cosines).abs().max() < 1e-5
