"""Bunny's template: conversations as token ids and labels, by the rules of Bunny's trainer, its oddities included.

A reference model's gradient is that of the loss it was trained with. `docs/bunny.md` lists the rules; the tests hold
them to what Bunny's code gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from packaging.version import Version

from tive.data.media import IMAGE_TAG
from tive.models.checkpoint import loading
from tive.models.losses import IGNORE
from tive.models.spliced import IMAGE_ID
from tive.util.errors import UserError
from tive.util.files import read_object

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
    """How a model's conversations become tokens.

    Attributes:
        tokenizer: the base's `tokenizer.json`; it cuts and pads nothing.
        end: the text of the one token that ends an answer.
        pad: the id that Bunny pads with.
        pad_is_eos: whether that is also the tokenizer's end of sequence.
        maximum: most positions of a record.
    """

    tokenizer: tokenizers.Tokenizer
    end: str
    pad: int
    pad_is_eos: bool
    maximum: int

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

    Args:
        model_type: one of `ENDS`, whose text ends an answer.

    Raises:
        UserError: a file is missing, needs a newer library, contradicts the other, or lacks a token that is needed.
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
        added = {
            int(number): token["content"] for number, token in (settings.get("added_tokens_decoder") or {}).items()
        }
    others = [text for number, text in added.items() if tokenizer.token_to_id(text) != number]
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
    pad_text, unk, eos = (_text_of(special.get(f"{name}_token")) for name in ("pad", "unk", "eos"))
    pad_text = pad_text or unk
    pad = tokenizer.token_to_id(pad_text) if pad_text else None
    if pad is None or eos is None:
        raise UserError(
            f"{settings_file} names no eos_token, or no pad_token or unk_token of tokenizer.json, one of which Bunny "
            "pads with; name the base that the adapter was trained on"
        )
    return BunnyTemplate(tokenizer, end, pad, pad_text == eos, maximum)


def _text_of(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
