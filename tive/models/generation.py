"""Answers that a model produces itself: which a record asks for, and greedy generation by transformers."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def generate_ids(
    model: Any, embeddings: Tensor, lengths: Sequence[int], ends: Collection[int], max_new_tokens: int
) -> list[list[int]]:
    """The most probable token after token, for each prompt of a batch, without the token that ends it.

    Args:
        embeddings: of the prompts, `[B, T, H]`, padded on the right.
        lengths: positions of each prompt.
        ends: tokens that end an answer.
    """
    width = max(lengths)
    mask = torch.zeros(len(lengths), width, dtype=torch.long, device=embeddings.device)
    moved = torch.zeros_like(embeddings[:, :width])
    for row, length in enumerate(lengths):  # an answer goes on where its prompt ends: the padding has to lie before it
        moved[row, width - length :] = embeddings[row, :length]
        mask[row, width - length :] = 1
    from transformers import GenerationMixin

    with greedy(model, ends, max_new_tokens):
        # Not the model's own `generate`: LLaVA's takes no embeddings. Without ids some releases begin with their own.
        found = GenerationMixin.generate(
            model,
            input_ids=mask.new_zeros(len(lengths), 0),
            inputs_embeds=moved,
            attention_mask=mask,
            use_cache=True,
        )
    return [until_end(ids, ends) for ids in found.tolist()]


@contextlib.contextmanager
def greedy(model: Any, ends: Collection[int], max_new_tokens: int) -> Iterator[None]:
    """Makes `generate` greedy, whatever sampling or penalty the model's files ask for."""
    from transformers import GenerationConfig

    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=min(ends),
    )
    try:
        yield
    finally:
        model.generation_config = before


def until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids before the first that ends an answer."""
    stop = next((index for index, number in enumerate(ids) if number in ends), len(ids))
    return ids[:stop]
