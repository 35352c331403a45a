"""A data file in another container is named, with a command that turns it into records."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import subprocess
import tarfile
import threading
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers.records import JSON_VALUES, record_with, write
from tive.data.containers import container_of
from tive.data.records import open_records
from tive.util.errors import UserError

RECORDS = [record_with(("human", f"é {number}?"), ("gpt", "A."), dataset="a") for number in range(3)]
TEXT = json.dumps(RECORDS, ensure_ascii=False, indent=1)
BY_KEY = {f"r{number}": record for number, record in enumerate(RECORDS)}


def read(path):
    return list(open_records(path))


def made_by_the_command(path, said):
    """The records in the file that the command in the message makes, pasted in another folder."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path)) and said in message and "\n" not in message
    subprocess.run(re.search("`(.*)`", message)[1], shell=True, check=True, cwd="/")
    (made,) = [other for other in path.parent.iterdir() if other.name.endswith("_records.json")]
    return read(made)


def archive(kind: str, members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as made:
            for name, content in members.items():
                made.writestr(name, content)
        return buffer.getvalue()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            made.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


CONTAINERS = {
    "gzip": ("a b.json.gz", gzip.compress(TEXT.encode()), "is gzip"),
    "bzip2": ("a.bz2", bz2.compress(TEXT.encode()), "is bzip2"),
    "xz": ("a.xz", lzma.compress(TEXT.encode()), "is xz"),
    "tar": ("a.tar", archive("tar", {"data.json": TEXT.encode()}), "is a tar archive"),
    "UTF-16 with a mark": ("a.json", TEXT.encode("utf-16"), "is UTF-16 text"),
    "UTF-16 without": ("a.json", TEXT.encode("utf-16-be"), "is UTF-16BE text"),
    "UTF-32 with a mark": ("a.json", TEXT.encode("utf-32"), "is UTF-32 text"),
    "UTF-32 without": ("a.json", TEXT.encode("utf-32-le"), "is UTF-32LE text"),
    "a list in an object": (
        "a.json",
        json.dumps({"version": 1, "about": {"a": [1]}, "data": RECORDS}).encode(),
        "is an object with a list of records under 'data'",
    ),
    "a list under an odd key": (
        "it's $HOME.json",
        json.dumps({'the "data" of it\'s $HOME': RECORDS}).encode(),
        "is an object with a list of records",
    ),
    "an object by id": ("a.json", json.dumps(BY_KEY, indent=1).encode(), "is an object whose values are records"),
    "an object that breaks off after its head": (
        "a.json",
        json.dumps({"data": RECORDS * 5000}).encode(),
        "is an object with a list of records under 'data'",
    ),
}


@pytest.mark.parametrize(("name", "content", "said"), CONTAINERS.values(), ids=CONTAINERS)
def test_a_container_is_named_and_the_command_that_is_told_makes_the_records(tmp_path, name, content, said):
    path = write(tmp_path / name, content)
    assert made_by_the_command(path, said)[: len(RECORDS)] == RECORDS


def test_a_list_of_questions_and_answers_in_an_object_is_one_of_records(tmp_path):
    records = [{"question": "q", "answer": "a"}] * 2
    path = write(tmp_path / "a.json", json.dumps({"data": records}))
    assert made_by_the_command(path, "a list of records under 'data'") == records


def test_lines_of_objects_with_questions_in_them_are_records(tmp_path):
    records = [{"image": f"{row}.png", "qa": [{"question": "q", "answer": "a"}]} for row in range(2)]
    assert read(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)))) == records


@pytest.mark.parametrize("records", [RECORDS, [{"id": row, "question": "a", "answer": "b"} for row in range(3)]])
@pytest.mark.parametrize("column", [list, lambda values: dict(enumerate(values))], ids=["lists", "pandas"])
def test_a_table_by_columns_is_named_and_the_command_makes_records_of_it(tmp_path, records, column):
    columns = {key: column([record[key] for record in records]) for key in records[0]}
    path = write(tmp_path / "-a table.json", json.dumps(columns))
    assert made_by_the_command(path, "a table by columns") == records


