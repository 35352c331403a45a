"""A text-only Llama of any width and depth with random weights and LoRA, in the form of a model family.

It needs torch, transformers and peft of any version: other tools are measured on it in environments of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tive.models import Collated, Encoded, RecordLosses, Reference
from tive.models.common import IGNORE, collated, losses_at_supervised

VOCABULARY = 4096
LORA_RANK = 8


def random_llama(width: int, layers: int, device: torch.device, dtype: torch.dtype) -> Reference:
    """A Llama with heads of 32 and an MLP of twice the width; LoRA on its attention, whose B matrices are not zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    get_peft_model(model, LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=attention))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    model.to(device=device, dtype=dtype).requires_grad_(False).eval()
    return Reference(model, model.model.layers, model.lm_head, None, device, dtype)


def random_texts(count: int, tokens: int) -> list[Encoded]:
    """Records of as many random tokens each, so that a batch has no padding; the second half is supervised."""
    generator = np.random.default_rng(0)
    texts = generator.integers(3, VOCABULARY, (count, tokens))
    return [Encoded(tokens, tokens // 2, "text", text) for text in texts]


def collate(reference: Reference, records: Sequence[Encoded]) -> Collated:
    """Records of one length."""
    tokens = np.stack([record.inputs for record in records])
    labels = tokens.copy()
    labels[:, : tokens.shape[1] - records[0].supervised] = IGNORE
    return collated({"input_ids": torch.from_numpy(tokens)}, list(labels), tokens.shape[1])


def record_losses(reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """Losses of records of one length."""
    batch = (records if isinstance(records, Collated) else collate(reference, records)).to(reference.device)
    hidden = reference.model.model(**batch.inputs, use_cache=False).last_hidden_state
    return losses_at_supervised(hidden.flatten(0, 1)[batch.positions], reference.model.lm_head, batch, el2n)
