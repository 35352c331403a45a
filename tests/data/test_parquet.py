"""Records of Parquet and of folders that `datasets` saved: read as those of JSON, written as they came."""

from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

import select_warm_up_data
from tests.helpers.feature_files import call, refusal
from tests.helpers.records import record_with, write
from tive.data.conversations import image_of, images_of
from tive.data.images import BadImage, open_image, read_image
from tive.data.media import StoredImage
from tive.data.parquet import TableRecords, _decoded_group
from tive.data.records import open_records, write_records
from tive.data.scan import check_chunk, refuse_problems, scan_records
from tive.data.trained import conversation_of, form_problem
from tive.util.errors import UserError

# What the hub's sets of today have as columns, from their cards: FineVision, The Cauldron, LLaVA-OneVision-Data.
IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
FINEVISION = pyarrow.schema(
    [
        ("images", pyarrow.list_(IMAGE)),
        ("texts", pyarrow.list_(pyarrow.struct([("user", pyarrow.string()), ("assistant", pyarrow.string())]))),
        ("source", pyarrow.string()),
        ("relevance_ratings", pyarrow.list_(pyarrow.int64())),
    ],
    metadata={b"huggingface": b'{"info": {"features": {"images": [{"_type": "Image"}]}}}'},
)
TURN = pyarrow.struct([("from", pyarrow.string()), ("value", pyarrow.string())])
ONEVISION = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("image", IMAGE),
        ("conversations", pyarrow.list_(TURN)),
        ("data_source", pyarrow.string()),
    ]
)


def png(number: int, size=(40, 30)) -> bytes:
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)).save(
        content, "PNG"
    )
    return content.getvalue()


def finevision(rows: range) -> list[dict]:
    return [
        {
            "images": [{"bytes": png(row), "path": None}] * (row % 3),
            "texts": [{"user": f"What {row}?", "assistant": "Noise."}, {"user": "Sure?", "assistant": "Yes."}],
            "source": "ab"[row % 2],
            "relevance_ratings": [5],
        }
        for row in rows
    ]


def onevision(rows: range) -> list[dict]:
    return [
        {
            "id": str(row),
            "image": {"bytes": png(row), "path": f"{row}.png"} if row % 2 else None,
            "conversations": [
                {"from": "human", "value": "<image>\nWhat?" if row % 2 else "What?"},
                {"from": "gpt", "value": "Noise."},
            ],
            "data_source": "ab"[row % 2],
        }
        for row in rows
    ]


@pytest.fixture
def fine(tmp_path):
    """Two subsets in folders of their own, several row groups each."""
    for name, rows in (("a", range(0, 7)), ("b/deep", range(7, 12))):
        (tmp_path / "fine" / name).mkdir(parents=True)
        table = pyarrow.Table.from_pylist(finevision(rows), FINEVISION)
        parquet.write_table(table, tmp_path / "fine" / name / "0.parquet", row_group_size=3)
    return tmp_path / "fine"


def test_a_folder_of_subsets_is_its_files_by_path_and_their_rows_as_they_lie(fine):
    records = open_records(fine)
    expected = finevision(range(12))
    assert len(records) == 12
    assert [records[row]["texts"] for row in range(12)] == [one["texts"] for one in expected]
    assert [one["texts"] for one in records] == [one["texts"] for one in expected]
    for row in range(12):
        assert [image.content for image in records[row]["images"]] == [one["bytes"] for one in expected[row]["images"]]
    assert [record["folder"] for record in records] == ["a"] * 7 + ["b/deep"] * 5
    assert conversation_of(records[5])["conversations"][0]["value"] == "<image><image>What 5?"
    assert records[-1]["texts"] == expected[-1]["texts"]
    with pytest.raises(IndexError):
        records[12]


def test_all_records_are_gone_through_without_the_bytes_of_images(fine):
    records = open_records(fine)
    assert all(image.content is None for record in records for image in record["images"])
    scan = scan_records(records, form_problem, "source")
    assert not scan.problems and scan.tasks == [*"ab" * 6] and not scan.images_alone and not scan.tags_alone
    assert scan_records(records, form_problem, "folder").tasks == ["a"] * 7 + ["b/deep"] * 5
    assert set(scan.images) == {()}  # none is looked for in a folder


