"""Answers of transformers' own models: what the model itself finds most probable, adapters and whole models."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

from scripts import evaluate
from tive.evaluation.results import Evaluation, read_stored
from tive.models import ModelFiles, Reference, family_of, native
from tive.util.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "native"
MODELS = ("llava_hf", "qwen2_5_vl", "internvl")
CPU = torch.device("cpu")


@functools.cache
def loaded(model: str, whole: bool = False) -> Reference:
    torch.set_flush_denormal(True)
    base = str(GOLDEN / model / "base")
    files = ModelFiles(base, None) if whole else ModelFiles(str(GOLDEN / model / "adapter"), base)
    assert family_of(files) is native
    native.check_files(files)
    return native.load(files, CPU, torch.float32)


def encoded_records(model: str, reference: Reference):
    records = json.loads((GOLDEN / model / "data.json").read_text())[:8]
    return [(r, native.encode(reference.processor, r, str(GOLDEN / model / "images"))) for r in records]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_the_first_token_of_an_answer_is_the_most_probable_after_all_that_comes_before(model, whole):
    reference = loaded(model, whole)
    tokenizer = reference.processor.library.tokenizer
    asked = 0
    for _, encoded in encoded_records(model, reference):
        inputs = native.collate(reference, [encoded]).inputs
        with torch.no_grad():
            best = reference.model(**inputs, use_cache=False).logits[0].argmax(dim=-1)
        answers = native.answers(reference.processor, encoded)
        asked += len(answers)
        texts = native.generate(reference, [prompt for prompt, _ in answers], 1)
        ends = [int(best[prompt.length - 1]) for prompt, _ in answers]
        assert texts == [tokenizer.decode([number], skip_special_tokens=True).strip() for number in ends]
    assert asked


@pytest.mark.parametrize("model", MODELS)
def test_the_answers_of_a_record_are_its_turns(model):
    reference = loaded(model)
    for record, encoded in encoded_records(model, reference):
        turns = record["conversations"]
        turns = turns[turns[0]["from"] == "gpt" :]
        expected = [turn["value"].strip() for turn in turns if turn["from"] == "gpt"]
        answers = [expected for _, expected in native.answers(reference.processor, encoded)]
        assert answers and set(answers) <= set(expected)


def test_generation_leaves_the_model_as_it_was():
    reference = loaded("qwen2_5_vl")
    before = reference.model.generation_config
    ((_, encoded), *_) = encoded_records("qwen2_5_vl", reference)
    native.generate(reference, [native.answers(reference.processor, encoded)[0][0]], 2)
    assert reference.model.generation_config is before


def test_records_above_the_longest_that_was_asked_for_are_left_out_and_another_limit_is_another_result(
    monkeypatch, tmp_path
):
    folder = GOLDEN / "llava_hf"
    parts = ["--input_file", folder / "data.json", "--image_folder", folder / "images", "--max_new_tokens", 0]
    parts += ["--model", "base", folder / "base", "--num_workers", 0, "--device", "cpu", "--on_bad_record", "skip"]

    def results(name: str, *options: object) -> list[str | None]:
        arguments = [*parts, "--save_path", tmp_path / name, *options]
        monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, arguments)])
        evaluate.main()
        (model,) = read_stored(tmp_path / name, Evaluation).models
        return [record.left_out for record in model.records]

    every = results("all")
    short = results("short", "--max_length", 60)
    longer = [new for old, new in zip(every, short, strict=True) if old is None and new is not None]
    assert 0 < len(longer) < len(every) and set(longer) == {"longer than the maximum length"}
    with pytest.raises(UserError, match="another model"):
        results("short", "--max_length", 61)
