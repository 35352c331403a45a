"""What the selection writes is read back by the same code, under a name that no other choice has."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import select_data_TIVE
from tests.helpers.feature_files import call, mixture, random_features, refusal, scores_of, write_features
from tive.data.records import open_records
from tive.data.tasks import NO_TASK
from tive.features.lookup import open_features
from tive.selection.mixture import read_mixture
from tive.selection.options import TiveOptions, stem_of
from tive.selection.output import (
    Chosen,
    Task,
    files_of,
    find_summaries,
    read_selection,
    write_selection,
)
from tive.util.errors import UserError
from tive.util.files import check_writable, sha256_of

main = select_data_TIVE.main


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, list[str | Path]]:
    """A folder with data and features, and the arguments that select from it into `out`."""
    (tmp_path / "data.json").write_text(json.dumps(mixture()))
    write_features(tmp_path / "features", tmp_path / "data.json", *random_features(len(mixture())))
    arguments = ["--data_path", tmp_path / "data.json", "--gradient_path", tmp_path / "features"]
    return tmp_path, [*arguments, "--save_path", tmp_path / "out"]


def change_chunks(folder: Path, change) -> None:
    for path in folder.glob("output_*.pt"):
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, path)


def columns(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or []), list(reader)


def test_every_score_of_the_pass_is_in_the_scores_file(made):
    folder, arguments = made
    call(main, *arguments)
    names, lines = columns(folder / "out" / "Tive_q_0.001_p_0.15_scores.csv")
    first, last = ["row", "id", "task", "norm", "influence"], ["weight", "times_selected", "left_out"]
    assert names == [*first, "loss", "supervised_tokens", "tokens", *last]
    expected = scores_of(random_features(len(mixture()))[1])
    assert [float(line["loss"]) for line in lines] == expected["losses"].tolist()
    assert [line["supervised_tokens"] for line in lines] == [str(count) for count in expected["supervised_tokens"]]
    assert [line["tokens"] for line in lines] == [str(count) for count in expected["tokens"]]


def test_features_of_earlier_runs_select_by_influence_and_norm_and_lack_the_columns(made, capsys):
    folder, arguments = made

    def strip(content):
        for key in ("losses", "supervised_tokens", "tokens"):
            del content[key]

    change_chunks(folder / "features", strip)
    call(main, *arguments)
    call(main, *arguments, "--instance_score", "norm")
    names, _ = columns(folder / "out" / "Tive_q_0.001_p_0.15_scores.csv")
    assert names == ["row", "id", "task", "norm", "influence", "weight", "times_selected", "left_out"]
    before = set((folder / "out").iterdir())
    for option in (["--instance_score", "loss"], ["--task_budget", "loss"], ["--instance_score", "length"]):
        line = refusal(capsys, main, *arguments, *option)
        assert "features holds no " in line and "take the gradients again" in line
    assert "take the gradients again with el2n" in refusal(capsys, main, *arguments, "--instance_score", "el2n")
    assert set((folder / "out").iterdir()) == before


def test_a_score_that_is_no_number_leaves_its_record_out_where_it_decides(made):
    folder, arguments = made

    def break_one(content):
        content["losses"][2] = float("nan")

    change_chunks(folder / "features", break_one)
    call(main, *arguments, "--instance_score", "loss", "--q", 1)
    _, lines = columns(folder / "out" / "Tive_q_1.0_p_0.15_score-loss_scores.csv")
    assert [line["row"] for line in lines if line["left_out"] == "loss not a number"] == ["2", "28", "54"]
    call(main, *arguments)
    _, lines = columns(folder / "out" / "Tive_q_0.001_p_0.15_scores.csv")
    assert not any(line["left_out"] for line in lines)


def test_the_visual_gain_decides_and_drops_records_and_one_without_images_gains_nothing(made, capsys):
    folder, arguments = made
    line = refusal(capsys, main, *arguments, "--drop_below", 0)
    assert "with visual_gain" in line

    def add_gains(content):
        gains = torch.linspace(-1, 1, len(content["norms"]))
        gains[::2] = float("nan")  # without images
        content["visual_gain"] = gains

    change_chunks(folder / "features", add_gains)
    call(main, *arguments, "--instance_score", "visual_gain", "--sampling", "top", "--p", 0.3)
    _, lines = columns(folder / "out" / "Tive_q_0.001_p_0.3_score-visual_gain_sampling-top_scores.csv")
    assert not any(line["left_out"] for line in lines)
    for task in ("vqa", "boxes"):
        there = [line for line in lines if line["task"] == task]
        gains = [float(line["visual_gain"] or 0) for line in there]
        drawn = [gain for gain, line in zip(gains, there, strict=True) if line["times_selected"] == "1"]
        assert sorted(drawn) == sorted(gains)[-len(drawn) :]
    call(main, *arguments, "--drop_below", 0)
    _, lines = columns(folder / "out" / "Tive_q_0.001_p_0.15_drop_below-0.0_scores.csv")
    assert all((line["left_out"] == "visual gain below 0") == (float(line["visual_gain"] or 0) < 0) for line in lines)
    assert "visual gain below 0" in capsys.readouterr().out


def test_no_choice_overwrites_the_files_of_another(made):
    folder, arguments = made
    choices = [
        [],
        ["--seed", 1],
        ["--exclude_tasks", "none"],
        ["--exclude_tasks", "vqa", "chat"],
        ["--exclude_tasks", "vqa"],
        ["--rounding", "largest_remainder"],
        ["--task_budget", "loss"],
        ["--task_budget", "loss+equal"],
        ["--at_most_once"],
        ["--instance_score", "loss"],
        ["--instance_score", "loss", "--sampling", "top"],
        ["--sampling", "clusters"],
        ["--task_key", "id:/", "--exclude_tasks", "none"],
        ["--q", 3, "--p", 0.3],
    ]
    for number, choice in enumerate(choices, start=1):
        call(main, *arguments, *choice)
        assert len(list((folder / "out").glob("*_summary.json"))) == number, choice
    # The default exclusion is the same whether it is named, and whether the data has such a task at all.
    call(main, *arguments, "--exclude_tasks", "textcaps")
    assert len(list((folder / "out").iterdir())) == 4 * len(choices)
    # Beside each subset are the numbers of its rows.
    for numbers in (folder / "out").glob("*_rows.npy"):
        subset = open_records(numbers.with_name(numbers.name.replace("_rows.npy", ".json")))
        records = open_records(folder / "data.json")
        assert [records[row] for row in np.load(numbers)] == list(subset)


def test_rows_only_writes_all_of_a_selection_but_its_records(made, capsys):
    folder, arguments = made
    stem = "Tive_q_0.001_p_0.15"
    call(main, *arguments, "--rows_only")
    assert {path.name for path in (folder / "out").iterdir()} == {
        f"{stem}{end}" for end in ("_rows.npy", "_scores.csv", "_summary.json")
    }
    rows = np.load(folder / "out" / f"{stem}_rows.npy")
    summary = read_selection(find_summaries(folder / "out")[0]).summary
    assert (summary.subset.file, summary.subset.records) == (f"{stem}_rows.npy", len(rows))
    assert summary.subset.sha256 == sha256_of(folder / "out" / f"{stem}_rows.npy")
    call(main, *arguments)
    assert np.array_equal(np.load(folder / "out" / f"{stem}_rows.npy"), rows)
    assert f"{stem}.json" in refusal(capsys, main, *arguments, "--rows_only")


def test_names_of_tasks_that_suit_no_file_name_are_replaced_and_stay_apart():
    stems = {
        stem_of(TiveOptions(exclude_tasks=tasks), "dataset", ["a/b", "a", "b", "a+b", "none", "x" * 300])
        for tasks in (("a/b",), ("a", "b"), ("a+b",), (), ("none",), ("x" * 300,))
    }
    assert len(stems) == 6
    assert all("/" not in stem and len(stem) < 100 for stem in stems)


def test_an_unwritable_folder_is_found_before_anything_is_read(made, capsys, tmp_path):
    _, arguments = made
    (tmp_path / "file").write_text("")
    for folder in ("/proc/none", tmp_path / "file", tmp_path / "file" / "below"):
        line = refusal(capsys, main, *arguments, "--save_path", folder, "--data_path", "nowhere.json")
        assert f"cannot write {folder}" in line
    check_writable(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()


def test_adam_features_are_refused_with_the_remedy(made, capsys):
    folder, arguments = made
    for kind in ("adam", "adam_release"):
        write_features(
            folder / kind,
            folder / "data.json",
            *random_features(len(mixture())),
            change=lambda match, kind=kind: match.update(gradient=kind),
        )
        line = refusal(capsys, main, *arguments, "--gradient_path", folder / kind)
        assert f"holds {kind} gradients" in line and "select_data_LESS.py" in line and "(gradient sgd)" in line
    assert not (folder / "out").exists()


@pytest.fixture
def without_gradients(made: tuple[Path, list[str | Path]]) -> tuple[Path, list[str | Path]]:
    """The same, and the arguments that select from a folder of forward passes alone, with the same scores."""
    folder, arguments = made
    forward, (_, norms) = folder / "forward", random_features(len(mixture()))
    nothing = torch.empty(len(norms), 0)
    write_features(forward, folder / "data.json", nothing, norms, change=lambda match: match.update(gradient="none"))
    change_chunks(forward, lambda content: content.pop("norms"))
    return folder, arguments


CHOICES_WITHOUT_GRADIENTS = [
    ["--task_budget", "equal", "--instance_score", "loss", "--q", 2],
    ["--task_budget", "size+loss", "--instance_score", "length", "--sampling", "top", "--p", 0.3],
    ["--task_budget", "length", "--instance_score", "random", "--at_most_once"],
    ["--task_budget", "equal+loss", "--from_sample"],
]


def test_a_folder_without_gradients_selects_by_its_scores_as_one_with_them(without_gradients, capsys):
    folder, arguments = without_gradients
    for choice in CHOICES_WITHOUT_GRADIENTS:
        call(main, *arguments, *choice)
        call(main, *arguments, *choice, "--gradient_path", folder / "forward", "--save_path", folder / "other")
        assert "nan" not in capsys.readouterr().out
    subsets = list((folder / "out").glob("*.json"))
    assert len(subsets) == 2 * len(CHOICES_WITHOUT_GRADIENTS)
    for subset in subsets:
        if not subset.name.endswith("_summary.json"):
            assert subset.read_bytes() == (folder / "other" / subset.name).read_bytes()
    for summary in (folder / "other").glob("*_summary.json"):
        selection = read_selection(summary)
        assert "norm" not in selection.columns and all(task.value is None for task in selection.tasks)


@pytest.mark.parametrize(
    "choice, named",
    [
        ([], ("no influence and no norm;",)),
        (["--task_budget", "equal+difficulty", "--instance_score", "loss"], ("no norm;",)),
        (["--task_budget", "equal", "--instance_score", "norm"], ("no norm;",)),
        (["--task_budget", "equal", "--instance_score", "loss", "--sampling", "clusters"], ("no influence;",)),
        (["--task_budget", "equal", "--instance_score", "loss", "--drop_below", 0], ("visual_gain",)),
    ],
)
def test_what_a_folder_without_gradients_lacks_is_refused_with_the_remedy(without_gradients, capsys, choice, named):
    folder, arguments = without_gradients
    line = refusal(capsys, main, *arguments, "--gradient_path", folder / "forward", *choice)
    assert str(folder / "forward") in line and all(name in line for name in named)
    assert ("gradient sgd" in line) == ("visual_gain" not in named) and not (folder / "out").exists()


def test_what_is_read_is_what_was_written(made):
    folder, arguments = made
    call(main, *arguments, "--instance_score", "loss", "--q", 2)
    selection = read_selection(find_summaries(folder / "out")[0])
    names, lines = columns(folder / "out" / f"{selection.stem}_scores.csv")
    assert list(selection.columns) == names[3:-2]
    for name, column in selection.columns.items():
        assert column.tolist() == [float(line[name] or "nan") for line in lines] or np.isnan(column).any()
    assert [selection.tasks[index].name for index in selection.task] == [line["task"] for line in lines]
    assert selection.summary.method == "TIVE" and selection.summary.arguments["instance_score"] == "loss"
    assert selection.summary.subset.records == selection.times_selected.sum()
    assert np.isnan(selection.column("el2n")).all()


def write_other(folder: Path, data: Path) -> dict[str, Path]:
    """A selection of another method, with scores of its own."""
    mixed = read_mixture(str(data), "no such key")
    count = len(mixed.ids)
    times = (np.arange(count) % 5 == 0).astype(np.int64)
    numbers = {"score": np.linspace(-1, 1, count), "rank": np.arange(count), "score_vqa, part": np.ones(count)}
    files = files_of(folder, "Less_p_0.2", data)
    task = Task(NO_TASK, records=count, counted=count - 1, selected=int(times.sum()), distinct=int(times.sum()))
    details = {"checkpoints": [{"step": 105, "weight": 0.6}]}
    chosen = Chosen([task], numbers, times, {3: "features are zero"}, "LESS", details)
    write_selection(files, mixed, chosen, {"p": 0.2}, open_features(data.parent / "features", mixed.records))
    return files


def test_another_methods_selection_is_written_and_read_by_the_same_code(made):
    folder, _ = made
    files = write_other(folder / "less", folder / "data.json")
    assert files["subset"].name == "Less_p_0.2.json" and len(json.loads(files["subset"].read_text())) == 16
    selection = read_selection(find_summaries(folder / "less")[0])
    assert list(selection.columns) == ["score", "rank", "score_vqa, part"]
    assert selection.summary.method == "LESS" and selection.summary.details["checkpoints"][0]["weight"] == 0.6
    assert [(entry.row, entry.reason) for entry in selection.summary.left_out] == [(3, "features are zero")]
    assert selection.column("score")[0] == -1


@pytest.mark.parametrize(
    "header",
    [
        "row,id,task,norm,times_selected",
        "id,row,task,times_selected,left_out",
        "row,id,task,norm,norm,times_selected,left_out",
    ],
)
def test_a_scores_file_of_other_columns_is_refused_with_those_it_must_have(made, header):
    folder, arguments = made
    call(main, *arguments)
    path = folder / "out" / "Tive_q_0.001_p_0.15_scores.csv"
    path.write_text(f"{header}\n" + path.read_text().partition("\n")[2])
    with pytest.raises(UserError, match="the columns are not row,id,task, scores, times_selected,left_out"):
        read_selection(find_summaries(folder / "out")[0])
