"""Bunny: a LoRA reference model that Bunny's trainer wrote, its language model and SigLIP tower of transformers.

Bunny's own code (BAAI-DCAI/Bunny) is on no registry and is not used; an `nn.Sequential` is the projector.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
from packaging.version import Version
from torch import Tensor, nn

from tive.data.media import IMAGE_TAG
from tive.data.trained import problem_of
from tive.models import ModelFiles, Reference, pads_images, spliced
from tive.models.checkpoint import library_config, load_pretrained, loading, read_config
from tive.models.common import IGNORE, decoder_layers, freeze
from tive.models.spliced import IMAGE_ID
from tive.util.errors import UserError
from tive.util.files import read_object

LIBRARIES: tuple[str, ...] = ("transformers", "tokenizers", "peft", "pillow")
record_problem = problem_of
encode, answers, generate = spliced.encode, spliced.answers, spliced.generate
collate, record_losses = spliced.collate, spliced.record_losses

_IN_ONE_GO = (
    "only when training ends, and going on from a checkpoint-N starts the projector afresh: train the reference model "
    "in one go (save_strategy no) and name its output_dir"
)


class Bunny(nn.Module):
    """The parts of a Bunny model, by the names that Bunny's trainer gives them in its files."""

    def __init__(self, language_model: Any, tower: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.language_model, self.mm_projector = language_model, projector
        self.vision_tower = nn.ModuleDict({"vision_tower": tower})

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Features `[B, patches, hidden]` of images `[B, 3, side, side]`: all patches of the last but one layer."""
        vision = _vision_of(self.vision_tower["vision_tower"])
        features: Tensor = self.mm_projector(vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state)
        return features


def _vision_of(tower: Any) -> Any:
    """What computes a tower's features; transformers 5 has no model inside the model."""
    return getattr(tower, "vision_model", tower)


def check_files(files: ModelFiles) -> None:
    """What would not show at loading: files that do not fit each other, settings that are not computed."""
    folder, base = files.folder, files.base
    if files.model_base is None:
        raise UserError(f"{folder}: a whole Bunny model cannot be read, only an adapter; name its base with it")
    config = spliced.check_parts(files, _IN_ONE_GO)
    if config.get("use_s2"):
        raise UserError(f"{folder}/config.json: use_s2 is not supported; train the reference model without use_s2")
    model_type = str(config.get("model_type"))
    if model_type not in ENDS:
        raise UserError(f"{folder}/config.json: the model type {model_type} is none of {', '.join(ENDS)}")
    of_base = read_config(base).get("model_type")
    if of_base != {"bunny-qwen": "qwen2"}.get(model_type, model_type.removeprefix("bunny-")):
        raise UserError(
            f"the base model {base} is of type {of_base}, the adapter in {folder} was trained as {model_type}; name "
            "the language model that Bunny's trainer started from (an adapter on a Bunny model is not supported)"
        )
    library_config(base)
    read_processor(files)


def tower_folder(files: ModelFiles) -> Path:
    """The folder of the SigLIP tower; its config says what a tower is, not its folder's name."""
    name, tower = spliced.tower_of(files)
    kind = read_config(tower).get("model_type") if tower else "not there, or a file as EVA's"
    if tower is None or kind not in ("siglip", "siglip_vision_model"):
        raise UserError(
            f"the vision tower {name} is {kind}, and only SigLIP towers are supported; name the folder of the one that "
            "the reference model was trained with as vision_tower"
        )
    return tower


def read_processor(files: ModelFiles, dtype: torch.dtype = torch.float32) -> spliced.SplicedProcessor:
    """Template and pixels as the files of the reference model, its base and its tower set them."""
    import transformers

    tower, config = tower_folder(files), read_config(files.folder)
    maximum = config.get("tokenizer_model_max_length")
    if not isinstance(maximum, int) or maximum < 1:
        raise UserError(
            f"{files.folder}/config.json: tokenizer_model_max_length is {maximum}; Bunny's trainer writes the "
            "model_max_length that it cut records at: put it there"
        )
    # transformers 5 has two, and the other one resizes otherwise than Bunny's.
    kind = getattr(transformers, "SiglipImageProcessorPil", None) or transformers.SiglipImageProcessor
    with loading(tower):
        vision = transformers.SiglipVisionConfig.from_pretrained(str(tower))
        images = kind.from_pretrained(str(tower))
    side = vision.image_size
    if (images.size.get("height"), images.size.get("width"), images.do_resize) != (side, side, True):
        raise UserError(
            f"{tower}/preprocessor_config.json: images are not resized to the tower's {side} by {side} pixels; "
            "download the tower again"
        )
    template = read_template(files.base, config["model_type"], maximum)
    features = (side // vision.patch_size) ** 2
    return spliced.SplicedProcessor(template, images, pads_images(files), features, maximum, dtype)


def identity(files: ModelFiles) -> str:
    """What tells one reference model from another: adapter, projector, tokenizer, settings, base and tower."""
    named = ("model_type", "image_aspect_ratio", "mm_projector_type", "tokenizer_model_max_length")
    config = read_config(files.folder)
    return spliced.identity_of(files, {key: config.get(key) for key in named})


def load(
    files: ModelFiles, device: torch.device, dtype: torch.dtype, gradient_checkpointing: bool = False
) -> Reference:
    """Base, adapter, tower and projector, proven to be what is on disk."""
    check_files(files)
    from transformers import AutoModelForCausalLM, SiglipVisionModel

    config, kind = library_config(files.base), str(read_config(files.folder).get("mm_projector_type", "mlp2x_gelu"))
    config.use_cache = False
    language_model = load_pretrained(
        AutoModelForCausalLM, files.base, (device, dtype), config=config, trust_remote_code=False
    )
    if language_model.lm_head.bias is not None:
        language_model.lm_head.bias = None  # Bunny's Phi has none
    # A whole SigLIP has a text model beside the tower.
    tower = load_pretrained(SiglipVisionModel, tower_folder(files), (device, dtype), ("text_model.", "logit_"))
    named = re.fullmatch(r"linear|mlp([1-9]\d*)x_gelu", kind)
    if not named:
        raise UserError(
            f"{files.folder}/config.json: the projector {kind} is not supported (supported: mlpNx_gelu and linear); "
            "train the reference model with mm_projector_type mlp2x_gelu"
        )
    widths = [tower.config.hidden_size, *[config.hidden_size] * int(named[1] or 1)]
    maps = [nn.Linear(*pair, dtype=dtype, device="meta") for pair in pairwise(widths)]
    projector = nn.Sequential(*[part for layer in maps for part in (nn.GELU(), layer)][1:])
    model = Bunny(language_model, tower, projector if kind != "linear" else projector[0])
    layers = decoder_layers(language_model)
    spliced.attach_trained(model, files.folder, layers, dtype)
    del _vision_of(tower).encoder.layers[-1]  # features are the last but one's

    # Never .to(dtype): it would round the rotary frequencies, which transformers computes in float32, by radians.
    model.to(device).requires_grad_(False).eval()
    freeze(language_model, gradient_checkpointing)
    return Reference(model, layers, language_model.lm_head, read_processor(files, dtype), device, dtype)


# The template

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
ANSWER = " ASSISTANT: "
# What ends an answer in the template of each model type, which is stored nowhere.
ENDS = dict.fromkeys(("bunny-phi", "bunny-phi3", "bunny-qwen", "bunny-qwen2", "bunny-stablelm"), "<|endoftext|>")
ENDS |= {"bunny-llama": "<|end_of_text|>", "bunny-minicpm": "</s>"}
# Older ones read Llama-3's `ignore_merges` and do not heed it (huggingface/tokenizers issue 1512).
_HEEDS_IGNORE_MERGES = Version("0.19.1")


@dataclass(frozen=True)
class BunnyTemplate:
    """How a model's conversations become tokens."""

    tokenizer: tokenizers.Tokenizer  # the base's `tokenizer.json`; it cuts and pads nothing
    end: str  # the text of the one token that ends an answer
    pad: int  # the id that Bunny pads with
    pad_is_eos: bool  # whether that is also the tokenizer's end of sequence
    maximum: int  # most positions of a record

    @property
    def ends(self) -> Sequence[int]:
        ids: list[int] = self.tokenizer.encode(self.end, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids).strip()
        return text

    def begin(self, ids: np.ndarray, start: int) -> int:
        return start

    def encode(self, turns: list[dict[str, Any]], has_image: bool) -> tuple[np.ndarray, np.ndarray]:
        """Ids and labels; text alone is cut at the maximum before its labels are looked for, else after."""
        prompt = self._prompt(turns, has_image)
        ids = np.array(self._tokens(prompt, has_image), np.int64)
        if not has_image:
            ids = ids[: self.maximum]
        labels = self._labels(prompt, ids, has_image)
        ids, labels = ids[: self.maximum], labels[: self.maximum]
        if not self.pad_is_eos:  # Bunny's attention mask is where an id is not the padding's
            kept = ids != self.pad
            ids, labels = ids[kept], labels[kept]
        return ids, labels

    def _prompt(self, turns: list[dict[str, Any]], has_image: bool) -> str:
        """The conversation as one text. A first turn that is not human is dropped; `<image>` opens its turn."""
        parts = [SYSTEM]
        for turn in turns[turns[0]["from"] != "human" :]:
            text = turn["value"]
            if has_image and IMAGE_TAG in text:
                text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
            role, close = ("USER", " ") if turn["from"] == "human" else ("ASSISTANT", self.end)
            parts.append(f"{role}: {text}{close}" if text else f"{role}:")
        return "".join(parts)

    def _tokens(self, text: str, has_image: bool) -> list[int]:
        first, *later = text.split(IMAGE_TAG) if has_image else [text]
        ids: list[int] = self.tokenizer.encode(first).ids
        for part in later:
            ids += [IMAGE_ID, *self.tokenizer.encode(part).ids[self._begins() :]]
        return ids

    def _begins(self) -> int:
        """How many tokens the tokenizer puts in front of every text, 0 or 1."""
        return len(self.tokenizer.encode("").ids)

    def _labels(self, prompt: str, ids: np.ndarray, has_image: bool) -> np.ndarray:
        """The answers' ids where Bunny finds them: by counting the tokens of each piece of the prompt alone.

        Where the count does not end where the tokens do, Bunny masks everything: a last human turn, an empty turn, the
        end token or ` ASSISTANT: ` inside a text, and lengths just above the maximum.
        """
        labels, begins = np.full(len(ids), IGNORE), self._begins()
        place, answers = begins, 0
        for piece in prompt.split(self.end):
            halves = piece.split(ANSWER)
            if len(halves) != 2:
                break
            question = len(self._tokens(halves[0] + ANSWER, has_image)) - 1 - begins
            length = len(self._tokens(piece, has_image)) + 1 - begins
            answer = slice(place + question, place + length)
            labels[answer] = ids[answer]
            place += length
            answers += 1
        counted = place - answers * self.pad_is_eos
        if counted < self.maximum and counted != np.count_nonzero(ids != self.pad):
            labels[:] = IGNORE
        return labels


def read_template(base: Path, model_type: str, maximum: int) -> BunnyTemplate:
    """The template of a base model, from its tokenizer's files alone: transformers 5 builds some anew, with other ids.

    A `UserError` where a file is missing, needs a newer library, contradicts the other, or lacks a token.
    """
    file, settings_file = base / "tokenizer.json", base / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(
            f"the base model {base} has no tokenizer.json, which Bunny's trainer uses; write it with "
            "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    content, settings = read_object(file), read_object(settings_file)
    with loading(file):
        if content["model"].get("ignore_merges") and Version(tokenizers.__version__) < _HEEDS_IGNORE_MERGES:
            raise UserError(
                f"{file} sets ignore_merges, which tokenizers {tokenizers.__version__} does not heed: its ids would be "
                f"wrong; use tokenizers {_HEEDS_IGNORE_MERGES} or later (bash scripts/setup.sh native)"
            )
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # transformers lets the settings change what tokenizer.json does; where they would, neither is taken.
    begins = len(tokenizer.encode("").ids) > 0
    with loading(settings_file):
        added = [(int(key), token["content"]) for key, token in (settings.get("added_tokens_decoder") or {}).items()]
    others = [text for key, text in added if tokenizer.token_to_id(text) != key]
    if others or settings.get("add_bos_token", begins) is not begins or settings.get("add_eos_token", False):
        raise UserError(
            f"{settings_file} and tokenizer.json contradict each other ("
            f"{', '.join(['add_bos_token', 'add_eos_token', *others])}), and which of them the adapter was trained "
            "with is not known; make the two agree"
        )
    end = ENDS[model_type]
    ends = tokenizer.encode(end, add_special_tokens=False).ids
    if len(ends) != 1:
        raise UserError(
            f"{file}: {end}, which ends an answer of this Bunny model, is {len(ends)} tokens of it and not one; "
            "name the base that the adapter was trained on"
        )
    if model_type == "bunny-llama":  # its end is both padding and end of sequence, whatever the tokenizer says
        return BunnyTemplate(tokenizer, end, ends[0], True, maximum)
    special, older = dict(settings), base / "special_tokens_map.json"
    if "added_tokens_decoder" not in settings and older.is_file():  # then this file has the last word
        special |= read_object(older)
    tokens = [special.get(f"{name}_token") for name in ("pad", "unk", "eos")]
    pad, unk, eos = (token.get("content") if isinstance(token, dict) else token for token in tokens)
    number = tokenizer.token_to_id(pad or unk) if isinstance(pad or unk, str) else None
    if number is None or eos is None:
        raise UserError(
            f"{settings_file} names no eos_token, or no pad_token or unk_token of tokenizer.json, one of which Bunny "
            "pads with; name the base that the adapter was trained on"
        )
    return BunnyTemplate(tokenizer, end, number, (pad or unk) == eos, maximum)
