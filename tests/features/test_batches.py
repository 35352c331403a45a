"""The memory policy: batches of like records within the limits; tokens are what is halved when memory runs out."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers

from tive.features.batches import Batches, bytes_a_token, padded_tokens, tokens_that_fit
from tive.method.gradients import RecordGradients
from tive.models import Encoded, Reference
from tive.models.common import freeze, target_modules
from tive.util.errors import UserError


def record(length: int, group: str = "text") -> Encoded:
    return Encoded(length, length // 2, group, None)


def records_of(*lengths: int) -> list[tuple[int, Encoded]]:
    return list(enumerate(map(record, lengths)))


@pytest.mark.parametrize("way", ["filled", "cut"])
def test_batches_hold_the_limits_one_group_and_little_padding_and_every_record_once(way):
    generator = np.random.default_rng(0)
    records = [(row, record(int(generator.integers(10, 800)), "image" if row % 3 else "text")) for row in range(500)]
    batches = list(getattr(Batches(16, 4000), way)(records))
    for batch in batches:
        assert 1 <= len(batch) <= 16
        assert len(batch) == 1 or padded_tokens(batch) <= 4000
        assert len({item.group for _, item in batch}) == 1
    assert sorted(row for batch in batches for row, _ in batch) == list(range(500))
    assert sum(item.length for _, item in records) / sum(map(padded_tokens, batches)) > 0.9


def test_the_first_batch_is_there_before_the_records_are_at_their_end():
    read = []

    def reading():
        for item in records_of(*[100] * 50):
            read.append(item)
            yield item

    next(Batches(16, 16384).filled(reading()))
    assert len(read) == 16


class Device:
    """A device that fits so many tokens; notes the lengths of what it was given."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.seen: list[list[int]] = []

    def __call__(self, batch: Sequence[Encoded]) -> list[int]:
        self.seen.append([item.length for item in batch])
        if len(batch) * max(self.seen[-1]) > self.tokens:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.seen[-1]


def test_when_memory_runs_out_tokens_are_halved_and_short_records_still_fill_their_batches(capsys):
    device, batches = Device(9000), Batches(16, 16384)
    records = records_of(*[2048] * 8, *[500] * 32)
    computed = [
        (row, length)
        for batch, result in batches.compute(device, records)
        for row, length in zip([row for row, _ in batch], result, strict=True)
    ]
    assert sorted(computed) == [(row, item.length) for row, item in records]
    assert batches.tokens == 8192
    assert device.seen == [[2048] * 8, [2048] * 4, [2048] * 4, [500] * 16, [500] * 16]
    assert capsys.readouterr().out.count("out of memory") == 1


def test_memory_that_runs_out_again_and_again_ends_with_what_fits():
    device = Device(600)
    batches = Batches(16, 16384)
    computed = [row for batch, _ in batches.compute(device, records_of(*[500] * 20)) for row, _ in batch]
    assert sorted(computed) == list(range(20)) and batches.tokens >= 500


def test_one_record_that_does_not_fit_alone_is_named():
    with pytest.raises(UserError, match="record 7 "):
        list(Batches(16, 16384).compute(Device(10), [(7, record(500))]))


def test_other_errors_pass_through():
    def fails(batch: Sequence[Encoded]) -> None:
        raise RuntimeError("of its own")

    with pytest.raises(RuntimeError, match="of its own"):
        list(Batches(16, 16384).compute(fails, records_of(5)))


def test_the_padding_efficiency_counts_every_batch():
    batches = Batches(2, 16384)
    list(batches.compute(len, records_of(100, 95)))
    assert batches.padding_efficiency == pytest.approx(195 / 200)


def reference_of(hidden: int, inner: int, layers: int, vocabulary: int, dtype=torch.bfloat16) -> SimpleNamespace:
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=inner, vocab_size=vocabulary)
    return SimpleNamespace(model=SimpleNamespace(config=config), layers=[None] * layers, dtype=dtype)


LLAVA_7B, QWEN_3B = reference_of(4096, 11008, 32, 32000), reference_of(2048, 11008, 36, 151936)


@pytest.mark.parametrize("reference, megabytes, tokens", [(LLAVA_7B, 4.5, 12_000), (QWEN_3B, 3.7, 14_000)])
def test_the_limit_of_models_that_people_have_is_what_their_activations_take(reference, megabytes, tokens):
    assert bytes_a_token(reference, False) == pytest.approx(megabytes * 1e6, rel=0.02)
    assert bytes_a_token(reference, True) < bytes_a_token(reference, False) / 8
    assert tokens_that_fit(reference, 64 * 10**9, False) == tokens
    assert tokens_that_fit(reference, 11 * 10**9, False) < 2048 < tokens_that_fit(reference, 11 * 10**9, True)


@pytest.mark.parametrize("kind, width, inner, groups", [("Llama", 256, 688, 8), ("Qwen2", 256, 1376, 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_estimate_is_what_autograd_keeps(kind, width, inner, groups, dtype):
    from peft import LoraConfig, get_peft_model  # after tive.models.common, which repairs torchvision for it

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=groups,
    )
    config._attn_implementation = "sdpa"
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"]))
    freeze(model.to(dtype), gradient_checkpointing=False)
    reference = Reference(model, model.model.layers, None, None, torch.device("cpu"), dtype)
    weights, kept = {weight.data_ptr() for weight in [*model.parameters(), *model.buffers()]}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(0, 64, (1, 256))
    hooks = RecordGradients(target_modules(reference), lambda name, gradients: None)
    with hooks, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model(input_ids=ids, use_cache=False)
    bytes_kept = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    assert bytes_kept / 256 == pytest.approx(bytes_a_token(reference, False), rel=0.1)


def test_a_larger_vocabulary_and_less_memory_leave_fewer_tokens():
    larger = reference_of(4096, 11008, 32, 152000)
    assert tokens_that_fit(larger, 22 * 10**9, False) < tokens_that_fit(LLAVA_7B, 22 * 10**9, False)
    assert tokens_that_fit(LLAVA_7B, 0, False) == 1


def test_where_one_record_does_not_fit_room_is_made_once():
    device, made = Device(100), []

    def relief() -> int:
        made.append(device.tokens)
        device.tokens = 600
        return 600

    batches = Batches(16, 16384, relief)
    rows = [row for batch, _ in batches.compute(device, records_of(500, 500, 500)) for row, _ in batch]
    assert sorted(rows) == [0, 1, 2] and made == [100] and batches.relief is None
    device.tokens = 10
    with pytest.raises(UserError, match="record 0 "):
        list(batches.compute(device, records_of(500)))
