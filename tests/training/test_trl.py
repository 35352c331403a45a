"""What scripts/train_trl.py leaves beside a model for step 3, and the pictures that it trains on."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.forked_python import PYTHON
from tests.helpers.tiny_native import QWEN
from tive.models import ModelFiles, native, native_encoding
from tive.models.common import target_modules
from tive.models.optimizer_state import MOMENTS_FILE, find_optimizer_state, moments_of_matrices, read_optimizer_state
from tive.models.training_record import difference, read_record
from tive.training.trl_trainer import DataArguments, opened
from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = QWEN.parent


def script(name: str, *arguments: object) -> str:
    ended = subprocess.run([PYTHON, ROOT / "scripts" / name, *map(str, arguments)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of three steps with a checkpoint after the second."""
    folder = tmp_path_factory.mktemp("trl")
    script("convert_data.py", "--source_path", GOLDEN / "data.json", "--target_path", folder / "data", "--to", "parts")
    options = "--assistant_only_loss --max_length 2048 --max_steps 3 --save_steps 2 --per_device_train_batch_size 2"
    options += " --use_cpu --bf16 false --report_to none --logging_steps 1 --learning_rate 1e-2"
    options += " --use_peft --lora_r 4 --lora_target_modules all-linear"
    paths = {"data_path": folder / "data", "image_folder": GOLDEN / "images", "output_dir": folder / "trained"}
    words = [word for name, path in paths.items() for word in (f"--{name}", path)]
    script("quickstart/native_model.py", "--folder", folder / "model")
    script("train_trl.py", *words, "--model_name_or_path", folder / "model", *options.split())
    return folder / "trained"


def test_the_base_and_the_template_of_a_training_are_known(trained: Path) -> None:
    for folder in (trained, trained / "checkpoint-2"):
        record = read_record(folder)
        assert record is not None and record.trainer == "trl"
        assert difference(record.base, trained.parent / "model") is None
        template = (folder / "chat_template.jinja").read_bytes()
        assert record.template == hashlib.sha256(template).hexdigest()
        assert record.settings == {"assistant_only_loss": True, "max_length": 2048}
        assert record.lora is not None and record.lora["r"] == 4


def test_a_checkpoint_holds_the_moments_by_name_that_its_optimizer_holds_by_number(trained: Path) -> None:
    """The adapter has matrices in the vision tower too, which comes first in the model's order."""
    checkpoint = trained / "checkpoint-2"
    reference = native.load(
        ModelFiles(str(checkpoint), str(trained.parent / "model")), torch.device("cpu"), torch.float32
    )
    matrices = target_modules(reference, "all")
    by_name, by_number = (
        moments_of_matrices(read_optimizer_state(checkpoint / name, 2), reference.model, matrices, str(checkpoint))
        for name in (MOMENTS_FILE, "optimizer.pt")
    )
    for name, of in by_name.items():
        assert of.m.any() and torch.equal(of.m, by_number[name].m) and torch.equal(of.v, by_number[name].v)
    assert find_optimizer_state(str(checkpoint)).name == MOMENTS_FILE


def test_the_trainer_sees_the_picture_that_step_3_sees(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A photo that lies on its side, as phones write it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.random.default_rng(0).integers(0, 255, (84, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", exif=exif)
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A photo."}]},
    ]
    record = {"messages": messages, "images": ["a.jpg"]}
    (tmp_path / "data.jsonl").write_text(json.dumps(record) + "\n")
    (of_the_trainer,) = opened(DataArguments(str(tmp_path / "data.jsonl"), str(tmp_path)))[0]["images"]

    seen: list[Image.Image] = []
    real = native_encoding.encode_turns
    monkeypatch.setattr(native_encoding, "encode_turns", lambda *given: seen.extend(given[3]) or real(*given))
    processor = native_encoding.load_processor(ModelFiles(str(QWEN), None))
    native_encoding.encode(processor, record, str(tmp_path))
    (of_step_3,) = seen
    assert of_step_3.size == (84, 140) and np.array_equal(np.asarray(of_the_trainer), np.asarray(of_step_3))


def test_a_selection_of_parquet_is_the_data_set_that_it_was_and_trains(trained: Path, tmp_path: Path) -> None:
    """A small data set of FineVision's schema, written by `datasets` as the hub's are."""
    import datasets

    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(8)]
    texts = [[{"user": f"What is {row}?", "assistant": "Noise."}] for row in range(8)]
    columns = {"images": [[picture] for picture in pictures], "texts": texts, "source": ["a", "b"] * 4}
    features = {
        "images": datasets.List(datasets.Image()),
        "texts": datasets.List({"user": datasets.Value("string"), "assistant": datasets.Value("string")}),
        "source": datasets.Value("string"),
    }
    (tmp_path / "hub" / "subset").mkdir(parents=True)
    whole = datasets.Dataset.from_dict(columns, datasets.Features(features))
    whole.to_parquet(tmp_path / "hub" / "subset" / "train-00000-of-00001.parquet")
    subset = tmp_path / "subset.parquet"
    command = [ROOT / "select_warm_up_data.py", "--source_path", tmp_path / "hub", "--target_path", subset]
    command += ["--sample_ratio", 0.5, "--task_key", "source"]
    subprocess.run([PYTHON, *map(str, command)], check=True, capture_output=True)

    rows = np.load(tmp_path / "subset_rows.npy")
    loaded = datasets.load_dataset("parquet", data_files=str(subset), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded.features == whole.features and loaded["texts"] == whole.select(rows)["texts"]
    for row, images in zip(rows, loaded["images"], strict=True):
        assert np.array_equal(np.asarray(images[0]), np.asarray(pictures[row]))

    seen = opened(DataArguments(str(subset)))
    assert len(seen) == 4 and np.array_equal(np.asarray(seen[0]["images"][0]), np.asarray(pictures[rows[0]]))
    options = "--max_steps 1 --use_cpu --bf16 false --report_to none --use_peft --lora_target_modules all-linear"
    paths = [
        "--model_name_or_path",
        trained.parent / "model",
        "--data_path",
        subset,
        "--output_dir",
        tmp_path / "trained",
    ]
    script("train_trl.py", *paths, "--max_length", 2048, "--per_device_train_batch_size", 2, *options.split())
    assert (tmp_path / "trained" / "adapter_model.safetensors").is_file()


def test_an_answer_that_is_taken_out_of_training_is_refused(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "loss": False}]
    (tmp_path / "data.json").write_text(json.dumps([{"messages": messages}]))
    with pytest.raises(UserError, match=r"record 0.*every answer"):
        opened(DataArguments(str(tmp_path / "data.json")))[0]


@pytest.mark.parametrize(
    "more",
    [("--foo", "3"), ("--model_name_or_path", "./nowhere"), ("--image_folder", "nowhere"), ("--data_path", "nowhere")],
    ids=lambda more: more[0],
)
def test_a_mistake_ends_in_one_line_that_names_it(trained: Path, tmp_path: Path, more: tuple[str, str]) -> None:
    paths = {
        "data_path": trained.parent / "data",
        "output_dir": tmp_path,
        "model_name_or_path": trained.parent / "model",
    }
    words = [word for name, path in paths.items() for word in (f"--{name}", path)]
    options = ["--use_cpu", "--bf16", "false", "--max_steps", "1", "--report_to", "none"]
    command = [PYTHON, ROOT / "scripts" / "train_trl.py", *words, *options, *more]
    ended = subprocess.run(command, capture_output=True, text=True)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and more[more[0] != "--foo"] in line and "Traceback" not in ended.stderr