def test_a_row_group_is_decoded_once_for_neighbouring_rows(fine):
    records = open_records(fine)
    _decoded_group.cache_clear()
    for row in range(12):
        records[row]
    assert _decoded_group.cache_info().misses == 5


def test_images_of_every_kind_of_column_are_opened_from_the_row(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(onevision(range(4)), ONEVISION), path)
    records = open_records(path)
    assert image_of(records[0]) is None and conversation_of(records[0])["conversations"]
    image = image_of(records[1])
    assert isinstance(image, StoredImage) and image.name == "1.png"
    assert np.array_equal(np.asarray(read_image("", image)), np.asarray(Image.open(io.BytesIO(png(1)))))
    binary = pyarrow.table({"image": pyarrow.array([png(3)], pyarrow.binary()), "question": ["a"], "answer": ["b"]})
    parquet.write_table(binary, path)
    assert image_of(open_records(path)[0]).content == png(3)
    paths = pyarrow.table({"image": ["x/1.png"], "question": ["a"], "answer": ["b"]})
    parquet.write_table(paths, path)
    assert image_of(open_records(path)[0]) == "x/1.png"


@pytest.mark.parametrize("content", [b"", b"no image", png(0)[:200]], ids=["empty", "text", "cut"])
def test_bytes_that_are_no_image_are_told_as_a_file_of_them_is(content):
    with pytest.raises(BadImage, match="unreadable image"):
        read_image("", StoredImage("a.png", content))


def test_the_images_in_the_rows_are_opened_where_all_are_to_be_checked(tmp_path):
    rows = onevision(range(8))
    rows[3]["image"]["bytes"] = b"no image"
    rows[5]["image"]["bytes"] = png(5)[:300]
    parquet.write_table(pyarrow.Table.from_pylist(rows, ONEVISION), tmp_path / "a.parquet")
    scan = scan_records(open_records(tmp_path / "a.parquet"), form_problem)
    assert not check_chunk(scan, range(8), "").reasons
    assert list(check_chunk(scan, range(8), "", open_image).reasons) == [3, 5]


@pytest.mark.parametrize("image", [None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, {"bytes": b"x"}])
def test_a_record_has_as_many_images_with_their_bytes_as_without(tmp_path, image):
    rows = [row | {"image": image} for row in onevision(range(2))]
    parquet.write_table(pyarrow.Table.from_pylist(rows, ONEVISION), tmp_path / "a.parquet")
    records = open_records(tmp_path / "a.parquet")
    expected = [0, 0] if image is None else [1, 1]
    assert [len(images_of(record)) for record in records] == expected
    assert [len(images_of(records[row])) for row in range(2)] == expected


def test_what_is_selected_is_written_with_the_schema_and_metadata_of_the_source(fine, tmp_path):
    rows = [11, 2, 2, 5]
    write_records(tmp_path / "subset.parquet", open_records(fine), rows)
    written = parquet.read_table(tmp_path / "subset.parquet")
    source = parquet.read_schema(fine / "a" / "0.parquet")
    assert written.schema.equals(source, check_metadata=True) and source.metadata == FINEVISION.metadata
    assert written.to_pylist() == [finevision(range(12))[row] for row in rows]


def test_step_1_draws_from_parquet_and_leaves_the_rows_numbers(fine, tmp_path):
    target = tmp_path / "warm_up.parquet"
    call(
        select_warm_up_data.main,
        "--source_path",
        fine,
        "--target_path",
        target,
        "--sample_ratio",
        0.5,
        "--task_key",
        "source",
    )
    rows = np.load(tmp_path / "warm_up_rows.npy")
    assert parquet.read_table(target).to_pylist() == [finevision(range(12))[row] for row in rows]
    assert [row % 2 for row in rows].count(0) == 3


