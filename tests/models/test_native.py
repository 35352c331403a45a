"""Models of transformers' own: every number of the goldens, every refusal, and what a trainer may leave on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.native_gradients import gradients_of, plain_loop
from tests.helpers.tiny_native import CLASSES, write
from tive.data.training_record import TrainingRecord, recorded_model, write_record
from tive.models import Encoded, LeftOut, ModelFiles, Reference, family_of, native, native_losses
from tive.models.answer_spans import align
from tive.models.checkpoint import load_pretrained
from tive.models.common import target_modules
from tive.models.native_encoding import image_tokens, load_processor
from tive.util.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "native"
MODELS = ("llava_hf", "qwen2_5_vl", "internvl")
CPU = torch.device("cpu")


def files_of(model: str, **options: Any) -> ModelFiles:
    return ModelFiles(str(GOLDEN / model / "adapter"), str(GOLDEN / model / "base"), **options)


@functools.cache
def expected(model: str) -> dict[str, Any]:
    return json.loads((GOLDEN / model / "expected.json").read_text())


@functools.cache
def records_of(model: str) -> list[dict[str, Any]]:
    return json.loads((GOLDEN / model / "data.json").read_text())


@functools.cache
def loaded(model: str, gradient_checkpointing: bool = False) -> Reference:
    torch.set_flush_denormal(True)
    return native.load(files_of(model), CPU, torch.float32, gradient_checkpointing)


@functools.cache
def encoded(model: str) -> tuple[Encoded, ...]:
    processor = loaded(model).processor
    return tuple(native.encode(processor, record, str(GOLDEN / model / "images")) for record in records_of(model))


def backend_of(reference: Reference) -> str:
    """Which of the library's two image processors was loaded, by what it is built on in every release."""
    bases = {base.__name__ for base in type(reference.processor.library.image_processor).__mro__}
    return "torchvision" if bases & {"TorchvisionBackend", "BaseImageProcessorFast"} else "pil"


# What the goldens hold.


@pytest.mark.parametrize("model", MODELS)
def test_supervised_tokens_are_the_answers_and_the_ends_of_their_turns(model: str) -> None:
    for record, item, ids in zip(records_of(model), encoded(model), expected(model)["supervised_ids"], strict=True):
        labels = item.inputs.labels
        assert labels[labels != -100].tolist() == ids, record["id"]
        assert item.supervised == len(ids)
        assert item.length == item.inputs.arrays["input_ids"].shape[1]


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch_size", (1, 5, 16))
def test_losses_norms_and_cosines_are_those_of_a_plain_loop(model: str, batch_size: int) -> None:
    reference = loaded(model)
    wanted = expected(model)["image_backends"][backend_of(reference)]
    losses, norms, cosines = gradients_of(reference, encoded(model), batch_size)
    np.testing.assert_allclose(losses, wanted["losses"], rtol=1e-4)
    np.testing.assert_allclose(norms, wanted["norms"], rtol=1e-4)
    np.testing.assert_allclose(cosines, wanted["cosines"], atol=1e-4)