@pytest.mark.parametrize("key", ["question", "prompt", "messages"])
def test_one_record_is_no_table(tmp_path, key):
    record = {"qa": [{"question": "a"}], key: "a"} if key == "question" else {"a": ["b"], key: [{"role": "user"}]}
    assert read(write(tmp_path / "a.jsonl", json.dumps(record))) == [record]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_shard_of_samples_becomes_records_and_an_image_folder_by_one_command(tmp_path, kind):
    members = {f"0/{row}.{end}": b"" for row in range(3) for end in ("PNG", "json", "txt")}
    members |= {f"0/{row}.json": json.dumps(record).encode() for row, record in enumerate([*RECORDS, RECORDS[0]])}
    path = write(tmp_path / f"a shard.{kind}", archive(kind, members))
    made = made_by_the_command(path, "WebDataset")
    assert made == [*(record | {"image": f"0/{row}.PNG"} for row, record in enumerate(RECORDS)), RECORDS[0]]
    assert (tmp_path / "a shard_unpacked" / "0" / "2.PNG").is_file()


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("other", ["README.md", "__MACOSX/._data.json", "more.json", "images/0.png"])
def test_an_archive_of_several_files_becomes_a_folder_and_its_data_file_is_named(tmp_path, kind, other):
    path = write(tmp_path / f"a b.{kind}", archive(kind, {"d/data.json": TEXT.encode(), other: b"x"}))
    with pytest.raises(UserError, match=r"unpack it with .*d/data\.json") as caught:
        read(path)
    subprocess.run(re.search("`(.*)`", str(caught.value))[1], shell=True, check=True, cwd="/")
    assert read(tmp_path / "a b_unpacked" / "d" / "data.json") == RECORDS
    assert ("image folder" in str(caught.value)) == (other == "images/0.png")


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_of_images_is_no_data_file_and_becomes_a_folder(tmp_path, kind):
    path = write(tmp_path / f"images.{kind}", archive(kind, {"a/0.png": b"x", "1.JPG": b"y"}))
    with pytest.raises(UserError, match=f"{kind} of images") as caught:
        read(path)
    subprocess.run(re.search("`(.*)`", str(caught.value))[1], shell=True, check=True, cwd="/")
    assert (tmp_path / "images_unpacked" / "a" / "0.png").read_bytes() == b"x"
    assert str(tmp_path / "images_unpacked") in str(caught.value)


FILES = {
    "InternVL's": {"sharegpt": {"root": "coco/", "annotation": "sharegpt.jsonl", "repeat_time": 1}},
    "LLaMA-Factory's": {"demo": {"file_name": "demo.json", "formatting": "sharegpt"}, "other": {"hf_hub_url": "a/b"}},
    "LLaVA-NeXT's": [{"json_path": "a.json", "sampling_strategy": "all"}],
    "LLaVA-NeXT's, in other words": {"datasets": [{"sampling_strategy": "all", "json_path": "a.json"}]},
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_list_of_data_files_is_no_record(tmp_path, content):
    with pytest.raises(UserError, match="list of data files"):
        read(write(tmp_path / "a.json", json.dumps(content)))


SAID = {
    "zstd": (b"\x28\xb5\x2f\xfd\x24", "zstd -dc"),
    "a cut zip": (b"PK\x03\x04\x14", "zip archive that is damaged"),
    "SQLite": (b"SQLite format 3\0\x10", "JSON"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "JSON"),
    "a pickle": (b"\x80\x04\x95", "JSON"),
    "a NumPy array": (b"\x93NUMPY\x01", "JSON"),
    "YAML": (b"datasets:\n  - json_path: a.json\n", "JSON"),
    "CSV": (b"id,image,text\n1,a.png,hello\n", "JSON"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>", "download"),
}


@pytest.mark.parametrize(("content", "named"), SAID.values(), ids=SAID)
def test_what_needs_more_than_a_command_is_named_in_one_line(tmp_path, content, named):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)
    assert named in str(caught.value)


def test_a_pipe_is_refused_as_a_pipe_and_not_read(tmp_path):
    reading, writing = os.pipe()
    try:
        with pytest.raises(UserError, match=r"is a pipe or a device.*to a file first"):
            read(f"/dev/fd/{reading}")
    finally:
        os.close(reading)
        os.close(writing)
    os.mkfifo(tmp_path / "a.json")
    thread = threading.Thread(target=lambda: pytest.raises(UserError, read, tmp_path / "a.json"), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive(), "waits for a writer"


@settings(max_examples=200, deadline=None)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4), min_size=1, max_size=3),
    lines=st.booleans(),
    cut=st.integers(1, 200),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n ", b"\xef\xbb\xbf \t\n"]),
    turns=st.sampled_from(["conversations", "messages"]),
)
def test_records_are_never_taken_for_another_container(tmp_path_factory, records, lines, cut, mark, turns):
    records = [{**record, turns: [{"from": "human", "value": "x"}]} for record in records]
    text = "\n".join(map(json.dumps, records)) if lines else json.dumps(records)
    path = tmp_path_factory.getbasetemp() / "a.json"
    assert container_of(mark + text.encode(), path) is None
    assert container_of((mark + text.encode())[: len(mark) + cut], path) is None


@given(content=st.binary(max_size=60) | st.binary(max_size=20).map(lambda tail: b"{" + tail))
def test_whatever_the_first_bytes_are_the_answer_is_one_line_or_none(tmp_path_factory, content):
    problem = container_of(content, tmp_path_factory.getbasetemp() / "a.json")
    assert problem is None or "\n" not in problem
