"""Gradients of a real pre-trained language model, with images: what a plain loop gives; what bfloat16, a base in 4 bits
and a sample cost."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from scripts.experiment.smollm2 import language_model, missing
from scripts.quickstart import data
from tests.helpers import smollm2
from tests.helpers.native_gradients import gradients_of, plain_loop
from tive.method.value import budget_errors, task_budgets, task_value
from tive.models import Encoded, ModelFiles, Reference, native

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
CPU = torch.device("cpu")
TASKS = (data.vqa, data.textcaps, data.chat, data.counting)
EACH = 6
SOME = slice(0, None, 3)  # two records of each task


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> ModelFiles:
    return smollm2.write(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def reference(files: ModelFiles) -> Reference:
    return native.load(files, CPU, torch.float32)


@pytest.fixture(scope="module")
def records(reference: Reference, tmp_path_factory: pytest.TempPathFactory) -> list[Encoded]:
    """`EACH` records of each of four tasks, one of them without images; a task's stand together."""
    folder = tmp_path_factory.mktemp("images")
    made = [
        data.make_record(task, number, random.Random(f"{task.__name__} {number}"), folder)
        for task in TASKS
        for number in range(EACH)
    ]
    return [native.encode(reference.processor, record, str(folder)) for record in made]


@pytest.fixture(scope="module")
def whole(reference: Reference, records: list[Encoded]) -> tuple[np.ndarray, ...]:
    """Losses, norms and cosines in float32, in batches."""
    return gradients_of(reference, records, EACH)


def test_it_is_the_pretrained_model() -> None:
    model, tokenizer = language_model()
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


def test_losses_norms_and_cosines_in_batches_are_those_of_a_plain_loop(
    reference: Reference, records: list[Encoded], whole: tuple[np.ndarray, ...]
) -> None:
    wanted_losses, wanted, unit = plain_loop(reference, records[SOME])
    losses, norms, cosines = whole
    np.testing.assert_allclose(losses[SOME], wanted_losses, rtol=1e-5)
    np.testing.assert_allclose(norms[SOME], wanted, rtol=1e-4)
    np.testing.assert_allclose(cosines[SOME, SOME], unit @ unit.T, atol=1e-4)


def test_bfloat16_keeps_the_order_of_the_norms_and_most_of_the_cosines(
    files: ModelFiles, records: list[Encoded], whole: tuple[np.ndarray, ...]
) -> None:
    low = gradients_of(native.load(files, CPU, torch.bfloat16), records[SOME], 4)
    off = differences("bfloat16", low, whole)
    assert off["losses"].max() < 0.05 and np.median(off["norms"]) < 0.05 and np.median(off["cosines"]) < 0.02


def test_a_base_in_4_bits_gives_the_gradients_of_a_plain_loop_over_it_and_keeps_the_order_of_the_norms(
    files: ModelFiles, records: list[Encoded], whole: tuple[np.ndarray, ...]
) -> None:
    pytest.importorskip("bitsandbytes")
    quantized = native.load(replace(files, load_in_4bit=True), CPU, torch.float32)
    assert type(quantized.layers[0].self_attn.q_proj.base_layer).__name__ == "Linear4bit"
    low = gradients_of(quantized, records[SOME], 4)
    wanted_losses, wanted, _ = plain_loop(quantized, records[SOME][:2])
    np.testing.assert_allclose(low[0][:2], wanted_losses, rtol=1e-4)
    np.testing.assert_allclose(low[1][:2], wanted, rtol=1e-3)
    off = differences("4 bits", low, whole)
    assert np.median(off["losses"]) < 0.1 and np.median(off["norms"]) < 0.3


def differences(name: str, low: tuple[np.ndarray, ...], whole: tuple[np.ndarray, ...]) -> dict[str, np.ndarray]:
    """What losses and norms of `SOME` are off, relative, and cosines; the norms' order is kept."""
    off = {
        "losses": np.abs(low[0] / whole[0][SOME] - 1),
        "norms": np.abs(low[1] / whole[1][SOME] - 1),
        "cosines": np.abs(low[2] - whole[2][SOME, SOME])[np.triu_indices(len(low[0]), 1)],
    }
    for key, values in off.items():  # docs/benchmarks.md has them
        print(f"{name}, {key}: median {np.median(values):.4f}, largest {values.max():.4f}")
    order = spearmanr(low[1], whole[1][SOME]).statistic
    print(f"{name}, rank correlation of the norms: {order:.2f}")
    assert order > 0.8
    return off


def test_half_of_the_records_give_the_tasks_budgets_within_the_error_that_is_said(
    whole: tuple[np.ndarray, ...],
) -> None:
    norms = whole[1].reshape(-1, EACH).astype(float)

    def budgets(part: np.ndarray) -> np.ndarray:
        return task_budgets(np.array([task_value(row) for row in part]), 0.5, 200)

    counts, sizes = np.full(len(norms), EACH // 2), np.full(len(norms), EACH)
    means, spread = norms.mean(axis=1)[None], norms.var(axis=1, ddof=1)[:, None, None]
    errors, _ = budget_errors(means, spread, counts, sizes, 100.0)
    random_ = np.random.default_rng(0)
    halves = [budgets(random_.permuted(norms, axis=1)[:, : EACH // 2]) for _ in range(300)]
    seen = np.sqrt(np.mean((np.array(halves) - budgets(norms)) ** 2, axis=0))
    print("budgets of 100:", budgets(norms).round(1), "errors said:", errors.round(1), "seen:", seen.round(1))
    np.testing.assert_allclose(seen, errors, rtol=0.3)
    assert budgets(norms).max() > 1.5 * budgets(norms).min()
