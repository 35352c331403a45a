"""Held-out losses and answers of LLaVA's models: what the trainer's own code gives, in batches, through a kill."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from scripts import evaluate
from tests.helpers.golden_model import GOLDEN, RECORDS, Finished
from tests.helpers.reference import CPU, encode_golden, llavas_inputs, load_golden
from tive.evaluation import run as evaluation_run
from tive.evaluation.results import Evaluation, read_stored
from tive.models import ModelFiles, llava
from tive.models.common import IGNORE
from tive.util.errors import run

ADAPTER = ("reference", str(GOLDEN / "llava-lora"), str(GOLDEN / "vicuna"))


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def whole_model(tmp_path_factory) -> Path:
    """A whole model as LLaVA's trainer saves one: weights, config and tokenizer in one folder."""
    from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "whole"
    torch.manual_seed(0)
    config = LlavaConfig.from_pretrained(GOLDEN / "llava-lora")
    config.mm_vision_tower = str(GOLDEN / "clip")
    LlavaLlamaForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(GOLDEN / "vicuna" / name, folder)
    return folder


def evaluate_models(save_path: Path, *more: object, models=(ADAPTER,), data: Path = GOLDEN / "data.json") -> Finished:
    arguments = [
        *("--input_file", data, "--image_folder", GOLDEN / "images", "--vision_tower", GOLDEN / "clip"),
        *("--save_path", save_path, "--num_workers", 0, "--device", "cpu", "--max_new_tokens", 0, "--window", 16),
        *(part for model in models for part in ("--model", *model)),
        *more,
    ]
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["evaluate.py", *map(str, arguments)]
    code = 0
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            run(evaluate.main)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.argv = before
    return Finished(code, out.getvalue(), err.getvalue())


