"""One conversation in every spelling of today's sets: read as the same, or refused by what stands there."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet as parquet
import pytest
from PIL import Image

from tests.helpers.records import record_with, write
from tive.data.conversations import image_of, to_llava
from tive.data.problems import form_remedy, refuse_bad_records
from tive.data.records import open_records
from tive.data.scan import check_image_folder, refuse_problems, scan_records, tag_notes
from tive.data.tasks import task_of
from tive.data.trained import conversation_of, form_problem, is_trained_on, problem_of, record_hash
from tive.util.errors import UserError


def says(role, content, **keys):
    return {"role": role, "content": content, **keys}


def parts(*image_parts, answer="Noise."):
    return {
        "messages": [
            says("user", [*image_parts, {"type": "text", "text": "What?", "index": None}]),
            says("assistant", [{"type": "text", "text": answer}]),
        ]
    }


SPELLINGS = {
    "llava": {
        "image": "a/0.png",
        "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "Noise."}],
    },
    "a list of one": {
        "image": ["./a/0.png"],
        "conversations": [says("user", "<image>What?"), says("assistant", "Noise.")],
    },
    "messages": {"images": ["a/0.png"], "messages": [says("user", "<image>What?"), says("assistant", "Noise.")]},
    "a path without its bytes": {
        "images": [{"bytes": None, "path": "a/0.png"}],
        "messages": [says("user", "<image>What?"), says("assistant", "Noise.")],
    },
    "an index": parts({"type": "image", "index": 0, "text": None}) | {"images": ["a/0.png"]},
    "a path": parts({"type": "image", "path": "a/0.png"}),
    "a local url": parts({"type": "image", "url": "a//0.png"}),
    "OpenAI's": parts({"type": "image_url", "image_url": {"url": "file://a/0.png", "detail": "high"}}),
    "a note on the image": parts({"type": "image", "image": "a/0.png", "metadata": {"width": 56}}),
    "without a type": parts({"image": "a/0.png"}),
    "a null column of the other form": {
        "image": "a/0.png",
        "messages": None,
        "conversations": [
            {"from": "human", "value": "<image>What?", "role": None, "content": None},
            {"from": "gpt", "value": "Noise.", "loss": None},
        ],
    },
    "null keys of the other form in its turns": {
        "images": ["a/0.png"],
        "messages": [
            says("user", "<image>What?", **{"from": None, "value": None}),
            says("assistant", "Noise.", **{"from": "", "value": ""}),
        ],
    },
    "texts": {"images": ["a/0.png"], "texts": [{"user": "What?", "assistant": "Noise."}], "source": "x"},
    "prompt and completion": {
        "images": ["a/0.png"],
        "prompt": [says("user", "What?")],
        "completion": [says("assistant", "Noise.")],
    },
    "question and answer": {"image": "a/0.png", "question": "What?", "answer": "Noise."},
    "query and response": {"images": ["a/0.png"], "query": "<image>What?", "response": "Noise."},
    "instruction and output": {"image": "a/0.png", "instruction": "What?", "input": "", "output": "Noise."},
}


@pytest.mark.parametrize("record", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_is_the_same_conversation_in_every_room(record):
    plain = SPELLINGS["llava"]
    conversation = conversation_of(record)
    assert [(turn["from"], turn["value"]) for turn in conversation["conversations"]] == [
        ("human", "<image>What?"),
        ("gpt", "Noise."),
    ]
    assert image_of(record) == "a/0.png" and task_of(record, "image:/") == "a"
    assert form_problem(record) is None
    assert problem_of(to_llava(record)) is None
    assert record_hash(to_llava(record) | {"image": "a/0.png"}) == record_hash(record)
    assert all(is_trained_on(turn) for turn in conversation["conversations"])
    assert image_of(plain) == image_of(record)


def test_an_index_counts_through_the_images():
    record = parts({"type": "image", "index": 1}, {"type": "image", "index": 0}) | {"images": ["a", "b"]}
    assert to_llava(record)["image"] == ["b", "a"]
    with pytest.raises(ValueError, match="`index` 2"):
        to_llava(parts({"type": "image", "index": 2}) | {"images": ["a"]})


REFUSED = {
    "a part's size": (parts({"type": "image", "image": "a.png", "resized_height": 56}), "`resized_height`"),
    "a part's pixels": (parts({"type": "image", "image": "a.png", "min_pixels": 56}), "`min_pixels`"),
    "an image's bytes in a part": (
        parts({"type": "image", "image": {"bytes": "AA", "path": None}}),
        "image is no path",
    ),
    "thoughts beside the content": (
        {"messages": [says("user", "x"), says("assistant", "y", reasoning_content="z")]},
        "`reasoning_content`",
    ),
    "a share of the loss": ({"messages": [says("user", "x"), says("assistant", "y", weight=0.5)]}, "`weight`"),
    "a question that is trained on": ({"messages": [says("user", "x", train=True), says("assistant", "y")]}, "`train`"),
    "boxes": (
        {
            "messages": [says("user", "Find <ref-object>"), says("assistant", "<bbox>")],
            "objects": {"ref": ["a"], "bbox": [[1, 2, 3, 4]]},
        },
        "`objects`",
    ),
    "boxes in the system prompt": (
        {
            "messages": [says("system", "<ref-object>"), says("user", "x"), says("assistant", "y")],
            "objects": {"ref": [1]},
        },
        "`objects`",
    ),
    "a system prompt that cannot be written": (
        {"messages": [says("user", "x"), says("assistant", "y")], "system": "\udfff"},
        "`system`",
    ),
    "a rejected answer": (
        {"messages": [says("user", "x"), says("assistant", "y")], "rejected_response": "z"},
        "`rejected_response`",
    ),
    "a preferred answer without turns": (
        {"prompt": [says("user", "x")], "chosen": [says("assistant", "y")]},
        "`chosen`",
    ),
    "a judged answer": ({"messages": [says("user", "x"), says("assistant", "y")], "label": False}, "`label`"),
    "a system prompt that is a list": (
        {"messages": [says("user", "x"), says("assistant", "y")], "system": ["z"]},
        "`system`",
    ),
    "tools": ({"messages": [says("user", "x"), says("assistant", "y")], "tools": [{"name": "a"}]}, "`tools`"),
    "an option of the template": (
        {"messages": [says("user", "x"), says("assistant", "y")], "chat_template_kwargs": {"enable_thinking": False}},
        "`chat_template_kwargs`",
    ),
    "both forms": ({"messages": [says("user", "x")], "conversations": [says("user", "x")]}, "both `conversations`"),
    "a prompt that is a text": ({"prompt": "x", "completion": "y"}, "`prompt`"),
    "an earlier exchange": ({"query": "x", "response": "y", "history": [["a", "b"]]}, "`history`"),
    "no form at all": ({"caption": "x", "transcripts": ["a"]}, "caption, transcripts"),
}


@pytest.mark.parametrize(("record", "named"), REFUSED.values(), ids=REFUSED)
def test_what_a_trainer_acts_on_and_is_not_followed_is_refused_by_its_name(record, named):
    with pytest.raises(ValueError) as caught:
        conversation_of(record)
    assert named in str(caught.value) and "\n" not in str(caught.value)
    assert named in form_problem(record)


@pytest.mark.parametrize("key", ["loss", "weight", "train", "training"])
@pytest.mark.parametrize("no", [False, 0, 0.0])
def test_an_answer_may_be_taken_out_of_training_by_a_key_of_its_turn(tmp_path, key, no):
    """Followed where the trainer follows it; LLaVA's trains on every answer, and refuses the record."""
    turns = [says("user", "a"), says("assistant", "b", **{key: no}), says("user", "c"), says("assistant", "d")]
    conversation = conversation_of({"messages": turns})
    answers = [turn for turn in conversation["conversations"] if turn["from"] == "gpt"]
    assert [is_trained_on(turn) for turn in answers] == [False, True]
    records = open_records(write(tmp_path / "a.json", json.dumps([{"messages": turns}])))
    assert scan_records(records, form_problem).answers == [1]  # the evaluation asks for no other
    assert form_problem({"messages": turns}) is None and form_problem(conversation) is None
    assert f"`{key}`" in problem_of(conversation)
    assert problem_of(record_with(("human", "a"), ("gpt", "b")) | {key: no}) is None  # a record's key is no turn's


