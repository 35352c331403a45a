"""Per-record gradients of a batch are the gradients of the records alone, whatever the batch."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from tests.helpers.reference import (
    EXPECTED,
    RECORDS,
    encode_golden,
    engine_of,
    in_batches,
    load_golden,
    plain_loop,
)
from tive.gradient_pass.batches import BatchLimits, next_batch
from tive.method.gradients import RecordGradients
from tive.models import Encoded, LeftOut, llava
from tive.util.errors import UserError


@pytest.fixture(scope="module")
def golden():
    return load_golden()


@pytest.fixture(scope="module")
def encoded(golden):
    return encode_golden(golden)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_norms_and_cosines_of_the_published_code_hold_at_every_batch_size(golden, encoded, size):
    result = in_batches(engine_of(golden), encoded, size)
    expected = torch.tensor(EXPECTED["norms"])
    assert sum(m.weight.numel() for m in llava.counted_matrices(golden, "self_attn").values()) == 16384
    assert ((result.norms - expected) / expected).abs().max() < 1e-4
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < 1e-4


def test_a_batch_gives_what_autograd_gives_one_record_at_a_time(golden, encoded):
    some = encoded[:6]
    plain = plain_loop(golden, some)
    result = in_batches(engine_of(golden), some, 6)
    whole = result.features * result.norms[:, None]
    assert (whole - plain).abs().max() < 1e-6 * plain.abs().max() + 1e-7


def test_gradient_checkpointing_gives_the_same_gradients(encoded):
    checkpointed = load_golden(gradient_checkpointing=True)
    assert checkpointed.model.model.gradient_checkpointing and checkpointed.model.model.training
    result = in_batches(engine_of(checkpointed), encoded, 8)
    expected = torch.tensor(EXPECTED["norms"])
    assert ((result.norms - expected) / expected).abs().max() < 1e-4
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < 1e-4


@pytest.mark.parametrize("dtype, cosine, norm", [(torch.bfloat16, 0.01, 0.01), (torch.float16, 0.01, 0.01)])
def test_half_precision_keeps_cosines_and_norms_within_one_percent(encoded, dtype, cosine, norm):
    result = in_batches(engine_of(load_golden(dtype)), encoded, 16)
    expected = torch.tensor(EXPECTED["norms"])
    assert ((result.norms - expected) / expected).abs().max() < norm
    assert (result.cosines - torch.tensor(EXPECTED["cosines"])).abs().max() < cosine


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_padding_does_not_change_a_records_gradient(encoded, dtype, tolerance):
    reference = load_golden(dtype)
    engine = engine_of(reference)
    by_length = sorted((record for record in encoded if record.pixels is not None), key=lambda r: r.length)
    short = by_length[0]
    words = reference.processor.tokenizer("a very long answer " * 300).input_ids
    long = copy.deepcopy(by_length[-1])
    long.input_ids = np.concatenate([long.input_ids, np.array(words)])[:1000]
    long.labels = np.concatenate([long.labels, np.array(words)])[:1000]
    long.length = len(long.input_ids) + 15
    assert long.length > 6 * short.length
    alone, _ = engine.compute([short])
    beside, _ = engine.compute([short, long])
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
    names = list(llava.counted_matrices(golden, "self_attn"))
    assert names[0] == "layers.0.self_attn.q_proj.A" and len(names) == 16
    everything = llava.counted_matrices(golden, "all")
    assert {name.split(".")[2] for name in everything} == {"self_attn", "mlp"} and len(everything) == 28
    assert set(llava.counted_matrices(golden, "q_proj,v_proj")) < set(names)
    assert not any(hasattr(module, "lora_A") for module in golden.model.get_vision_tower().modules())
    for bad in ("attention", "", "vision_tower"):
        with pytest.raises(UserError, match="names no LoRA matrix"):
            llava.counted_matrices(golden, bad)
    with pytest.raises(UserError, match=r"not one of 1 \.\. 2"):
        llava.counted_matrices(golden, "self_attn", 3)


def test_the_last_layers_alone_give_the_same_part_of_the_gradient_and_nothing_below_is_computed(golden, encoded):
    some = encoded[:4]
    whole = in_batches(engine_of(golden), some, 2)
    engine = engine_of(golden, last_layers=1)
    below = []
    hook = golden.model.model.layers[0].register_forward_hook(lambda m, i, o: below.append(o[0].requires_grad))
    last = in_batches(engine, some, 2)
    hook.remove()
    assert below and not any(below)
    part = (whole.features * whole.norms[:, None])[:, 8192:]
    assert torch.allclose(last.features * last.norms[:, None], part, rtol=1e-4, atol=1e-6)


def test_a_batch_that_does_not_fit_is_halved_and_the_lower_size_kept(golden, encoded, monkeypatch, capsys):
    sizes = []
    whole = llava.record_losses

    def small_memory(reference, records):
        sizes.append(len(records))
        if len(records) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return whole(reference, records)

    monkeypatch.setattr(llava, "record_losses", small_memory)
    limits = BatchLimits(16, 16384)
    records = dict(enumerate(encoded))
    results = engine_of(golden).compute_all(records, limits)
    expected = torch.tensor(EXPECTED["norms"])
    norms = torch.stack([results[row][1] for row in range(len(encoded))])
    assert ((norms - expected) / expected).abs().max() < 1e-4
    assert limits.records <= 3 and max(sizes[5:]) <= 3
    assert "out of memory: batches are now" in capsys.readouterr().out


def test_one_record_that_does_not_fit_alone_is_named(golden, encoded, monkeypatch):
    def no_memory(reference, records):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(llava, "record_losses", no_memory)
    with pytest.raises(UserError, match=r"record 7 .* alone does not fit"):
        engine_of(golden).compute_all({7: encoded[7]}, BatchLimits(16, 16384))


def test_a_float16_overflow_is_met_with_a_smaller_loss_scale(encoded, monkeypatch):
    reference = load_golden(torch.float16)
    engine = engine_of(reference)
    usual = engine.compute(encoded[:2])[1]
    monkeypatch.setattr("tive.gradient_pass.batches._FLOAT16_LOSS_SCALE", 2.0**24)
    assert torch.allclose(engine.compute(encoded[:2])[1], usual, rtol=0.01)


def test_a_record_with_a_gradient_that_is_not_finite_harms_no_other(golden, encoded):
    engine = engine_of(golden)
    poisoned = copy.deepcopy(encoded[0])
    poisoned.pixels[:] = np.nan
    features, norms = engine.compute([poisoned, encoded[1]])
    assert not torch.isfinite(norms[0]) and not features[0].any()
    assert abs(norms[1] - EXPECTED["norms"][1]) < 1e-4 * EXPECTED["norms"][1]


def _record(length: int, image: bool) -> Encoded:
    pixels = np.zeros((3, 2, 2), np.float32) if image else None
    return Encoded(np.zeros(length, np.int64), np.zeros(length, np.int64), pixels, length)


def test_batches_hold_the_limits_one_modality_and_little_padding():
    generator = np.random.default_rng(0)
    records = {row: _record(int(generator.integers(10, 800)), bool(row % 3)) for row in range(500)}
    waiting = sorted(records, key=lambda row: (records[row].pixels is None, -records[row].length, row))
    seen, padded = [], 0
    while waiting:
        batch = next_batch(waiting, records, BatchLimits(16, 4000))
        lengths = [records[row].length for row in batch]
        assert 1 <= len(batch) <= 16
        assert len(batch) == 1 or len(batch) * max(lengths) <= 4000
        assert len({records[row].pixels is None for row in batch}) == 1
        seen += batch
        padded += len(batch) * max(lengths)
        waiting = waiting[len(batch) :]
    assert sorted(seen) == list(range(500))
    assert sum(record.length for record in records.values()) / padded > 0.9


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
