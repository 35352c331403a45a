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
import sys
import tarfile
import threading

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


def tar(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("data.json")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


CONTAINERS = {
    "gzip": ("a b.json.gz", gzip.compress(TEXT.encode()), "is gzip"),
    "bzip2": ("a.bz2", bz2.compress(TEXT.encode()), "is bzip2"),
    "xz": ("a.xz", lzma.compress(TEXT.encode()), "is xz"),
    "tar": ("a.tar", tar(TEXT.encode()), "is a tar archive"),
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
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} {said}")
    assert "\n" not in message
    command = re.search("`(.*)`", message)[1]
    subprocess.run(command.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    (made,) = [other for other in tmp_path.iterdir() if other != path]
    assert read(made)[: len(RECORDS)] == RECORDS


SAID = {
    "Parquet": (b"PAR1\x15\x04", "Parquet", "read_parquet"),
    "Arrow": (b"ARROW1\0\0", "Arrow", "read_feather"),
    "zstd": (b"\x28\xb5\x2f\xfd\x24", "zstd", "zstd -dc"),
    "zip": (b"PK\x03\x04\x14", "zip", "unzip -p"),
    "a YAML mixture": (b"datasets:\n  - json_path: a.json\n", "YAML", "JSON files that it names"),
    "a YAML list": (b"# data\n- a.json\n", "YAML", "JSON files that it names"),
    "SQLite": (b"SQLite format 3\0\x10", "SQLite", "JSON Lines"),
    "HDF5": (b"\x89HDF\r\n\x1a\n\0", "HDF5", "JSON Lines"),
    "a pickle": (b"\x80\x04\x95", "pickle", "JSON Lines"),
    "a NumPy array": (b"\x93NUMPY\x01", "NumPy", "JSON Lines"),
    "CSV": (b"id,image,text\n1,a.png,hello\n", "CSV", "`conversations`"),
    "CSV in quotes": (b'"id","text"\r\n1,"[a]"\r\n', "CSV", "`conversations`"),
    "columns between tabs": (b"id\timage\n1\ta.png\n", "CSV", "`conversations`"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS", "git lfs pull"),
    "a web page": (b"\n<!DOCTYPE html><html>", "web page", "download"),
}


@pytest.mark.parametrize(("content", "kind", "remedy"), SAID.values(), ids=SAID)
def test_what_needs_more_than_a_command_is_named_with_the_remedy(tmp_path, content, kind, remedy):
    path = write(tmp_path / "a.json", content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert kind in str(caught.value) and remedy in str(caught.value)


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