@pytest.mark.parametrize("value", ["false", 0.5, [0], "no"])
def test_a_key_of_training_that_says_neither_yes_nor_no_is_refused_for_every_model(value):
    record = record_with(("human", "a"), ("gpt", "b"))
    record["conversations"][1]["loss"] = value
    assert "`loss`" in problem_of(record)
    with pytest.raises(ValueError, match="`loss`"):
        conversation_of(record)


def test_the_answers_of_a_prompt_are_not_trained_on():
    prompt = [says("user", "a"), says("assistant", "b"), says("user", "c")]
    turns = conversation_of({"prompt": prompt, "completion": [says("assistant", "d")]})["conversations"]
    assert [is_trained_on(turn) for turn in turns if turn["from"] == "gpt"] == [False, True]


def test_a_text_that_holds_an_empty_list_of_tools_says_nothing():
    assert form_problem(record_with(("human", "a"), ("gpt", "b")) | {"tools": "[]"}) is None


@pytest.mark.parametrize("empty", [None, "", [], {}, [None]])
@pytest.mark.parametrize("key", ["messages", "image", "images", "video", "tools", "objects", "rejected", "system"])
def test_an_empty_key_is_no_key(key, empty):
    record = record_with(("human", "a"), ("gpt", "b")) | {key: empty}
    assert problem_of(record) is None and form_problem(record) is None
    assert record_hash(record) == record_hash(record_with(("human", "a"), ("gpt", "b")))


OTHER_TAGS = [
    "<image 1>",
    "<|image_pad|>",
    "<img>",
    "<ImageHere>",
    "[IMG]",
    "<Image>",
    "<start_of_image>",
    "{image}",
    "",
]


