"""Gradients of a real pre-trained language model, with images: what a plain loop gives; and what bfloat16 costs."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from scripts.quickstart.data import TASKS
from tests.helpers import smollm2
from tests.helpers.native_gradients import gradients_of, plain_loop
from tive.models import Encoded, ModelFiles, Reference, native

pytestmark = pytest.mark.skipif(bool(smollm2.missing()), reason=smollm2.missing())
CPU = torch.device("cpu")
TASKS_TAKEN = ("vqa", "textcaps", "chat", "counting")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return smollm2.write(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def reference(files: ModelFiles) -> Reference:
    return native.load(files, CPU, torch.float32)


def encoded(reference: Reference, folder: Path) -> list[Encoded]:
    """Two records of each of four tasks, one of them without images."""
    records = []
    for task in TASKS_TAKEN:
        for number in range(2):
            image, turns = TASKS[task][0](random.Random(f"{task} {number}"))
            record = {"id": f"{task}-{number}"}
            if image is not None:
                record["image"] = f"{task}_{number}.png"
                image.save(folder / record["image"])
            parts = [(role, text) for turn in turns for role, text in zip(("human", "gpt"), turn, strict=True)]
            record["conversations"] = [{"from": role, "value": text} for role, text in parts]
            records.append(native.encode(reference.processor, record, str(folder)))
    return records


def test_it_is_the_pretrained_model() -> None:
    model, tokenizer = smollm2.language_model()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_losses_norms_and_cosines_in_batches_are_those_of_a_plain_loop(reference: Reference, tmp_path: Path) -> None:
    records = encoded(reference, tmp_path)
    wanted_losses, wanted, unit = plain_loop(reference, records)
    losses, norms, cosines = gradients_of(reference, records, 4)
    np.testing.assert_allclose(losses, wanted_losses, rtol=1e-5)
    np.testing.assert_allclose(norms, wanted, rtol=1e-4)
    np.testing.assert_allclose(cosines, unit @ unit.T, atol=1e-4)


def test_bfloat16_keeps_the_order_of_the_norms_and_most_of_the_cosines(
    files: ModelFiles, reference: Reference, tmp_path: Path
) -> None:
    records = encoded(reference, tmp_path)
    losses, norms, cosines = gradients_of(reference, records, 4)
    low_losses, low_norms, low_cosines = gradients_of(native.load(files, CPU, torch.bfloat16), records, 4)
    off = {"losses": np.abs(low_losses / losses - 1), "norms": np.abs(low_norms / norms - 1)}
    off |= {"cosines": np.abs(low_cosines - cosines)[np.triu_indices(len(records), 1)]}
    for name, values in off.items():  # docs/benchmarks.md has them
        print(f"{name}: median {np.median(values):.4f}, largest {values.max():.4f}")
    assert spearmanr(low_norms, norms).statistic > 0.95
    assert off["losses"].max() < 0.05 and np.median(off["norms"]) < 0.05 and np.median(off["cosines"]) < 0.02
