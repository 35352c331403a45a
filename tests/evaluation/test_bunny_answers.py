"""Answers of Bunny's models: token after token what a plain loop finds, in a batch."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tive.models import Encoded, ModelFiles, Reference, bunny, spliced
from tive.util.errors import UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "bunny"
MODEL = GOLDEN / "qwen1.5-1.8b"


@pytest.fixture(scope="module")
def golden() -> Reference:
    torch.set_flush_denormal(True)
    files = ModelFiles(str(MODEL / "reference"), str(MODEL / "base"), str(MODEL / "siglip"))
    return bunny.load(files, torch.device("cpu"), torch.float32)


def plain_answer(reference: Reference, prompt: Encoded, max_new_tokens: int) -> str:
    text, inputs, ids = reference.processor.template, prompt.inputs, []
    (end,) = text.tokenizer.encode(text.end, add_special_tokens=False).ids
    for _ in range(max_new_tokens):
        longer = np.concatenate([inputs.ids, ids]).astype(np.int64)
        record = Encoded(len(longer), 0, prompt.group, replace(inputs, ids=longer, labels=longer))
        embeddings = spliced.embed(reference, spliced.collate(reference, [record]).inputs)
        with torch.no_grad():
            ids.append(int(reference.model.language_model(inputs_embeds=embeddings).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return text.tokenizer.decode(ids).strip()


def test_answers_of_a_batch_are_those_of_a_plain_loop_one_token_after_the_other(golden):
    records = json.loads((GOLDEN / "data.json").read_text())[:10]
    encoded = [bunny.encode(golden.processor, record, str(GOLDEN / "images")) for record in records]
    answers = [answer for record in encoded for answer in bunny.answers(golden.processor, record)]
    prompts = [prompt for prompt, _ in answers][:8]
    assert len({prompt.length for prompt in prompts}) > 1
    assert bunny.generate(golden, prompts, 4) == [plain_answer(golden, prompt, 4) for prompt in prompts]
    said = {turn["value"].strip() for record in records for turn in record["conversations"] if turn["from"] == "gpt"}
    assert {expected for _, expected in answers} <= said


def test_a_whole_bunny_model_is_refused_with_what_can_be_read():
    with pytest.raises(UserError, match="only an adapter"):
        bunny.check_files(ModelFiles(str(MODEL / "reference"), None))