@pytest.mark.parametrize("model", MODELS)
def test_gradient_checkpointing_computes_layers_again_and_gives_the_same(model: str) -> None:
    reference = loaded(model, gradient_checkpointing=True)
    calls = []
    hook = reference.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    losses, norms, cosines = gradients_of(reference, encoded(model)[:5], 5)
    hook.remove()
    assert len(calls) == 2
    plain = gradients_of(loaded(model), encoded(model)[:5], 5)
    for ours, theirs in zip((losses, norms, cosines), plain, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", MODELS)
def test_target_modules_are_the_language_models_alone_by_names_that_do_not_depend_on_nesting(model: str) -> None:
    matrices = target_modules(loaded(model), "self_attn")
    assert len(matrices) == expected(model)["counted_matrices"]
    assert sum(matrix.weight.numel() for matrix in matrices.values()) == expected(model)["counted_parameters"]
    assert all(re.fullmatch(r"layers\.\d+\.self_attn\.[qkvo]_proj\.[AB]", name) for name in matrices)


@pytest.mark.parametrize("model", MODELS)
def test_nothing_is_trainable_and_no_dropout_is_on(model: str) -> None:
    for gradient_checkpointing in (False, True):
        reference = loaded(model, gradient_checkpointing)
        assert not any(parameter.requires_grad for parameter in reference.model.parameters())
        assert not any(module.training for module in reference.model.modules() if isinstance(module, torch.nn.Dropout))


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    reference = native.load(files_of("qwen2_5_vl"), CPU, torch.bfloat16)
    _, norms, _ = gradients_of(reference, encoded("qwen2_5_vl")[:8], 4)
    wanted = expected("qwen2_5_vl")["image_backends"][backend_of(reference)]["norms"][:8]
    np.testing.assert_allclose(norms, wanted, rtol=0.03)


def test_el2n_comes_where_it_is_asked_for() -> None:
    reference, records = loaded("internvl"), encoded("internvl")[:3]
    assert native.record_losses(reference, records).el2n is None
    assert (native.record_losses(reference, records, el2n=True).el2n > 0).all()


# Records.


def conversation(*turns: str, **more: Any) -> dict[str, Any]:
    """Turns of human and gpt in order."""
    names = ("human", "gpt")
    return {"conversations": [{"from": names[row % 2], "value": text} for row, text in enumerate(turns)], **more}


def ids_of(item: Encoded) -> list[int]:
    return item.inputs.arrays["input_ids"][0].tolist()


@pytest.mark.parametrize("model", MODELS)
def test_every_form_of_a_record_gives_the_same_tokens(model: str) -> None:
    processor, images = loaded(model).processor, str(GOLDEN / model / "images")
    question, first, answer = "What is it?\n<image>", "<image>\nAnd here?", "A red circle."
    llava = conversation(question, answer, first, "Yes.", image=["13.png", "14.png"])
    llava["conversations"].insert(0, {"from": "system", "value": "Be brief."})
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("Be brief.", question, answer, first, "Yes.")
    messages = {
        "messages": [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)],
        "images": ["13.png", "14.png"],
    }
    sharegpt = conversation(question, answer, first, "Yes.", system="Be brief.", images=["13.png", "14.png"])
    wanted = native.encode(processor, llava, images)
    for other in (messages, sharegpt):
        item = native.encode(processor, other, images)
        assert ids_of(item) == ids_of(wanted)
        assert item.inputs.labels.tolist() == wanted.inputs.labels.tolist()


