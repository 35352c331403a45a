"""Per-record gradients of a batch are the gradients of the records alone, whatever the batch."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers.reference import (
    EXPECTED,
    RECORDS,
    encode_golden,
    gradients_of,
    in_batches,
    load_golden,
    plain_loop,
    plain_losses,
    step_of,
)
from tive.method.gradients import RecordGradients
from tive.models import LeftOut, llava
from tive.models.common import target_modules
from tive.util.errors import UserError


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def encoded(golden):
    return encode_golden(golden)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_norms_and_cosines_of_the_published_code_hold_at_every_batch_size(golden, encoded, size):
    result = in_batches(step_of(golden), encoded, size)
    expected = torch.tensor(EXPECTED["norms"])
    assert sum(m.weight.numel() for m in target_modules(golden, "self_attn").values()) == 16384
    assert ((result.norms - expected) / expected).abs().max() < 1e-4
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < 1e-4


def test_a_batch_gives_what_autograd_gives_one_record_at_a_time(golden, encoded):
    some = encoded[:6]
    plain = plain_loop(golden, some)
    result = in_batches(step_of(golden), some, 6)
    whole = result.features * result.norms[:, None]
    assert (whole - plain).abs().max() < 1e-6 * plain.abs().max() + 1e-7


def test_the_losses_are_those_of_llava_one_record_at_a_time(golden, encoded):
    result = in_batches(step_of(golden), encoded, 16)
    assert (result.losses - plain_losses(golden, encoded)).abs().max() < 1e-5


def test_gradient_checkpointing_gives_the_same_gradients(encoded):
    checkpointed = load_golden(gradient_checkpointing=True)
    assert checkpointed.model.model.gradient_checkpointing and checkpointed.model.model.training
    result = in_batches(step_of(checkpointed), encoded, 8)
    expected = torch.tensor(EXPECTED["norms"])
    assert ((result.norms - expected) / expected).abs().max() < 1e-4
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < 1e-4


@pytest.mark.parametrize("dtype, cosine, norm", [(torch.bfloat16, 0.01, 0.01), (torch.float16, 0.01, 0.01)])
def test_half_precision_keeps_cosines_and_norms_within_one_percent(encoded, dtype, cosine, norm):
    result = in_batches(step_of(load_golden(dtype)), encoded, 16)
    expected = torch.tensor(EXPECTED["norms"])
    assert ((result.norms - expected) / expected).abs().max() < norm
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < cosine


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_padding_does_not_change_a_records_gradient(encoded, dtype, tolerance):
    reference = load_golden(dtype)
    step = step_of(reference)
    by_length = sorted((record for record in encoded if record.inputs.pixels is not None), key=lambda r: r.length)
    short = by_length[0]
    words = reference.processor.template.tokenizer("a very long answer " * 300).input_ids
    inputs = by_length[-1].inputs
    ids = np.concatenate([inputs.ids, np.array(words)])[:1000]
    labels = np.concatenate([inputs.labels, np.array(words)])[:1000]
    long = replace(by_length[-1], inputs=replace(inputs, ids=ids, labels=labels), length=len(ids))
    assert long.length > 6 * short.length
    alone = gradients_of(step, [short]).features
    beside = gradients_of(step, [short, long]).features
    assert (alone[0] - beside[0]).norm() < tolerance * alone[0].norm()


def test_a_matrix_that_is_used_twice_counts_its_gradients_together():
    torch.manual_seed(0)
    matrix = torch.nn.Linear(5, 5, bias=False).requires_grad_(False)
    inputs = torch.randn(3, 4, 5)
    seen = []
    with RecordGradients({"twice": matrix}, lambda name, gradients: seen.append((name, gradients))) as hooks:
        hooks.backward(matrix(torch.tanh(matrix(inputs))).square().sum(dim=(1, 2)))
    assert [name for name, _ in seen] == ["twice"]
    matrix.requires_grad_(True)
    for row in range(3):
        loss = matrix(torch.tanh(matrix(inputs[row]))).square().sum()
        (expected,) = torch.autograd.grad(loss, matrix.weight)
        assert torch.allclose(seen[0][1][row], expected, rtol=1e-5, atol=1e-5)


def test_only_the_language_models_lora_matrices_count(golden):
    names = list(target_modules(golden, "self_attn"))
    assert names[0] == "layers.0.self_attn.q_proj.A" and len(names) == 16
    everything = target_modules(golden, "all")
    assert {name.split(".")[2] for name in everything} == {"self_attn", "mlp"} and len(everything) == 28
    assert set(target_modules(golden, "q_proj,v_proj")) < set(names)
    assert not any(hasattr(module, "lora_A") for module in golden.model.get_vision_tower().modules())
    for bad in ("attention", "", "vision_tower"):
        with pytest.raises(UserError, match="names no LoRA matrix"):
            target_modules(golden, bad)


def test_below_the_first_counted_matrix_nothing_is_computed_backward(golden, encoded):
    step = step_of(golden)
    last = {name: matrix for name, matrix in step.matrices.items() if name.startswith("layers.1.")}
    below = []
    hook = golden.model.model.layers[0].register_forward_hook(lambda m, i, o: below.append(o[0].requires_grad))
    found = gradients_of(replace(step, matrices=last), encoded[:2])
    hook.remove()
    whole = gradients_of(step, encoded[:2])
    assert below and not any(below)
    part = (whole.features * whole.norms[:, None])[:, 8192:]
    assert torch.allclose(found.features[:, 8192:] * found.norms[:, None], part, rtol=1e-4, atol=1e-6)


def test_a_record_with_a_gradient_that_is_not_finite_harms_no_other(golden, encoded):
    poisoned = copy.deepcopy(encoded[0])
    poisoned.inputs.pixels[:] = np.nan
    found = gradients_of(step_of(golden), [poisoned, encoded[1]])
    assert not torch.isfinite(found.norms[0]) and not found.features[0].any()
    assert abs(found.norms[1] - EXPECTED["norms"][1]) < 1e-4 * EXPECTED["norms"][1]


def test_a_record_with_nothing_supervised_is_left_out_with_its_reason(golden):
    long = {"conversations": [{"from": "human", "value": "word " * 4000}, {"from": "gpt", "value": "yes"}]}
    with pytest.raises(LeftOut, match="no supervised token"):
        llava.encode(golden.processor, long, "")
    silent = {"conversations": [{"from": "human", "value": "hello"}]}
    with pytest.raises(LeftOut, match="no supervised token"):
        llava.encode(golden.processor, silent, "")


def test_encoding_does_not_change_the_record(golden):
    before = copy.deepcopy(RECORDS[2])
    llava.encode(golden.processor, RECORDS[2], "tests/golden/reference_model/images")
    assert before == RECORDS[2]
