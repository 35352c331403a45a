"""scripts/report.py: what the page shows, what it must never do, and how it fails."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import runpy
import shutil
import sys
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from setuptools import Distribution

from tests.helpers.feature_files import random_features, record, write_features
from tive.data.records import open_records
from tive.evaluation.results import Conditions, Evaluation, ModelResult, TaskResult, write_result
from tive.report import page as page_module
from tive.report.page import Samples, card_of
from tive.util.text import DASH, short

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "report.py"
HEADER = ["row", "id", "task", "norm", "influence", "weight", "times_selected", "left_out"]
STEM = "Tive_q_0.001_p_0.15"
HOSTILE = [
    "<script>alert(1)</script>",
    "\"><img src=x onerror=alert(1)> ' onload='alert(2)",
    "</svg></style></details><style>@import url(http://evil.example/x.css);</style>",
    "]]> &amp; <!-- -->",
    "\u202eمهمة 🦜 $\\frac{a}{b}$ \x1b\n line",
    "x" * 5000,
]


def make_selection(
    folder: Path, names: list[str], records_a_task: int = 9, q: float = 0.001, hostile: bool = False
) -> Path:
    """A selection in the format of select_data_TIVE.py; the first task is excluded, the third row left out."""
    random = np.random.default_rng(0)
    images = folder / "images"
    images.mkdir(parents=True)
    Image.new("RGB", (64, 40), "navy").save(images / "a.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8\xff not an image")
    Image.new("RGB", (64, 40), "red").save(folder / "secret.png")
    paths = ["a.png", "missing.png", "broken.jpg", "../secret.png", str(folder / "secret.png"), None]
    rows, records, tasks, left_out = [], [], [], []
    for number, name in enumerate(names):
        influence = random.uniform(0, 0.8, records_a_task)
        weights = np.exp(q * influence) / np.exp(q * influence).sum()
        for position in range(records_a_task):
            row = len(rows)
            text = HOSTILE[row % len(HOSTILE)] if hostile else f"answer {row}"
            identity = HOSTILE[row % len(HOSTILE)] if hostile else f"id-{row}"
            record = {"id": identity, "dataset": name}
            record["conversations"] = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": text}]
            path = paths[row % len(paths)]
            records.append({**record, "image": path} if path else record)
            out = "gradient is zero <b>" if row == 2 else ""
            if out:
                left_out.append({"row": row, "id": identity, "task": name, "reason": out})
            scores = ["", "", ""] if out else [1.0 + number + position / 10, influence[position], weights[position]]
            selected = int(number > 0 and position < 3)
            rows.append([row, identity, name, *scores[:2], scores[2] if number else "", selected, out])
        tasks.append(
            {"task": name, "records": records_a_task, "counted": records_a_task - (number == 0)}
            | {"value": 1.4 + number if number else None, "budget": 3 if number else None, "excluded": number == 0}
            | {"selected": 3 * (number > 0), "distinct": 3 * (number > 0)}
            | {"effective_sample_size": 1 / float((weights**2).sum()) if number else None}
        )
    data = folder / "data.json"
    data.write_text(json.dumps(records))
    with open(folder / f"{STEM}_scores.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([HEADER, *rows])
    sha256 = hashlib.sha256(data.read_bytes()).hexdigest()
    manifest = {"device": "A<b>100", "dtype": "bfloat16", "seconds": 7200.0, "records_per_second": 2.5}
    manifest |= {"padding_efficiency": 0.96, "peak_memory_bytes": 3 * 2**30, "versions": {"torch": "2.13.0"}}
    summary = {
        "arguments": {"q": q, "p": 0.15, "seed": 0, "exclude_tasks": names[:1]},
        "versions": {"numpy": "1.26.4"},
        "created": "2025-01-05T15:00:00+00:00",
        "inputs": {
            "data_path": str(data),
            "data_sha256": sha256,
            "data_records": len(rows),
            "image_folder": str(images),
        }
        | {"gradient_path": "features", "chunks": [], "match": {"projector": "rademacher"}},
        "tasks": tasks,
        "left_out": left_out,
        "subset": {"file": f"{STEM}.json", "records": 3 * (len(names) - 1), "sha256": "ab" * 32},
        "gradient_pass": [manifest],
    }
    (folder / f"{STEM}_summary.json").write_text(json.dumps(summary))
    return folder


def script(path: Path, *arguments: object) -> None:
    """Run a script as the command line does."""
    before, sys.argv = sys.argv, [str(path), *map(str, arguments)]
    try:
        runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = before


def report(*arguments: object) -> None:
    script(SCRIPT, *arguments)


def errors_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    """The lines a failing run prints; the last is the error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        report(*arguments)
    assert stop.value.code == 2
    out, lines = capsys.readouterr()
    assert out == "" and lines.splitlines()[-1].startswith("error: ")
    return lines.splitlines()


