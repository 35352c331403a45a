"""A first look at data: what is counted of every record, of JSON and of Parquet, and one page of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from scripts import describe_data
from tests.helpers.feature_files import call, refusal
from tive.data.records import open_records
from tive.data.tasks import NO_TASK
from tive.report.description import describe, look_at_images, table_of_tasks


def picture(number: int) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.full((20, 30 + number, 3), number, np.uint8)).save(content, "PNG")
    return content.getvalue()


def turns(*answers: str) -> list[dict[str, str]]:
    return [turn for text in answers for turn in ({"from": "human", "value": "What?"}, {"from": "gpt", "value": text})]


PICTURES = {"0.png": picture(0), "copy of 0.png": picture(0), "1.png": picture(1), "bad.png": b"no picture"}
RECORDS = [
    {"image": ["0.png"], "conversations": turns("abc"), "dataset": "a"},
    {"image": ["copy of 0.png"], "conversations": turns("abc"), "dataset": "a"},
    {"image": ["0.png", "1.png"], "conversations": turns("abcde", "f"), "dataset": "a"},
    {"image": [], "conversations": turns("abcdefg"), "dataset": "b"},
    {"image": ["bad.png"], "conversations": turns("x"), "dataset": "b"},
    {"image": [], "conversations": [], "dataset": "b"},
    {"image": [], "conversations": turns("y"), "dataset": None},
]


@pytest.fixture(params=["json", "parquet"])
def data(request, tmp_path):
    """The same records as JSON beside image files, and as Parquet with the images in the rows; and the folder."""
    if request.param == "json":
        for name, content in PICTURES.items():
            (tmp_path / name).write_bytes(content)
        (tmp_path / "data.json").write_text(json.dumps(RECORDS))
        return tmp_path / "data.json", tmp_path
    rows = [
        record | {"image": [{"bytes": PICTURES[name], "path": name} for name in record["image"]]} for record in RECORDS
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "data.parquet", row_group_size=2)
    return tmp_path / "data.parquet", tmp_path


def test_every_record_is_counted_once_with_its_images_answers_and_text(data):
    description = describe(open_records(data[0]), "dataset")
    assert {task: rows.tolist() for task, rows in description.tasks.items()} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
        NO_TASK: [6],
    }
    assert description.images.tolist() == [1, 1, 2, 0, 1, 0, 0]
    assert description.answers.tolist() == [1, 1, 2, 1, 1, 0, 1]
    assert description.lengths_of(np.array([2, 3])).tolist() == [5, 1, 7]
    assert description.repeated.tolist() == [False, True, *[False] * 5]
    assert [*description.problems] == [5]


def test_images_with_equal_bytes_and_broken_ones_are_told_where_all_are_read(data):
    path, folder = data
    looks = look_at_images(describe(open_records(path), "dataset"), str(folder))
    assert [*looks.broken] == [4]
    assert sorted(map(tuple, looks.sizes.tolist()))[-1] == (31, 20)
    # A file that two records name is read once; in rows each has its own bytes.
    assert looks.repeated == (1 if path.suffix == ".json" else 2)


def test_a_task_that_is_called_all_has_its_line_beside_that_of_all_records(tmp_path):
    records = [{"conversations": turns("x"), "dataset": task} for task in ("all", "all", "b")]
    (tmp_path / "data.json").write_text(json.dumps(records))
    lines = table_of_tasks(describe(open_records(tmp_path / "data.json"), "dataset"))
    assert [line[:2] for line in lines[1:]] == [("all", "2"), ("b", "1"), ("all", "3")]


@pytest.mark.parametrize("images", [[], ["--images"]], ids=["texts", "images"])
def test_the_script_writes_one_page_with_pictures(data, images, capsys):
    path, folder = data
    target = folder / "out" / "look.html"
    call(
        describe_data.main,
        "--source_path",
        path,
        "--image_folder",
        folder,
        "--target_path",
        target,
        "--samples",
        2,
        *images,
    )
    printed = capsys.readouterr().out
    assert ["a", "3", "0", "2", "1"] in [line.split()[:5] for line in printed.splitlines()]
    assert "--task_key" in printed and str(target) in printed
    page = target.read_text()
    assert page.count('<img src="data:image/jpeg') >= 2 and "<script" not in page
    assert ("unreadable image" in page) >= bool(images)
    assert {file.name for file in (folder / "out" / "look_plots").iterdir()} == {"tasks.png", "answers.png"}


def test_what_cannot_be_described_ends_in_one_line(tmp_path, capsys):
    (tmp_path / "a.json").write_text("[]")
    paths = ["--source_path", tmp_path / "a.json", "--target_path", tmp_path / "a.html"]
    assert "a.json" in refusal(capsys, describe_data.main, *paths)
    assert "--samples" in refusal(capsys, describe_data.main, *paths, "--samples", -1)
    assert "the source itself" in refusal(capsys, describe_data.main, *paths, "--target_path", tmp_path / "a.json")
    assert "--image_folder" in refusal(capsys, describe_data.main, *paths, "--image_folder", tmp_path / "none")
    assert not (tmp_path / "a.html").exists()
