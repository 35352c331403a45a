"""Feature files: what is written is read, and what does not belong together or is damaged is refused in one line."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.feature_files import (
    match_for,
    mixture,
    random_features,
    scores_of,
    write_features,
    write_release_features,
)
from tive.data.records import open_records
from tive.features.chunk import LeftOutRecord, Match, open_chunks, write_chunk
from tive.features.lookup import open_features
from tive.util.errors import UserError
from tive.util.files import sha256_of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data file, its features and norms, and a folder with three chunks."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data.json").write_text(json.dumps(mixture()))
    features, norms = random_features(len(mixture()))
    features[5], norms[5] = 0, float("nan")
    write_features(folder / "features", folder / "data.json", features, norms, left_out={5: "image missing"})
    return folder, features, norms


@pytest.fixture
def case(made, tmp_path):
    """A copy of the folder that a test may harm, and its records."""
    shutil.copytree(made[0] / "features", tmp_path / "features")
    return tmp_path / "features", open_records(made[0] / "data.json")


def refusal(folder, records, *arguments) -> str:
    with pytest.raises(UserError) as error:
        open_features(folder, records, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def rewrite(path: Path, change) -> None:
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_what_is_written_is_read_memory_mapped_in_order(case, made):
    folder, records = case
    chunks = open_features(folder, records, 3).chunks
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [(0, 26), (26, 52), (52, 78)]
    assert torch.equal(torch.cat([block for chunk in chunks for block in chunk.blocks]), made[1])
    assert np.array_equal(
        np.concatenate([chunk.scores["norms"] for chunk in chunks]), made[2].double().numpy(), equal_nan=True
    )
    assert chunks[0].left_out == [LeftOutRecord(5, None, "image missing")]
    assert chunks[0].manifest["sha256"] == sha256_of(folder / "output_0.pt")
    mapped = Path("/proc/self/maps")
    assert not mapped.exists() or str(folder / "output_2.pt") in mapped.read_text()


def test_norms_are_also_a_json_list_as_in_the_release(case, made):
    norms = json.loads((case[0] / "output_norm_0.json").read_text())
    assert norms[5] is None and norms[:5] == made[2][:5].tolist() and len(norms) == 26


def test_a_part_of_a_larger_tensor_is_written_without_the_rest(tmp_path, made):
    match = match_for(made[0] / "data.json", 78, 3, 0, 24)
    write_chunk(tmp_path, Match(**match), np.zeros((100_000, 24), np.float16)[:26], scores_of(torch.ones(26)), [], {})
    assert os.path.getsize(tmp_path / "output_0.pt") < 10_000


def test_an_empty_chunk_past_the_end_is_read(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps(mixture({"vqa": 5})))
    features, norms = random_features(5)
    write_features(tmp_path / "features", tmp_path / "data.json", features, norms, num_chunks=4)
    chunks = open_chunks(tmp_path / "features")
    assert [chunk.stop - chunk.start for chunk in chunks] == [2, 2, 1, 0]


@pytest.mark.parametrize("old_format", [False, True])
def test_the_releases_files_are_read_in_both_formats_of_torch(tmp_path, made, old_format):
    _, features, norms = made
    write_release_features(tmp_path, features, norms, 2, _use_new_zipfile_serialization=not old_format)
    chunks = open_chunks(tmp_path)
    assert torch.equal(torch.cat([block for chunk in chunks for block in chunk.blocks]), features)
    assert all(chunk.manifest == {} for chunk in chunks)


def test_a_failing_write_leaves_no_file_under_its_name(tmp_path, made, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(UserError, match="No space left"):
        match = Match(**match_for(made[0] / "data.json", 78, 3, 0, 24))
        write_chunk(tmp_path, match, made[1][:26].numpy(), scores_of(made[2][:26]), [], {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_chunk_is_named(case, missing):
    folder, records = case
    (folder / f"output_{missing}.pt").unlink()
    line = refusal(folder, records)
    assert f"chunk {missing} of 3 missing" in line and f"chunk_idx {missing}" in line


def test_a_chunk_without_manifest_is_not_finished(case):
    folder, records = case
    (folder / "manifest_1.json").unlink()
    assert "chunk 1 of 3 missing or not finished" in refusal(folder, records)


def test_a_wrong_chunk_num_is_refused(case):
    assert "3 chunks, not 8; leave chunk_num out" in refusal(*case, 8)


@pytest.mark.parametrize(
    "key, value",
    [
        ("model", "b" * 64),
        ("projector", "trak_cuda"),
        ("proj_seed", 7),
        ("proj_dim", 12),
        ("counted_parameters", 5),
        ("grad_modules", "all"),
        ("dtype", "bfloat16"),
        ("gradient", "adam"),
        ("num_chunks", 4),
        ("data_sha256", "c" * 64),
    ],
)
def test_chunks_of_different_runs_are_refused_by_what_differs(made, tmp_path, key, value):
    folder, features, norms = made
    write_features(
        tmp_path,
        folder / "data.json",
        features,
        norms,
        change=lambda match: match.update({key: value} if match["chunk_idx"] == 1 else {}),
    )
    line = refusal(tmp_path, open_records(folder / "data.json"))
    assert f"differ in `{key}`" in line and "chunk 0, chunk 2 " in line and "; chunk 1 " in line


def test_overlapping_chunks_are_refused(made, tmp_path):
    folder, features, norms = made

    def shift(match):
        if match["chunk_idx"] == 1:
            match.update(start=match["start"] - 2, stop=match["stop"] - 2)

    write_features(tmp_path, folder / "data.json", features, norms, change=shift)
    assert "chunk 1 overlaps" in refusal(tmp_path, open_records(folder / "data.json"))


def test_a_chunk_and_a_manifest_of_two_runs_are_refused(case):
    folder, records = case
    for number in range(3):
        rewrite(folder / f"manifest_{number}.json", lambda manifest: manifest["match"].update(proj_seed=3))
    assert "differs from manifest_0.json in `proj_seed`" in refusal(folder, records)


def test_chunks_under_each_others_names_are_refused(case):
    folder, records = case
    for name in ("output_{}.pt", "manifest_{}.json"):
        os.rename(folder / name.format(0), folder / "aside")
        os.rename(folder / name.format(1), folder / name.format(0))
        os.rename(folder / "aside", folder / name.format(1))
    assert "it describes chunk 1" in refusal(folder, records)


def test_an_empty_folder_a_missing_one_and_one_of_two_kinds_are_refused(case, made, tmp_path):
    folder, records = case
    (tmp_path / "empty").mkdir()
    assert "no finished chunk" in refusal(tmp_path / "empty", records)
    (tmp_path / "empty" / "105").mkdir()
    (tmp_path / "empty" / "105" / "manifest_0.json").touch()
    assert f"name one below it, as {tmp_path}/empty/105" in refusal(tmp_path / "empty", records)
    assert "cannot read the feature folder" in refusal(tmp_path / "nowhere", records)
    write_release_features(folder, made[1], made[2], 1)
    assert "two kinds" in refusal(folder, records)


def test_the_releases_files_are_refused_when_they_do_not_fit(made, tmp_path):
    _, features, norms = made
    records = open_records(made[0] / "data.json")
    write_release_features(tmp_path / "less", features[:70], norms[:70], 2)
    assert "70 records" in refusal(tmp_path / "less", records)
    write_release_features(tmp_path / "gap", features, norms, 3)
    (tmp_path / "gap" / "output_1").unlink()
    assert "chunk 1 of 3 missing" in refusal(tmp_path / "gap", records)
    write_release_features(tmp_path / "norms", features, norms, 2)
    (tmp_path / "norms" / "output_norm_1.json").write_text("[1.0]")
    assert "1 norms of 39 records" in refusal(tmp_path / "norms", records)
    (tmp_path / "norms" / "output_norm_1.json").write_text('["1"]')
    assert "output_norm_1.json" in refusal(tmp_path / "norms", records)
    write_release_features(tmp_path / "widths", features, norms, 2)
    torch.save([torch.zeros(39, 7)], tmp_path / "widths" / "output_1")
    assert "differ in dimension" in refusal(tmp_path / "widths", records)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.pop("match"),
        lambda manifest: manifest["match"].pop("model"),
        lambda manifest: manifest["match"].update(start="0"),
        lambda manifest: manifest["match"].update(num_chunks=True),
        lambda manifest: manifest["match"].update(stop=10**30),
        lambda manifest: manifest.pop("left_out"),
        lambda manifest: manifest.update(left_out=[{"row": 77, "reason": "of another chunk"}]),
        lambda manifest: manifest.update(left_out=[{"row": 1}]),
        lambda manifest: manifest["match"].update(num_chunks=10**15),
    ],
)
def test_a_manifest_that_is_not_one_is_refused(case, change):
    folder, records = case
    rewrite(folder / "manifest_0.json", change)
    refusal(folder, records)


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Payload:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def bad_contents(match, features, norms):
    good = {"features": features, "norms": norms, "match": match}
    return {
        "payload": saved({**good, "features": Payload()}),
        "plain pickle": pickle.dumps(Payload()),
        "empty": b"",
        "random": bytes(range(256)) * 40,
        "truncated": saved(good)[:-200],
        "half": saved(good)[:700],
        "cut before its last page": saved(good | {"features": torch.zeros(26, 4096).half()})[:5000],
        "a list": saved([features]),
        "no norms": saved({"features": features, "match": match}),
        "match of a tensor": saved({**good, "match": {**match, "proj_seed": torch.zeros(3)}}),
        "integers": saved({**good, "features": features.int()}),
        "three dimensions": saved({**good, "features": features[None]}),
        "sparse": saved({**good, "features": features.float().to_sparse()}),
        "expanded": saved({**good, "features": torch.zeros(1, 24).half().expand(26, 24)}),
        "fewer rows": saved({**good, "features": features[:9].clone()}),
        "fewer norms": saved({**good, "norms": norms[:9].clone()}),
        "meta": saved({**good, "features": features.to("meta")}),
        "another archive": zip_of("hello"),
    }


def zip_of(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("file.txt", text)
    return buffer.getvalue()


@pytest.mark.parametrize("name", bad_contents({}, torch.zeros(26, 24).half(), torch.ones(26)))
def test_a_file_that_holds_something_else_is_refused_and_nothing_in_it_runs(case, made, name, monkeypatch):
    folder, records = case
    monkeypatch.chdir(folder.parent)
    match = json.loads((folder / "manifest_0.json").read_text())["match"]
    (folder / "output_0.pt").write_bytes(bad_contents(match, made[1][:26].clone(), made[2][:26].clone())[name])
    line = refusal(folder, records)
    assert "output_0.pt" in line and "make this chunk again" in line
    assert not Path("owned").exists()


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_files_are_refused_in_one_line_or_read_with_the_right_shape(made, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    shutil.copytree(made[0] / "features", folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["output_0.pt", "manifest_0.json"]))
    content = bytearray((folder / name).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (folder / name).write_bytes(content)
    try:
        chunks = open_chunks(folder)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (
            sum(len(chunk.scores["norms"]) for chunk in chunks) == sum(len(chunk.blocks[0]) for chunk in chunks) == 78
        )
    shutil.rmtree(folder)


def test_a_folder_of_an_earlier_version_is_read(case, made):
    """Its `match` has no dtype and no EL2N, which stand elsewhere in the manifest, and has a key that is no more."""
    folder, _ = case
    for number in range(3):
        path = folder / f"manifest_{number}.json"
        manifest = json.loads(path.read_text())
        earlier = {name: value for name, value in manifest["match"].items() if name not in ("dtype", "el2n")}
        earlier |= {"last_layers": None, "projector": "sparse"}
        run = earlier | {"batch_size": 16, "window": 512, "el2n": False}
        path.write_text(json.dumps(manifest | {"match": earlier, "run": run, "dtype": "float32"}))
        content = torch.load(folder / f"output_{number}.pt", weights_only=True)
        torch.save(content | {"match": earlier}, folder / f"output_{number}.pt")
    chunks = open_chunks(folder)
    assert torch.equal(torch.cat([block for chunk in chunks for block in chunk.blocks]), made[1])
    assert {chunk.match.dtype for chunk in chunks} == {"float32"} and not any(chunk.match.el2n for chunk in chunks)