def error_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line a failing run prints."""
    (line,) = errors_of(capsys, *arguments)
    return line


class Page(HTMLParser):
    """The elements of a page, with the text and the cells that stand in it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.source = path.read_text(encoding="utf-8")
        self.text = ""
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {key: value or "" for key, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.in_cell = False

    def cells(self, name: str) -> dict[str, str]:
        """Of the page's first table, the row of a name, by column."""
        return dict(zip(self.rows[0], next(row for row in self.rows if row[0] == name), strict=True))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_selection(tmp_path_factory.mktemp("plain"), ["captions", "vqa", "chat", "ocr"])


@pytest.fixture(scope="module")
def plain(folder: Path) -> Page:
    report(folder)
    return Page(folder / "report.html")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Page:
    folder = make_selection(tmp_path_factory.mktemp("hostile"), HOSTILE, hostile=True)
    report(folder)
    return Page(folder / "report.html")


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """The plain selection's two files, to be broken."""
    for end in ("_summary.json", "_scores.csv"):
        shutil.copy(folder / f"{STEM}{end}", tmp_path)
    return tmp_path


@pytest.fixture
def without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what pictures have no part in: plots are made, but not rendered, which takes nearly all of a page's time."""

    monkeypatch.setattr(page_module, "render", lambda figure: ("data:,", b""))


def change_summary(folder: Path, *keys: object, value: object, stem: str = STEM) -> None:
    path = folder / f"{stem}_summary.json"
    summary = json.loads(path.read_text())
    inner = summary
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(summary))


def test_every_plot_has_a_text_alternative_its_numbers_and_a_png(plain: Page, folder: Path) -> None:
    plots = [image for image in plain.all("img") if "svg" in image["src"]]
    files = sorted(path.name for path in (folder / "report_plots").iterdir())
    assert files == [f"{name}.png" for name in ("choice", "influence", "mixture", "norm", "task_values")]
    assert len(plots) == len(files) == len(plain.all("figcaption"))
    assert all(len(plot["alt"]) > 20 for plot in plots)
    assert plain.text.count("The numbers of this plot") == len(plots) - 2  # the tasks' table has those of two
    for name in files:
        with Image.open(folder / "report_plots" / name) as image:
            assert image.format == "PNG" and image.width > 600


def test_the_page_names_every_task_and_its_numbers(plain: Page) -> None:
    header = ["records", "share before", "value", "records counted", "budget", "selected", "distinct", "share after"]
    captions, vqa = plain.cells("captions"), plain.cells("vqa")
    assert [captions[key] for key in header] == ["9", "25.0%", "–", "–", "excluded", "0", "0", "0.0%"]
    assert [vqa[key] for key in header] == ["9", "25.0%", "2.40", "9", "3", "3", "3", "33.3%"]


def test_the_page_says_what_was_left_out_what_it_cost_and_where_it_came_from(plain: Page) -> None:
    assert ["gradient is zero <b>", "captions", "1", "row 2, id id-2"] in plain.rows
    for said in ("2.0 h", "2.50", "0.960", "3.0 GiB", "A<b>100", "ab" * 32, '["captions"]', "rademacher"):
        assert said in plain.text


