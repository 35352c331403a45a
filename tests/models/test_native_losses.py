"""Losses of transformers' own models: proven at loading, in 4 bits, and in 16."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.golden_native import (
    CPU,
    GOLDEN,
    copied,
    encoded,
    files_of,
    loaded,
    records_of,
)
from tests.helpers.native_gradients import gradients_of, plain_loop
from tive.models import Reference, native
from tive.models.checkpoint import load_pretrained
from tive.util.errors import UserError


def test_a_model_whose_batch_differs_from_its_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that loses its padding's mask, or a key of the processor, is such a model."""
    collate = native.collate

    def leaking(reference: Reference, records: Any) -> Any:
        batch = collate(reference, records)
        batch.inputs["input_ids"] = batch.inputs["input_ids"].roll(len(records) - 1, dims=0)
        return batch

    monkeypatch.setattr(native, "collate", leaking)
    with pytest.raises(UserError, match="a batch gives other losses than its records alone"):
        native.load(files_of("internvl"), CPU, torch.float32)


@pytest.mark.parametrize(("change", "known"), [("nothing", True), ("cap", True), ("factor", False)])
def test_what_a_model_does_to_its_logits_is_done(change: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cap by its config's name is known, so that losses are computed in pieces; else the model makes all logits."""
    reference, records = loaded("internvl"), encoded("internvl")[:3]
    kind, cap = type(reference.model), 5.0
    forward = kind.forward
    changes = {"nothing": lambda x: x, "cap": lambda x: torch.tanh(x / cap) * cap, "factor": lambda x: x / 8}

    def changed(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = changes[change](output.logits)
        return output

    monkeypatch.setattr(kind, "forward", changed)
    if change == "cap":
        text = reference.model.config.get_text_config()
        monkeypatch.setattr(text, "final_logit_softcapping", cap, raising=False)
    proven = native.proven(reference)
    assert (proven.head is not None) is known
    with torch.no_grad():
        ours = native.record_losses(proven, records).losses
        for loss, record in zip(ours, records, strict=True):
            logits = reference.model(**native.collate(reference, [record]).inputs, use_cache=False).logits[0]
            targets = torch.from_numpy(record.inputs.labels)[1:]
            torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits[:-1], targets))


def test_the_small_losses_of_a_good_model_in_bfloat16_are_held_to_an_absolute_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference = native.load(files_of("internvl"), CPU, torch.float32)
    made_up, encode_turns, collate = [], native.encode_turns, native.collate
    monkeypatch.setattr(native, "encode_turns", lambda *given: made_up.append(encode_turns(*given)) or made_up[-1])
    native.proven(reference)
    optimizer = torch.optim.Adam(reference.model.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(100):
        optimizer.zero_grad()
        losses = torch.cat([native.record_losses(reference, made_up[first : first + 2]).losses for first in (0, 2)])
        if losses.max() < 0.2:
            break
        losses.sum().backward()
        optimizer.step()
    assert losses.max() < 0.2
    reference = replace(reference, model=reference.model.requires_grad_(False).to(torch.bfloat16), dtype=torch.bfloat16)
    native.proven(reference)

    def leaking(reference: Reference, records: Any) -> Any:
        batch = collate(reference, records)
        batch.inputs["input_ids"] = batch.inputs["input_ids"].roll(len(records) - 1, dims=0)
        return batch

    monkeypatch.setattr(native, "collate", leaking)
    with pytest.raises(UserError, match="than its records alone"):
        native.proven(reference)


# 4 bits, and where weights go.


def test_a_base_in_4_bits_gives_the_gradients_of_a_plain_loop_over_it(tmp_path: Path) -> None:
    files = copied("qwen2_5_vl", tmp_path)
    in_4bit = replace(files, load_in_4bit=True)
    reference, records = native.load(in_4bit, CPU, torch.float32), encoded("qwen2_5_vl")[:4]
    layer = reference.layers[0].self_attn.q_proj
    assert type(layer.base_layer).__name__ == "Linear4bit" and layer.lora_A["default"].weight.dtype == torch.float32
    losses, norms, _ = gradients_of(reference, records, 4)
    whole, whole_norms, _ = gradients_of(loaded("qwen2_5_vl"), records, 4)
    assert 0.001 < np.abs(losses - whole).max() < 0.2 and not np.allclose(norms, whole_norms, rtol=1e-3)
    for ours, plain in zip((losses, norms), plain_loop(reference, records)[:2], strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-4)
    assert native.identity(in_4bit) != native.identity(files)

    quantized = tmp_path / "quantized"
    base = Path(str(files.model_base))
    shutil.copytree(base, quantized, ignore=shutil.ignore_patterns("*.safetensors"))
    transformers = importlib.import_module("transformers")
    method = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    kind = transformers.AutoModelForImageTextToText
    kind.from_pretrained(base, quantization_config=method, device_map={"": "cpu"}).save_pretrained(quantized)
    stored = replace(files, model_base=str(quantized))
    with pytest.raises(UserError, match=r"config\.json: quantization_config.*load_in_4bit"):
        native.check_files(stored)
    again = native.load(replace(stored, load_in_4bit=True), CPU, torch.float32)
    np.testing.assert_allclose(gradients_of(again, records, 4)[0], losses, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pixels_travel_in_16_bits_where_the_model_computes_in_16_bits(dtype: torch.dtype) -> None:
    reference, record = native.load(files_of("qwen2_5_vl"), CPU, dtype), records_of("qwen2_5_vl")[0]
    item = native.encode(reference.processor, record, str(GOLDEN / "qwen2_5_vl" / "images"))
    whole = encoded("qwen2_5_vl")[0]
    pixels = item.inputs.arrays["pixel_values"]
    assert pixels.nbytes * 2 == whole.inputs.arrays["pixel_values"].nbytes
    with torch.no_grad():
        assert torch.equal(*(native.record_losses(reference, [one]).losses for one in (item, whole)))


def test_weights_go_straight_to_a_gpu() -> None:
    """The library reads each weight onto the device; a CPU needs no word of it."""
    asked: list[dict[str, Any]] = []

    class Kind:
        @staticmethod
        def from_pretrained(folder: str, **options: Any) -> tuple[Any, dict[str, list[str]]]:
            asked.append(options)
            return None, {"missing_keys": [], "mismatched_keys": [], "unexpected_keys": []}

    for device in (torch.device("cuda", 1), CPU):
        load_pretrained(Kind, "folder", (device, torch.bfloat16))
    assert asked[0]["device_map"] == {"": torch.device("cuda", 1)} and "device_map" not in asked[1]
