"""Step 1 through its command line: equal numbers from every task, exact records, an unharmed source."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import select_warm_up_data
from tests.helpers.feature_files import call, mixture, record, refusal
from tive.data.conversations import from_llava, to_llava
from tive.data.records import open_records

main = select_warm_up_data.main
ROOT = Path(select_warm_up_data.__file__).parent


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(mixture(), ensure_ascii=False, indent=1))
    return path


def warm_up(source: Path, *arguments) -> list[dict]:
    target = source.with_name("out") / "warm_up.json"
    call(main, "--source_path", source, "--target_path", target, *arguments)
    return json.loads(target.read_text())


def test_every_task_gives_the_same_number(source, capsys):
    drawn = Counter(one["dataset"] for one in warm_up(source, "--sample_ratio", 16 / 78))
    assert drawn == {"vqa": 4, "textcaps": 4, "boxes": 4, "chat": 4}
    lines = capsys.readouterr().out.splitlines()
    assert ["vqa", "40", "4"] in [line.split() for line in lines]
    assert ["total", "78", "16"] in [line.split() for line in lines]


@pytest.mark.parametrize("ratio", [0.02, 0.08, 0.29, 0.5, 0.77, 0.99, 1.0])
def test_the_total_holds_and_small_tasks_give_all_they_have(source, ratio):
    drawn = Counter(one["dataset"] for one in warm_up(source, "--sample_ratio", ratio))
    assert drawn.total() == int(ratio * 78)
    sizes = {"vqa": 40, "textcaps": 9, "boxes": 23, "chat": 6}
    for task, number in drawn.items():
        assert number >= max(drawn.values()) - 1 or number == sizes[task]


def test_rows_only_writes_the_numbers_of_the_records_that_are_drawn_and_no_records(source, capsys):
    folder = source.with_name("out")
    arguments = ["--source_path", source, "--target_path", folder / "warm_up.json"]
    call(main, *arguments, "--rows_only")
    assert [path.name for path in folder.iterdir()] == ["warm_up_rows.npy"]
    rows = np.load(folder / "warm_up_rows.npy")
    records = open_records(source)
    assert [records[row] for row in rows] == warm_up(source)
    assert "warm_up.json" in refusal(capsys, main, *arguments, "--rows_only")  # the records could be of other data


@pytest.mark.parametrize("number", [1, 6, 8, 25, 100])
def test_so_many_of_every_task_are_drawn_and_all_of_a_smaller_one(source, number):
    drawn = Counter(one["dataset"] for one in warm_up(source, "--per_task", number))
    sizes = {"vqa": 40, "textcaps": 9, "boxes": 23, "chat": 6}
    assert drawn == {task: min(size, number) for task, size in sizes.items()}


def test_a_sample_for_its_gradients_is_drawn_apart_from_the_warm_up_sample_of_the_same_seed(tmp_path):
    source = tmp_path / "data.json"
    source.write_text(json.dumps([record(row, "vqa") for row in range(1000)]))
    samples = [warm_up(source, *size) for size in (("--sample_ratio", 0.1), ("--per_task", 100))]
    ids = [{one["id"] for one in sample} for sample in samples]
    assert len(ids[0]) == len(ids[1]) == 100 and len(ids[0] & ids[1]) < 25


def test_records_are_drawn_once_and_come_unchanged_in_the_order_of_the_source(source):
    sample = warm_up(source, "--sample_ratio", 0.4)
    rows = [one["extra"]["nested"][0] for one in sample]
    assert rows == sorted(set(rows))
    assert sample == [mixture()[row] for row in rows]
    texts = [open_records(source).raw(row).decode() for row in rows]
    assert (source.parent / "out" / "warm_up.json").read_text() == "[\n" + ",\n".join(texts) + "\n]\n"


def test_the_same_seed_draws_the_same_sample_and_another_seed_another(source):
    samples = [warm_up(source, "--seed", seed, "--sample_ratio", 0.3) for seed in (0, 0, 1)]
    assert samples[0] == samples[1] != samples[2]


def test_every_record_of_a_task_is_as_likely_as_any_other(tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(row, "vqa") for row in range(10)]))
    times = Counter(
        one["extra"]["nested"][0] for seed in range(150) for one in warm_up(path, "--seed", seed, "--sample_ratio", 0.3)
    )
    assert sum((times[row] - 45) ** 2 / 45 for row in range(10)) < 25


def test_another_key_and_json_lines_are_read(tmp_path):
    records = [{**one, "image": f"{one['dataset']}/1.jpg"} for one in mixture()]
    for one in records:
        del one["dataset"]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, records)))
    sample = warm_up(tmp_path / "data.jsonl", "--task_key", "image:/", "--sample_ratio", 8 / 78)
    assert Counter(one["image"] for one in sample) == dict.fromkeys(
        ["vqa/1.jpg", "textcaps/1.jpg", "boxes/1.jpg", "chat/1.jpg"], 2
    )


@pytest.mark.parametrize(
    "given, says",
    [
        (["--sample_ratio", 0], "--sample_ratio 0.0"),
        (["--sample_ratio", 1.01], "--sample_ratio 1.01"),
        (["--sample_ratio", "nan"], "--sample_ratio nan"),
        (["--sample_ratio", 0.01], "less than one record"),
        (["--seed", -2], "--seed -2"),
        (["--task_key", "source"], "no record names a task under `source`"),
        (["--source_path", "nowhere.json"], "cannot read nowhere.json"),
    ],
)
def test_bad_arguments_get_one_line_and_write_nothing(source, capsys, given, says):
    target = source.with_name("out.json")
    assert says in refusal(capsys, main, "--source_path", source, "--target_path", target, *given)
    assert not target.exists()


def test_a_sample_smaller_than_the_tasks_is_drawn_from_all_of_them_by_the_seed(tmp_path, capsys):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record(row, f"task {row // 2}") for row in range(80)]))
    times: Counter[str] = Counter()
    for seed in range(40):
        drawn = Counter(one["dataset"] for one in warm_up(path, "--seed", seed, "--sample_ratio", 0.25))
        assert drawn.total() == 20 and max(drawn.values()) == 1
        assert "20 of 40 tasks give nothing" in capsys.readouterr().out
        times += drawn
    assert len(times) == 40 and max(times.values()) < 40


def test_all_records_that_cannot_be_used_are_listed_and_dropped_by_the_command_that_is_told(source, capsys):
    records = json.loads(source.read_text())
    records[3]["conversations"] = []
    records[5]["video"] = "a.mp4"
    records[7]["dataset"] = ["a", "b"]
    source.write_text(json.dumps(records))
    target = source.with_name("warm_up.json")
    line = refusal(capsys, main, "--source_path", source, "--target_path", target)
    listing = source.with_name("warm_up_bad_records.json")
    assert "3 of 78 records cannot be used" in line and str(listing) in line
    assert [entry["row"] for entry in json.loads(listing.read_text())] == [3, 5, 7]
    assert not target.exists()
    subprocess.run(re.search("`(.*)`", line)[1], shell=True, cwd="/", check=True, capture_output=True)
    good = json.loads(source.with_name("data_good.json").read_text())
    assert good == [one for row, one in enumerate(records) if row not in (3, 5, 7)]
    call(main, "--source_path", source.with_name("data_good.json"), "--target_path", target)
    assert not listing.exists()


def test_pictures_under_images_are_pictures_and_tags_without_one_are_told(source, capsys):
    records = json.loads(source.read_text())
    for row, one in enumerate(records):
        one.pop("image", None)
        one["images"] = [] if row < 5 else [f"./{one['dataset']}/{row}.jpg"]
        one["conversations"] = [{"from": "human", "value": "<image>\nQ?"}, {"from": "gpt", "value": "A."}]
        one["dataset"] = one["dataset"] if row < 5 else None
    source.write_text(json.dumps(records[:5]))
    warm_up(source, "--sample_ratio", 1)
    assert "5 records have <image> in their text and no image" in capsys.readouterr().out
    source.write_text(json.dumps(records[5:]))
    warm_up(source, "--sample_ratio", 1, "--task_key", "images:/")
    assert {"vqa", "textcaps", "boxes", "chat", "total"} <= {
        line.split()[0] for line in capsys.readouterr().out.splitlines()
    }


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '[{"id": 1, "dataset": "a"}]', "[]", "[{}", "\xff"])
def test_a_bad_source_gets_one_line_and_the_target_keeps_what_it_held(source, capsys, text):
    source.write_text(text, encoding="latin-1")
    target = source.with_name("out.json")
    target.write_text("what was there")
    assert str(source) in refusal(capsys, main, "--source_path", source, "--target_path", target)
    assert target.read_text() == "what was there"


def test_the_source_is_never_the_target(source, capsys, tmp_path):
    text = source.read_text()
    (tmp_path / "link.json").symlink_to(source)
    for target in (source, tmp_path / "link.json", f"{tmp_path}/../{tmp_path.name}/data.json"):
        assert "is the source itself" in refusal(capsys, main, "--source_path", source, "--target_path", target)
    assert source.read_text() == text


def test_a_folder_is_no_target(source, capsys):
    for target in (".", source.parent):
        assert "name a file" in refusal(capsys, main, "--source_path", source, "--target_path", target)


def test_the_script_runs_by_itself(source):
    script = Path(select_warm_up_data.__file__)
    target = source.with_name("sample.json")
    command = [sys.executable, script, "--source_path", source, "--target_path", target]
    done = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=True)
    assert f"written: {target}" in done.stdout and len(json.loads(target.read_text())) == 6


@pytest.mark.parametrize("form", ("llava", "sharegpt", "messages", "parts"))
def test_a_sample_is_drawn_from_every_form_that_a_trainer_reads(form, tmp_path):
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image>\n<image>\nWhich?"}]
    turns.append({"from": "gpt", "value": "The first."})
    llava = {"id": "a", "dataset": "two", "image": ["a.png", "b.png"], "conversations": turns}
    other = llava if form == "llava" else from_llava(to_llava(llava), form)
    source = tmp_path / "data.jsonl"
    source.write_text("\n".join(json.dumps(other | {"id": str(row)}) for row in range(4)) + "\n")
    drawn = warm_up(source, "--sample_ratio", 0.5)
    assert len(drawn) == 2 and all(item == other | {"id": item["id"]} for item in drawn)