@pytest.mark.parametrize("mark", [*OTHER_TAGS, ""])
def test_images_without_a_tag_are_counted_and_what_stands_there_is_named(tmp_path, mark):
    records = [record_with(("human", text), ("gpt", "a"), image="0.png") for text in ("<image>\nb", "b", f"{mark}c")]
    scan = scan_records(open_records(write(tmp_path / "a.json", json.dumps(records))), problem_of)
    (note,) = tag_notes(scan, range(3))
    assert "2 records" in note and "record 1" in note and (not mark or f"`{mark}`" in note)
    assert tag_notes(scan, range(1)) == []


# Remedies: one after the other, until the step goes through


def to_tar(records):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as made:
        for row, record in enumerate(records):
            for end, content in (("json", json.dumps(record).encode()), ("png", b"png")):
                entry = tarfile.TarInfo(f"{row:03}.{end}")
                entry.size = len(content)
                made.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def to_parquet():
    """Three rows that can be used, and one with a question alone."""
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    texts = [[{"user": "a", "assistant": "b"}]] * 3 + [[{"user": "a", "assistant": None}]]
    columns = {"image": pyarrow.array([{"bytes": content.getvalue()}] * 4, kind), "texts": texts, "dataset": ["x"] * 4}
    made = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), made)
    return made.getvalue()


MESSAGES = [{"messages": [says("user", "a"), says("assistant", "b")], "dataset": "x", "id": row} for row in range(4)]
BAD = [MESSAGES[3] | {"video": "a.mp4"}, *MESSAGES[:3]]
SAMPLES = [record_with(("human", "<image>a"), ("gpt", "b"), dataset="x")] * 4
FILES = {
    "another form": (json.dumps(MESSAGES).encode(), 4),
    "another form with a record that cannot be used": (json.dumps(BAD).encode(), 3),
    "gzip of another form": (gzip.compress(json.dumps(MESSAGES).encode()), 4),
    "UTF-16 of an object of another form": (json.dumps({"data": MESSAGES}).encode("utf-16"), 4),
    "a table by columns": (json.dumps({key: [one[key] for one in MESSAGES] for key in MESSAGES[0]}).encode(), 4),
    "an object by id": (json.dumps({str(row): one for row, one in enumerate(BAD)}).encode(), 3),
    "a shard of samples": (to_tar(SAMPLES), 4),
    "Parquet with an image in each row": (to_parquet(), 3),
    "no tasks": (json.dumps([record_with(("human", "a"), ("gpt", "b"))] * 4).encode(), 4),
}


def step(path: Path) -> int:
    """What a step with LLaVA's model does with a data file; how many records it has."""
    scan = scan_records(open_records(path), problem_of, "dataset")
    refuse_problems(scan, "dataset", path.with_name("-bad records.json"))
    return len(scan.records)


@pytest.mark.parametrize(("content", "count"), FILES.values(), ids=FILES)
def test_remedies_lead_from_any_file_to_one_that_the_step_takes(tmp_path, content, count):
    folder = tmp_path / "it's a $HOME"
    folder.mkdir()
    path = write(folder / "-data of mine.json", content)
    for _ in range(5):
        try:
            assert step(path) == count
            return
        except UserError as error:
            message = str(error)
        for _ in range(3):  # a command that is refused names the next one
            before = set(folder.iterdir())
            command = re.search("`([^`]*)`[^`]*$", message)[1]
            done = subprocess.run(command, shell=True, check=False, cwd="/", capture_output=True, text=True)
            assert done.returncode in (0, 2), done.stderr
            message = done.stderr
            if done.returncode == 0:
                break
        (path,) = [one for one in set(folder.iterdir()) - before if one.is_file() and "bad" not in one.name]
    pytest.fail(f"no end: {message}")


def test_a_file_of_no_known_form_is_described_and_not_to_be_dropped_whole(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"caption": "x", "image_url": "https://a/b", "dataset": "x"}] * 3))
    with pytest.raises(UserError) as caught:
        step(path)
    assert "caption, image_url, dataset" in str(caught.value) and "--drop" not in str(caught.value)


def test_a_remedy_is_one_for_the_reason(tmp_path):
    """Records without a task need no other form; most images missing is a matter of the folder, and no form either."""
    records = open_records(write(tmp_path / "a.json", json.dumps(MESSAGES)))
    with pytest.raises(UserError) as caught:
        refuse_bad_records(records, {0: "names no task under `dataset`"}, tmp_path / "bad.json")
    assert "--drop" in str(caught.value) and "--to" not in str(caught.value)
    assert "image_folder" in form_remedy(records, dict.fromkeys(range(4), "missing image"))
    assert form_remedy(records, {0: "missing image"}) == form_remedy(records, {}) == ""


def test_an_archive_given_as_the_image_folder_is_named(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([record_with(("human", "<image>a"), ("gpt", "b"), image="0.png")]))
    scan = scan_records(open_records(path), problem_of)
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(write(tmp_path / "0.png", b"x"), "0.png")
    with pytest.raises(UserError, match="tar of images"):
        check_image_folder(scan, range(1), str(tmp_path / "images.tar"))
