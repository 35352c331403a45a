"""Bunny's records as token ids, labels and pixels: its template, what it masks, and SigLIP's image processing.

The rules are those that Bunny's trainer (BAAI-DCAI/Bunny) follows, its oddities included: a reference model's gradient
is that of the loss it was trained with. `docs/bunny.md` lists them; the tests hold them to what Bunny's code gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from packaging.version import Version
from PIL import Image

from tive.data.images import resize_padded
from tive.data.media import IMAGE_TAG
from tive.models.losses import IGNORE
from tive.models.spliced import IMAGE_ID
from tive.util.errors import UserError
from tive.util.files import read_json

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
class TextRules:
    """How a model's conversations become tokens.

    Attributes:
        tokenizer: the base's `tokenizer.json`; it cuts and pads nothing.
        end: the text of the token that ends an answer.
        pad: the id that Bunny pads with.
        pad_is_eos: whether that is also the tokenizer's end of sequence.
        begins: how many tokens the tokenizer puts in front of every text, 0 or 1.
        maximum: most positions of a record.
    """

    tokenizer: tokenizers.Tokenizer
    end: str
    pad: int
    pad_is_eos: bool
    begins: int
    maximum: int


@dataclass(frozen=True)
class ImageRules:
    """How an image becomes pixels, as `SiglipImageProcessor` does it: resize, rescale, normalise.

    Attributes:
        side: height and width in pixels.
        pad: pad to a square of the mean colour first; else the image is squashed.
        resample: Pillow's number of the filter.
        patches: image features of one image.
    """

    side: int
    pad: bool
    resample: int
    rescale_factor: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    patches: int


def read_text_rules(base: Path, model_type: str, maximum: int) -> TextRules:
    """The text rules of a base model, from its tokenizer's files alone.

    transformers' own tokenizer classes are not used: release 5 builds some of them anew, with other ids.

    Args:
        model_type: one of `ENDS`, whose text ends an answer.

    Raises:
        UserError: a file is missing, or needs a newer library, or its parts contradict each other, or that text is not
            one token of it.
    """
    end = ENDS[model_type]
    file, settings_file = base / "tokenizer.json", base / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(
            f"the base model {base} has no tokenizer.json, which Bunny's trainer uses; write it with "
            "transformers' AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    content, settings = read_json(file), read_json(settings_file)
    for path, value in ((file, content), (settings_file, settings)):
        if not isinstance(value, dict):
            raise UserError(f"{path} is not a JSON object; download it again")
    model = content.get("model")
    installed = tokenizers.__version__
    if isinstance(model, dict) and model.get("ignore_merges") and Version(installed) < _HEEDS_IGNORE_MERGES:
        raise UserError(
            f"{file} sets ignore_merges, which tokenizers {installed} does not heed: its ids would be wrong; use an "
            f"environment with tokenizers {_HEEDS_IGNORE_MERGES} or later (bash scripts/setup.sh native)"
        )
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises a bare Exception
        raise UserError(
            f"{file} cannot be read by tokenizers {installed} ({str(error).splitlines()[0]}); use an environment with "
            "a newer one (bash scripts/setup.sh native), or download the file again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _refuse_contradictions(tokenizer, settings, settings_file)

    begins = len(tokenizer.encode("").ids)
    ends = tokenizer.encode(end, add_special_tokens=False).ids
    if len(ends) != 1:
        raise UserError(
            f"{file}: {end}, which ends an answer of this Bunny model, is {len(ends)} tokens of it and not one; "
            "name the base that the adapter was trained on"
        )
    if model_type == "bunny-llama":  # its end is both padding and end of sequence, whatever the tokenizer says
        return TextRules(tokenizer, end, ends[0], True, begins, maximum)
    names = ("pad", "unk", "eos")
    special = {name: _token_text(settings.get(f"{name}_token")) for name in names}
    if "added_tokens_decoder" not in settings:  # the older form, in which the other file has the last word
        special |= {name: text for name in names if (text := _token_text(_special_tokens(base).get(f"{name}_token")))}
    pad_text = special["pad"] or special["unk"]
    pad = tokenizer.token_to_id(pad_text) if pad_text else None
    if pad is None or special["eos"] is None:
        raise UserError(
            f"{settings_file} names no eos_token, or no pad_token or unk_token of tokenizer.json, one of which Bunny "
            "pads with; name the base that the adapter was trained on"
        )
    return TextRules(tokenizer, end, pad, pad_text == special["eos"], begins, maximum)


def _special_tokens(base: Path) -> dict[str, Any]:
    path = base / "special_tokens_map.json"
    content = read_json(path) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _token_text(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _refuse_contradictions(tokenizer: tokenizers.Tokenizer, settings: dict[str, Any], path: Path) -> None:
    """transformers lets `tokenizer_config.json` change what `tokenizer.json` does; where it would, neither is taken."""
    begins = len(tokenizer.encode("").ids) > 0
    if settings.get("add_bos_token", begins) is not begins or settings.get("add_eos_token", False):
        raise UserError(
            f"{path}: add_bos_token and add_eos_token are not what tokenizer.json does; which of them the adapter was "
            "trained with is not known: make the two agree"
        )
    added = settings.get("added_tokens_decoder") or {}
    for number, token in added.items() if isinstance(added, dict) else ():
        text = _token_text(token)
        if text is not None and str(tokenizer.token_to_id(text)) != number:
            raise UserError(f"{path} has the token {text} as {number}, tokenizer.json has not; make the two agree")


def prompt_of(conversations: list[dict[str, Any]], end: str, has_image: bool) -> str:
    """The conversation as one text. A first turn that is not human is dropped; `<image>` opens its turn."""
    turns = conversations[conversations[0]["from"] != "human" :]
    parts = [SYSTEM]
    for turn in turns:
        text = turn["value"]
        if has_image and IMAGE_TAG in text:
            text = f"{IMAGE_TAG}\n{text.replace(IMAGE_TAG, '').strip()}".strip()
        role, close = ("USER", " ") if turn["from"] == "human" else ("ASSISTANT", end)
        parts.append(f"{role}: {text}{close}" if text else f"{role}:")
    return "".join(parts)


def encode_text(
    rules: TextRules, conversations: list[dict[str, Any]], has_image: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels, int64 `[t]`, an image standing as one `IMAGE_ID`; labels may be `IGNORE` throughout.

    Text alone is cut at the maximum before its labels are found, a record with an image after.
    """
    prompt = prompt_of(conversations, rules.end, has_image)
    ids = np.array(_tokens(rules, prompt, has_image), np.int64)
    if not has_image:
        ids = ids[: rules.maximum]
    labels = _labels(rules, prompt, ids, has_image)
    ids, labels = ids[: rules.maximum], labels[: rules.maximum]
    if not rules.pad_is_eos:  # Bunny's attention mask is where an id is not the padding's
        kept = ids != rules.pad
        ids, labels = ids[kept], labels[kept]
    return ids, labels