def test_the_default_q_is_called_all_but_uniform(plain: Page) -> None:
    assert re.search(r"At q = 0.001 .* 100.0% of a task's records: the draw is all but uniform", plain.text)


def test_the_curve_is_the_effective_sample_size_of_the_softmax(plain: Page, folder: Path) -> None:
    with open(folder / f"{STEM}_scores.csv", newline="") as file:
        scores = {}
        for line in csv.DictReader(file):
            if line["task"] != "captions":
                scores.setdefault(line["task"], []).append(float(line["influence"]))

    def naive(values: list[float], q: float) -> float:
        weights = [math.exp(q * value) for value in values]
        return sum(weights) ** 2 / sum(weight**2 for weight in weights)

    start = next(place for place, row in enumerate(plain.rows) if "q for half" in row)
    halves = {row[0]: float(row[2]) for row in plain.rows[start + 1 : start + 4]}
    assert set(halves) == set(scores)
    for task, half in halves.items():
        assert naive(scores[task], half) / len(scores[task]) == pytest.approx(0.5, abs=0.02)


def test_all_text_of_the_data_is_text(hostile: Page) -> None:
    names = {name for name, _ in hostile.elements}
    assert not names & {"script", "iframe", "object", "embed", "link", "base", "form", "video", "foreignobject"}
    assert len(hostile.all("style")) == 1
    assert not [key for _, attributes in hostile.elements for key in attributes if key.startswith("on")]
    for text in HOSTILE[:4]:
        assert text in hostile.text
    assert "\x1b" not in hostile.source
    assert max(map(len, hostile.text.split())) < 2000


@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_nothing_is_loaded_from_anywhere(which: str, request: pytest.FixtureRequest) -> None:
    page = request.getfixturevalue(which)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for name, attributes in page.elements:
        for key, value in attributes.items():
            if key in ("src", "srcset", "data", "action", "poster", "background"):
                assert name == "img" and re.match(r"data:image/(jpeg|svg\+xml);base64,", value)
            if key.endswith("href"):
                assert value.startswith("#") and value[1:] in ids
    style = page.source[page.source.index("<style>") : page.source.index("</style>")]
    assert "@import" not in style and "url(" not in style
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_images_that_are_missing_broken_or_outside_leave_a_word(plain: Page) -> None:
    for said in ("missing image", "unreadable image", "image path leaves the image folder", "no image"):
        assert said in plain.text
    embedded = {image["src"].partition(",")[2] for image in plain.all("img") if "jpeg" in image["src"]}
    assert len(embedded) == 1
    with Image.open(io.BytesIO(base64.b64decode(embedded.pop()))) as image:
        red, _, blue = image.getpixel((5, 5))
        assert blue > 100 > red


