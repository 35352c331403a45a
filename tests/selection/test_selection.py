"""Step 4 through its command line: the paper's numbers, exact records, and one clear line for everything bad."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import select_data_TIVE
from tests.helpers.feature_files import (
    call,
    mixture,
    random_features,
    record,
    refusal,
    write_features,
    write_release_features,
)
from tests.helpers.forked_python import PYTHON
from tive.data.records import open_records
from tive.features import lookup as span_module
from tive.features.chunk import open_chunks
from tive.features.lookup import spans_of
from tive.method import influence as influence_module
from tive.method.influence import group_means, products

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "legacy_features"
main = select_data_TIVE.main


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    (folder / "data.json").write_text(json.dumps(mixture(), ensure_ascii=False, indent=1))
    features, norms = random_features(len(mixture()))
    write_features(folder / "features", folder / "data.json", features, norms)
    return folder, features, norms


def paths(folder: Path, out: Path) -> list[str | Path]:
    return ["--data_path", folder / "data.json", "--gradient_path", folder / "features", "--save_path", out]


class Outcome:
    """The selection of this stem, or the only one, that a folder holds."""

    def __init__(self, out: Path, stem: str | None = None) -> None:
        if stem is None:
            (summary,) = out.glob("*_summary.json")
            stem = summary.name.removesuffix("_summary.json")
        self.stem = stem
        self.subset_text = (out / f"{stem}.json").read_text()
        self.subset = json.loads(self.subset_text)
        with open(out / f"{stem}_scores.csv", newline="") as file:
            self.scores = list(csv.DictReader(file))
        self.summary = json.loads((out / f"{stem}_summary.json").read_text())
        self.tasks = {task["task"]: task for task in self.summary["tasks"]}

    def column(self, name: str) -> np.ndarray:
        return np.array([float(line[name] or "nan") for line in self.scores])


def all_pairs(features: torch.Tensor, tasks: list[str]) -> np.ndarray:
    """Mean cosine of every record with the records of its task, itself among them, the naive way."""
    unit = features.double() / features.double().norm(dim=1, keepdim=True)
    return np.array(
        [
            np.mean([float(unit[row] @ unit[other]) for other in range(len(tasks)) if tasks[other] == tasks[row]])
            for row in range(len(tasks))
        ]
    )


def test_the_release_and_this_agree_on_its_own_files(tmp_path):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    given = expected["arguments"]
    call(
        main,
        *("--data_path", GOLDEN / "data.json", "--gradient_path", GOLDEN, "--save_path", tmp_path),
        *("--p", given["p"], "--q", given["q"], "--chunk_num", given["chunk_num"]),
    )
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_0.3")
    wanted = np.array([np.nan if value is None else value for value in expected["influence"]])
    np.testing.assert_allclose(outcome.column("influence"), wanted, atol=2e-3)
    for task, size in expected["task_size"].items():
        assert outcome.tasks[task]["budget_before_rounding"] == pytest.approx(size, abs=1e-6)
        assert outcome.tasks[task]["selected"] == expected["selected_per_task"][task]
    assert outcome.tasks["textcaps"]["excluded"] and outcome.tasks["textcaps"]["selected"] == 0
    assert outcome.summary["inputs"]["match"] is None and outcome.summary["gradient_pass"] == []


@pytest.fixture(scope="module", params=[1, 129])
def chunkings(request, tmp_path_factory):
    """The same features in folders of different chunkings, opened; tasks and all-pairs influence."""
    folder = tmp_path_factory.mktemp("chunkings")
    (folder / "data.json").write_text(json.dumps(mixture()))
    tasks = [one["dataset"] for one in mixture()]
    features, norms = random_features(len(tasks), request.param)
    for chunks in (1, 5, 80):
        write_features(folder / str(chunks), folder / "data.json", features, norms, num_chunks=chunks)
    write_release_features(folder / "release", features, norms, 3)
    opened = {name: open_chunks(folder / name) for name in ("1", "5", "80", "release")}
    return opened, np.unique(tasks, return_inverse=True)[1], all_pairs(features, tasks)


@pytest.mark.parametrize("span_rows, block_rows, threads", [(1, 1, 1), (7, 3, 2), (4096, 128, 3), (33, 128, 1)])
def test_influence_is_the_all_pairs_mean_for_any_chunking_block_and_threads(
    chunkings, monkeypatch, span_rows, block_rows, threads
):
    monkeypatch.setattr(span_module, "SPAN_ROWS", span_rows)
    monkeypatch.setattr(influence_module, "BLOCK_ROWS", block_rows)
    folders, codes, expected = chunkings
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for chunks in folders.values():
            spans = spans_of(chunks)
            values = products(spans, group_means(spans, codes)[0], codes)
            np.testing.assert_allclose(values, expected, atol=1e-11)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_the_outcome_is_the_papers_formulas_on_the_scores_it_writes(made, tmp_path, capsys):
    folder, features, norms = made
    call(main, *paths(folder, tmp_path), "--p", 0.3, "--q", 5)
    outcome = Outcome(tmp_path, "Tive_q_5.0_p_0.3")
    tasks = [one["dataset"] for one in mixture()]
    influence = all_pairs(features, tasks)
    values = {task: np.mean([float(n) for n, t in zip(norms, tasks, strict=True) if t == task]) for task in set(tasks)}
    values.pop("textcaps")
    for task, entry in outcome.tasks.items():
        rows = [row for row, name in enumerate(tasks) if name == task]
        assert entry["records"] == entry["counted"] == len(rows)
        assert entry["selected"] == sum(int(outcome.scores[row]["times_selected"]) for row in rows)
        if task == "textcaps":
            assert entry["value"] is entry["budget"] is entry["effective_sample_size"] is None
            continue
        budget = 0.3 * len(tasks) * values[task] / sum(values.values())
        raw = np.exp(5 * influence[rows])
        assert entry["value"] == pytest.approx(values[task])
        assert entry["budget_before_rounding"] == pytest.approx(budget)
        assert entry["selected"] == entry["budget"] == int(budget)
        assert entry["effective_sample_size"] == pytest.approx(raw.sum() ** 2 / (raw**2).sum())
        np.testing.assert_allclose(outcome.column("weight")[rows], raw / raw.sum(), rtol=1e-9)
        np.testing.assert_allclose(outcome.column("influence")[rows], influence[rows], atol=1e-10)
    np.testing.assert_allclose(outcome.column("norm"), norms.double().numpy())
    printed = capsys.readouterr().out
    assert "leans towards high influence at q = 5.0" in printed
    vqa = next(line for line in printed.splitlines() if line.startswith("vqa"))
    assert vqa.split()[1:4] == ["40", f"{values['vqa']:.4g}", f"{outcome.tasks['vqa']['budget_before_rounding']:.1f}"]


def test_a_budget_above_the_records_takes_each_of_them_equally_often_and_draws_the_rest(made, tmp_path, capsys):
    call(main, *paths(made[0], tmp_path), "--p", 1, "--task_budget", "equal")
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_1.0_budget-equal")
    times = [int(line["times_selected"]) for line in outcome.scores if line["task"] == "chat"]
    assert sorted(times) == [4, 4, 4, 4, 5, 5] and outcome.tasks["chat"]["distinct"] == 6  # 26 of 6 records
    assert "chat (26 of 6 records)" in capsys.readouterr().out
    ids = [one["id"] for one in outcome.subset]
    assert sorted(ids.count(line["id"]) for line in outcome.scores if line["task"] == "chat") == sorted(times)


def test_records_are_written_byte_for_byte_in_the_order_of_the_data(made, tmp_path):
    call(main, *paths(made[0], tmp_path), "--p", 0.4)
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_0.4")
    records = open_records(made[0] / "data.json")
    texts = [
        records.raw(row).decode() for row, line in enumerate(outcome.scores) for _ in range(int(line["times_selected"]))
    ]
    assert outcome.subset_text == "[\n" + ",\n".join(texts) + "\n]\n"
    subset = outcome.summary["subset"]
    assert subset["sha256"] == hashlib.sha256(outcome.subset_text.encode()).hexdigest()
    assert subset["records"] == len(texts) and subset["file"] == "Tive_q_0.001_p_0.4.json"


def test_the_same_seed_draws_the_same_subset_for_any_chunking_and_another_seed_another(made, tmp_path):
    folder, features, norms = made
    write_features(tmp_path / "again", folder / "data.json", features, norms, num_chunks=7)
    texts = []
    for seed, gradients in ((3, folder / "features"), (3, tmp_path / "again"), (4, folder / "features")):
        call(main, *paths(folder, tmp_path / "out"), "--gradient_path", gradients, "--seed", seed, "--q", 20)
        texts.append(Outcome(tmp_path / "out", f"Tive_q_20.0_p_0.15_seed-{seed}").subset_text)
    assert texts[0] == texts[1] != texts[2]


def test_a_tasks_draw_does_not_depend_on_the_other_tasks(made, tmp_path):
    drawn = []
    for excluded in ("textcaps", "textcaps,chat"):
        # By size, the budget of a task does depend on the others: all of p goes to those that are left.
        p = 0.2 if "," not in excluded else 0.2 * 63 / 69
        call(main, *paths(made[0], tmp_path), "--p", p, "--task_budget", "size", "--exclude_tasks", excluded)
        exclusion = "_exclude-chat+textcaps" if "," in excluded else ""
        outcome = Outcome(tmp_path, f"Tive_q_0.001_p_{p}_budget-size{exclusion}")
        drawn.append(
            [line["row"] for line in outcome.scores if line["task"] == "vqa" and line["times_selected"] == "1"]
        )
    assert drawn[0] == drawn[1] and drawn[0]


def test_task_budgets_by_size_and_equal_ones_share_the_same_total(made, tmp_path):
    for kind, shares in (("size", [40, 23, 6]), ("equal", [1, 1, 1])):
        call(main, *paths(made[0], tmp_path), "--task_budget", kind)
        tasks = Outcome(tmp_path, f"Tive_q_0.001_p_0.15_budget-{kind}").tasks
        budgets = [tasks[name]["budget_before_rounding"] for name in ("vqa", "boxes", "chat")]
        assert budgets == pytest.approx([0.15 * 78 * share / sum(shares) for share in shares])


def test_top_takes_the_best_scores_and_random_ignores_q(made, tmp_path, capsys):
    folder, _, norms = made
    call(main, *paths(folder, tmp_path), "--instance_score", "norm", "--sampling", "top", "--p", 0.3)
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_0.3_score-norm_sampling-top")
    for task in ("vqa", "boxes"):
        rows = [row for row, line in enumerate(outcome.scores) if line["task"] == task]
        best = sorted(rows, key=lambda row: -norms[row])[: outcome.tasks[task]["selected"]]
        assert [row for row in rows if outcome.scores[row]["times_selected"] == "1"] == sorted(best)
    assert "the highest norm of each task" in capsys.readouterr().out
    texts = []
    for q in ("0.0", "30.0"):
        call(main, *paths(folder, tmp_path), "--instance_score", "random", "--q", q)
        texts.append(Outcome(tmp_path, f"Tive_q_{q}_p_0.15_score-random").subset_text)
    assert texts[0] == texts[1]


def test_clusters_give_varied_records_and_the_same_for_any_chunking(tmp_path, capsys):
    (tmp_path / "data.json").write_text(json.dumps([record(row, ["vqa", "chat"][row % 2]) for row in range(400)]))
    features, norms = random_features(400)
    corners = torch.randn(5, 24, generator=torch.Generator().manual_seed(5))
    corner = np.random.default_rng(0).choice(5, 400, p=[0.9, 0.04, 0.02, 0.02, 0.02])
    features = (corners[torch.from_numpy(corner)] + 0.05 * features.float()).half()
    features[7], norms[7] = 0, 1.0
    subsets = []
    for chunks in (1, 7):
        write_features(tmp_path / str(chunks), tmp_path / "data.json", features, norms, num_chunks=chunks)
        arguments = [*paths(tmp_path, tmp_path / "out"), "--gradient_path", tmp_path / str(chunks)]
        call(main, *arguments, "--sampling", "clusters", "--task_budget", "size")
        outcome = Outcome(tmp_path / "out", "Tive_q_0.001_p_0.15_budget-size_sampling-clusters")
        subsets.append(outcome.subset_text)
    assert subsets[0] == subsets[1]
    times = outcome.column("times_selected")
    assert times.max() == 1 and times.sum() == 60 and times[7] == 0
    for task in range(2):
        drawn = np.flatnonzero((times > 0) & (np.arange(400) % 2 == task))
        assert set(corner[drawn].tolist()) == set(corner[task::2].tolist())
    assert "clusters" in capsys.readouterr().out
    # The points' file is gone.
    assert sorted(path.suffix for path in (tmp_path / "out").iterdir()) == [".csv", ".json", ".json", ".npy"]


def test_a_budget_above_the_records_is_met_by_clusters_too(made, tmp_path):
    call(main, *paths(made[0], tmp_path), "--p", 1, "--task_budget", "equal", "--sampling", "clusters")
    outcome = Outcome(tmp_path)
    times = [int(line["times_selected"]) for line in outcome.scores if line["task"] == "chat"]
    assert sorted(times) == [4, 4, 4, 4, 5, 5]


def test_equal_records_are_tied_and_top_takes_the_earlier(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([record(row, "vqa") for row in range(301)]))
    features, norms = random_features(301, 64)
    features[:] = features[:1]
    write_features(tmp_path / "features", tmp_path / "data.json", features, norms)
    call(main, *paths(tmp_path, tmp_path / "out"), "--sampling", "top", "--p", 0.1)
    times = [line["times_selected"] for line in Outcome(tmp_path / "out", "Tive_q_0.001_p_0.1_sampling-top").scores]
    assert times == ["1"] * 30 + ["0"] * 271


def test_records_without_a_usable_gradient_count_in_nothing_and_are_reported(tmp_path, capsys):
    records = mixture()
    rows = {
        task: [row for row, one in enumerate(records) if one["dataset"] == task] for task in ("vqa", "boxes", "chat")
    }
    broken, untasked = rows["vqa"][3], rows["vqa"][4]
    del records[broken]["conversations"]
    records[untasked] = "not even an object"
    (tmp_path / "data.json").write_text(json.dumps(records))
    features, norms = random_features(len(records))
    for row in (broken, untasked):
        features[row], norms[row] = 0, float("nan")
    zero, infinite, zero_norm, odd_norm = rows["boxes"][0], rows["boxes"][1], rows["chat"][0], rows["chat"][1]
    features[zero], features[infinite, 2] = 0, float("inf")
    norms[zero_norm], norms[odd_norm] = 0, float("inf")
    write_features(
        tmp_path / "features", tmp_path / "data.json", features, norms, left_out={broken: "no turns", untasked: "odd"}
    )
    call(main, *paths(tmp_path, tmp_path), "--p", 1, "--task_budget", "equal")
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_1.0_budget-equal")
    reasons = {
        **{broken: "no turns", untasked: "odd", zero: "features are zero", infinite: "features not finite"},
        **{zero_norm: "zero gradient", odd_norm: "gradient norm not a positive number"},
    }
    assert {entry["row"]: entry["reason"] for entry in outcome.summary["left_out"]} == reasons
    assert {row: line["left_out"] for row, line in enumerate(outcome.scores) if line["left_out"]} == reasons
    for row in reasons:
        line = outcome.scores[row]
        assert (line["influence"], line["weight"], line["times_selected"]) == ("", "", "0")
    assert outcome.tasks["boxes"]["records"] - outcome.tasks["boxes"]["counted"] == 2
    assert outcome.tasks["(no task)"]["excluded"] and outcome.tasks["(no task)"]["records"] == 1
    assert "left out: 6 records" in capsys.readouterr().out
    counted = [row for row in rows["boxes"] if row not in reasons]
    expected = all_pairs(features[counted], ["boxes"] * len(counted))
    np.testing.assert_allclose(outcome.column("influence")[counted], expected, atol=1e-10)
    assert outcome.tasks["boxes"]["value"] == pytest.approx(float(norms[counted].double().mean()))


def test_json_lines_and_other_task_keys_are_read(tmp_path):
    records = [{**one, "meta": {"source": one.pop("dataset")}} for one in mixture()]
    (tmp_path / "data.json").write_text("".join(json.dumps(one) + "\n" for one in records))
    features, norms = random_features(len(records))
    write_features(tmp_path / "features", tmp_path / "data.json", features, norms)
    call(main, *paths(tmp_path, tmp_path), "--task_key", "meta.source")
    outcome = Outcome(tmp_path, "Tive_q_0.001_p_0.15_task_key-meta.source")
    assert set(outcome.tasks) == {"vqa", "textcaps", "boxes", "chat"}


@pytest.mark.parametrize(
    "given, excluded",
    [
        ([], {"textcaps"}),
        (["--exclude_tasks"], set()),
        (["--exclude_tasks", "none"], set()),
        (["--exclude_tasks", ""], set()),
        (["--exclude_tasks", "vqa,chat"], {"vqa", "chat"}),
        (["--exclude_tasks", "vqa", "chat, boxes"], {"vqa", "chat", "boxes"}),
    ],
)
def test_excluded_tasks_may_be_several_or_none_and_their_records_count_in_n(made, tmp_path, given, excluded):
    call(main, *paths(made[0], tmp_path), *given)
    outcome = Outcome(tmp_path)
    assert {name for name, task in outcome.tasks.items() if task["excluded"]} == excluded
    total = sum(task["budget_before_rounding"] or 0 for task in outcome.tasks.values())
    assert total == pytest.approx(0.15 * 78)


def test_the_summary_says_what_the_subset_was_made_of(made, tmp_path):
    call(main, *paths(made[0], tmp_path), "--seed", 2)
    summary = Outcome(tmp_path).summary
    assert summary["arguments"]["seed"] == 2 and summary["versions"].keys() == {"python", "torch", "numpy"}
    inputs = summary["inputs"]
    assert inputs["data_sha256"] == hashlib.sha256((made[0] / "data.json").read_bytes()).hexdigest()
    assert inputs["match"]["proj_dim"] == 24 and inputs["image_folder"] == "images"
    assert [(chunk["start"], chunk["stop"]) for chunk in inputs["chunks"]] == [(0, 26), (26, 52), (52, 78)]
    assert [made["records_per_second"] for made in summary["gradient_pass"]] == [2.5] * 3


def test_odd_ids_and_task_names_are_written_so_that_they_can_be_read(tmp_path):
    records = [record(row, ["a,b", 'quo"te', "半 ", "line\nbreak"][row % 4]) for row in range(40)]
    for row, identity in enumerate([None, 7, [1, 2], "x\ny", "\udfff", True]):
        records[row]["id"] = identity
    (tmp_path / "data.json").write_text(json.dumps(records))
    features, norms = random_features(40)
    write_features(tmp_path / "features", tmp_path / "data.json", features, norms)
    call(main, *paths(tmp_path, tmp_path), "--p", 0.5, "--exclude_tasks", "a,b")
    outcome = Outcome(tmp_path)
    assert [line["id"] for line in outcome.scores[:6]] == ["", "7", "[1, 2]", "x\ny", "\\udfff", "true"]
    assert {line["task"] for line in outcome.scores} == set(outcome.tasks)
    assert outcome.tasks["a,b"]["excluded"]


@pytest.mark.parametrize(
    "given, says",
    [
        (["--p", 0], "p 0.0"),
        (["--p", 1.5], "p 1.5"),
        (["--p", "nan"], "p nan"),
        (["--q", -1], "q -1.0"),
        (["--q", "inf"], "q inf"),
        (["--seed", -1], "seed -1"),
        (["--sampling", "top", "--instance_score", "random"], "no meaning"),
        (["--p", 0.001], "less than one record"),
        (["--chunk_num", 2], "chunks, not 2; leave chunk_num out"),
        (["--data_path", "nowhere.json"], "cannot read nowhere.json"),
        (["--gradient_path", "nowhere"], "cannot read the feature folder nowhere"),
        (["--task_key", "source"], "names no task under `source`"),
        (["--exclude_tasks", "vqa", "textcaps", "boxes", "chat"], "every task"),
        (["--exclude_tasks", "captins"], "no task captins to exclude; its tasks are: vqa, boxes, textcaps, chat"),
        (["--exclude_tasks", "vqa", "multiple choice"], "no task multiple choice to exclude"),
        (["--exclude_tasks", "multiple", "choice"], "in quotes"),
        (["--device", "mps"], "'mps' is not a device"),
        (["--device", "cuda:x"], "'cuda:x' is not a device"),
        (["--save_path", "/proc/none"], "cannot write"),
    ],
)
def test_bad_arguments_get_one_line(made, tmp_path, capsys, given, says):
    assert says in refusal(capsys, main, *paths(made[0], tmp_path), *given)
    listed = ["bad_records.json"] if says.startswith("names no task") else []
    assert [path.name for path in tmp_path.iterdir()] == listed


def test_records_with_a_problem_that_were_not_left_out_are_refused_and_all_listed(tmp_path, capsys):
    records = mixture()
    records[7]["conversations"][0]["from"] = "robot"
    del records[9]["dataset"]
    (tmp_path / "data.json").write_text(json.dumps(records))
    write_features(tmp_path / "features", tmp_path / "data.json", *random_features(len(records)))
    line = refusal(capsys, main, *paths(tmp_path, tmp_path / "out"))
    assert f"2 of {len(records)} records cannot be used" in line
    assert "record 7" in line and "'robot'" in line and "as task_key" in line
    entries = json.loads((tmp_path / "out" / "bad_records.json").read_text())
    assert [entry["row"] for entry in entries] == [7, 9]
    assert entries[1]["reason"] == "names no task under `dataset`"


def test_data_that_changed_takes_the_features_there_are_and_what_lacks_them_is_written_to_be_computed(
    made, tmp_path, capsys
):
    folder, features, norms = made
    records = [one | {"dataset": "all"} for one in reversed(mixture())]
    (tmp_path / "data.json").write_text(json.dumps(records))
    arguments = [*paths(tmp_path, tmp_path / "out"), "--gradient_path", folder / "features"]
    call(main, *arguments)
    outcome = Outcome(tmp_path / "out")
    np.testing.assert_allclose(outcome.column("influence"), all_pairs(features.flip(0), ["all"] * 78), atol=1e-10)
    np.testing.assert_allclose(outcome.column("norm"), norms.double().numpy()[::-1])

    records.insert(9, record(999, "all"))
    (tmp_path / "data.json").write_text(json.dumps(records))
    line = refusal(capsys, main, *arguments)
    missing = tmp_path / "out" / "missing" / "records.json"
    assert "1 of the 79 records" in line and "record 9" in line and f"--input_file {missing}" in line
    assert json.loads(missing.read_text()) == [records[9]]
    write_features(missing.parent, missing, *random_features(1, seed=4), num_chunks=1)
    call(main, *arguments, missing.parent, "--p", 0.3)
    assert Outcome(tmp_path / "out", "Tive_q_0.001_p_0.3").summary["inputs"]["data_records"] == 79


def test_a_task_without_any_usable_record_is_refused(made, tmp_path, capsys):
    folder, features, norms = made
    chat = [row for row, one in enumerate(mixture()) if one["dataset"] == "chat"]
    norms = norms.clone()
    norms[chat] = float("nan")
    write_features(
        tmp_path / "features", folder / "data.json", features, norms, left_out=dict.fromkeys(chat, "no image")
    )
    arguments = [*paths(folder, tmp_path / "out"), "--gradient_path", tmp_path / "features"]
    assert "all 6 records of task chat are left out" in refusal(capsys, main, *arguments)
    call(main, *arguments, "--exclude_tasks", "chat")


def test_a_run_that_fails_overwrites_nothing(made, tmp_path, capsys, monkeypatch):
    call(main, *paths(made[0], tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full_disk(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tive.selection.output.csv.writer", full_disk)
    assert "No space left" in refusal(capsys, main, *paths(made[0], tmp_path), "--seed", 5)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_data_file_is_never_overwritten(made, tmp_path, capsys):
    shutil.copytree(made[0] / "features", tmp_path / "features")
    data = shutil.copy(made[0] / "data.json", tmp_path / "Tive_q_0.001_p_0.15.json")
    line = refusal(capsys, main, *paths(tmp_path, tmp_path), "--data_path", data)
    assert "would be overwritten" in line
    assert data.read_bytes() == (made[0] / "data.json").read_bytes()


def test_the_script_runs_by_itself_from_anywhere(made, tmp_path):
    script = [sys.executable, ROOT / "select_data_TIVE.py"]
    done = subprocess.run(
        [*script, *map(str, paths(made[0], tmp_path))], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "all but uniform at q = 0.001" in done.stdout
    assert len(Outcome(tmp_path).subset) == sum(task["selected"] for task in Outcome(tmp_path).tasks.values())
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True, check=True)
    assert "Choosing q" in shown.stdout


def test_the_benchmark_compares_both_ways_and_stops_the_slow_one():
    def benchmark(*arguments: str) -> str:
        command = [PYTHON, ROOT / "scripts" / "benchmark.py", "selection", "--proj_dim", "8", "--tasks", "3"]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout

    lines = [line.split() for line in benchmark("--sizes", "300", "900").splitlines()]
    for size in ("300", "900"):
        assert float(next(line for line in lines if line[:1] == [size])[-1]) < 1e-6
    assert benchmark("--sizes", "300", "900", "--limit", "0").count("stopped (about") == 2
