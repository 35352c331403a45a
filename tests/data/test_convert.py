"""Conversion of records: nothing is lost on the way to another trainer's form and back."""

from __future__ import annotations

import io
import json

import pyarrow
import pyarrow.parquet as parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from scripts import convert_data
from tests.helpers.in_process import run_here
from tests.helpers.records import MEDIA
from tive.data import shards
from tive.data.conversations import FORMS, from_llava, image_paths, to_llava
from tive.data.media import images_in
from tive.data.records import open_records
from tive.data.shards import schema_of, write_shards
from tive.data.trained import problem_of


def convert(tmp_path, text, *arguments, source="a.json", target="b.json"):
    """Run the script; the result, and the target's text or None."""
    (tmp_path / source).write_bytes(text if isinstance(text, bytes) else text.encode())
    paths = ["--source_path", str(tmp_path / source), "--target_path", str(tmp_path / target)]
    done = run_here(convert_data.main, *paths, *arguments)
    written = tmp_path / target
    return done, written.read_text() if written.exists() else None


LLAVA = {
    "id": "33471",
    "image": "coco/33471.jpg",
    "conversations": [
        {"from": "human", "value": "<image>\nWhat color is the bus?", "weight": 1},
        {"from": "gpt", "value": "White and red."},
        {"from": "human", "value": "Where is it?"},
        {"from": "gpt", "value": "On the street."},
    ],
    "dataset": "LLaVA-Instruct",
    "system": "You are brief.",
}
# The three trainers' forms of it, as their documentation shows them.
EXPECTED = {
    "sharegpt": {
        "id": "33471",
        "images": ["coco/33471.jpg"],
        "conversations": LLAVA["conversations"],
        "dataset": "LLaVA-Instruct",
        "system": "You are brief.",
    },
    "messages": {
        "id": "33471",
        "images": ["coco/33471.jpg"],
        "messages": [
            {"role": "system", "content": "You are brief."},
            {"role": "user", "content": "<image>\nWhat color is the bus?", "weight": 1},
            {"role": "assistant", "content": "White and red."},
            {"role": "user", "content": "Where is it?"},
            {"role": "assistant", "content": "On the street."},
        ],
        "dataset": "LLaVA-Instruct",
    },
    "parts": {
        "id": "33471",
        "images": ["coco/33471.jpg"],
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "You are brief."}]},
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "\nWhat color is the bus?"}],
                "weight": 1,
            },
            {"role": "assistant", "content": [{"type": "text", "text": "White and red."}]},
            {"role": "user", "content": [{"type": "text", "text": "Where is it?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "On the street."}]},
        ],
        "dataset": "LLaVA-Instruct",
    },
}


@pytest.mark.parametrize("form", EXPECTED)
def test_a_record_takes_the_form_that_the_trainer_documents_and_comes_back(form):
    assert from_llava(to_llava(LLAVA), form) == EXPECTED[form]
    assert to_llava(EXPECTED[form]) == LLAVA
    assert problem_of(to_llava(EXPECTED[form])) is None