def test_the_most_and_least_influential_of_each_task_are_shown(plain: Page, hostile: Page, folder: Path) -> None:
    with open(folder / f"{STEM}_scores.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["influence"]]
    for task in ("captions", "vqa", "chat", "ocr"):
        ranked = sorted((line for line in lines if line["task"] == task), key=lambda line: float(line["influence"]))
        shown = [int(line["row"]) for line in [*ranked[::-1][:3], *ranked[:3]]]
        places = [plain.text.index(f"row {row}, id id-{row}") for row in shown]
        assert places == sorted(places)
        assert all(re.search(rf"answer {row}(?!\d)", plain.text) for row in shown)
        middle = [int(line["row"]) for line in ranked[3:-3]]
        assert middle and not any(re.search(rf"answer {row}(?!\d)", plain.text) for row in middle)
    assert "(3,500 more characters)" in hostile.text


def test_the_same_input_gives_the_same_bytes(plain: Page, folder: Path, tmp_path: Path) -> None:
    report(folder, "--output", tmp_path / "again.html")
    assert (tmp_path / "again.html").read_bytes() == (folder / "report.html").read_bytes()
    for path in (tmp_path / "again_plots").iterdir():
        assert path.read_bytes() == (folder / "report_plots" / path.name).read_bytes()


@pytest.mark.usefixtures("without_plots")
def test_a_data_file_that_is_gone_or_changed_costs_the_samples_only(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = copy / "changed.json"
    changed.write_text('[{"id": 1, "conversations": [{"from": "human", "value": "other"}]}]')
    change_summary(copy, "inputs", "data_path", value=str(changed))
    report(copy)
    page = Page(copy / "report.html")
    assert "Made without images and conversations" in page.text and "SHA-256" in page.text
    assert "jpeg" not in page.source and "not read" in page.text
    assert "without images and conversations" in capsys.readouterr().err
    assert "is not the file" in error_of(capsys, copy, "--data_path", changed)


QUESTION, ANSWER = "What is it?", "A circle."
FORMS = [
    {
        "conversations": [{"from": "human", "value": f"<image>\n{QUESTION}"}, {"from": "gpt", "value": ANSWER}],
        "image": "a.png",
    },
    {
        "messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}],
        "images": ["a.png"],
    },
    {
        "messages": [
            {"role": "user", "content": [{"type": "image", "path": "a.png"}, {"type": "text", "text": QUESTION}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]},
        ]
    },
    {"texts": [{"user": QUESTION, "assistant": ANSWER}], "images": ["a.png"]},
]


@pytest.mark.parametrize("form", FORMS, ids=["conversations", "messages", "parts", "texts"])
def test_a_record_of_any_form_is_shown_with_its_turns_and_image(folder: Path, tmp_path: Path, form: dict) -> None:
    (tmp_path / "data.json").write_text(json.dumps([form]))
    samples = Samples(1, open_records(str(tmp_path / "data.json")), str(folder / "images"))
    card = card_of(samples, 0, "id", "")
    assert card.image is not None and card.image.startswith("data:image/jpeg")
    assert [text.removeprefix("<image>").strip() for _, text in card.turns] == [QUESTION, ANSWER]


def test_a_plot_of_many_tasks_shows_the_largest_and_its_table_all(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page_module, "ROWS", 3)
    report(folder, "--output", tmp_path / "page.html", "--samples", 0)
    page = Page(tmp_path / "page.html")
    drawn = [base64.b64decode(image["src"].partition(",")[2]).decode() for image in page.all("img")]
    assert sum("first 3 of 4" in plot for plot in drawn) == 3
    assert {row[0] for row in page.rows if len(row) == 9} >= {"captions", "vqa", "chat", "ocr"}


@pytest.mark.usefixtures("without_plots")
def test_one_of_several_selections_is_chosen_by_name_or_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for end in ("_summary.json", "_scores.csv"):
        shutil.copy(copy / f"{STEM}{end}", copy / f"Other{end}")
    for more in ((), ("--name", "Third")):
        *names, line = errors_of(capsys, copy, *more)
        assert names == ["Other", STEM] and "--name" in line and "--all" in line
    report(copy / "Other_summary.json", "--samples", 0)
    report(copy, "--name", STEM, "--samples", 0)
    assert (copy / "Other_report.html").is_file() and (copy / f"{STEM}_report.html").is_file()


def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    remedy = "run select_data_TIVE.py first, with this save_path"
    assert error_of(capsys, tmp_path) == f"error: {tmp_path} holds no selection (*_summary.json); {remedy}"


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (["tasks"], "x", "`$.tasks`"),
        (["tasks"], [], "`$.tasks`"),
        (["tasks", 1, "records"], -1, "`$.tasks[1].records`"),
        (["tasks", 1, "value"], float("nan"), "`$.tasks[1].value`"),
        (["tasks", 1, "selected"], 10**400, "`$.tasks[1].selected`"),
        (["tasks", 1, "task"], "captions", "twice"),
        (["tasks", 1, "task"], "unknown", "row #11"),
        (["tasks", 1, "selected"], 4, "'vqa'"),
        (["arguments", "q"], "<b>", "`$.q`"),
        (["arguments"], None, "`$.arguments`"),
        (["inputs", "data_path"], 3, "`$.inputs.data_path`"),
        (["inputs", "image_folder"], [], "`$.inputs.image_folder`"),
        (["left_out"], [3], "`$.left_out[0]`"),
        (["gradient_pass"], None, "`$.gradient_pass`"),
    ],
)
def test_a_damaged_summary_is_named(
    copy: Path, capsys: pytest.CaptureFixture[str], keys: list[object], value: object, named: str
) -> None:
    change_summary(copy, *keys, value=value)
    assert named in error_of(capsys, copy)
    assert not (copy / "report.html").exists()


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("7,id,vqa,1,x,1,0,", "ow #38"),
        ("36,id,vqa,1,nan,1,0,", "ow #38"),
        ("36,id,vqa,1,inf,1,0,", "ow #38"),
        ("36,id,vqa,1,0.5,1,-1,", "ow #38"),
        ("36,id,vqa", "ow #38"),
        ("36,id,vqa,1,0.5,0.5,0,", "'vqa'"),
        ('36,"id', "CSV"),
        ("36,\udcff,vqa,1,0.5,0.5,0,", "CSV"),
        (f"36,{'x' * 200000},vqa,1,0.5,0.5,0,", "'vqa'"),
    ],
)
def test_a_damaged_scores_file_is_named(copy: Path, capsys: pytest.CaptureFixture[str], line: str, named: str) -> None:
    with open(copy / f"{STEM}_scores.csv", "a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(f"{line}\n")
    assert named in error_of(capsys, copy)


def test_missing_files_and_wrong_arguments_are_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "is not a folder" in error_of(capsys, copy / "nowhere")
    assert "--image_folder" in error_of(capsys, copy, "--image_folder", copy / "nowhere")
    assert "--samples" in error_of(capsys, copy, "--samples", -1)
    assert "nowhere.json" in error_of(capsys, copy, "--data_path", copy / "nowhere.json")
    scores = copy / f"{STEM}_scores.csv"
    assert "is not a summary" in error_of(capsys, scores)
    scores.write_text("row,id\n")
    assert "columns" in error_of(capsys, copy)
    scores.unlink()
    assert "belongs beside the summary" in error_of(capsys, copy)
    (copy / f"{STEM}_summary.json").write_text("{")
    assert "not JSON" in error_of(capsys, copy)


@pytest.mark.filterwarnings("ignore:overflow")
def test_extreme_numbers_still_make_a_page(copy: Path) -> None:
    scores = copy / f"{STEM}_scores.csv"
    rows = list(csv.reader(scores.open(newline="")))
    for row, (norm, influence) in zip(
        rows[12:], [("1e-200", "1e200"), ("1e200", "-1e200"), ("0", "0"), ("", "")], strict=False
    ):
        row[3:5] = norm, influence
    with scores.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    change_summary(copy, "arguments", "q", value=1e299)
    change_summary(copy, "inputs", "data_path", value="a\0b\ud800")
    change_summary(copy, "gradient_pass", value=[{}])
    change_summary(copy, "created", value="<b>")
    report(copy)
    page = Page(copy / "report.html")
    assert "At q = 1e+299" in page.text and "jpeg" not in page.source


@pytest.mark.usefixtures("without_plots")
def test_what_the_selection_writes_makes_a_page_that_agrees_with_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    names = ["captions"] * 6 + ["vqa"] * 20 + ["chat"] * 14
    turns = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}]
    (tmp_path / "data.json").write_text(json.dumps([{"dataset": name, "conversations": turns} for name in names]))
    (tmp_path / "features").mkdir()
    generator = torch.Generator().manual_seed(0)
    torch.save([torch.randn(len(names), 64, generator=generator).half() + 0.5], tmp_path / "features" / "output_0")
    (tmp_path / "features" / "output_norm_0.json").write_text(json.dumps([1.0 + row / 10 for row in range(len(names))]))
    places = ["--data_path", tmp_path / "data.json", "--gradient_path", tmp_path / "features", "--save_path", tmp_path]
    script(ROOT / "select_data_TIVE.py", *places, "--exclude_tasks", "captions", "--q", "20")
    report(tmp_path)
    page = Page(tmp_path / "report.html")
    (summary,) = (json.loads(path.read_text()) for path in tmp_path.glob("*_summary.json"))
    for task in summary["tasks"]:
        cells = page.cells(task["task"])
        assert [cells["records"], cells["distinct"]] == [str(task["records"]), str(task["distinct"])]
        row = [task["task"], short(task["effective_sample_size"])]
        assert task["excluded"] or row in [shown[:2] for shown in page.rows]
    assert "have no manifests" in page.text

    sums = tmp_path / "sums"
    rules = ["--exclude_tasks", "captions", "--task_budget", "size+equal"]
    script(ROOT / "select_data_TIVE.py", *places[:-1], sums, *rules)
    report(sums)
    (summary,) = (json.loads(path.read_text()) for path in sums.glob("*_summary.json"))
    page = Page(sums / "report.html")
    (task,) = [task for task in summary["tasks"] if task["task"] == "vqa"]
    shown = page.cells("vqa")
    parts = [task["budget_parts"][rule] for rule in ("size", "equal")]
    assert [float(shown["by size"]), float(shown["by equal"])] == pytest.approx(parts, rel=0.01)
    assert "the mean of its shares by size and equal" in page.text