def plain_answer(reference, prompt, max_new_tokens: int) -> str:
    """The most probable token after token, the whole prompt computed anew for each, alone and without padding."""
    tokenizer, inputs = reference.processor.template.tokenizer, prompt.inputs
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(max_new_tokens):
            longer = np.append(inputs.ids, ids).astype(np.int64)
            arguments = llavas_inputs(replace(inputs, ids=longer, labels=longer))
            ids.append(int(reference.model(**arguments).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
    return tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_answers_of_a_batch_are_those_of_a_plain_loop_one_token_after_the_other(golden):
    records = encode_golden(golden)[:14]
    prompts = [prompt for record in records for prompt, _ in llava.answers(golden.processor, record)]
    shown = [prompt for prompt in prompts if prompt.inputs.pixels is not None]
    texts = [prompt for prompt in prompts if prompt.inputs.pixels is None]
    for batch in (shown[:5], texts[:5], [*shown[5:8], *texts[5:7]]):
        assert len({prompt.length for prompt in batch}) > 1
        assert llava.generate(golden, batch, 5) == [plain_answer(golden, prompt, 5) for prompt in batch]


def test_the_answers_of_a_record_are_its_turns_each_behind_all_that_came_before(golden):
    for record, encoded in zip(RECORDS, encode_golden(golden), strict=True):
        turns = record["conversations"]
        turns = turns[turns[0]["from"] == "gpt" :]
        expected = [" ".join(turn["value"].split()) for turn in turns if turn["from"] == "gpt"]
        answers = llava.answers(golden.processor, encoded)
        assert [" ".join(text.split()) for _, text in answers] == expected[: len(answers)]
        assert len(answers) == len(expected) or encoded.length == golden.processor.max_length
        for prompt, _ in answers:
            whole, before = encoded.inputs.ids, prompt.inputs.ids
            assert (whole[: len(before)] == before).all() and encoded.inputs.labels[len(before)] != IGNORE


def test_an_answer_cut_at_the_maximum_length_is_not_asked_for(golden):
    encoded = encode_golden(golden)[0]
    last, _ = llava.answers(golden.processor, encoded)[-1]
    shorter = replace(golden.processor, max_length=last.length + 1)
    assert len(llava.answers(shorter, encoded)) == len(llava.answers(golden.processor, encoded)) - 1


def test_losses_are_those_of_the_family_and_the_means_are_over_tasks(golden, tmp_path):
    done = evaluate_models(tmp_path)
    assert done.code == 0, done.err
    (model,) = read_stored(tmp_path, Evaluation).models
    encoded = encode_golden(golden)
    with torch.no_grad():
        alone = [float(llava.record_losses(golden, [record]).losses) for record in encoded]
    assert [record.loss for record in model.records] == pytest.approx(alone, rel=1e-5)
    for task in model.tasks:
        losses = [loss for loss, record in zip(alone, RECORDS, strict=True) if record["dataset"] == task.name]
        assert task.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        assert f"{task.loss:.4f}" in done.out


def test_an_answer_that_the_model_itself_gives_is_exact(golden, tmp_path):
    records = []
    for record in (record for record in RECORDS if "image" in record):
        encoded = llava.encode(golden.processor, record, str(GOLDEN / "images"))
        first, _ = llava.answers(golden.processor, encoded)[0]
        (text,) = llava.generate(golden, [first], 4)
        if record["conversations"][0]["from"] == "human" and any(map(str.isalnum, text)):
            records.append({**record, "conversations": [record["conversations"][0], {"from": "gpt", "value": text}]})
        if len(records) == 3:
            break
    records.append(RECORDS[0])
    data = tmp_path / "records.json"
    data.write_text(json.dumps(records))
    done = evaluate_models(tmp_path / "out", "--max_new_tokens", 4, data=data)
    assert done.code == 0, done.err
    (model,) = read_stored(tmp_path / "out", Evaluation).models
    assert [(record.answers, record.exact) for record in model.records[:3]] == [(1, 1)] * 3
    assert model.records[3].exact == 0 < model.records[3].answers


def test_a_whole_model_gives_what_llavas_own_code_gives(whole_model):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    reference = llava.load(ModelFiles(str(whole_model), None), CPU, torch.float32)
    theirs = LlavaLlamaForCausalLM.from_pretrained(whole_model).eval()
    theirs.get_vision_tower().load_model()
    for record in RECORDS[:6]:
        encoded = llava.encode(reference.processor, record, str(GOLDEN / "images"))
        with torch.no_grad():
            expected = float(theirs(**llavas_inputs(encoded.inputs)).loss)
            assert float(llava.record_losses(reference, [encoded]).losses) == pytest.approx(expected, rel=1e-5)


def test_several_models_are_relative_to_the_first(whole_model, tmp_path):
    done = evaluate_models(tmp_path, models=(("whole", whole_model), ADAPTER))
    assert done.code == 0, done.err
    assert [model.name for model in read_stored(tmp_path, Evaluation).models] == ["whole", "reference"]
    assert "relative to whole" in done.out


def test_a_killed_evaluation_goes_on_where_it_stopped_and_ends_the_same(monkeypatch, tmp_path):
    whole = evaluate_models(tmp_path / "whole")
    assert whole.code == 0, whole.err
    compute, calls = evaluation_run.losses_of, []

    def killed(*arguments, **named):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return compute(*arguments, **named)

    monkeypatch.setattr(evaluation_run, "losses_of", killed)
    assert evaluate_models(tmp_path / "killed").code == 130
    assert evaluate_models(tmp_path / "killed").code == 0
    assert len(calls) == 4  # three windows of 16, and the one that was interrupted
    first, second = (read_stored(tmp_path / name, Evaluation).models[0] for name in ("whole", "killed"))
    assert first.records == second.records
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"evaluation.json", "model_reference.json"}


def test_results_that_are_there_are_used_and_those_of_something_else_are_refused(monkeypatch, tmp_path):
    assert evaluate_models(tmp_path).code == 0
    monkeypatch.setattr(evaluation_run, "losses_of", None)  # nothing is computed any more
    assert evaluate_models(tmp_path).code == 0
    other = evaluate_models(tmp_path, "--max_new_tokens", 3)
    assert other.code == 2 and "another max new tokens" in other.err and "--overwrite" in other.err


def test_results_belong_to_records_in_data_that_was_relabelled_reordered_and_has_grown(monkeypatch, tmp_path):
    first, last = RECORDS[:6], RECORDS[6]
    data = tmp_path / "data.json"
    data.write_text(json.dumps(first))
    assert evaluate_models(tmp_path / "out", data=data).code == 0
    before = {record.content: record.loss for record in read_stored(tmp_path / "out", Evaluation).models[0].records}
    changed = [last, *({**record, "dataset": "renamed", "id": "x"} for record in reversed(first))]
    data.write_text(json.dumps(changed, indent=1))
    compute, computed = evaluation_run.losses_of, []

    def counted(family, reference, records, batches):
        computed.extend(records)
        return compute(family, reference, records, batches)

    monkeypatch.setattr(evaluation_run, "losses_of", counted)
    done = evaluate_models(tmp_path / "out", data=data)
    assert done.code == 0 and computed == [0], done.err
    (model,) = read_stored(tmp_path / "out", Evaluation).models
    assert {record.content: record.loss for record in model.records[1:]} == before
    assert [task.name for task in model.tasks] == [last["dataset"], "renamed"]

    # Of fewer records: the results of the others would be lost under this name; another one has nothing to compute.
    data.write_text(json.dumps(changed[2:4]))
    refused = evaluate_models(tmp_path / "out", data=data)
    assert refused.code == 2 and "--overwrite" in refused.err
    fewer = evaluate_models(tmp_path / "out", data=data, models=(("fewer", *ADAPTER[1:]),))
    assert fewer.code == 0 and computed == [0], fewer.err

    # Where its image is gone since, a record is left out, whatever is known of it.
    data.write_text(json.dumps(changed))
    gone = ("--image_folder", tmp_path, "--on_bad_record", "skip")
    done = evaluate_models(tmp_path / "out", *gone, data=data, models=(("gone", *ADAPTER[1:]),))
    model = next(model for model in read_stored(tmp_path / "out", Evaluation).models if model.name == "gone")
    assert [record.loss is None for record in model.records] == ["image" in record for record in changed], done.err


def test_a_record_that_cannot_be_used_stops_the_run_or_is_left_out_with_its_reason(tmp_path):
    bad = [{**RECORDS[0], "image": "nowhere.png"}, {"id": 1, "dataset": "vqa"}, *RECORDS[:3]]
    data = tmp_path / "bad.json"
    data.write_text(json.dumps(bad))
    stopped = evaluate_models(tmp_path / "out", data=data)
    assert stopped.code == 2 and "record 0" in stopped.err and "(on_bad_record skip)" in stopped.err
    done = evaluate_models(tmp_path / "out", "--on_bad_record", "skip", data=data)
    assert done.code == 0, done.err
    (model,) = read_stored(tmp_path / "out", Evaluation).models
    assert [record.left_out is None for record in model.records] == [False, False, True, True, True]
    assert model.records[0].left_out == "missing image" and "2 of 5 records are left out" in done.out

    # The list of them goes when all can be used.
    listing = tmp_path / "out" / "bad_records.json"
    assert [entry["row"] for entry in json.loads(listing.read_text())] == [0, 1]
    data.write_text(json.dumps(bad[2:]))
    done = evaluate_models(tmp_path / "out", data=data)
    assert done.code == 0 and not listing.exists(), done.err


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (("x", GOLDEN / "llava-lora"), "name its base"),
        (("x", GOLDEN / "images"), "holds no model"),
        (("x/y", GOLDEN / "vicuna"), "a name has letters"),
        (("x", GOLDEN / "vicuna"), "model type 'llama'"),
    ],
)
def test_what_is_no_model_is_said_before_anything_is_computed(tmp_path, model, message):
    done = evaluate_models(tmp_path / "out", models=(model,))
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--chat_template", "x.jinja"), ("--max_length", 9), ("--max_pixels", 9)])
def test_an_option_of_another_family_is_refused(tmp_path, option):
    done = evaluate_models(tmp_path / "out", *option)
    assert done.code == 2 and option[0].strip("-") in done.err and not (tmp_path / "out").exists()