KEYS = st.text(max_size=6).filter(
    lambda key: key
    not in ("image", "images", "conversations", "messages", "system", "from", "value", "role", "content")
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
EXTRA = st.dictionaries(KEYS, VALUES, max_size=2)
TEXTS = st.lists(st.sampled_from(["<image>", "\n", "a", "é ", "<image", "image>"]) | st.text(max_size=4)).map("".join)
PATHS = st.text(min_size=1, max_size=8)
TURNS = st.builds(
    lambda role, text, extra: {"from": role, "value": text, **extra}, st.sampled_from(["human", "gpt"]), TEXTS, EXTRA
)


def is_read(record) -> bool:
    try:
        return images_in(record) is not None
    except ValueError:
        return False


LLAVA_RECORDS = st.builds(
    lambda images, turns, system, extra: {**images, "conversations": turns, **system, **extra},
    st.just({}) | st.builds(lambda path: {"image": path}, PATHS | st.lists(PATHS, min_size=2, max_size=3)),
    st.lists(TURNS, max_size=5),
    st.just({}) | st.builds(lambda text: {"system": text}, TEXTS.filter(bool)),
    EXTRA,
).filter(is_read)


@settings(max_examples=200, deadline=None)
@given(record=LLAVA_RECORDS, form=st.sampled_from(FORMS))
def test_no_key_is_lost_from_llava_to_any_form_and_back(record, form):
    there = json.loads(json.dumps(from_llava(to_llava(record), form)))
    assert to_llava(there) == record


@settings(max_examples=100, deadline=None)
@given(record=LLAVA_RECORDS, first=st.sampled_from(FORMS), second=st.sampled_from(FORMS))
def test_every_form_leads_to_every_other_and_back(record, first, second):
    start = from_llava(to_llava(record), first)
    assert from_llava(to_llava(from_llava(to_llava(start), second)), first) == start


@settings(max_examples=100, deadline=None)
@given(
    record=st.dictionaries(st.sampled_from(["image", "images", "conversations", "messages", "system"]), VALUES)
    | st.builds(lambda record, media: {**record, **media}, LLAVA_RECORDS, MEDIA)
    | VALUES
)
def test_whatever_a_record_holds_it_converts_or_says_why(record):
    try:
        converted = to_llava(record)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(converted["conversations"], list)
        assert images_in(converted) == images_in(record)


def test_an_image_as_a_string_and_as_a_list_of_one_are_the_same():
    assert to_llava({**LLAVA, "image": ["coco/33471.jpg"]}) == LLAVA


@pytest.mark.parametrize("images", [{"images": []}, {"images": None}, {"image": ""}, {"image": None}, {}])
def test_a_record_without_an_image_has_no_image_key(images):
    turns = [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello."}]
    assert to_llava({"conversations": turns, **images}) == {"conversations": turns}


def test_an_image_that_a_part_names_and_keys_that_an_export_filled_with_null_are_read():
    parts = [{"type": "image", "image": "a.jpg", "text": None}, {"type": "text", "text": "What?", "image": None}]
    converted = to_llava({"messages": [{"role": "user", "content": parts}]})
    assert converted == {"conversations": [{"from": "human", "value": "<image>What?"}], "image": "a.jpg"}


@pytest.mark.parametrize("key", ["conversations", "messages"])
@pytest.mark.parametrize("human", ["human", "user"])
@pytest.mark.parametrize("gpt", ["gpt", "assistant", "chatgpt"])
@pytest.mark.parametrize(("role", "text"), [("from", "value"), ("role", "content")])
def test_every_name_of_a_role_is_read_in_either_form_of_a_turn(key, human, gpt, role, text):
    turns = [{role: name, text: "x"} for name in ("system", human, gpt)]
    assert to_llava({"id": 0, key: turns}) == {
        "id": 0,
        "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "x"}],
        "system": "x",
    }


def test_a_path_in_an_image_part_of_the_openai_form_is_read():
    parts = [{"type": "image_url", "image_url": {"url": "file://coco/1.jpg"}}, {"type": "text", "text": "What?"}]
    converted = to_llava({"messages": [{"role": "user", "content": parts}]})
    assert converted == {"conversations": [{"from": "human", "value": "<image>What?"}], "image": "coco/1.jpg"}


def test_the_tag_of_a_record_without_an_image_is_only_text():
    record = {"conversations": [{"from": "human", "value": "What does <image> do in HTML?"}]}
    parts = from_llava(record, "parts")
    assert parts["messages"][0]["content"] == [{"type": "text", "text": "What does <image> do in HTML?"}]
    assert to_llava(parts) == record


def says(role, content):
    return {"role": role, "content": content}


REFUSED = {
    "a number": (3, "is not an object"),
    "neither form": ({"id": 1}, "no `conversations` or `messages`"),
    "both forms": ({"conversations": ["x"], "messages": ["x"]}, "both `conversations` and `messages`"),
    "turns and texts": (
        {"conversations": [{"from": "human", "value": "x"}], "texts": [{"user": "a", "assistant": "b"}]},
        "both `conversations` and `texts`",
    ),
    "both images": (
        {"conversations": [], "image": "a", "images": ["b"]},
        "different images under `image` and `images`",
    ),
    "a video": ({"conversations": [], "video": "a.mp4"}, "`video`"),
    "an image under another key": ({"conversations": [], "image_path": "a.jpg"}, "`image_path`"),
    "turns that are no list": ({"messages": "hello"}, "not a list of turns"),
    "a turn that is a text": ({"messages": ["hello"]}, "a turn 0 that is not an object"),
    "a tool's turn": ({"messages": [says("user", "x"), says("tool", "y")]}, "a turn 1 whose `role`"),
    "a function call": ({"conversations": [{"from": "function_call", "value": "x"}]}, "a turn 0 whose `from`"),
    "no content": ({"messages": [{"role": "assistant", "tool_calls": []}]}, "without a text `content`"),
    "a role that is a list": ({"messages": [says(["user"], "x")]}, "a turn 0 whose `role` a list is none of"),
    "an unknown part": ({"messages": [says("user", [{"type": "video"}])]}, "a part in turn 0"),
    "a part that is a text": ({"messages": [says("user", ["x"])]}, "a part in turn 0"),
    "a part with more keys": ({"messages": [says("user", [{"type": "image", "max": 1}])]}, "`max` in a part of turn 0"),
    "a part that holds the image itself": (
        {"messages": [says("user", [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}])]},
        "holds the image itself",
    ),
    "an image part alone": ({"messages": [says("user", [{"type": "image"}])]}, "no image"),
    "a tag beside an image part": (
        {"messages": [says("user", [{"type": "image"}, {"type": "text", "text": "<image>"}])], "images": ["a"]},
        "<image>",
    ),
    "images named twice": (
        {"messages": [says("user", [{"type": "image", "image": "a"}])], "images": ["a"]},
        "names its images twice",
    ),
    "an image that is a number": ({"conversations": [], "image": 0}, "neither a path nor"),
    "image bytes": ({"messages": [], "images": [{"bytes": "AA"}]}, "is an object; write the image to a file"),
    "a late system turn": ({"messages": [says("user", "x"), says("system", "y")]}, "not the first"),
    "two system prompts": ({"messages": [says("system", "x")], "system": "y"}, "and a key `system`"),
    "a system turn with more": ({"messages": [{**says("system", "x"), "name": "y"}]}, "more keys"),
    "a text beside question and answer": ({"texts": [{"user": "a", "assistant": "b", "content": "c"}]}, "both forms"),
    "a turn of both forms": ({"messages": [{**says("user", "x"), "value": "y"}]}, "both forms"),
}


@pytest.mark.parametrize("form", ["llava", "messages"])
@pytest.mark.parametrize(("record", "said"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_place_is_refused_and_never_dropped(record, said, form):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        from_llava(to_llava(record), form)


# The command


def test_json_and_json_lines_convert_into_each_other_byte_for_byte(tmp_path):
    texts = ['{"id": 1.50,  "é": "\\u00e9"}', '{"x":[ ]}']
    done, lines = convert(tmp_path, "[" + ", ".join(texts) + "]", target="b.jsonl")
    assert done.returncode == 0, done.stderr
    assert lines.splitlines() == texts
    done, listed = convert(tmp_path, lines, source="b.jsonl", target="c.json")
    assert done.returncode == 0, done.stderr
    assert listed == "[\n" + ",\n".join(texts) + "\n]\n"


@pytest.mark.parametrize("form", EXPECTED)
def test_the_command_converts_there_and_back(tmp_path, form):
    bare = {"id": "t", "conversations": [{"from": "human", "value": "Hi \ud800"}, {"from": "gpt", "value": "Hé."}]}
    done, there = convert(tmp_path, json.dumps([LLAVA, bare]), "--to", form, target="b.jsonl")
    assert done.returncode == 0, done.stderr
    assert json.loads(there.splitlines()[0]) == EXPECTED[form]
    done, back = convert(tmp_path, there, "--to", "llava", source="b.jsonl", target="c.json")
    assert done.returncode == 0, done.stderr
    assert json.loads(back) == [LLAVA, bare]
    keys, keys_back = ([key for key in one if key != "system"] for one in (LLAVA, json.loads(back)[0]))
    assert keys_back == keys  # in their order
    assert "Hé." in there.splitlines()[1] or "\\u00e9" in there.splitlines()[1]
    assert "1 have a system prompt under `system`" in done.stdout


def test_tags_that_do_not_fit_the_images_are_told(tmp_path):
    untagged = {**LLAVA, "conversations": LLAVA["conversations"][2:]}
    done, _ = convert(tmp_path, json.dumps([LLAVA, untagged]), "--to", "messages")
    assert done.returncode == 0, done.stderr
    assert "1 have more or fewer <image> tags than images" in done.stdout
    assert "record 1 (id '33471')" in done.stdout


def test_the_listed_records_are_dropped_and_the_others_stay_byte_for_byte(tmp_path):
    texts = [f'{{"id": "{name}",  "n": 1.50}}' for name in "abcd"]
    lists = [tmp_path / "bad_0.json", tmp_path / "bad_1.json"]
    for path, row, name in zip(lists, (1, 3), "bd", strict=True):
        path.write_text(json.dumps([{"row": row, "id": name, "reason": "missing image"}]))
    done, written = convert(tmp_path, "\n".join(texts), "--drop", *map(str, lists), target="b.jsonl")
    assert done.returncode == 0, done.stderr
    assert written.splitlines() == [texts[0], texts[2]]
    assert "2 records are left out" in done.stdout


@pytest.mark.parametrize(
    ("listing", "said"),
    [
        ([{"row": 0, "id": "b"}], "no record 0 with the id 'b'"),
        ([{"row": 2, "id": "c"}], "no record 2 with the id 'c'"),
        ([{"row": -1, "id": "a"}], "is no list of bad records"),
        ({"left_out": []}, "is no list of bad records"),
        ([3], "is no list of bad records"),
    ],
)
def test_a_list_of_other_data_drops_nothing(tmp_path, listing, said):
    (tmp_path / "bad.json").write_text(json.dumps(listing))
    done, written = convert(tmp_path, '[{"id": "a"}, {"id": "b"}]', "--drop", str(tmp_path / "bad.json"))
    assert done.returncode == 2
    assert said in done.stderr and done.stderr.count("\n") == 1
    assert written is None


MISTAKES = {
    "the same file": ("[]", ["--target_path", "{folder}/a.json"], "the source itself"),
    "a target that is a folder": ("[]", ["--target_path", "."], "name a file"),
    "no such source": ("[]", ["--source_path", "{folder}/none.json"], "none.json"),
    "a record of no form": ('[{"id": "x"}]', ["--to", "llava"], "record 0 (id 'x') has no `conversations`"),
    "a number that is not finite": ('[{"conversations": [], "x": NaN}]', ["--to", "llava"], "not finite"),
    "a number that overflows": ('[{"conversations": [], "x": 1e999}]', ["--to", "messages"], "not finite"),
    "bytes that are no UTF-8": (b'[{"id": 1}, {"id": "\xe9"}]', [], "(record 1, byte 12)"),
    "records of no form for Parquet": (
        '[{"id": "x"}, 3]',
        ["--to", "parquet"],
        "record 0 (id 'x') has no `conversations`",
    ),
    "a damaged source": ('[{"conversations": []}, {', ["--to", "llava"], "record 1"),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, case):
    text, arguments, said = case
    done, _ = convert(tmp_path, text, *(argument.format(folder=tmp_path) for argument in arguments))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert {path.name for path in tmp_path.iterdir()} <= {"a.json", "b_bad_records.json"}


def test_a_table_with_images_is_unpacked_to_files_and_again_without_writing_them_twice(tmp_path):
    pictures = []
    for color, form in (("red", "PNG"), ("blue", "JPEG"), ("red", "PNG")):
        content = io.BytesIO()
        Image.new("RGB", (9, 7), color).save(content, form)
        pictures.append(content.getvalue())
    kind = pyarrow.list_(pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())]))
    images = [[{"bytes": content, "path": None}] for content in pictures] + [[]]
    texts = [[{"user": "What?", "assistant": "Noise."}]] * 4
    table = pyarrow.table({"images": pyarrow.array(images, kind), "texts": texts, "source": ["x"] * 4})
    parquet.write_table(table, tmp_path / "a.parquet")
    folder = tmp_path / "images"
    for _ in range(2):
        arguments = ["--to", "llava", "--image_folder", str(folder)]
        done, written = convert(tmp_path, (tmp_path / "a.parquet").read_bytes(), *arguments, source="a.parquet")
        assert done.returncode == 0, done.stderr
        files = {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")}
        records = json.loads(written)
        assert [problem_of(record) for record in records] == [None] * 4 and "image" not in records[3]
        assert [(folder / record["image"]).read_bytes() for record in records[:3]] == pictures
    assert sorted(file.suffix for file in files) == [".jpg", ".png"]  # equal bytes are one file
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.*")} == files


def test_a_table_with_images_wants_a_folder_for_them(tmp_path):
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array([{"bytes": b"x"}], kind), "question": ["a"], "answer": ["b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    done, written = convert(tmp_path, (tmp_path / "a.parquet").read_bytes(), "--to", "llava", source="a.parquet")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and written is None
    assert "--image_folder" in done.stderr


def test_listed_records_are_dropped_from_a_table_whose_rows_stay_as_they_are(tmp_path):
    table = pyarrow.table({"id": ["a", "b", "c"], "question": ["1", "2", "3"], "answer": ["x"] * 3})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "bad.json").write_text(json.dumps([{"row": 1, "id": "b"}]))
    content = (tmp_path / "a.parquet").read_bytes()
    arguments = ["--drop", str(tmp_path / "bad.json"), "--target_path", str(tmp_path / "good.parquet")]
    done, _ = convert(tmp_path, content, *arguments, source="a.parquet")
    assert done.returncode == 0, done.stderr
    assert parquet.read_table(tmp_path / "good.parquet").to_pylist() == [table.to_pylist()[row] for row in (0, 2)]
    (tmp_path / "bad.json").write_text(json.dumps([{"row": 1, "id": "other"}]))
    done, _ = convert(tmp_path, content, *arguments, source="a.parquet")
    assert done.returncode == 2 and "record 1" in done.stderr


# To Parquet


@pytest.fixture
def pictured(tmp_path):
    """Records with one image, with several, with none, with further keys of all kinds; and their image folder."""
    contents = {}
    for name, form in (("coco/1.jpg", "JPEG"), ("coco/2.png", "PNG"), ("3.png", "PNG")):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((30 + len(contents), 20), 50).save(tmp_path / "images" / name, form)
        contents[name] = (tmp_path / "images" / name).read_bytes()
    turns = LLAVA["conversations"]
    records = [
        LLAVA | {"image": "coco/1.jpg", "scores": [1, 2.5], "box": {"x": [1, 2]}},
        LLAVA | {"image": ["coco/2.png", "3.png"], "id": "é"},
        {"id": "text", "conversations": turns[2:], "box": {"y": "left"}, "scores": []},
        {"id": "again", "image": "3.png", "conversations": turns},
    ] * 3
    return records, contents, tmp_path


def unpacked(tmp_path, source):
    """The records that `--to llava` makes of a folder of Parquet, with the bytes of each image in place of its path."""
    done, written = convert(tmp_path, "", "--source_path", str(source), "--to", "llava", "--image_folder", "out")
    assert done.returncode == 0, done.stderr
    return json.loads(written)


def test_records_and_images_go_into_parquet_and_come_back_the_same(pictured, monkeypatch):
    records, contents, folder = pictured
    monkeypatch.chdir(folder)
    options = ("--to", "parquet", "--image_folder", "images", "--target_path", "packed")
    done, _ = convert(folder, json.dumps(records), *options)
    assert done.returncode == 0, done.stderr
    assert {path.suffix for path in (folder / "packed").iterdir()} == {".parquet"}
    assert not list(folder.glob(".*"))
    back = unpacked(folder, folder / "packed")
    assert len(back) == len(records)
    for one, record in zip(back, records, strict=True):
        names, files = (
            value if isinstance(value, list) else [value] for value in (record.get("image", []), one.get("image", []))
        )
        assert [(folder / "out" / file).read_bytes() for file in files] == [contents[name] for name in names]
        assert {**one, "image": None} == {**record, "image": None}
    done, _ = convert(folder, json.dumps(records), *options)
    assert done.returncode == 2 and "there already" in done.stderr


def test_packing_goes_on_where_it_was_stopped_and_writes_the_same_files(pictured, monkeypatch):
    records, _, folder = pictured
    (folder / "a.json").write_text(json.dumps(records))
    source, images = open_records(folder / "a.json"), str(folder / "images")
    monkeypatch.setattr(shards, "GROUP_BYTES", 1200)
    monkeypatch.setattr(shards, "GROUPS_A_SHARD", 2)
    schema, problems = schema_of(source)
    assert not problems and write_shards(folder / "whole", source, schema, images) > 2

    read = []

    def stopping(image, folder):
        read.append(image)
        if len(read) == 9:
            raise KeyboardInterrupt
        return stored(image, folder)

    stored = shards._stored
    monkeypatch.setattr(shards, "_stored", stopping)
    with pytest.raises(KeyboardInterrupt):
        write_shards(folder / "packed", source, schema, images)
    assert not (folder / "packed").exists()
    write_shards(folder / "packed", source, schema, images)
    assert len(read) < 9 + sum(len(image_paths(record)) for record in records)
    whole, packed = (sorted((folder / name).iterdir()) for name in ("whole", "packed"))
    assert [file.read_bytes() for file in whole] == [file.read_bytes() for file in packed]
    groups = [parquet.ParquetFile(file).num_row_groups for file in whole]
    assert max(groups) == 2 and len(open_records(folder / "packed")) == len(records)


def test_what_parquet_cannot_take_is_refused_by_row(pictured, monkeypatch):
    records, _, folder = pictured
    monkeypatch.chdir(folder)
    (folder / "images" / "no.jpg").write_bytes(b"no image")
    bad = {
        2: {"id": 7},
        4: {"scores": "high"},
        5: {"image": "missing.jpg"},
        6: {"image": "no.jpg"},
        7: {"big": 1 << 70},
    }
    mixed = [record | bad.get(row, {}) for row, record in enumerate(records)]
    done, _ = convert(
        folder, json.dumps(mixed), "--to", "parquet", "--image_folder", "images", "--target_path", "packed"
    )
    assert done.returncode == 2 and done.stderr.count("error: ") == 1
    assert [entry["row"] for entry in json.loads((folder / "packed_bad_records.json").read_text())] == [*bad]
    assert not (folder / "packed").exists() and not list(folder.glob(".*"))


def test_the_datasets_library_reads_the_shards_as_records_with_pictures(pictured, monkeypatch):
    datasets = pytest.importorskip("datasets")
    records, contents, folder = pictured
    monkeypatch.chdir(folder)
    done, _ = convert(
        folder, json.dumps(records), "--to", "parquet", "--image_folder", "images", "--target_path", "packed"
    )
    assert done.returncode == 0, done.stderr
    loaded = datasets.load_dataset(str(folder / "packed"), split="train", cache_dir=str(folder / "cache"))
    assert [len(row["images"]) for row in loaded] == [len(image_paths(record)) for record in records]
    with Image.open(io.BytesIO(contents["coco/2.png"])) as image:
        assert loaded[1]["images"][0].tobytes() == image.tobytes()
    assert [part["type"] for part in loaded[0]["messages"][1]["content"]] == ["image", "text"]
