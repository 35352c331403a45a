"""LLaVA's and Bunny's models: an image's features stand among the text's embeddings, a projector beside the adapter.

All that both do is here; `llava.py` and `bunny.py` hold what differs: files, classes, template and masking.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.data.conversations import image_of
from tive.data.images import BadImage, read_image, resize_padded
from tive.data.media import StoredImage
from tive.models import Collated, Encoded, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import TRAINED_FILE, attach_adapter, check_adapter, fingerprint, place_tensors, read_tensors
from tive.models.checkpoint import read_config, refuse_options
from tive.models.common import IGNORE, collated, greedy, losses_at_supervised, packed, supervised_runs, unpacked
from tive.models.training_record import model_folder
from tive.util.errors import UserError

IMAGE_ID = -200
_READ_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
)


@dataclass(frozen=True)
class SplicedProcessor:
    """What a loader's worker needs to encode records; holds no weights.

    The family's template makes tokens of conversations: `encode` gives ids and labels, int64 `[t]`, `IMAGE_ID` once for
    each image and `IGNORE` where nothing is supervised; `decode` an answer's text without what ends it; `begin` where
    the answer begins whose first supervised token is given; `ends` are the ids that end an answer.
    """

    template: Any
    image_processor: Any  # the vision tower's, of transformers
    pad: bool  # images to a square
    image_features: int  # of one image
    max_length: int  # where records are cut
    dtype: torch.dtype  # what the model computes in, to which pixels are rounded


@dataclass(frozen=True)
class SplicedRecord:
    """A record's arrays."""

    ids: np.ndarray  # int64 `[t]`; `IMAGE_ID` where an image's features stand, once for each
    labels: np.ndarray  # int64 `[t]`; `IGNORE` where nothing is supervised
    pixels: np.ndarray | None  # `[3, height, width]`, `packed`; None where no `IMAGE_ID` stands


# Files


def tower_of(files: ModelFiles) -> tuple[str, Path | None]:
    """The vision tower's name, and its folder where it is on this machine."""
    name = str(files.vision_tower or read_config(files.folder).get("mm_vision_tower"))
    return name, model_folder(name)


def check_parts(files: ModelFiles, remedy: str) -> dict[str, Any]:
    """The model's config; a `UserError` where an option is not read here, a part is missing or does not fit the others.

    Args:
        remedy: what to do where the trained projector is not there.
    """
    refuse_options(files, "chat_template", "max_length", "max_pixels", "load_in_4bit")
    if files.model_base is not None:
        check_adapter(files.folder)
        for name in ("config.json", TRAINED_FILE):
            if not (files.folder / name).is_file():
                raise UserError(f"{files.folder} lacks {name}, which the trainer writes {remedy}")
    config, of_base = read_config(files.folder), read_config(files.base)
    for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        if key in config and of_base.get(key, config[key]) != config[key]:
            raise UserError(
                f"the base model {files.base} has {key} {of_base[key]}, the adapter in {files.folder} was trained on "
                f"{config[key]}; name the base that it was trained on"
            )
    return config


def identity_of(files: ModelFiles, settings: dict[str, Any]) -> str:
    """What tells one model from another: what was trained, base, tower, and settings of the encoding."""
    _, tower = tower_of(files)
    folders = [files.base, *([] if tower is None else [tower])]
    read = [files.folder / TRAINED_FILE, *(folder / name for folder in folders for name in _READ_FILES)]
    return fingerprint(files, read, folders, json.dumps(settings, sort_keys=True))