@pytest.mark.usefixtures("without_plots")
def test_values_from_a_sample_stand_with_their_errors(copy: Path) -> None:
    summary = json.loads((copy / f"{STEM}_summary.json").read_text())
    for number, task in enumerate(summary["tasks"]):
        if not task["excluded"]:
            errors = {"sampled": 5, "value_error": 0.25, "budget_error": 0.5, "budget_interval": [2.0, 4.0]}
            change_summary(copy, "tasks", number, value=task | errors)
    report(copy, "--samples", 0)
    page = Page(copy / "report.html")
    shown = page.cells("vqa")
    assert [shown[key] for key in ("value", "its standard error", "records counted")] == ["2.40", "0.250", "5"]
    assert [shown["budget"], shown["its 95% interval"]] == ["3", "2 to 4"]


SCORES = ["loss", "el2n", "supervised_tokens", "tokens"]


def add_scores(folder: Path) -> None:
    """Losses, EL2N and lengths, as the gradient pass keeps them beside the norms; norms fall as lengths grow."""
    path = folder / f"{STEM}_scores.csv"
    header, *rows = csv.reader(path.open(newline=""))
    for position, row in enumerate(rows):
        # A record that was left out has none.
        row[6:6] = ["", "", "", ""] if row[-1] else [2.5 - position / 100, 0.75, 400 - position, 976 + position]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*header[:6], *SCORES, *header[6:]], *rows])


