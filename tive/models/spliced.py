"""What LLaVA and Bunny share: an image's features stand among the text's embeddings, a projector beside the adapter."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tive.models import Answer, Collated, Encoded, LeftOut, ModelFiles, RecordLosses, Reference
from tive.models.adapter import CONFIG_FILE, adapter_file, attach_adapter, place_tensors, read_tensors
from tive.models.checkpoint import read_config
from tive.models.common import base_of, fingerprint
from tive.models.generation import generate_ids
from tive.models.losses import IGNORE, losses_at_supervised, supervised_runs, supervised_tokens, unpacked
from tive.util.errors import UserError

IMAGE_ID = -200
# What was trained beside the LoRA matrices: the projector, and the vision tower where it was tuned.
TRAINED_FILE = "non_lora_trainables.bin"
_READ_FILES = (
    *("config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
)


@dataclass(frozen=True)
class SplicedRecord:
    """A record's arrays.

    Attributes:
        ids: int64 `[t]`; `IMAGE_ID` where an image's features stand, once for each.
        labels: int64 `[t]`; `IGNORE` where nothing is supervised.
        pixels: `[3, height, width]`, `packed`, or None where no `IMAGE_ID` stands.
    """

    ids: np.ndarray
    labels: np.ndarray
    pixels: np.ndarray | None


def pads_images(files: ModelFiles) -> bool:
    """Whether images are padded to a square."""
    return read_config(Path(files.model_path)).get("image_aspect_ratio") == "pad"


def identity_of(files: ModelFiles, tower: Path | None, settings: dict[str, Any]) -> str:
    """What tells one model from another: what was trained, base, tower, and settings of the encoding."""
    folder = Path(files.model_path)
    trained = [] if files.model_base is None else [adapter_file(folder), folder / CONFIG_FILE, folder / TRAINED_FILE]
    folders = [base_of(files), *([] if tower is None else [tower])]
    read = [part / name for part in folders for name in _READ_FILES if (part / name).is_file()]
    return fingerprint([*trained, *read], folders, json.dumps(settings, sort_keys=True))


def attach_trained(model: nn.Module, folder: Path, layers: nn.ModuleList, dtype: torch.dtype) -> None:
    """Put what was trained into a model of base and tower; the projector may lack numbers.

    Raises:
        UserError: as `attach_adapter`; or the file beside the adapter lacks a part of the projector, or of a vision
            tower that the training tuned.
    """
    path, config = folder / TRAINED_FILE, read_config(folder)
    placed = place_tensors(model, read_tensors(path), path, dtype)
    tuned = config.get("unfreeze_vision_tower")  # of Bunny; what LLaVA tuned before may stand in the base
    parts = ("mm_projector.", "vision_tower.") if tuned else ("mm_projector.",)
    names = [name for name, _ in model.named_parameters() if name.removeprefix("model.").startswith(parts)]
    absent = [name for name in names if name not in placed]
    if absent:
        raise UserError(
            f"{path} lacks {len(absent)} weights, {absent[0]} among them; train the reference model again, in one go "
            "from beginning to end"
        )
    attach_adapter(model, folder, layers, dtype)


def splice(ids: np.ndarray, labels: np.ndarray, features: int, maximum: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels as the language model sees them: an image's id once for each of its features, then the cut."""
    repeats = np.where(ids == IMAGE_ID, features, 1)
    return np.repeat(ids, repeats)[:maximum], np.repeat(labels, repeats)[:maximum]


def spliced_record(ids: np.ndarray, labels: np.ndarray, pixels: np.ndarray | None) -> Encoded:
    """A record of spliced ids and labels, ready to be put in a batch with any others.

    Raises:
        LeftOut: nothing in it is supervised.
    """
    supervised = int(np.count_nonzero(labels[1:] != IGNORE))
    if not supervised:
        raise LeftOut("no supervised token")
    inputs = SplicedRecord(ids, labels, pixels if IMAGE_ID in ids else None)
    return Encoded(len(ids), supervised, "records", inputs)


def language_model_of(reference: Reference) -> Any:
    """The causal language model of transformers: LLaVA's class is one, other models have one."""
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
    return Collated(inputs, supervised_tokens([record.inputs.labels for record in records], width))


def record_losses(reference: Reference, records: Collated | Sequence[Encoded], el2n: bool = False) -> RecordLosses:
    """The losses of a batch, records with an image and without.

    They are padded on the right and attention is causal, so no position of a record sees the padding and no mask is
    needed.
    """
    batch = (records if isinstance(records, Collated) else collate(reference, records)).to(reference.device)
    embeddings = embed(reference, batch.inputs)
    hidden = language_model_of(reference).model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
    assert reference.head is not None
    return losses_at_supervised(hidden, reference.head, batch.supervised, el2n)


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


def answers_of(
    record: Encoded, maximum: int, text_of: Callable[[list[int]], str], begin: Callable[[np.ndarray, int], int]
) -> list[Answer]:
    """Each answer of a record that was not cut at the maximum length, the true earlier turns before it.

    Args:
        text_of: the text of an answer's ids.
        begin: where the answer at a position begins, of which the labels may hold more.
    """
    inputs: SplicedRecord = record.inputs
    answers = []
    for start, stop in supervised_runs(inputs.labels):
        if stop < maximum:
            start = begin(inputs.ids, start)
            expected = text_of(inputs.ids[start:stop].tolist())
            before = replace(inputs, ids=inputs.ids[:start], labels=inputs.labels[:start])
            answers.append(Answer(Encoded(start, 0, record.group, before), expected))
    return answers


def generate(
    reference: Reference, prompts: Sequence[Encoded], ends: Sequence[int], max_new_tokens: int
) -> list[list[int]]:
    """The ids of what the model answers to prompts, with an image or without."""
    lengths = [prompt.length for prompt in prompts]
    embeddings = embed(reference, collate(reference, prompts).to(reference.device).inputs)
    return generate_ids(language_model_of(reference), embeddings, lengths, ends, max_new_tokens)