def test_an_image_stands_where_the_text_has_it() -> None:
    processor, images = loaded("qwen2_5_vl").processor, str(GOLDEN / "qwen2_5_vl" / "images")
    first = ids_of(native.encode(processor, conversation("<image>\nWhat?", "A.", image="00.png"), images))
    last = ids_of(native.encode(processor, conversation("What?\n<image>", "A.", image="00.png"), images))
    assert first != last and sorted(first) == sorted(last)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (conversation("Hello"), "no supervised token"),
        (conversation("What is <|image_pad|>?", "That."), "an image token in its text"),
        (conversation("<image>What?", "That.", image="none.png"), "missing image"),
        (conversation("What?", "That.", image="00.png"), "has 1 images and 0 tags <image>"),
        (conversation("<image>What?", "<image>That.", image=["00.png", "00.png"]), "has an image in an answer"),
        (conversation("What?", "That.", video="a.mp4"), "has media under `video`"),
        ({"conversations": [{"from": "owner", "value": "What?"}]}, "from"),
    ],
)
def test_a_record_that_cannot_be_encoded_is_left_out_with_its_reason(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(LeftOut, match=re.escape(reason)):
        native.encode(loaded("qwen2_5_vl").processor, record, str(GOLDEN / "qwen2_5_vl" / "images"))


@pytest.mark.parametrize("record", [conversation("What?", "That.", image="00.png"), {"conversations": "none"}, 7])
def test_what_is_wrong_with_a_records_text_is_known_without_its_images(record: Any) -> None:
    assert native.record_problem(record)
    assert native.record_problem(records_of("qwen2_5_vl")[0]) is None


def test_an_image_that_the_processor_refuses_leaves_its_record_out(tmp_path: Path) -> None:
    Image.new("RGB", (4000, 8)).save(tmp_path / "thin.png")
    with pytest.raises(LeftOut, match=r"the processor refuses it: .*aspect ratio"):
        native.encode(
            loaded("qwen2_5_vl").processor, conversation("<image>What?", "A line.", image="thin.png"), str(tmp_path)
        )


def test_records_above_the_maximum_length_are_left_out_and_none_is_cut() -> None:
    item = encoded("qwen2_5_vl")[0]
    record, images = records_of("qwen2_5_vl")[0], str(GOLDEN / "qwen2_5_vl" / "images")
    processor = loaded("qwen2_5_vl").processor
    assert ids_of(native.encode(replace(processor, max_length=item.length), record, images)) == ids_of(item)
    with pytest.raises(LeftOut, match="longer than the maximum length"):
        native.encode(replace(processor, max_length=item.length - 1), record, images)


def test_an_image_above_the_maximum_of_pixels_is_made_smaller(tmp_path: Path) -> None:
    Image.effect_noise((112, 112), 50).convert("RGB").save(tmp_path / "noise.png")
    processor, record = loaded("qwen2_5_vl").processor, conversation("<image>What?", "Noise.", image="noise.png")
    whole = native.encode(processor, record, str(tmp_path))
    small = native.encode(replace(processor, max_pixels=56 * 56), record, str(tmp_path))
    assert small.length < whole.length and small.supervised == whole.supervised


def with_template(model: str, change: Callable[[str], str], tmp_path: Path) -> Any:
    """The golden's processor with another chat template, as --chat_template gives it."""
    template = tmp_path / "template.jinja"
    template.write_text(change((GOLDEN / model / "base" / "chat_template.jinja").read_text()))
    return load_processor(files_of(model, chat_template=str(template)))


def printing(text: str) -> Callable[[str], str]:
    return lambda template: template.replace("content['text']", text)


def test_a_template_that_changes_an_answer_leaves_the_record_out(tmp_path: Path) -> None:
    processor = with_template(
        "internvl", lambda text: text.replace("content['text']", "content['text'].split('</think>')[-1]"), tmp_path
    )
    assert native.encode(processor, conversation("Hi", "Hello."), "").supervised
    with pytest.raises(LeftOut, match="the chat template changes an answer"):
        native.encode(processor, conversation("Hi", "<think>A greeting.</think>Hello."), "")


THINKING = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% set text = message.content[0].text %}"
    "{% if message.role == 'assistant' %}{% if '</think>' in text %}"
    "{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% else %}{% set thought = '' %}{% endif %}"
    "{% if loop.last %}<think>\n{{ thought }}\n</think>\n\n{% endif %}{% endif %}{{ text }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize("answer", ["<think>\nA greeting.\n</think>\n\nHello.", "Hello.", " Hello. "])
def test_a_template_that_prints_thoughts_whole_supervises_the_answer_where_it_stands(
    answer: str, tmp_path: Path
) -> None:
    processor = with_template("internvl", lambda _: THINKING, tmp_path)
    item = native.encode(processor, conversation("Hi", answer), "")
    supervised = item.inputs.labels[item.inputs.labels != -100]
    assert processor.library.tokenizer.decode(supervised) == answer + "<|im_end|>"


def test_thoughts_that_a_template_drops_from_an_earlier_turn_leave_the_record_out(tmp_path: Path) -> None:
    processor = with_template("internvl", lambda _: THINKING, tmp_path)
    thought = "<think>\nA greeting.\n</think>\n\nHello."
    with pytest.raises(LeftOut, match="changes an answer"):
        native.encode(processor, conversation("Hi", thought, "Again", thought), "")


def test_a_photo_is_seen_upright(tmp_path: Path) -> None:
    lying, exif = Image.effect_noise((84, 140), 50).convert("RGB"), Image.Exif()
    lying.transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    exif[0x0112] = 6
    lying.save(tmp_path / "photo.png", exif=exif)
    processor = loaded("qwen2_5_vl").processor
    seen = [
        native.encode(processor, conversation("<image>What?", "Noise.", image=image), str(tmp_path)).inputs.arrays
        for image in ("photo.png", "upright.png")
    ]
    assert np.array_equal(seen[0]["pixel_values"], seen[1]["pixel_values"])
    assert np.array_equal(seen[0]["image_grid_thw"], seen[1]["image_grid_thw"])