@pytest.mark.usefixtures("without_plots")
def test_records_whose_images_help_least_are_shown_where_the_gain_is_known(copy: Path, plain: Page) -> None:
    path = copy / f"{STEM}_scores.csv"
    header, *rows = csv.reader(path.open(newline=""))
    for position, row in enumerate(rows):
        row[6:6] = [round(0.5 - position / 100, 2) if position % 6 != 5 else ""]  # every sixth is without an image
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([[*header[:6], "visual_gain", *header[6:]], *rows])
    report(copy, "--samples", 1)
    page = Page(copy / "report.html")
    assert {"visual_gain", "seen"} <= {attributes["id"] for attributes in page.all("section")}
    seen = page.text[page.text.rindex("Records whose images help most and least") :]
    assert re.findall(r"row (\d+), id", seen[: seen.index("Records left out")])[:2] == ["0", "8"]
    assert "Visual gain" not in plain.text


@pytest.mark.usefixtures("without_plots")
def test_losses_lengths_and_el2n_are_shown_where_they_are_known(copy: Path, plain: Page) -> None:
    add_scores(copy)
    report(copy, "--samples", 1)
    page = Page(copy / "report.html")
    assert {"loss.png", "el2n.png"} < {path.name for path in (copy / "report_plots").iterdir()}
    assert {"loss", "el2n", "supervised_tokens"} < {attributes["id"] for attributes in page.all("section")}
    # vqa: rows 9 to 17, of which the first three are drawn
    assert ["vqa", "383", "385", "387", "389", "391", "390"] in page.rows
    assert re.search(r"loss 2\.\d\d? · el2n 0\.750 · supervised tokens 3\d\d\b", page.text)
    assert "-1.00 (median of the tasks, -1.00 to -1.00)" in page.text
    for absent in ("Losses", "EL2N", "Lengths", "supervised tokens", "rank correlation"):
        assert absent not in plain.text


