"""On the quickstart's own model and records, half precision keeps norms within 1% and cosines within 0.01."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.helpers.forked_python import PYTHON
from tests.helpers.reference import CPU, in_batches, step_of
from tive.models import ModelFiles, llava

ROOT = Path(__file__).resolve().parents[2]


def add_adapter(model: Path) -> Path:
    """A LoRA reference model for the quickstart's base: B matrices are random instead of trained, for speed."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    base = LlamaForCausalLM.from_pretrained(model / "vicuna")
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(base, config)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder = model / "reference"
    adapted.save_pretrained(folder)
    projector = torch.load(model / "mm_projector.bin", weights_only=True)
    torch.save(
        {f"base_model.model.{name}": value for name, value in projector.items()}, folder / "non_lora_trainables.bin"
    )
    settings = json.loads((model / "vicuna" / "config.json").read_text()) | {
        "model_type": "llava_llama",
        "mm_vision_tower": str(model / "clip"),
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": json.loads((model / "clip" / "config.json").read_text())["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 2048,
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quickstart")
    for script, arguments in [
        ("quickstart/data.py", ["--folder", str(folder)]),
        ("quickstart/model.py", ["--data", str(folder / "data.json"), "--folder", str(folder / "model")]),
    ]:
        done = subprocess.run([PYTHON, f"scripts/{script}", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    add_adapter(folder / "model")
    yield folder
    shutil.rmtree(folder)


def test_half_precision_is_within_one_percent_of_float32(quickstart):
    records = json.loads((quickstart / "data.json").read_text())[::60]
    model = quickstart / "model"
    results = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        reference = llava.load(ModelFiles(str(model / "reference"), str(model / "vicuna")), CPU, dtype)
        encoded = [llava.encode(reference.processor, record, str(quickstart / "images")) for record in records]
        results[dtype] = in_batches(step_of(reference), encoded, 8)
    exact = results.pop(torch.float32)
    assert len({record["dataset"] for record in records}) >= 5
    for half in results.values():
        assert ((half.norms - exact.norms) / exact.norms).abs().max() < 0.01
        assert (half.cosines - exact.cosines).abs().max() < 0.01