def _tokens(rules: TextRules, text: str, has_image: bool) -> list[int]:
    first, *later = text.split(IMAGE_TAG) if has_image else [text]
    ids = rules.tokenizer.encode(first).ids
    for part in later:
        ids += [IMAGE_ID, *rules.tokenizer.encode(part).ids[rules.begins :]]
    return ids


def _labels(rules: TextRules, prompt: str, ids: np.ndarray, has_image: bool) -> np.ndarray:
    """The answers' ids, found as Bunny finds them: by counting the tokens of each piece of the prompt alone.

    Where the walk does not end where the tokens do, Bunny masks everything: a last human turn, an empty turn, the end
    token or ` ASSISTANT: ` inside a text, and lengths just above the maximum.
    """
    labels = np.full(len(ids), IGNORE)
    place, answers = rules.begins, 0
    for piece in prompt.split(rules.end):
        halves = piece.split(ANSWER)
        if len(halves) != 2:
            break
        question = len(_tokens(rules, halves[0] + ANSWER, has_image)) - 1 - rules.begins
        length = len(_tokens(rules, piece, has_image)) + 1 - rules.begins
        answer = slice(place + question, place + length)
        labels[answer] = ids[answer]
        place += length
        answers += 1
    walked = place - answers * rules.pad_is_eos
    if walked < rules.maximum and walked != np.count_nonzero(ids != rules.pad):
        labels[:] = IGNORE
    return labels


def read_image_rules(tower: Path, pad: bool, image_size: int, patch_size: int) -> ImageRules:
    """The image rules of a SigLIP tower.

    Raises:
        UserError: `preprocessor_config.json` is missing, or asks for what is not done here.
    """
    path = tower / "preprocessor_config.json"
    content = read_json(path)
    size = content.get("size") if isinstance(content, dict) else None
    if size != {"height": image_size, "width": image_size}:
        raise UserError(
            f"{path}: `size` is not the tower's {image_size} by {image_size} pixels; download the tower again"
        )
    for name in ("do_resize", "do_rescale", "do_normalize"):
        if content.get(name, True) is not True:
            raise UserError(f"{path}: {name} is off, with which no SigLIP tower was trained; download the tower again")
    mean, std = (tuple(content.get(name) or (0.5, 0.5, 0.5)) for name in ("image_mean", "image_std"))
    return ImageRules(
        image_size,
        pad,
        content.get("resample", Image.Resampling.BICUBIC),
        content.get("rescale_factor", 1 / 255),
        mean,
        std,
        (image_size // patch_size) ** 2,
    )


def pixels_of(rules: ImageRules, picture: Image.Image) -> np.ndarray:
    """An RGB image as float32 `[3, side, side]`."""
    resample = Image.Resampling(rules.resample)
    if rules.pad:
        red, green, blue = (int(255 * channel) for channel in rules.mean)
        picture = resize_padded(picture, (red, green, blue), rules.side, resample)
    else:
        picture = picture.resize((rules.side, rules.side), resample)
    values = (np.asarray(picture) * rules.rescale_factor).astype(np.float32)
    mean, std = np.array(rules.mean, np.float32), np.array(rules.std, np.float32)
    return ((values - mean) / std).transpose(2, 0, 1)