LESS_STEM = "Less_p_0.25_gradient-sgd_weights-2.0"


def less_selection(folder: Path, names: list[str]) -> Path:
    """What select_data_LESS.py makes of 40 records and a target of as many subtasks, of one record more each."""
    data, target = folder / "data.json", folder / "target.json"
    data.write_text(json.dumps([record(row, ["vqa", "chat"][row % 2]) for row in range(40)]))
    subtasks = [name for number, name in enumerate(names) for _ in range(number + 1)]
    target.write_text(json.dumps([record(row, name) for row, name in enumerate(subtasks)]))
    write_features(folder / "train", data, *random_features(40, seed=1), left_out={3: "not finite"})
    write_features(folder / "goal", target, *random_features(len(subtasks), seed=2), num_chunks=1)
    places = ["--train", folder / "train", "--target", folder / "goal", "--save_path", folder]
    options = ["--data_path", data, "--target_data", target, "--gradient", "sgd", "--weights", 2, "--p", 0.25]
    script(ROOT / "select_data_LESS.py", *options, *places)
    return folder


def test_a_selection_for_a_target_is_shown_by_subtask(tmp_path: Path) -> None:
    names = ["read & spell", "<b>count</b>", "boxes"]
    report(less_selection(tmp_path, names), "--samples", 2)
    page = Page(tmp_path / "report.html")
    assert "What LESS selected" in page.text
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == ["mixture", "subtasks", "score", "records", "left-out", "origin"]
    plotted = sorted(path.name for path in (tmp_path / "report_plots").iterdir())
    assert plotted == ["mixture.png", "score.png", "subtasks.png"]

    with open(tmp_path / f"{LESS_STEM}_scores.csv", newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["score"]]
    served = {task: [0, 0, 0] for task in ("vqa", "chat")}
    for line in lines:
        if line["times_selected"] == "1":
            served[line["task"]][max(range(3), key=lambda number: float(line[f"score_{names[number]}"]))] += 1
    for task, counts in served.items():
        assert [task, *map(str, counts)] in page.rows
    for number, name in enumerate(names):
        chosen = str(served["vqa"][number] + served["chat"][number])
        assert [name, str(number + 1), chosen] in [row[:3] for row in page.rows]
        ranked = sorted(lines, key=lambda line: float(line[f"score_{name}"]))
        shown = [line["row"] for line in [*ranked[::-1][:2], *ranked[:2]]]
        block = page.text[page.text.index(f"{name} {number + 1} record") :]
        assert re.findall(r"row (\d+), id", block)[:4] == shown
    assert str(tmp_path / "train") in page.text
    assert "effective" not in page.text and "budget" not in page.text


