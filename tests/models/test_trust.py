"""A model made to hurt, or one that is broken, is refused in one line; nothing in a file is ever executed."""

from __future__ import annotations

import ast
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.golden_model import GOLDEN, ROOT, run_step

Tensors = dict[str, torch.Tensor]


class Payload:
    """What a pickle executes when it is loaded."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.fixture
def model(tmp_path) -> SimpleNamespace:
    """A copy of the golden model's parts, which a test may spoil; `run` runs the step on it."""
    for name in ("llava-lora", "vicuna", "clip"):
        shutil.copytree(GOLDEN / name, tmp_path / name)

    def run():
        folders = ("--model_path", tmp_path / "llava-lora", "--model_base", tmp_path / "vicuna")
        return run_step(tmp_path / "out", *folders, "--vision_tower", tmp_path / "clip")

    return SimpleNamespace(lora=tmp_path / "llava-lora", base=tmp_path / "vicuna", tower=tmp_path / "clip", run=run)


def refused(done, *messages: str) -> None:
    assert done.code == 2, done.out + done.err
    (line,) = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.err.splitlines()[-1] == line
    for message in messages:
        assert message in line
    assert "Traceback" not in done.err


def test_no_file_of_the_project_loads_a_pickle_or_runs_a_text():
    for path in [*ROOT.glob("*.py"), *ROOT.glob("tive/**/*.py"), *ROOT.glob("scripts/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                assert name not in ("eval", "exec", "pickle.load", "pickle.loads", "yaml.load_all"), path
                assert name != "yaml.load" or "_Loader" in ast.unparse(node)  # a SafeLoader
                if name == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), path
                if re.search(
                    r"\bAuto\w+\.from_pretrained$", name
                ):  # transformers asks on the terminal where nothing is said
                    assert any(k.arg == "trust_remote_code" for k in node.keywords), path
                assert not any(k.arg == "trust_remote_code" and ast.unparse(k.value) != "False" for k in node.keywords)


@pytest.mark.parametrize("raw", [False, True], ids=["saved by torch", "a plain pickle"])
@pytest.mark.parametrize("part", ["adapter", "projector", "base", "tower"])
def test_a_pickle_payload_is_not_executed(model, tmp_path, part, raw):
    executed = tmp_path / "executed"
    if part == "adapter":
        for file in model.lora.glob("adapter_model.*"):
            file.unlink()
        path = model.lora / "adapter_model.bin"
    elif part == "projector":
        path = model.lora / "non_lora_trainables.bin"
    else:
        folder = model.base if part == "base" else model.tower
        for file in [*folder.glob("*.safetensors"), *folder.glob("*.index.json"), *folder.glob("pytorch_model*.bin")]:
            file.unlink()
        path = folder / "pytorch_model.bin"
    content = {"weight": Payload(executed)}
    path.write_bytes(pickle.dumps(content)) if raw else torch.save(content, path)
    refused(model.run())
    assert not executed.exists()


def test_code_beside_a_model_is_not_executed(model, tmp_path):
    executed = tmp_path / "executed"
    for folder in (model.base, model.lora, model.tower):
        (folder / "hostile.py").write_text(f"import os\nos.mkdir({str(executed)!r})\nclass Hostile: pass\n")
        for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            if (folder / name).exists():
                config = json.loads((folder / name).read_text())
                classes = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoImageProcessor")
                config["auto_map"] = dict.fromkeys(classes, "hostile.Hostile")
                config["auto_map"]["AutoTokenizer"] = ["hostile.Hostile", None]
                (folder / name).write_text(json.dumps(config))
    model.run()
    assert not executed.exists()


def spoil(path: Path, change: Callable[[Tensors], None]) -> None:
    read = load_file if path.suffix == ".safetensors" else lambda path: torch.load(path, weights_only=True)
    tensors = read(path)
    change(tensors)
    if path.suffix == ".safetensors":
        save_file(tensors, path, {"format": "pt"})
    else:
        torch.save(tensors, path)


def adapter_of(model) -> Path:
    (path,) = model.lora.glob("adapter_model.*")
    return path


def first(tensors: Tensors, part: str = "") -> str:
    return next(name for name in tensors if part in name)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.update({first(t): torch.full_like(t[first(t)], float("inf"))}), "not finite"),
        (lambda t: t.update({first(t): torch.zeros(3, 3)}), "shape [3, 3]"),
        (lambda t: t.clear(), "mm_projector"),
        (lambda t: t.update({"number": 5}), "not a dictionary of tensors"),
    ],
    ids=["not finite", "wrong shape", "empty", "no tensor"],
)
def test_a_projector_that_does_not_fit_is_refused(model, change, message):
    spoil(model.lora / "non_lora_trainables.bin", change)
    refused(model.run(), "non_lora_trainables.bin", message)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_one(tensors: Tensors) -> None:
    del tensors[first(tensors, "k_proj.weight")]


BROKEN: dict[str, Callable[[Any], Any]] = {
    "a base of another width": lambda m: edit(m.base / "config.json", hidden_size=4096),
    "a base without config": lambda m: (m.base / "config.json").unlink(),
    "a base without tokenizer": lambda m: [path.unlink() for path in m.base.glob("tokenizer*")],
    "a base that breaks off": lambda m: [os.truncate(path, 1000) for path in m.base.glob("*.safetensors")],
    "a base without weights": lambda m: [path.unlink() for path in m.base.glob("*.safetensors")],
    "a checkpoint without projector": lambda m: (m.lora / "non_lora_trainables.bin").unlink(),
    "no adapter": lambda m: adapter_of(m).unlink(),
    "an adapter that breaks off": lambda m: os.truncate(adapter_of(m), 1000),
    "an empty adapter": lambda m: os.truncate(adapter_of(m), 0),
    "an adapter config that is a list": lambda m: (m.lora / "adapter_config.json").write_text("[]"),
    "an adapter config that breaks off": lambda m: (m.lora / "adapter_config.json").write_text('{"r":'),
    "a config that is a list": lambda m: (m.lora / "config.json").write_text("[]"),
    "a config that is no JSON": lambda m: (m.lora / "config.json").write_bytes(b"\xff\xfe\0"),
    "a config of another model": lambda m: edit(m.lora / "config.json", model_type="gpt2"),
    "a tower without weights": lambda m: [path.unlink() for path in m.tower.glob("*.safetensors")],
    "a tower that breaks off": lambda m: [os.truncate(path, 1000) for path in m.tower.glob("*.safetensors")],
    "a tower without processor": lambda m: (m.tower / "preprocessor_config.json").unlink(),
    "a tower that lacks a weight": lambda m: [spoil(path, drop_one) for path in m.tower.glob("*.safetensors")],
    "a tower of another width": lambda m: edit(m.tower / "config.json", hidden_size=16),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_refused_in_one_line_that_names_its_part(model, tmp_path, name):
    BROKEN[name](model)
    done = model.run()
    refused(done)
    named = (str(model.base), str(model.lora), str(model.tower))
    assert any(path in done.err for path in named), done.err
    assert not (tmp_path / "out" / "manifest_0.json").exists()
