"""Models of transformers' own: every number of the goldens and of other classes, in batches as in a plain loop."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.helpers.golden_native import (
    CPU,
    GOLDEN,
    MODELS,
    backend_of,
    encoded,
    expected,
    files_of,
    loaded,
    records_of,
)
from tests.helpers.native_gradients import gradients_of, plain_loop
from tests.helpers.tiny_native import CLASSES, write
from tive.models import native
from tive.models.common import target_modules

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