def test_a_table_without_tasks_gets_a_column_of_them_by_the_command_that_is_told(fine, tmp_path):
    records = open_records(fine)
    with pytest.raises(UserError) as caught:
        refuse_problems(scan_records(records, form_problem, "dataset"), "dataset", tmp_path / "bad.json")
    command = re.search("`([^`]*)`$", str(caught.value))[1]
    subprocess.run(f"{command} --default x", shell=True, check=True, cwd="/")
    labelled = parquet.read_table(fine.parent / "labelled.parquet").to_pylist()
    # Texts without an image are ShareGPT's by LLaVA's rules.
    expected = [row | {"dataset": "x" if row["images"] else "ShareGPT"} for row in finevision(range(12))]
    assert labelled == expected
    assert parquet.read_schema(fine.parent / "labelled.parquet").metadata == FINEVISION.metadata


@pytest.mark.parametrize(("existing", "expected"), [("keep", [*"abababababab"]), ("replace", ["x"] * 12)])
def test_a_tables_tasks_are_kept_or_replaced_as_told(fine, tmp_path, existing, expected):
    script = Path(__file__).parents[2] / "scripts" / "label_tasks.py"
    (tmp_path / "rules.yaml").write_text("rules:\n  - task: x\n    min_questions: 1\n")
    options = ["--source_path", fine, "--target_path", tmp_path / "a.parquet", "--existing", existing]
    subprocess.run(
        [sys.executable, script, *options, "--task_key", "source", "--rules", tmp_path / "rules.yaml"], check=True
    )
    labelled = parquet.read_table(tmp_path / "a.parquet")
    assert labelled["source"].to_pylist() == expected
    assert labelled.drop(["source"]).to_pylist() == parquet.read_table(fine).drop(["source"]).to_pylist()


def test_a_table_goes_into_a_parquet_file_and_json_into_json(fine, tmp_path):
    with pytest.raises(UserError, match=r"\.parquet"):
        write_records(tmp_path / "a.json", open_records(fine), [0])
    source = write(tmp_path / "a.json", json.dumps([record_with(("human", "a"), ("gpt", "b"))]))
    with pytest.raises(UserError, match=r"\.json"):
        write_records(tmp_path / "a.parquet", open_records(source), [0])


