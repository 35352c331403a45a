"""A tiny Bunny: base and SigLIP tower as they come from the hub, but small and random, records with images, and a LoRA
reference model that is trained for a few steps with the family's own losses and laid out as Bunny's trainer does it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from tive.models import ModelFiles, bunny  # before transformers and peft: it makes torchvision importable
from tive.models.bunny import SYSTEM

from peft import LoraConfig, get_peft_model  # isort: skip
from transformers import AutoConfig, AutoModelForCausalLM, SiglipVisionConfig, SiglipVisionModel  # isort: skip

END = "<|endoftext|>"
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2}
COLOURS = ("red", "green", "blue", "white")


def make_records(folder: Path, count: int = 36) -> Path:
    """Records of three tasks and their images; returns the data file."""
    choose, records = random.Random(0), []
    (folder / "images").mkdir(parents=True)
    for number in range(count):
        task, colour = ("colour", "describe", "chat")[number % 3], choose.choice(COLOURS)
        question, answer = f"What colour is shape {number}?", f"It is {colour}."
        if task == "describe":
            question, answer = (
                "Describe the image.",
                " ".join([f"A {colour} shape in the middle."] * choose.randint(1, 4)),
            )
        record: dict[str, Any] = {"id": f"r{number}", "dataset": task}
        if task != "chat":
            image = Image.new("RGB", (choose.randint(20, 60), choose.randint(20, 60)), "grey")
            ImageDraw.Draw(image).ellipse((4, 4, 16, 16), fill=colour)
            image.save(folder / "images" / f"{number}.png")
            record["image"], question = f"{number}.png", f"<image>\n{question}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        records.append(record | {"conversations": turns})
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    return data


def make_parts(folder: Path, kind: str = "phi") -> ModelFiles:
    """A base of a language model of transformers, a tower, and a reference model whose adapter is not trained yet.

    `folder` holds `data.json`, whose text the tokenizer is trained on.
    """
    torch.manual_seed(0)
    base, tower, reference = folder / "base", folder / "siglip", folder / "reference"
    for part in (base, tower, reference):
        part.mkdir()
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator([SYSTEM, (folder / "data.json").read_text()], trainer)
    tokenizer.save(str(base / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "unk_token": END}
    (base / "tokenizer_config.json").write_text(json.dumps(settings))

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model(kind, **TEXT, **heads, vocab_size=400, max_position_embeddings=512)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    language_model = AutoModelForCausalLM.from_config(config)
    language_model.save_pretrained(base)
    SiglipVisionModel(SiglipVisionConfig(**VISION, image_size=28, patch_size=14)).save_pretrained(tower)
    (tower / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 28, "width": 28}}))

    fused = kind == "phi3"
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["qkv_proj"] if fused else ["q_proj", "k_proj", "v_proj"])
    adapted = get_peft_model(language_model, adapter)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    adapted.save_pretrained(str(reference))
    layers = [torch.nn.Linear(32, 48), torch.nn.GELU(), torch.nn.Linear(48, 48)]
    projector = torch.nn.Sequential(*layers).state_dict()
    torch.save(
        {f"base_model.model.model.mm_projector.{name}": value for name, value in projector.items()},
        reference / "non_lora_trainables.bin",
    )
    written = json.loads((base / "config.json").read_text()) | {
        "model_type": f"bunny-{kind}",
        "mm_vision_tower": str(tower),
        "mm_hidden_size": VISION["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "image_aspect_ratio": "pad",
        "tokenizer_model_max_length": 256,
    }
    (reference / "config.json").write_text(json.dumps(written))
    return ModelFiles(str(reference), str(base))


def train(files: ModelFiles, data: Path, steps: int = 8) -> list[float]:
    """Train the adapter in place with the family's own losses; returns each step's mean loss."""
    reference = bunny.load(files, torch.device("cpu"), torch.float32)
    records = [
        bunny.encode(reference.processor, record, str(data.parent / "images"))
        for record in json.loads(data.read_text())
    ]
    adapter = {name: p for name, p in reference.model.language_model.named_parameters() if ".lora_" in name}
    for parameter in adapter.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapter.values(), lr=1e-2)
    losses = []
    for step in range(steps):
        loss = bunny.record_losses(reference, records[step % 3 :: 3]).losses.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tensors = {f"base_model.model.{name.replace('.default', '')}": p.detach() for name, p in adapter.items()}
    save_file(tensors, Path(files.model_path) / "adapter_model.safetensors", {"format": "pt"})
    return losses
