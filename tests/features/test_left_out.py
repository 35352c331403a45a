"""Before any GPU time: what is wrong with the data is counted, shown and listed; every record has one end."""

from __future__ import annotations

import copy
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.golden_model import GOLDEN, RECORDS, run_step, write_records
from tests.helpers.reference import encode_golden, load_golden
from tive.data.images import BadImage, find_image, open_image
from tive.features.step import GradientStep


def record(image: str | None = None, answer: str = "red", **more) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat color?" if image else "What color?"}]
    turns.append({"from": "gpt", "value": answer})
    return {"id": 7, **({"image": image} if image else {}), "conversations": turns, **more}


def picture(size: tuple[int, int] = (9, 7), mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def chunk_of(data: bytes, kind: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder of images of every kind that people have."""
    folder = tmp_path_factory.mktemp("images")
    for mode, name in {
        "L": "gray.png",
        "P": "palette.gif",
        "RGBA": "rgba.png",
        "CMYK": "cmyk.jpg",
        "1": "one_bit.png",
    }.items():
        picture(mode=mode).save(folder / name)
    Image.fromarray(np.arange(63, dtype=np.uint16).reshape(7, 9) * 900).save(folder / "sixteen_bit.png")
    picture().save(folder / "animated.gif", save_all=True, append_images=[picture((9, 7), "L")])
    picture().convert("P").save(folder / "transparent.png", transparency=b"\0\x80")
    picture((2, 1)).save(folder / "two_pixels.png")
    picture((1, 1)).save(folder / "one_pixel.png")
    picture((64, 64)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("<html>404 Not Found</html>")
    # PostScript, which Pillow would hand to another program.
    (folder / "script.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 7\n%%EndComments\nshowpage\n")
    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk_of(size, b"IHDR") + chunk_of(zlib.compress(bytes(1000)), b"IDAT")
    (folder / "bomb.png").write_bytes(bomb + chunk_of(b"", b"IEND"))
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    (folder / "below").mkdir()
    picture().save(folder / "below" / "other.gif")
    picture().save(folder.parent / "outside.png")
    return folder


GOOD = ["gray.png", "palette.gif", "rgba.png", "cmyk.jpg", "one_bit.png", "sixteen_bit.png", "animated.gif"]
GOOD += ["transparent.png", "two_pixels.png", "whole.jpg", "below/other.jpg", "below/../gray.png"]
BAD = {
    "nowhere.png": "missing image",
    "nowhere/at/all.png": "missing image",
    "gray.png/below.png": "missing image",
    "folder.png": "missing image",
    "dangling.png": "missing image",
    "../outside.png": "image path leaves the image folder",
    "below/../../outside.png": "image path leaves the image folder",
    "/etc/hostname": "image path leaves the image folder",
    "nul\0.png": "image path is no file name",
    "half\ud800.png": "image path is no file name",
    "x" * 300 + ".png": "unreadable image: File name too long",
    "empty.jpg": "unreadable image: the file is empty",
}
FOUND_WHEN_OPENED = {
    "truncated.jpg": "unreadable image: image file is truncated",
    "text.jpg": "unreadable image: no image format that is known",
    "script.jpg": "unreadable image: no image format that is known",
    "bomb.png": "unreadable image: above 178956970 pixels",
    "one_pixel.png": "unreadable image: one pixel",
}


@pytest.mark.parametrize("name", GOOD)
def test_images_of_every_kind_are_read_as_rgb(images, name):
    image = open_image(find_image(str(images), name))
    assert image.mode == "RGB" and max(image.size) > 1


@pytest.mark.parametrize("name", [*BAD, *FOUND_WHEN_OPENED], ids=ascii)
def test_images_that_cannot_be_used_have_a_reason(images, name):
    with pytest.raises(BadImage) as bad:
        open_image(find_image(str(images), name))
    assert str(bad.value).startswith((BAD | FOUND_WHEN_OPENED)[name])


def test_an_absolute_path_in_the_image_folder_and_a_relative_folder_are_fine(images, monkeypatch):
    assert find_image(str(images), str(images / "gray.png")) == str(images / "gray.png")
    monkeypatch.chdir(images)
    assert find_image(".", "below/other.gif") == "./below/other.gif"
    with pytest.raises(BadImage, match="leaves"):
        find_image(".", "../outside.png")


TOO_LONG = [{"from": "human", "value": "hello " * 3000}, {"from": "gpt", "value": "x"}]


def hostile_records() -> tuple[list, dict[int, str]]:
    """Records of every kind, all with one id, and the reasons of those that cannot be used, by row."""
    bad: list[tuple[object, str]] = [(record(image), reason) for image, reason in (BAD | FOUND_WHEN_OPENED).items()]
    bad += [
        ("text", "is not an object"),
        ({"id": 7}, "has no `conversations`"),
        (record("gray.png") | {"image": ["gray.png", "rgba.png"]}, "has 2 images"),
        (record() | {"conversations": TOO_LONG}, "no supervised token"),
    ]
    good = [record(image) for image in GOOD]
    good += [
        record("gray.png") | {"image": ["gray.png"]},
        record(),
        record("gray.png") | {"conversations": record()["conversations"]},  # an image and no tag
        record("gray.png") | {"conversations": record("x.png")["conversations"] + record()["conversations"]},
        record() | {"conversations": record("tag.png")["conversations"]},  # a tag and no image
        record(answer="long answer " * 3000),
        record() | {"id": None},
    ]
    order = np.random.default_rng(1).permutation(len(bad) + 3 * len(good))
    everything = [*bad, *((item, "") for item in good * 3)]
    records = [everything[place][0] for place in order]
    return records, {row: everything[place][1] for row, place in enumerate(order) if everything[place][1]}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> tuple[Path, list, dict[int, str]]:
    records, reasons = hostile_records()
    return write_records(tmp_path_factory.mktemp("data") / "data.json", records), records, reasons


@pytest.mark.parametrize("more", [[], ["--check_images", "full", "--num_workers", 1]], ids=str)
def test_every_record_ends_with_features_or_with_one_reason_in_its_own_row(images, hostile, tmp_path, more):
    data, records, reasons = hostile
    out = tmp_path / "features"
    done = run_step(out, "--input_file", data, "--image_folder", images, "--on_bad_record", "skip", *more)
    assert done.code == 0, done.err
    left_out = json.loads((out / "manifest_0.json").read_text())["left_out"]
    assert [entry["row"] for entry in left_out] == sorted(reasons)
    assert all(entry["reason"].startswith(reasons[entry["row"]]) for entry in left_out)
    saved = torch.load(out / "output_0.pt", weights_only=True)
    norms = json.loads((out / "output_norm_0.json").read_text())
    assert len(saved["features"]) == len(norms) == len(records)
    for row in range(len(records)):
        computed = row not in reasons
        assert bool(saved["features"][row].any()) == computed
        assert (norms[row] is not None and norms[row] > 0) == computed
    if more:  # what opening finds is known before the run
        assert f"{len(reasons) - 1} records cannot be used" in done.out


def test_a_records_feature_does_not_depend_on_bad_neighbours(tmp_path):
    records = copy.deepcopy(RECORDS[:12])
    records[3]["image"] = "nowhere.png"
    records[7] = 5
    run_step(tmp_path / "good", "--input_file", write_records(tmp_path / "good.json", RECORDS[:12]))
    data = write_records(tmp_path / "bad.json", records)
    done = run_step(tmp_path / "bad", "--input_file", data, "--on_bad_record", "skip")
    assert done.code == 0
    good, bad = (torch.load(tmp_path / name / "output_0.pt", weights_only=True) for name in ("good", "bad"))
    same = [row for row in range(12) if row not in (3, 7)]
    assert torch.allclose(good["features"][same].float(), bad["features"][same].float(), atol=2e-3)
    assert torch.allclose(good["norms"][same], bad["norms"][same], rtol=1e-5)


def test_bad_records_stop_the_run_before_the_model_is_loaded(images, hostile, tmp_path, monkeypatch):
    data, records, reasons = hostile
    monkeypatch.setattr("tive.models.llava.load", lambda *_: pytest.fail("the model was loaded"))
    out = tmp_path / "features"
    done = run_step(out, "--input_file", data, "--image_folder", images, "--check_images", "full")
    assert done.code == 2 and done.err.splitlines()[-1].startswith("error: ")
    assert "(on_bad_record skip)" in done.err
    listed = json.loads((out / "bad_records_0.json").read_text())
    unsupervised = {row for row, reason in reasons.items() if reason == "no supervised token"}
    assert [entry["row"] for entry in listed] == sorted(set(reasons) - unsupervised)
    assert f"{len(listed)} of {len(records)} records cannot be used" in done.err
    assert f"{sum(reason == 'missing image' for reason in reasons.values()):>8}  missing image" in done.out
    assert done.out.count("(id 7): ") == 10 - sum(entry["id"] is None for entry in listed[:10])
    assert "/etc/hostname" in {entry["image"] for entry in listed}


def test_the_list_goes_when_the_records_are_repaired(tmp_path):
    records = copy.deepcopy(RECORDS[:4])
    records[0]["image"] = "nowhere.png"
    out = tmp_path / "features"
    assert run_step(out, "--input_file", write_records(tmp_path / "data.json", records)).code == 2
    assert (out / "bad_records_0.json").exists()
    assert run_step(out, "--input_file", write_records(tmp_path / "data.json", RECORDS[:4])).code == 0
    assert not (out / "bad_records_0.json").exists()


def test_images_under_another_extension_are_used_and_reported(tmp_path):
    records = [copy.deepcopy(item) for item in RECORDS[:6]]
    for item in records:
        if "image" in item:
            item["image"] = item["image"].replace(".png", ".jpg")
    count = sum("image" in item for item in records)
    done = run_step(tmp_path / "renamed", "--input_file", write_records(tmp_path / "data.json", records))
    assert done.code == 0 and f"{count} records have their image under another extension" in done.out
    assert "img_0.jpg is img_0.png" in done.out
    run_step(tmp_path / "plain", "--input_file", write_records(tmp_path / "plain.json", RECORDS[:6]))
    features = [
        torch.load(tmp_path / name / "output_0.pt", weights_only=True)["features"] for name in ("renamed", "plain")
    ]
    assert torch.equal(*features)


def features_of(out: Path) -> torch.Tensor:
    return torch.load(out / "output_0.pt", weights_only=True)["features"]


def test_an_image_under_images_is_the_image(tmp_path):
    records = copy.deepcopy(RECORDS[:6])
    for number, item in enumerate(records):
        if "image" in item:
            image = item.pop("image")
            item["images"] = [image] if number % 2 else image
    plain = run_step(tmp_path / "plain", "--input_file", write_records(tmp_path / "plain.json", RECORDS[:6]))
    done = run_step(tmp_path / "out", "--input_file", write_records(tmp_path / "data.json", records))
    assert plain.code == done.code == 0
    assert torch.equal(features_of(tmp_path / "out"), features_of(tmp_path / "plain"))


@pytest.mark.parametrize("key", ["video", "videos", "audio", "image_path", "image_file", "img"])
def test_media_that_are_not_read_are_never_taken_for_text(tmp_path, key):
    records = copy.deepcopy(RECORDS[:4])
    records[2].pop("image", None)
    records[2][key] = "a.mp4"
    done = run_step(tmp_path / "out", "--input_file", write_records(tmp_path / "data.json", records))
    assert done.code == 2 and f"under `{key}`" in done.out and "1 of 4 records cannot be used" in done.err


def test_a_leading_gpt_turn_changes_nothing_even_with_a_tag(tmp_path):
    """As in LLaVA's trainer, which drops it."""
    records = [record for record in copy.deepcopy(RECORDS) if "image" in record][:2]
    run_step(tmp_path / "without", "--input_file", write_records(tmp_path / "without.json", records))
    for record in records:
        record["conversations"].insert(0, {"from": "gpt", "value": "Hello, you sent <image>"})
    done = run_step(tmp_path / "with", "--input_file", write_records(tmp_path / "with.json", records))
    assert done.code == 0, done.err
    assert torch.equal(features_of(tmp_path / "with"), features_of(tmp_path / "without"))


def test_a_tag_without_an_image_is_counted_and_said(tmp_path):
    records = copy.deepcopy(RECORDS[:6])
    for row in (2, 4):
        records[row].pop("image", None)
        records[row]["conversations"][0]["value"] = "<image>\nWhat is it?"
    done = run_step(tmp_path / "out", "--input_file", write_records(tmp_path / "data.json", records))
    assert done.code == 0 and "2 records have <image> in their text and no image" in done.out
    assert "the first: record 2" in done.out


def test_an_image_that_is_too_thin_is_left_out_and_the_full_check_finds_it(tmp_path):
    folder = shutil.copytree(GOLDEN / "images", tmp_path / "images")
    Image.new("RGB", (6, 30_000)).save(folder / "thin.png")
    records = copy.deepcopy(RECORDS[:4])
    records.append(record("thin.png"))
    data = write_records(tmp_path / "data.json", records)
    found = run_step(tmp_path / "out", "--input_file", data, "--image_folder", folder, "--check_images", "full")
    assert found.code == 2 and "1 of 5 records cannot be used" in found.err
    left_out = "unreadable image: above 178956970 pixels when it is padded to a square"
    assert left_out in found.out
    done = run_step(tmp_path / "out", "--input_file", data, "--image_folder", folder, "--on_bad_record", "skip")
    assert done.code == 0, done.err
    entries = json.loads((tmp_path / "out" / "manifest_0.json").read_text())["left_out"]
    assert [(entry["row"], entry["reason"]) for entry in entries] == [(4, left_out)]


@pytest.mark.parametrize("kind", ["no supervised token", "template mismatch"])
def test_many_records_without_supervised_tokens_stop_the_run_with_the_hint(tmp_path, kind):
    records, model_base = RECORDS[:], GOLDEN / "vicuna"
    if kind == "no supervised token":
        for row in (3, 30, 41):
            records[row] = record() | {"conversations": TOO_LONG}
    else:  # a tokenizer of another model
        model_base = shutil.copytree(model_base, tmp_path / "base")
        config = json.loads((model_base / "tokenizer_config.json").read_text())
        (model_base / "tokenizer_config.json").write_text(json.dumps(config | {"add_bos_token": False}))
    data = write_records(tmp_path / "data.json", records)
    done = run_step(tmp_path / "out", "--input_file", data, "--model_base", model_base, "--on_bad_record", "skip")
    assert done.code == 2 and "above 2% of the chunk: the tokenizer or the template is not" in done.err
    assert done.err.count("error:") == 1 and "Traceback" not in done.err
    assert not (tmp_path / "out" / "manifest_0.json").exists()
    listed = json.loads((tmp_path / "out" / "bad_records_0.json").read_text())
    assert {entry["reason"] for entry in listed} == {kind} and str(tmp_path / "out" / "bad_records_0.json") in done.err
    if kind == "no supervised token":
        assert [entry["row"] for entry in listed] == [3, 30, 41]


def test_the_command_that_the_stopped_run_gives_writes_data_that_goes_through(tmp_path):
    records = copy.deepcopy(RECORDS)
    for row in (3, 30, 41):
        records[row] = record() | {"conversations": TOO_LONG}
    data = write_records(tmp_path / "data.json", records)
    stopped = run_step(tmp_path / "out", "--input_file", data)
    subprocess.run(re.search("`([^`]*)`", stopped.err)[1], shell=True, cwd="/", check=True)
    done = run_step(tmp_path / "out_good", "--input_file", tmp_path / "data_good.json")
    assert done.code == 0 and "45 features, 0 records left out" in done.out


def test_few_records_without_supervised_tokens_are_left_out(tmp_path):
    records = RECORDS[:]
    records[41] = record() | {"conversations": TOO_LONG}
    done = run_step(tmp_path / "out", "--input_file", write_records(tmp_path / "data.json", records))
    assert done.code == 0 and "47 features, 1 records left out" in done.out


@pytest.mark.parametrize("bad, code", [({20}, 0), ({1, 9, 20}, 2)])
def test_gradients_that_are_not_finite_are_left_out_and_many_stop_the_run(tmp_path, monkeypatch, bad, code):
    whole, ready, marked = GradientStep.__call__, GradientStep.ready, {}

    def marking(step, records):
        made = ready(step, records)
        marked[id(made)] = made, [place for place, item in enumerate(records) if pickle.dumps(item) in wanted]
        return made

    def poisoned(step, batch):
        results = whole(step, batch)
        results["norms"][marked[id(batch)][1]] = float("nan")
        return results

    reference = load_golden()
    wanted = [pickle.dumps(encode_golden(reference)[row]) for row in bad]
    monkeypatch.setattr(GradientStep, "ready", marking)
    monkeypatch.setattr(GradientStep, "__call__", poisoned)
    done = run_step(tmp_path / "out")
    assert done.code == code
    if code:
        assert (
            "3 of them (not finite) are above 2% of the chunk" in done.err
            and "try the dtype bfloat16 or float32" in done.err
        )
    else:
        entries = json.loads((tmp_path / "out" / "manifest_0.json").read_text())["left_out"]
        assert entries == [{"row": 20, "id": RECORDS[20]["id"], "reason": "not finite"}]


def test_an_image_that_goes_bad_during_the_run_stops_it_and_the_repaired_run_goes_on(tmp_path, monkeypatch):
    folder = shutil.copytree(GOLDEN / "images", tmp_path / "images")
    image = folder / RECORDS[20]["image"]
    good = image.read_bytes()
    image.write_bytes(good[:60])
    stopped = run_step(tmp_path / "out", "--image_folder", folder)
    assert stopped.code == 2 and "error: record 20: unreadable image" in stopped.err
    image.write_bytes(good)
    done = run_step(tmp_path / "out", "--image_folder", folder)
    assert done.code == 0 and "continuing: 16 of 48" in done.out


def test_a_dry_run_says_what_the_run_costs_and_writes_no_features(tmp_path):
    done = run_step(tmp_path / "out", "--dry_run", 6)
    assert done.code == 0
    for part in ("records/s", "waiting for data", "net cost", "forward", "peak memory", "GB for the features"):
        assert part in done.out
    plans = re.findall(r"N = (\d+): (\d+) records, .* at most ([\d.]+)%", done.out)
    assert ("100", "48", "0.0") in plans and float(min(plans, key=lambda plan: int(plan[1]))[2]) <= 2
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--image_folder", "nowhere"], "the image folder nowhere is not there"),
        (["--image_folder", ""], "image_folder"),
        (["--input_file", "nowhere.json"], "cannot read nowhere.json"),
        (["--model_base", "nowhere"], "nowhere is neither a folder nor"),
        (["--model_path", "nowhere"], "nowhere holds no model"),
        (["--vision_tower", "./nowhere"], "the vision tower ./nowhere is not there"),
        (["--output_file", GOLDEN / "data.json"], "cannot write to the folder"),
        (["--num_chunks", 2], "num_chunks 2 without chunk_idx"),
        (["--num_chunks", 0], "--num_chunks 0 is not a positive number"),
        (["--chunk_idx", 3, "--num_chunks", 2], "chunk 3 (arguments) is not one of 0 .. 1"),
        (["--device", "tpu"], "'tpu' is not a device"),
    ],
    ids=str,
)
def test_what_is_not_there_is_named_before_anything_is_written(tmp_path, more, message):
    done = run_step(tmp_path / "out", *more)
    assert done.code == 2 and message in done.err and "Traceback" not in done.err
    assert not (tmp_path / "out").exists() or not os.listdir(tmp_path / "out")


def test_an_empty_chunk_past_the_end_is_complete_at_once(tmp_path):
    done = run_step(tmp_path / "out", "--num_chunks", 47, "--chunk_idx", 46)
    assert done.code == 0
    assert torch.load(tmp_path / "out" / "output_46.pt", weights_only=True)["features"].shape == (0, 512)
    assert json.loads((tmp_path / "out" / "output_norm_46.json").read_text()) == []
