"""What every family needs of a checkpoint: load it whole, freeze it, name its target modules, tell it from others."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tive.data.training_record import difference
from tive.models import ModelFiles, Reference
from tive.util.errors import UserError
from tive.util.files import read_json, sampled_sha256, sha256_of

_WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
# What stands beside quantised weights in a file, in the names of the common libraries.
_SCALES = re.compile(
    r"(weight_scale|scale_inv|input_scale|scales|zero_point|qweight|qzeros|g_idx|weight_packed|absmax|quant_map|SCB)\b"
)


def prepare_torchvision() -> None:
    """Make torchvision importable where its operators do not fit the installed torch.

    PyPI's torchvision beside a CPU build of torch (and any other mismatch) fails on an operator that image processors
    never call; declaring it is enough for them.
    """
    if importlib.util.find_spec("torchvision") is None:
        return
    try:
        importlib.import_module("torchvision")
    except (RuntimeError, ImportError, OSError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for operator in ("nms", "qnms"):
            _DECLARED.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        importlib.import_module("torchvision")


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
# Before transformers and peft are imported, also in a loader's worker that is not forked.
prepare_torchvision()

_QUANTIZED_NAME = re.compile(r"(?i)(bnb|[348]-?bits?|int[48]|awq|gptq|fp8|nf4|hqq|w[48]a\d+)(?![a-z])")


@contextlib.contextmanager
def loading(folder: str | Path) -> Iterator[None]:
    """Turns whatever a library raises while it loads a model's folder into one line. Code beside a model never runs.

    Raises:
        UserError: it could not be loaded.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers, sentencepiece and safetensors raise many kinds
        for path in sorted(Path(folder).glob("*.json")):
            content = read_json(path)
            if isinstance(content, dict) and content.get("auto_map"):
                raise UserError(
                    f"{path} names code beside the model (auto_map), which is never run; take the model in the form of "
                    "transformers, whose name mostly ends in -hf"
                ) from error
        raise UserError(
            f"cannot load {folder}: {first_line(error)}; download it again, or use an environment that has what it "
            "needs (bash scripts/setup.sh native)"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of a library's error, or its kind where it has no text."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def base_folder(model_base: str) -> str:
    """The folder of a base model that is a folder, or a name on huggingface.co that was downloaded before.

    Raises:
        UserError: it is neither.
    """
    if os.path.isdir(model_base):
        return model_base
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(model_base, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"the model {model_base} is neither a folder nor a downloaded model; name its folder, or download it with "
            "`huggingface-cli download`"
        ) from error


def base_of(files: ModelFiles) -> Path:
    """The folder that a model's language model and tokenizer come from: the adapter's base, or a whole model's own."""
    return Path(files.model_path if files.model_base is None else files.model_base)


def refuse_options(files: ModelFiles, *names: str) -> None:
    """Refuse options that the family would not look at.

    Raises:
        UserError: one is set.
    """
    for name in names:
        if getattr(files, name):
            raise UserError(
                f"{name} {getattr(files, name)}: {files.model_path} is a model that does not read it; leave it out"
            )


def read_config(folder: Path, in_4bit: bool = False) -> dict[str, Any]:
    """A model's config.json, of weights that are not quantised.

    Args:
        in_4bit: they may be quantised to 4 bits by bitsandbytes.

    Raises:
        UserError: there is none, it is no JSON object, or it or a file of weights says that weights are quantised.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder (no config.json); name the model's folder")
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object; make or download it again")
    known = stored_in_4bit(config)
    if known and in_4bit:
        return config
    said = f"{path}: quantization_config" if _says_quantized(config) else _quantized_weight(folder)
    if said:
        remedy = "take load_in_4bit (transformers' models), or " if known else ""
        raise UserError(
            f"{said}: gradients on quantised weights are not supported as they are; {remedy}name the same model in "
            "full precision, and a reference model that was trained on it"
        )
    return config


def stored_in_4bit(config: dict[str, Any]) -> bool:
    """Whether a model's weights are stored in 4 bits of bitsandbytes."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and bool(method.get("load_in_4bit"))


def _says_quantized(config: dict[str, Any]) -> bool:
    """Whether a config, or one of a part inside it, has a `quantization_config` that is not empty."""
    if config.get("quantization_config"):
        return True
    return any(_says_quantized(part) for part in config.values() if isinstance(part, dict))


def _quantized_weight(folder: Path) -> str | None:
    """File and name of a weight that is stored in eight bits or fewer; None where there is none."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    kind = file.get_slice(name).get_dtype()
                    if "weight" in name and kind.startswith(("F8", "F6", "F4", "I8", "U8")):
                        return f"{path}: {name} is stored as {kind}"
        except (SafetensorError, OSError):
            continue  # loading says what is wrong with it
    return None


def refuse_other_shape(folder: Path, base: Path) -> None:
    """Compare the sizes that the config beside an adapter names with those of the base.

    Raises:
        UserError: one differs.
    """
    config, of_base = read_config(folder), read_config(base)
    for key in _SHAPE_KEYS:
        if key in of_base and key in config and of_base[key] != config[key]:
            raise UserError(
                f"the base model {base} has {key} {of_base[key]}, the adapter in {folder} was trained on "
                f"{config[key]}; name the base that it was trained on"
            )


def refuse_other(folder: Path, what: str, recorded: dict[str, Any] | None, present: Path | None) -> None:
    """Compare a model with the one that the training of `folder` recorded.

    Raises:
        UserError: it is another one.
    """
    differs = difference(recorded, present) if recorded and present else None
    if recorded and differs:
        raise UserError(
            f"the {what} {present} is not the one that {folder} was trained with ({differs}); name that one: "
            f"{recorded.get('path')}"
        )


def print_named_base(folder: Path, base: Path, in_4bit: bool = False) -> None:
    """Print the base that an adapter names, where another is used, or one of another precision than its name says."""
    named = str(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    of_hub = re.search(r"models--([^/]+)/snapshots/", f"{base}/")
    if Path(named).resolve() == base.resolve() or (of_hub and named == of_hub[1].replace("--", "/")):
        return
    note = ""
    if _QUANTIZED_NAME.search(named) and not in_4bit:
        note = (
            ", which by its name has quantised weights: an adapter belongs to the weights that it was trained on (of 4 "
            "bits with load_in_4bit)"
        )
    print(f"{folder}/adapter_config.json names the base {named}{note}; taken as trained on {base}")


def load_pretrained(
    kind: Any, folder: str | Path, place: tuple[torch.device, torch.dtype], apart: tuple[str, ...] = (), **options: Any
) -> Any:
    """A model of one of transformers' classes: each of its weights is in the folder's files.

    Weights in the files that the model has no parameter for are printed.

    Args:
        place: where its weights go, each as it is read, and in which precision.
        apart: prefixes of weights that come from another place, or that the class leaves out on purpose.

    Raises:
        UserError: it cannot be loaded, lacks weights, or has what belongs to quantised ones.
    """
    from transformers.utils import logging

    device, dtype = place
    if device.type != "cpu" or "quantization_config" in options:
        options["device_map"] = {"": device}
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # what it warns of is looked at below
    try:
        with loading(folder), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*do_sample.*")  # of a generation config that is not used here
            model, report = kind.from_pretrained(str(folder), torch_dtype=dtype, output_loading_info=True, **options)
    finally:
        logging.set_verbosity(level)
    missing = {str(key) for part in ("missing_keys", "mismatched_keys") for key in report[part]}
    missing = {key for key in missing if not key.startswith(apart)}
    if missing:
        raise UserError(f"{folder} lacks {len(missing)} weights, {min(missing)} among them; download it again")
    unused = sorted(key for key in map(str, report["unexpected_keys"]) if not key.startswith(apart))
    scales = [key for key in unused if _SCALES.search(key)]
    if scales:
        raise UserError(
            f"{folder} holds {scales[0]}, which belongs to quantised weights and has no place in the model; name the "
            "same model in full precision"
        )
    if unused:
        print(f"{folder}: {len(unused)} weights have no place in the model and are not used, {unused[0]} among them")
    return model


def decoder_layers(model: Any) -> nn.ModuleList:
    """The language model's layers: they stand beside its input embeddings.

    Raises:
        UserError: this model keeps them elsewhere.
    """
    embedding = model.get_input_embeddings()
    for module in model.modules():
        if any(child is embedding for child in module.children()):
            layers = getattr(module, "layers", None)
            if isinstance(layers, nn.ModuleList):
                return layers
    raise UserError(f"{type(model).__name__} keeps its language model's layers in a way that is not supported")


def freeze(model: Any, gradient_checkpointing: bool) -> None:
    """Make nothing trainable and turn every dropout off, also under gradient checkpointing."""
    model.requires_grad_(False)
    model.eval()
    if gradient_checkpointing:
        with warnings.catch_warnings():  # transformers 5.24 wants another name, which older releases do not have
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # eval() turns checkpointing off without a word. What checkpoints is in training mode, its parts are not.
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True


def target_modules(reference: Reference, grad_modules: str = "self_attn") -> dict[str, nn.Linear]:
    """The LoRA matrices whose gradients count, in the model's order, by canonical name (`layers.3.self_attn.q_proj.A`).

    Only what lies below the language model's layers: a vision tower has a `self_attn` and a `q_proj` too.

    Args:
        grad_modules: comma-separated parts of a module's path in its layer (`self_attn`, `q_proj,v_proj`), or `all`.

    Raises:
        UserError: nothing is counted.
    """
    wanted = {part.strip() for part in grad_modules.split(",") if part.strip()}
    matrices: dict[str, nn.Linear] = {}
    for number, layer in enumerate(reference.layers):
        for path, module in layer.named_modules():
            if hasattr(module, "lora_A") and (wanted == {"all"} or wanted & set(path.split("."))):
                matrices[f"layers.{number}.{path}.A"] = module.lora_A["default"]
                matrices[f"layers.{number}.{path}.B"] = module.lora_B["default"]
    if not matrices:
        raise UserError(f"grad_modules {grad_modules} names no LoRA matrix of this adapter (try self_attn)")
    return matrices


def fingerprint(hashed: Iterable[Path], listed: Iterable[Path], *texts: str) -> str:
    """SHA-256 over files' content, over names, sizes and sampled content of the weight files in folders, and texts.

    Two bases of one shape differ in nothing but the content; hashing 14 GB of it at each start would cost minutes.
    """
    digest = hashlib.sha256()
    for file in hashed:
        digest.update(sha256_of(file).encode())
    for folder in listed:
        for file in sorted(file for pattern in _WEIGHT_FILES for file in folder.glob(pattern)):
            digest.update(f"{file.name} {file.stat().st_size} {sampled_sha256(file)}\n".encode())
    digest.update("\n".join(texts).encode())
    return digest.hexdigest()


def library_versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages, `unknown` for one that has none."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions
