#!/usr/bin/env python
"""Make the quickstart's model: the parts of LLaVA-1.5 as they come from the hub, but small and random.

`vicuna/` is a LLaMA with a sentencepiece tokenizer in slow format, trained on the data's own text; `clip/` a CLIP
vision tower with its image processor; `mm_projector.bin` a two-layer projector. Every call gives the same files.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
)

from tive.data.records import open_records
from tive.util.errors import run
from tive.util.files import write_json

HIDDEN, VISION_HIDDEN, VOCABULARY = 128, 64, 600
# How the conversations of LLaVA's template v1 begin; so that its words are in the vocabulary.
TEMPLATE = "A chat between a curious user and an artificial intelligence assistant. USER: ASSISTANT:"
# Vicuna-7B-v1.5's own: sampling values without do_sample, which transformers refuses to save.
GENERATION = {"bos_token_id": 1, "eos_token_id": 2, "max_length": 4096, "pad_token_id": 0, "temperature": 0.9}


def make_tokenizer(data: Path, folder: Path) -> int:
    """Train a byte-pair tokenizer on the text of `data`; returns the size of its vocabulary."""
    texts = [TEMPLATE] * 20
    texts += [turn["value"] for record in open_records(data) for turn in record["conversations"]]
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=VOCABULARY,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            num_threads=1,
            minloglevel=2,
        )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"), model_max_length=2048, legacy=False)
    tokenizer.pad_token = tokenizer.unk_token
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def make_vicuna(data: Path, folder: Path, layers: int) -> None:
    folder.mkdir(parents=True)
    config = LlamaConfig(
        vocab_size=make_tokenizer(data, folder),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        torch_dtype="float32",
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    write_json(folder / "generation_config.json", {**GENERATION, "top_p": 0.6})


def make_clip_and_projector(folder: Path) -> None:
    config = CLIPVisionConfig(
        hidden_size=VISION_HIDDEN,
        intermediate_size=2 * VISION_HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=56,
        patch_size=14,
    )
    CLIPVisionModel(config).save_pretrained(folder / "clip")
    side = {"height": config.image_size, "width": config.image_size}
    CLIPImageProcessor(size={"shortest_edge": config.image_size}, crop_size=side).save_pretrained(folder / "clip")
    layers = torch.nn.Linear(VISION_HIDDEN, HIDDEN), torch.nn.GELU(), torch.nn.Linear(HIDDEN, HIDDEN)
    tensors = torch.nn.Sequential(*layers).state_dict()
    torch.save({f"model.mm_projector.{name}": tensor for name, tensor in tensors.items()}, folder / "mm_projector.bin")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="records whose text the tokenizer is trained on")
    parser.add_argument("--folder", type=Path, required=True, help="gets vicuna/, clip/ and mm_projector.bin")
    parser.add_argument("--layers", type=int, default=4, help="of the language model")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    # Built beside its place, so that a model that is there is a whole one.
    unfinished = arguments.folder.with_name(f".{arguments.folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    make_vicuna(arguments.data, unfinished / "vicuna", arguments.layers)
    make_clip_and_projector(unfinished)
    os.replace(unfinished, arguments.folder)
    print(f"a tiny LLaVA-1.5: {arguments.folder}")


if __name__ == "__main__":
    run(main)