def test_a_template_that_strips_answers_supervises_what_it_prints(tmp_path: Path) -> None:
    processor = with_template(
        "internvl", lambda text: text.replace("content['text']", "content['text'] | trim"), tmp_path
    )
    item = native.encode(processor, conversation("Hi", "  Hello.\n"), "")
    supervised = item.inputs.labels[item.inputs.labels != -100]
    assert processor.library.tokenizer.decode(supervised) == "Hello.<|im_end|>"


def test_the_end_of_a_turn_is_no_image_token_though_the_processor_names_it(tmp_path: Path) -> None:
    library = load_processor(copied("internvl", tmp_path)).library
    tokens = image_tokens(library)
    assert {"<IMG_CONTEXT>", "<img>", "</img>"} <= tokens
    library.end_of_turn_token = "<|im_end|>"
    assert image_tokens(library) == tokens


def test_a_template_that_refuses_a_record_leaves_it_out_with_the_templates_words(tmp_path: Path) -> None:
    refusal = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('must start with user') }}{% endif %}"
    processor = with_template("internvl", lambda text: refusal + text, tmp_path)
    record = {"conversations": [{"from": "gpt", "value": "Hello."}, {"from": "human", "value": "Hi"}]}
    with pytest.raises(LeftOut, match="the chat template refuses it: must start with user"):
        native.encode(processor, record, "")


def test_a_first_token_that_the_template_prints_is_not_added_again(tmp_path: Path) -> None:
    plain = native.encode(loaded("llava_hf").processor, conversation("Hi", "Hello."), "")
    processor = with_template("llava_hf", lambda text: "{{ bos_token }}" + text, tmp_path)
    assert ids_of(native.encode(processor, conversation("Hi", "Hello."), "")) == ids_of(plain)


def test_what_a_loaders_worker_needs_travels_to_it() -> None:
    processor = pickle.loads(pickle.dumps(loaded("qwen2_5_vl").processor))
    record, images = records_of("qwen2_5_vl")[0], str(GOLDEN / "qwen2_5_vl" / "images")
    assert ids_of(native.encode(processor, record, images)) == ids_of(encoded("qwen2_5_vl")[0])


WORDS = st.lists(st.integers(0, 4), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), WORDS, WORDS), min_size=1, max_size=4), st.integers(1, 5))
def test_answers_are_found_again_whatever_an_image_becomes(
    turns: list[tuple[int, list[int], list[int]]], tokens: int
) -> None:
    """Few different words, so that answers and questions repeat each other; each answer opens with 90, ends with 91."""
    plain: list[int] = []
    expanded: list[int] = []
    spans, wanted = [], []
    for images, question, answer in turns:
        plain += [80, *[99] * images, *question, 90]
        expanded += [80, *[98, *[99] * tokens, 97] * images, *question, 90]
        spans.append((len(plain), len(plain) + len(answer) + 1))
        wanted.append((len(expanded), len(expanded) + len(answer) + 1))
        plain += [*answer, 91]
        expanded += [*answer, 91]
    assert align(np.array(plain), np.array(expanded), spans) == wanted


# Other classes, which the family has no word of.


@pytest.mark.parametrize("name", CLASSES)
def test_any_class_gives_what_a_plain_loop_gives_in_batches_of_any_records(name: str, tmp_path: Path) -> None:
    torch.set_flush_denormal(True)
    reference = native.load(write(name, tmp_path), CPU, torch.float32)
    images = str(GOLDEN / "qwen2_5_vl" / "images")
    records = tuple(native.encode(reference.processor, record, images) for record in records_of("qwen2_5_vl")[:12])
    decode = reference.processor.library.tokenizer.decode
    end = "<end_of_utterance>" if name == "smolvlm" else "<|im_end|>"
    for record, item in zip(records_of("qwen2_5_vl"), records, strict=False):
        supervised = decode(item.inputs.labels[item.inputs.labels != -100])
        answers = [turn["value"] for turn in record["conversations"] if turn["from"] == "gpt"]
        assert supervised.count(end) == len(answers) and all(answer.strip() in supervised for answer in answers)

    assert len(target_modules(reference, "self_attn")) == 3 * 4 * 2
    _, wanted, unit = plain_loop(reference, records)
    for batch_size in (1, 5):
        _, norms, cosines = gradients_of(reference, records, batch_size)
        np.testing.assert_allclose(norms, wanted, rtol=1e-4)
        np.testing.assert_allclose(cosines, unit @ unit.T, atol=1e-4)