@pytest.mark.parametrize(
    ("keys", "value", "named"),
    [
        (["method"], "MORE", "MORE"),
        (["details", "subtasks"], [], "`$.subtasks`"),
        (["details", "subtasks", 0, "name"], "other", "score_other"),
        (["gradient_pass"], [{"seconds": "long"}], "`$[0].seconds`"),
    ],
)
def test_a_target_that_does_not_fit_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: list[object], value: object, named: str
) -> None:
    less_selection(tmp_path, ["a", "b"])
    change_summary(tmp_path, *keys, value=value, stem=LESS_STEM)
    assert named in error_of(capsys, tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_template_and_the_styles_are_installed_with_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    beside = {path.name for path in (ROOT / "tive" / "report").iterdir() if path.suffix not in (".py", "")}
    patterns = distribution.package_data["tive.report"]
    assert beside == {"page.css", "page.html.jinja", "page.mplstyle"}
    assert all(any(fnmatch(name, pattern) for pattern in patterns) for name in beside)


def evaluation_of(folder: Path, models: dict[str, tuple[float | None, int]]) -> Path:
    """What scripts/evaluate.py writes of two tasks, with each model's loss and exact answers in the second."""
    results = []
    for name, (loss, exact) in models.items():
        tasks = [TaskResult("<i>vqa</i>", 4, 0, 2.0, 4, 3), TaskResult("chat", 4, 4 * (loss is None), loss, 4, exact)]
        match = Conditions("ab" * 32, 8, f"model of {name}", "float32", 16, "dataset")
        results.append(ModelResult(name, f"out/{name}", None, match, "cpu", 1.0, tasks, [], {}))
    write_result(folder / "evaluation.json", Evaluation("held_out.json", results))
    return folder


@pytest.mark.usefixtures("without_plots")
def test_an_evaluation_is_shown_by_task_and_model_and_relative_to_the_first(copy: Path, plain: Page) -> None:
    report(copy, "--evaluation", evaluation_of(copy, {"all": (1.0, 4), "<b>ours</b>": (1.5, 2), "none": (None, 0)}))
    page = Page(copy / "report.html")
    losses, exact = page.rows[:5], page.rows[5:10]
    assert losses == [
        ["task", "records", "all", "<b>ours</b>", "none"],
        ["<i>vqa</i>", "4", "2.0000", "2.0000", "2.0000"],
        ["chat", "4", "1.0000", "1.5000", DASH],
        ["mean over tasks", "8", "1.5000", "1.7500", DASH],
        ["relative to all", "", "100.0%", "125.0%", DASH],
    ]
    assert exact[2:] == [
        ["chat", "4", "100.0%", "50.0%", "0.0%"],
        ["mean over tasks", "8", "87.5%", "62.5%", "37.5%"],
        ["relative to all", "", "100.0%", "75.0%", "50.0%"],
    ]
    assert "4 records could not be given to none." in page.text
    assert "evaluation" not in {attributes["id"] for attributes in plain.all("section")}


def test_an_evaluation_that_is_none_is_named(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no result of scripts/evaluate.py" in error_of(capsys, copy, "--evaluation", copy / f"{STEM}_summary.json")
    assert "nowhere" in error_of(capsys, copy, "--evaluation", copy / "nowhere")


@pytest.mark.usefixtures("without_plots")
def test_selections_of_the_same_data_are_compared(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = "Tive_q_50.0_p_0.15_with_a_name_that_is_longer_than_any_line_of_a_terminal_would_show_of_it_in_one_piece"
    header, *rows = csv.reader((copy / f"{STEM}_scores.csv").open(newline=""))
    for task in ("vqa", "chat", "ocr"):
        mine = [row for row in rows if row[2] == task]
        for position, row in enumerate(mine):
            row[6] = str(int(1 <= position < 4))  # two of three are those of the first selection
    with (copy / f"{other}_scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    shutil.copy(copy / f"{STEM}_summary.json", copy / f"{other}_summary.json")
    change_summary(copy, "arguments", "q", value=50.0, stem=other)
    report(copy, "--all")
    page = Page(copy / "comparison.html")
    assert other in page.text
    assert ["q", "0.001", "50.0"] in page.rows
    assert ["vqa", "9", "3", "3"] in page.rows
    assert ["1", "100.0%", "66.7%"] in page.rows and ["by chance", "25.0%", "25.0%"] in page.rows
    drawn = [float(row[3]) for row in rows if row[6] == "1"]
    assert ["2", f"{np.mean(drawn):.2f}"] in [row[:2] for row in page.rows]

    change_summary(copy, "arguments", "from_sample", value=True, stem=other)
    report(copy, "--all")
    assert ["2", DASH] in [row[:2] for row in Page(copy / "comparison.html").rows]  # a sample alone has scores
    report(copy, "--name", other)
    assert "the other records have no features" in Page(copy / f"{other}_report.html").text

    change_summary(copy, "inputs", "data_sha256", value="cd" * 32, stem=other)
    assert "different data" in error_of(capsys, copy, "--all")
    assert "--name" in error_of(capsys, copy, "--all", "--name", STEM)