def test_a_folder_that_datasets_saved_is_read(tmp_path):
    folder = tmp_path / "saved"
    folder.mkdir()
    table = pyarrow.Table.from_pylist(onevision(range(6)), ONEVISION)
    with pyarrow.OSFile(str(folder / "data-0.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, ONEVISION) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    (folder / "dataset_info.json").write_text("{}")
    for path in (folder, folder / "data-0.arrow"):
        records = open_records(path)
        assert [record["id"] for record in records] == [*"012345"]
        assert image_of(records[5]).content == png(5) and image_of(records[4]) is None
        assert [image_of(record).content for record in records if image_of(record)] == [None] * 3
    write_records(tmp_path / "a.parquet", records, [5, 1])
    assert parquet.read_table(tmp_path / "a.parquet").to_pylist() == [onevision(range(6))[row] for row in (5, 1)]


def test_a_reader_of_a_table_travels_to_another_process(fine):
    assert pickle.loads(pickle.dumps(open_records(fine)))[3]["texts"] == finevision(range(4))[3]["texts"]


def test_the_fingerprint_is_that_of_names_sizes_and_footers(fine, tmp_path):
    before = open_records(fine).fingerprint
    shutil.copytree(fine, tmp_path / "other place")
    assert open_records(tmp_path / "other place").fingerprint == before
    parquet.write_table(pyarrow.Table.from_pylist(finevision(range(8)), FINEVISION), fine / "a" / "0.parquet")
    assert open_records(fine).fingerprint != before


def cut(folder):
    file = folder / "a" / "0.parquet"
    file.write_bytes(file.read_bytes()[:-20])


def other_columns(folder):
    parquet.write_table(pyarrow.Table.from_pylist(onevision(range(2)), ONEVISION), folder / "c.parquet")


def json_beside(folder):
    (folder / "b" / "more.jsonl").write_text("{}")


def nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE = {
    "cut": (cut, "0.parquet"),
    "another schema": (other_columns, "c.parquet"),
    "JSON beside it": (json_beside, "more.jsonl"),
    "an empty folder": (nothing, "fine"),
    "several splits": (lambda folder: (folder / "dataset_dict.json").write_text("{}"), "several data sets"),
}


@pytest.mark.parametrize(("damage", "named"), DAMAGE.values(), ids=DAMAGE)
def test_a_folder_that_cannot_be_read_is_told_in_one_line_by_the_file(fine, damage, named):
    damage(fine)
    with pytest.raises(UserError, match=named) as caught:
        open_records(fine)
    assert "\n" not in str(caught.value)


def test_a_file_that_was_cut_since_it_was_opened_is_named(fine):
    records = open_records(fine)
    assert isinstance(records, TableRecords)
    _decoded_group.cache_clear()
    cut(fine)
    with pytest.raises(UserError, match=r"0\.parquet"):
        records[0]
    with pytest.raises(UserError, match=r"0\.parquet"):
        list(records)


def rows_of(folder, change, name="0.parquet"):
    """One more file in the folder, of two rows that are changed."""
    rows = finevision(range(1, 3))
    for row in rows:
        change(row)
    (folder / "c").mkdir()
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "c" / name)


def zeros_in_the_middle(folder):
    file = folder / "a" / "0.parquet"
    content = bytearray(file.read_bytes())
    metadata = parquet.read_metadata(file).row_group(0)
    start = metadata.column(3).dictionary_page_offset or metadata.column(3).data_page_offset
    content[start : start + 40] = bytes(40)
    file.write_bytes(content)


def second_column(folder):
    table = pyarrow.Table.from_pylist(onevision(range(2)), ONEVISION)
    shutil.rmtree(folder)
    folder.mkdir()
    other = pyarrow.Table.from_pylist(onevision(range(2, 4)), ONEVISION)["image"]
    table = table.append_column("images", other).append_column("source", table["data_source"])
    parquet.write_table(table, folder / "0.parquet")


# What is wrong with a folder -> what the line names: the file or the row, and words of the remedy.
BAD_INPUT = {
    "cut": (cut, ["0.parquet", "download"]),
    "damaged inside": (zeros_in_the_middle, ["0.parquet", "download"]),
    "another schema": (other_columns, ["c.parquet", "keep one kind"]),
    "an image of another type": (
        lambda folder: rows_of(folder, lambda row: row.update(images=7)),
        ["record 12", "--drop"],
    ),
    "a struct of something else": (
        lambda folder: rows_of(folder, lambda row: row.update(images=[{"height": 3}])),
        ["record 12", "--drop"],
    ),
    "texts that are no list": (
        lambda folder: rows_of(folder, lambda row: row.update(texts="x")),
        ["record 12", "--drop"],
    ),
    "texts of something else": (
        lambda folder: rows_of(folder, lambda row: row.update(texts=[{"q": "x"}])),
        ["record 12", "--drop"],
    ),
    "null texts": (lambda folder: rows_of(folder, lambda row: row.update(texts=None)), ["record 12", "--drop"]),
    "two columns of images": (second_column, ["record 1", "keep one of the two keys"]),
    "JSON beside Parquet": (json_beside, ["more.jsonl", "one kind"]),
    "an empty folder": (nothing, ["fine", "name a data file"]),
}


@pytest.mark.parametrize(("damage", "named"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_ends_step_1_in_one_line_with_file_or_row_and_remedy_and_nothing_is_written(
    fine, tmp_path, capsys, damage, named
):
    damage(fine)
    target = tmp_path / "out" / "warm_up.parquet"
    options = ["--source_path", fine, "--target_path", target, "--task_key", "source", "--sample_ratio", 0.5]
    line = refusal(capsys, select_warm_up_data.main, *options)
    assert all(words in line for words in named), line
    assert {path.name for path in tmp_path.glob("out/*")} <= {"warm_up_bad_records.json"}


def test_a_row_whose_images_are_null_has_none(fine):
    rows_of(fine, lambda row: row.update(images=[None]))
    records = open_records(fine)
    assert images_of(records[12]) == () and not scan_records(records, form_problem).problems


def test_files_whose_columns_differ_in_type_are_told_when_rows_of_both_are_written(fine, tmp_path):
    rows_of(fine, lambda row: row.update(relevance_ratings="high"))
    with pytest.raises(UserError, match=r"c/0\.parquet"):
        write_records(tmp_path / "a.parquet", open_records(fine), [0, 13])
    assert not (tmp_path / "a.parquet").exists()