# Adapters and bases.


def copied(model: str, tmp_path: Path) -> ModelFiles:
    """A copy of a golden whose files a test may change."""
    for part in ("adapter", "base"):
        shutil.copytree(GOLDEN / model / part, tmp_path / part)
    return ModelFiles(str(tmp_path / "adapter"), str(tmp_path / "base"))


def change_config(folder: str, name: str = "adapter_config.json", **values: Any) -> None:
    path = Path(folder) / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def change_tensors(folder: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = Path(folder) / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


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
    with pytest.raises(UserError, match="lacks the LoRA matrices of") as refused:
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


def change_base(files: ModelFiles, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = Path(str(files.model_base)) / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def test_weights_of_eight_bits_are_refused_before_loading(tmp_path: Path) -> None:
    files, kind = copied("internvl", tmp_path), torch.float8_e4m3fn
    change_base(files, lambda t: {key: value.to(kind) if "q_proj.weight" in key else value for key, value in t.items()})
    with pytest.raises(UserError, match=r"model\.safetensors: .*q_proj\.weight is stored as F8"):
        native.check_files(files)


def test_scales_that_no_parameter_takes_are_refused_and_other_leftovers_are_printed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = copied("internvl", tmp_path)
    change_base(files, lambda t: t | {"a_part_of_another_release.weight": torch.ones(2)})
    native.load(files, CPU, torch.float32)
    assert "a_part_of_another_release.weight" in capsys.readouterr().out
    change_base(files, lambda t: t | {"language_model.layers.0.self_attn.q_proj.weight_scale_inv": torch.ones(1)})
    with pytest.raises(UserError, match=r"q_proj\.weight_scale_inv.*full precision"):
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
    assert "someone/another-base" in other and str(files.model_base) in other and "quantised" not in other
    assert "quantised" in printed("unsloth/internvl-unsloth-bnb-4bit")


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
    write_record(Path(files.model_path), replace(record, template="another", settings={"assistant_only_loss": True}))
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


def test_a_model_whose_batch_differs_from_its_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that loses its padding's mask, or a key of the processor, is such a model."""
    collate = native_losses.collate

    def leaking(reference: Reference, records: Any) -> Any:
        inputs = collate(reference, records)
        inputs["input_ids"] = inputs["input_ids"].roll(len(records) - 1, dims=0)
        return inputs

    monkeypatch.setattr(native_losses, "collate", leaking)
    with pytest.raises(UserError, match="a batch gives other losses than its records alone"):
        native.load(files_of("internvl"), CPU, torch.float32)


@pytest.mark.parametrize(("change", "known"), [("nothing", True), ("cap", True), ("factor", False)])
def test_what_a_model_does_to_its_logits_is_done(change: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap by its config's name is known, so that losses are computed in pieces; else the model makes all logits."""
    reference, records = loaded("internvl"), encoded("internvl")[:3]
    kind, cap = type(reference.model), 5.0
    forward = kind.forward
    changes = {"nothing": lambda x: x, "cap": lambda x: torch.tanh(x / cap) * cap, "factor": lambda x: x / 8}

    def changed(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = changes[change](output.logits)
        return output

    monkeypatch.setattr(kind, "forward", changed)
    if change == "cap":
        text = reference.model.config.get_text_config()
        monkeypatch.setattr(text, "final_logit_softcapping", cap, raising=False)
    proven = native_losses.proven(reference)
    assert (proven.head is not None) is known
    with torch.no_grad():
        ours = native.record_losses(proven, records).losses
        for loss, record in zip(ours, records, strict=True):
            logits = reference.model(**native_losses.collate(reference, [record]), use_cache=False).logits[0]
            targets = torch.from_numpy(record.inputs.labels)[1:]
            torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:-1], targets))


def test_the_small_losses_of_a_good_model_in_bfloat16_are_held_to_an_absolute_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = native.load(files_of("internvl"), CPU, torch.float32)
    made_up, encode_turns, collate = [], native_losses.encode_turns, native_losses.collate
    monkeypatch.setattr(
        native_losses, "encode_turns", lambda *given: made_up.append(encode_turns(*given)) or made_up[-1]
    )
    native_losses.proven(reference)
    optimizer = torch.optim.Adam(reference.model.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        losses = torch.cat([native.record_losses(reference, made_up[first : first + 2]).losses for first in (0, 2)])
        if losses.max() < 0.2:
            break
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.2
    reference = replace(reference, model=reference.model.requires_grad_(False).to(torch.bfloat16), dtype=torch.bfloat16)
    native_losses.proven(reference)

    def leaking(reference: Reference, records: Any) -> Any:
        inputs = collate(reference, records)
        return inputs | {"input_ids": inputs["input_ids"].roll(len(records) - 1, dims=0)}

    monkeypatch.setattr(native_losses, "collate", leaking)
    with pytest.raises(UserError, match="than its records alone"):
        native_losses.proven(reference)


# 4 bits, and where weights go.


def test_a_base_in_4_bits_gives_the_gradients_of_a_plain_loop_over_it(tmp_path: Path) -> None:
    files = copied("qwen2_5_vl", tmp_path)
    in_4bit = replace(files, load_in_4bit=True)
    reference, records = native.load(in_4bit, CPU, torch.float32), encoded("qwen2_5_vl")[:4]
    layer = reference.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.lora_A["default"].weight.dtype == torch.float32
    losses, norms, _ = gradients_of(reference, records, 4)
    whole, whole_norms, _ = gradients_of(loaded("qwen2_5_vl"), records, 4)
    assert 0.001 < np.abs(losses - whole).max() < 0.2 and not np.allclose(norms, whole_norms, rtol=1e-3)
    for ours, plain in zip((losses, norms), plain_loop(reference, records)[:2], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4)
    assert native.identity(in_4bit) != native.identity(files)

    quantized = tmp_path / "quantized"
    base = Path(str(files.model_base))
    shutil.copytree(base, quantized, ignore=shutil.ignore_patterns("*.safetensors"))
    transformers = importlib.import_module("transformers")
    method = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kind = transformers.AutoModelForImageTextToText
    kind.from_pretrained(base, quantization_config=method, device_map={"": "cpu"}).save_pretrained(quantized)
    stored = replace(files, model_base=str(quantized))
    with pytest.raises(UserError, match=r"config\.json: quantization_config.*load_in_4bit"):
        native.check_files(stored)
    again = native.load(replace(stored, load_in_4bit=True), CPU, torch.float32)
    np.testing.assert_allclose(gradients_of(again, records, 4)[0], losses, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_travel_in_16_bits_where_the_model_computes_in_16_bits(dtype: torch.dtype) -> None:
    reference, record = native.load(files_of("qwen2_5_vl"), CPU, dtype), records_of("qwen2_5_vl")[0]
    item = native.encode(reference.processor, record, str(GOLDEN / "qwen2_5_vl" / "images"))
    whole = encoded("qwen2_5_vl")[0]
    pixels = item.inputs.arrays["pixel_values"]
    assert pixels.nbytes * 2 == whole.inputs.arrays["pixel_values"].nbytes
    with torch.no_grad():
        assert torch.equal(*(native.record_losses(reference, [one]).losses for one in (item, whole)))


def test_weights_go_straight_to_a_gpu() -> None:
    """The library reads each weight onto the device; a CPU needs no word of it."""
    asked: list[dict[str, Any]] = []

    class Kind:
        @staticmethod
        def from_pretrained(folder: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
            asked.append(options)
            return None, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    for device in (torch.device("cuda", 1), CPU):
        load_pretrained(Kind, "folder", (device, torch.bfloat16))
    assert asked[0]["device_map"] == {"": torch.device("cuda", 1)} and "device_map" not in asked[1]


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
