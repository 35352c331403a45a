"""Records of transformers' own models: what is supervised, what is left out, and why."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.helpers.golden_native import (
    GOLDEN,
    MODELS,
    conversation,
    copied,
    encoded,
    files_of,
    ids_of,
    loaded,
    records_of,
)
from tive.models import LeftOut, native
from tive.models.native_encoding import align, image_tokens, load_processor


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
    with pytest.raises(LeftOut, match=r"processor refuses it: .*aspect ratio"):
        native.encode(
            loaded("qwen2_5_vl").processor, conversation("<image>What?", "A line.", image="thin.png"), str(tmp_path)
        )


def test_a_lack_of_memory_is_no_reason_to_leave_a_record_out(monkeypatch: pytest.MonkeyPatch) -> None:
    processor = loaded("qwen2_5_vl").processor

    def without_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(type(processor.library), "__call__", without_memory)
    with pytest.raises(MemoryError):
        native.encode(processor, conversation("Hello.", "Hello!"), "")


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
    with pytest.raises(LeftOut, match="refuses it: must start with user"):
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