def attach_trained(model: nn.Module, folder: Path, layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Put what was trained into a model of base and tower; the projector may lack numbers.

    A `UserError` as of `attach_adapter`; or the file beside the adapter lacks a part of the projector, or of a vision
    tower that the training tuned.
    """
    path = folder / TRAINED_FILE
    placed = place_tensors(model, read_tensors(path), path, dtype)
    tuned = read_config(folder).get("unfreeze_vision_tower")  # of Bunny; what LLaVA tuned before may stand in the base
    parts = ("mm_projector.", "vision_tower.") if tuned else ("mm_projector.",)
    names = [name for name, _ in model.named_parameters() if name.removeprefix("model.").startswith(parts)]
    absent = [name for name in names if name not in placed]
    if absent:
        raise UserError(
            f"{path} lacks {len(absent)} weights, {absent[0]} among them; train the reference model again, in one go "
            "from beginning to end"
        )
    attach_adapter(model, folder, layers, dtype)


# Records


def encode(processor: SplicedProcessor, record: dict[str, Any], image_folder: str) -> Encoded:
    """One record as the trainer encodes it: the training's template, answers supervised."""
    image = image_of(record)
    pixels = None if image is None else _pixels(processor, image_folder, image)
    ids, labels = processor.template.encode(record["conversations"], image is not None)
    return spliced_record(ids, labels, pixels, processor.image_features, processor.max_length)


def spliced_record(
    ids: np.ndarray, labels: np.ndarray, pixels: np.ndarray | None, features: int, maximum: int
) -> Encoded:
    """A record as the language model sees it: an image's id once for each of its features, then the cut."""
    repeats = np.where(ids == IMAGE_ID, features, 1)
    ids, labels = (np.repeat(each, repeats)[:maximum] for each in (ids, labels))
    supervised = int(np.count_nonzero(labels[1:] != IGNORE))
    if not supervised:
        raise LeftOut("no supervised token")
    return Encoded(len(ids), supervised, "records", SplicedRecord(ids, labels, pixels if IMAGE_ID in ids else None))


def _pixels(processor: SplicedProcessor, folder: str, image: str | StoredImage) -> np.ndarray:
    """An image's pixels as the trainer's image processor gives them, `[3, height, width]`, `packed`."""
    try:
        picture = read_image(folder, image, processor.pad)
    except BadImage as error:
        raise LeftOut(str(error)) from error
    height = max(picture.size) if processor.pad else picture.height
    if height in (1, 3):
        raise LeftOut(f"unreadable image: {height} pixels high, which the trainer takes for channels")
    images = processor.image_processor
    if processor.pad:  # then the processor has nothing to resize, and no large square is built
        side = images.size.get("height") or images.size["shortest_edge"]
        side = side if images.do_resize else max(picture.size)
        red, green, blue = (int(part * 255) for part in images.image_mean)
        picture = resize_padded(picture, (red, green, blue), side, images.resample)
    return packed(np.asarray(images(picture, return_tensors="np")["pixel_values"][0]), processor.dtype)


def answers(processor: SplicedProcessor, record: Encoded) -> list[tuple[Encoded, str]]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it."""
    inputs: SplicedRecord = record.inputs
    asked = []
    for start, stop in supervised_runs(inputs.labels):
        if stop < processor.max_length:
            start = processor.template.begin(inputs.ids, start)
            before = replace(inputs, ids=inputs.ids[:start], labels=inputs.labels[:start])
            expected = processor.template.decode(inputs.ids[start:stop].tolist())
            asked.append((Encoded(start, 0, record.group, before), expected))
    return asked


# Batches


def language_model_of(reference: Reference) -> Any:
    """The causal language model of transformers: LLaVA's class is one, Bunny's model has one."""
    return getattr(reference.model, "language_model", reference.model)


def collate(reference: Reference, records: Sequence[Encoded]) -> Collated:
    """Ids `[B, T]`, padded on the right, the pixels of the images, and which of their features stand where."""
    width = max(record.length for record in records)
    ids = np.zeros((len(records), width), np.int64)
    for row, record in enumerate(records):
        ids[row, : record.length] = record.inputs.ids
    inputs = {"ids": torch.from_numpy(ids.clip(min=0))}
    shown = [row for row, record in enumerate(records) if record.inputs.pixels is not None]
    if shown:
        inputs["pixels"] = unpacked(np.stack([records[row].inputs.pixels for row in shown]), reference.dtype)
        # An image that was cut gives its first features.
        places = [np.flatnonzero(ids[row] == IMAGE_ID) for row in shown]
        inputs["to"] = torch.from_numpy(
            np.concatenate([row * width + at for row, at in zip(shown, places, strict=True)])
        )
        inputs["image"] = torch.from_numpy(np.repeat(np.arange(len(shown)), [len(at) for at in places]))
        inputs["feature"] = torch.from_numpy(np.concatenate([np.arange(len(at)) for at in places]))
    return collated(inputs, [record.inputs.labels for record in records], width)


def record_losses(reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """The losses of a batch, without a mask: attention is causal, so no position of a record sees what pads it."""
    batch = (records if isinstance(records, Collated) else collate(reference, records)).to(reference.device)
    embeddings = embed(reference, batch.inputs)
    hidden = language_model_of(reference).model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert reference.head is not None
    states = hidden.flatten(0, 1).index_select(0, batch.positions)
    return losses_at_supervised(states, reference.head, batch, el2n)


@torch.no_grad()
def embed(reference: Reference, inputs: dict[str, Tensor]) -> Tensor:
    """Input embeddings `[B, T, hidden]`, with the features of each image (`encode_images`) in their places."""
    embeddings: Tensor = language_model_of(reference).get_input_embeddings()(inputs["ids"])
    if "pixels" not in inputs:
        return embeddings
    features = reference.model.encode_images(inputs["pixels"])
    taken = inputs["image"] * features.shape[1] + inputs["feature"]
    chosen = features.flatten(0, 1).index_select(0, taken).to(embeddings.dtype)
    return embeddings.flatten(0, 1).index_copy(0, inputs["to"], chosen).view_as(embeddings)


def generate(reference: Reference, prompts: Sequence[Encoded], max_new_tokens: int) -> list[str]:
    """What the model answers to prompts, with an image or without."""
    from transformers import GenerationMixin

    model, template = language_model_of(reference), reference.processor.template
    embeddings = embed(reference, collate(reference, prompts).to(reference.device).inputs)
    mask = torch.zeros(embeddings.shape[:2], dtype=torch.long, device=embeddings.device)
    moved = torch.zeros_like(embeddings)
    for row, prompt in enumerate(prompts):  # an answer goes on where its prompt ends: the padding has to lie before it
        moved[row, -prompt.length :] = embeddings[row, : prompt.length]
        mask[row, -prompt.length :] = 1
    # Not the model's own `generate`: LLaVA's takes no embeddings. Without ids some releases begin with their own.
    inputs = {"input_ids": mask[:, :0], "inputs_embeds": moved, "attention_mask": mask}
    ids = greedy(model, partial(GenerationMixin.generate, model), template.ends, max_new_tokens, **inputs)
    return [template.decode(answer) for answer in ids]
