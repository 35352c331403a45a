"""The task rules: the published wording and shape of each source, near misses, whole mixtures, and rule files."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scripts import label_tasks
from tests.helpers.in_process import run_here
from tests.helpers.mixture import BOX, COCO, COUNTS, OPTION_LETTER, REGION, SHORT_ANSWER, example, mixture, record
from tive.data.conversations import from_llava, to_llava
from tive.data.records import open_records
from tive.data.scan import scan_records
from tive.data.tasks import CONDITIONS, add_key, read_rules, replace_key
from tive.data.trained import form_problem, problem_of
from tive.util.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RULE_FILES = sorted((ROOT / "scripts" / "rules").glob("*.yaml"))
LLAVA = read_rules(ROOT / "scripts" / "rules" / "llava_v1_5.yaml")
DESCRIBE = "What do you see happening in this image?"


def label(*arguments):
    return run_here(label_tasks.main, *arguments)


def run_on(tmp_path, records, *arguments, source="a.json", target="b.json"):
    """Run the script on records; the result, and the target's text or None."""
    text = records if isinstance(records, str) else json.dumps(records)
    (tmp_path / source).write_text(text)
    done = label("--source_path", tmp_path / source, "--target_path", tmp_path / target, *arguments)
    written = tmp_path / target
    return done, written.read_text() if written.exists() else None


def assert_refused(done, *said):
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    for part in said:
        assert part in done.stderr


# LLaVA-1.5's mixture: each source in its published shape

SHAPES = {
    "ShareGPT": record(None, ["Write a poem about <image> tags.", "Shorter."]),
    "OCR-VQA": record("ocr_vqa/images/1878883.jpg", [f"Who wrote this book?\n{SHORT_ANSWER}", "What is its title?"]),
    "textcaps": record(
        "textvqa/train_images/011e7e629fb9ae7b.jpg",
        ["Provide a one-sentence caption for the provided image.\nReference OCR token: EXIT, 24"],
    ),
    "GQA": record("gqa/images/2375429.jpg", [f"Is the sky blue?\n{SHORT_ANSWER}", "What is on the table?"]),
    "VisualGenome": record("vg/VG_100K/2404787.jpg", [REGION, BOX]),
    "A-OKVQA": record(COCO, [f"What is it for?\nA. sun\nB. rain\nC. snow\nD. wind\n{OPTION_LETTER}"]),
    "RefCOCO, a description": record(COCO, [REGION, REGION]),
    "RefCOCO, a box": record(COCO, [BOX, BOX]),
    "VQAv2": record(COCO, [f"Is it wet?\n{SHORT_ANSWER}", "How many people?", "What color is it?"]),
    "OKVQA, one question": record(COCO, [f"What kind of weather is it?\n{SHORT_ANSWER}"]),
    "OKVQA, two questions": record(COCO, [f"What weather is it?\n{SHORT_ANSWER}", "What is it made of?"]),
    "LLaVA-Instruct, a conversation": record(COCO, ["What are they doing?", "Is it raining?", "Why do they wait?"]),
    "LLaVA-Instruct, a description": record(COCO, [DESCRIBE]),
    "LLaVA-Instruct, reasoning": record(COCO, ["What may the people be waiting for?"]),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_source_of_llava_is_told_by_its_published_wording_and_shape(name):
    assert LLAVA.task_of(SHAPES[name], split=False) == name.split(",")[0]
    assert problem_of(SHAPES[name]) is None


NEAR_MISSES = {
    "the option's letter, without the full request": (
        record(COCO, ["Answer with the option's letter from the given choices."]),
        "LLaVA-Instruct",
    ),
    "the option's letter, asked of another folder": (record("gqa/images/1.jpg", [f"A or B?\n{OPTION_LETTER}"]), "GQA"),
    "a short answer in other words": (record(COCO, ["Answer in a single word or phrase."]), "LLaVA-Instruct"),
    "a short answer in lower case": (record(COCO, [SHORT_ANSWER.lower()]), "LLaVA-Instruct"),
    "the request in the answer, not in the question": (
        record(COCO, ["What does the sign say?"], [SHORT_ANSWER]),
        "LLaVA-Instruct",
    ),
    "a region without its request": (record(COCO, ["What is at [0.42, 0.61, 0.78, 0.95]?"]), "LLaVA-Instruct"),
    "a region request that names no region": (
        record(COCO, ["Please provide a short description for this region of France."]),
        "LLaVA-Instruct",
    ),
    "a caption request on COCO": (record(COCO, ["Provide a one-sentence caption."]), "LLaVA-Instruct"),
    "two questions and the option's letter": (
        record(COCO, [f"A or B?\n{OPTION_LETTER}", f"C or D?\n{OPTION_LETTER}"]),
        "A-OKVQA",
    ),
    "the folder's name inside the path": (record("extra/coco/1.jpg", ["What is it?"]), None),
    "the folder's name as a prefix of another": (record("vgg/1.jpg", [REGION]), None),
    "a folder of no source": (record("llava/1.jpg", ["What is it?"]), None),
    "an image in a list": ({**record(COCO, ["What is it?"]), "image": [COCO]}, "LLaVA-Instruct"),
    "an image under `images`": ({**record(None, ["What is it?"]), "images": [COCO]}, "LLaVA-Instruct"),
    "a path with a dot in front": (record(f"./{COCO}", ["What is it?"]), "LLaVA-Instruct"),
    "an image that is null": ({**record(None, ["What is it?"]), "image": None}, "ShareGPT"),
}


@pytest.mark.parametrize(("given_record", "task"), NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_a_near_miss_does_not_match(given_record, task):
    assert LLAVA.task_of(given_record, split=False) == task


@pytest.mark.parametrize(
    ("questions", "task"),
    [
        (["What are they doing?", "Why?"], "LLaVA-conversation"),
        ([DESCRIBE, "And behind it?"], "LLaVA-conversation"),
        ([DESCRIBE], "LLaVA-detail"),
        (["What is this photo about'?"], "LLaVA-detail"),
        (["Write a detailed description of the given image."], "LLaVA-detail"),
        (["Write a detailed description of the given image"], "LLaVA-detail"),
        (["What do you see happening in this image, and why?"], "LLaVA-reasoning"),
        (["what do you see happening in this image?"], "LLaVA-reasoning"),
        (["Describe the following image and its mood."], "LLaVA-reasoning"),
    ],
)
@pytest.mark.parametrize("tag_first", [True, False])
def test_llava_instruct_splits_by_turns_and_by_the_fixed_requests(questions, task, tag_first):
    made = record(COCO, questions)
    made["conversations"][0]["value"] = f"<image>\n{questions[0]}" if tag_first else f"{questions[0]}\n<image>"
    assert LLAVA.task_of(made, split=True) == task
    assert LLAVA.task_of(made, split=False) == "LLaVA-Instruct"


def test_every_record_of_the_mixture_has_the_task_that_it_is_of_and_the_rules_expect_its_665298():
    for task, made in mixture(scale=100):
        assert LLAVA.task_of(made, split=False) == task
    assert LLAVA.expected == COUNTS and sum(COUNTS.values()) == 665_298


def test_the_split_leaves_every_other_source_alone():
    random_ = random.Random(1)
    for task in COUNTS:
        for _ in range(20):
            made = example(task, random_)
            found = LLAVA.task_of(made, split=True)
            assert found == task if task != "LLaVA-Instruct" else found.startswith("LLaVA-")


# The other mixtures


def rules_of(name):
    return read_rules(ROOT / "scripts" / "rules" / f"{name}.yaml")


@pytest.mark.parametrize("path", RULE_FILES, ids=lambda path: path.stem)
def test_every_rule_file_reads(path):
    assert read_rules(path).rules


def test_svit_mix_differs_from_llava_only_in_its_own_records():
    svit, random_ = rules_of("svit_mix"), random.Random(2)
    for task in COUNTS.keys() - {"LLaVA-Instruct"}:
        for _ in range(20):
            assert svit.task_of(example(task, random_), split=False) == task
    vg = "vg/VG_100K/1.jpg"
    asked = {
        "SVIT-referring": ["Where is the bag? Locate the objects with their coordinates."],
        "SVIT-detail": ["Can you portray the image in words?"],
        "SVIT-conversation-and-reasoning": ["What may happen next?", "Why?"],
    }
    for task, questions in asked.items():
        assert svit.task_of(record(vg, questions), split=True) == task
        assert svit.task_of(record(vg, questions), split=False) == "SVIT"


@pytest.mark.parametrize(
    ("image", "task"),
    [
        (None, "Text"),
        ("docvqa/images/1.png", "DocVQA"),
        ("chartqa/train/1.png", "ChartQA"),
        ("dvqa/images/1.png", "DVQA"),
        ("ai2d/images/1.png", "AI2D"),
        ("ALLaVA-4V/allava_laion/images/1.jpeg", "ALLaVA"),
        ("gpt4v-dataset/images/1.jpg", "LAION-GPT4V"),
        ("llava/LLaVA-Pretrain/images/00453/1.jpg", "ShareGPT4V"),
        ("sam/images/1.jpg", "ShareGPT4V"),
        ("web-landmark/images/1.jpg", "ShareGPT4V"),
        ("coco/train2017/1.jpg", "LLaVA-Instruct"),
        ("new_folder/1.jpg", None),
    ],
)
def test_mini_gemini_is_told_by_folder(image, task):
    assert rules_of("mini_gemini").task_of(record(image, ["What is it?"]), split=False) == task


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("PACS+dog_image_category_classification", "Style-and-domain"),
        ("VQA-E+image_captioning", "Captioning"),
        ("VQA-E+visual_question_answering", "Question-answering"),
        ("DVQA+charts_question_answer_2", "Document-and-chart"),
        ("A-OKVQA+visual_question_answering", "Reasoning"),
        ("Total-Text+text_detection", "Text-in-image"),
        ("ObjectNet+Object_classfication", "Recognition"),
        ("ITM", "Image-text-matching"),
        ("image_quality", "Emotion-and-opinion"),
        ("a_new_task", None),
        (None, None),
        (3, None),
    ],
)
def test_vision_flan_is_consolidated_by_its_own_names(name, task):
    made = {**record("1.jpg", ["What is it?"]), "task_name": name}
    assert rules_of("vision_flan").task_of(made, split=False) == task


@pytest.mark.parametrize("name", ["llava_v1_5", "svit_mix", "mini_gemini"])
def test_the_captions_bear_the_name_that_selection_leaves_out_by_default(name):
    assert rules_of(name).task_of(SHAPES["textcaps"], split=False) == "textcaps"


# Rule files


def test_the_first_rule_that_matches_wins_and_every_condition_of_it_must_hold(tmp_path):
    path = tmp_path / "rules.yaml"
    path.write_text(
        """
rules:
  - {task: many, image_prefix: [a/, b/], min_questions: 2, max_questions: 3}
  - {task: named, key_is: {meta.source: [x, y]}}
  - {task: by id, key_prefix: {id: aok_}}
  - {task: pictures, image: present}
"""
    )
    rules = read_rules(path)
    cases = [
        (record("a/1.jpg", ["q"] * 3), "many"),
        (record("b/1.jpg", ["q"] * 4), "pictures"),
        ({**record("a/1.jpg", ["q"]), "meta": {"source": "y"}}, "named"),
        ({**record("a/1.jpg", ["q"] * 2), "meta": {"source": "y"}}, "many"),
        ({**record(None, ["q"]), "id": "aok_1"}, "by id"),
        ({**record(None, ["q"]), "id": 1}, None),
    ]
    assert [rules.task_of(made, split=False) for made, _ in cases] == [task for _, task in cases]


BAD_RULES = {
    "not YAML": ("rules: [", "not YAML"),
    "not text": (b"\xff\xfe\x00", "not YAML"),
    "an object that YAML could build": ("rules: !!python/object/apply:os.system ['true']", "not YAML"),
    "no rules": ("expected: {}", "`rules`"),
    "empty": ("", "null"),
    "rules that are no list": ("rules: {task: a}", "rules`"),
    "another entry": ("rules: [{task: a, image: absent}]\nexpect: {a: 1}", "expect"),
    "a rule that is a text": ("rules: [a]", "rule 1", "object"),
    "a task that YAML takes for a truth value": ("rules: [{task: no, image: absent}]", "rule 1", "quotes"),
    "no condition": ("rules: [{task: a, image: absent}, {task: b}]", "rule 2 (b)", "no condition"),
    "an unknown condition": ("rules: [{task: a, image_prefx: b/}]", "rule 1", "`image_prefx`"),
    "a number for a text": ("rules: [{task: a, image_prefix: 3}]", "rule 1", "image_prefix"),
    "an empty list": ("rules: [{task: a, image_prefix: []}]", "rule 1", "image_prefix"),
    "an empty text": ("rules: [{task: a, image_prefix: ''}]", "rule 1", "image_prefix"),
    "a text for a number": ("rules: [{task: a, min_questions: two}]", "rule 1", "min_questions"),
    "a truth value for a number": ("rules: [{task: a, min_questions: true}]", "rule 1", "min_questions"),
    "a negative number": ("rules: [{task: a, max_questions: -1}]", "rule 1", "max_questions"),
    "an image that is neither": ("rules: [{task: a, image: maybe}]", "rule 1", "image"),
    "two keys": ("rules: [{task: a, key_is: {b: c, d: e}}]", "rule 1", "key_is"),
    "a key without texts": ("rules: [{task: a, key_is: {b: 1}}]", "rule 1", "key_is"),
    "a condition twice": ("rules:\n  - task: a\n    image: absent\n    image: present", "line 4", "stands twice"),
    "a condition left empty": ("rules: [{task: a, image: absent, image_prefix: }]", "rule 1", "image_prefix"),
    "a split left empty": ("rules: [{task: a, image: absent, split: }]", "rule 1", "split"),
    "an empty split": ("rules: [{task: a, image: absent, split: []}]", "rule 1", "split"),
    "a split in a split": (
        "rules: [{task: a, image: absent, split: [{task: b, image: absent, split: [{task: c, image: absent}]}]}]",
        "rule 1 (a): part 1 (b)",
    ),
    "counts of an unknown task": ("rules: [{task: a, image: absent}]\nexpected: {b: 1}", "`expected:`", "b"),
    "a count that is no number": ("rules: [{task: a, image: absent}]\nexpected: {a: many}", "expected"),
    "counts that are a list": ("rules: [{task: a, image: absent}]\nexpected: [1]", "expected"),
    "rules inside themselves": ("rules: &all [*all]", "rule 1"),
}


@pytest.mark.parametrize("case", BAD_RULES.values(), ids=BAD_RULES)
def test_a_bad_rule_file_ends_in_one_line_that_names_the_file_and_the_rule(tmp_path, case):
    content, *said = case
    path = tmp_path / "rules.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_rules(path)
    for part in (str(path), *said):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


YAML_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["present", "a/"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)
RULE_VALUES = st.dictionaries(st.sampled_from(["task", "split", *CONDITIONS]), YAML_VALUES, max_size=4)


@settings(max_examples=100, deadline=None)
@given(content=st.text(max_size=60) | st.builds(lambda rules: json.dumps({"rules": rules}), st.lists(RULE_VALUES)))
def test_any_text_is_a_rule_file_or_one_line(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "rules.yaml"
    path.write_text(content, errors="replace")
    try:
        rules = read_rules(path)
    except UserError as error:
        assert str(error).startswith(str(path))
        assert "\n" not in str(error)
    else:
        for made in SHAPES.values():
            assert rules.task_of(made, split=True) is None or isinstance(rules.task_of(made, split=True), str)


# Adding the key

OBJECTS = st.dictionaries(
    st.text(max_size=6) | st.just("dataset"),
    st.recursive(
        st.none() | st.floats(allow_nan=False, allow_infinity=False) | st.integers() | st.text(max_size=6),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.just("dataset"), inner),
        max_leaves=8,
    ),
    max_size=5,
)


@settings(max_examples=100, deadline=None)
@given(
    content=OBJECTS, task=st.text(min_size=1, max_size=8), indent=st.sampled_from([None, 2]), ascii_only=st.booleans()
)
def test_the_key_is_added_or_replaced_and_nothing_else_changes(content, task, indent, ascii_only):
    raw = json.dumps(content, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "replace")
    content = json.loads(raw)
    written = (replace_key if "dataset" in content else add_key)(raw, "dataset", task)
    assert list(json.loads(written).items()) == list({**content, "dataset": task}.items())


@pytest.mark.parametrize(
    ("raw", "written"),
    [
        ("{}", '{"dataset": "é"}'),
        ("{ \n}", '{"dataset": "é" \n}'),
        ('{"a":1.50 }', '{"a":1.50, "dataset": "é" }'),
        ('{\n  "a": "}"\n}', '{\n  "a": "}", "dataset": "é"\n}'),
    ],
)
def test_every_byte_stays_where_a_key_is_added(raw, written):
    assert add_key(raw.encode(), "dataset", "é").decode() == written.replace("é", "\\u00e9")


@pytest.mark.parametrize(
    ("raw", "written"),
    [
        ('{"dataset":null,"a":1.50}', '{"dataset":"t","a":1.50}'),
        ('{ "a" : {"dataset": 1}, "dataset" : [1, {"b": 2}] }', '{ "a" : {"dataset": 1}, "dataset" : "t" }'),
        ('{"dataset": 1, "é": "\\u00e9", "dataset": 2}', '{"dataset": "t", "é": "\\u00e9", "dataset": "t"}'),
        ('{"data\\u0073et": 1}', '{"data\\u0073et": "t"}'),
    ],
)
def test_every_other_byte_stays_where_a_key_is_replaced(raw, written):
    assert replace_key(raw.encode(), "dataset", "t").decode() == written


# The command


def test_a_mixture_in_proportion_is_labelled_byte_for_byte_and_counted(tmp_path):
    made = list(mixture(scale=1000))
    done, written = run_on(tmp_path, [content for _, content in made])
    assert done.returncode == 0, done.stderr
    assert [json.loads(line.rstrip(",")) for line in written.splitlines()[1:-1]] == [
        {**content, "dataset": task} for task, content in made
    ]
    assert scan_records(open_records(tmp_path / "b.json"), form_problem, "dataset").tasks == [task for task, _ in made]
    rows = {line.split()[0]: line.split()[1:3] for line in done.stdout.splitlines()[1:12]}
    assert rows == {
        **{task: [f"{count // 1000}", f"{count:,}"] for task, count in COUNTS.items()},
        "all": [f"{len(made)}", "665,298"],
    }


def test_the_split_is_shown_below_what_it_divides(tmp_path):
    done, written = run_on(tmp_path, list(SHAPES.values()), "--split_llava", "--task_key", "task")
    assert done.returncode == 0, done.stderr
    tasks = Counter(made["task"] for made in json.loads(written))
    assert tasks["LLaVA-conversation"] == tasks["LLaVA-detail"] == tasks["LLaVA-reasoning"] == 1
    lines = [line.split() for line in done.stdout.splitlines()]
    assert ["LLaVA-Instruct", "3", "157,712"] in [line[:3] for line in lines]
    assert ["LLaVA-detail", "1"] in lines


def test_json_lines_stay_json_lines(tmp_path):
    text = "\n".join(json.dumps(made, ensure_ascii=False) for made in SHAPES.values())
    done, written = run_on(tmp_path, text, source="a.jsonl", target="b.jsonl")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in written.splitlines()] == [
        {**made, "dataset": name.split(",")[0]} for name, made in SHAPES.items()
    ]


def test_records_that_no_rule_matches_are_counted_and_shown_and_stop_the_run(tmp_path):
    strange = [{**record(f"new/{number}.jpg", ["What?"]), "id": f"odd{number}"} for number in range(12)]
    done, written = run_on(tmp_path, [SHAPES["GQA"]] * 12 + strange)
    assert_refused(done, "12 of 24 records", "llava_v1_5.yaml", "--default")
    assert written is None
    shown = [line for line in done.stdout.splitlines() if "odd" in line]
    assert len(shown) == 10
    assert "record 12 (id 'odd0'), image new/0.jpg" in shown[0]


def test_rules_of_another_mixture_are_told_and_the_keys_that_could_name_a_task(tmp_path):
    strange = [
        {**record(f"new/{number}.jpg", ["What?"]), "id": number, "source": "ab"[number % 2]} for number in range(9)
    ]
    done, written = run_on(tmp_path, strange)
    assert_refused(done, "9 of 9", "llava_v1_5.yaml", "another mixture", "`source`: 2 values", "--task_key")
    assert written is None


def test_a_default_takes_the_records_that_are_left_over(tmp_path):
    done, written = run_on(tmp_path, [SHAPES["GQA"], record("new/1.jpg", ["What?"])], "--default", "other")
    assert done.returncode == 0, done.stderr
    assert [made["dataset"] for made in json.loads(written)] == ["GQA", "other"]
    assert "No rule matches 1 records" in done.stdout


EXISTING = [{**SHAPES["GQA"], "dataset": "mine"}, {**SHAPES["GQA"], "dataset": None}, SHAPES["GQA"]]


def test_a_record_that_has_the_key_stops_the_run_unless_told(tmp_path):
    done, written = run_on(tmp_path, EXISTING)
    assert_refused(done, "record 0 (id '2375429')", "`dataset`", "--existing")
    assert written is None


def test_images_under_either_key_and_in_every_spelling_of_the_path_have_the_same_task(tmp_path):
    spellings = [
        {"image": "ocr_vqa/images/1.jpg"},
        {"image": "./ocr_vqa/images/1.jpg"},
        {"images": ["ocr_vqa/images/1.jpg"]},
        {"images": "./ocr_vqa//images/1.jpg"},
        {"image": "coco/../ocr_vqa/images/1.jpg", "video": None},
    ]
    turns = SHAPES["OCR-VQA"]["conversations"]
    done, written = run_on(tmp_path, [{"conversations": turns, **media} for media in spellings])
    assert done.returncode == 0, done.stderr
    assert [made["dataset"] for made in json.loads(written)] == ["OCR-VQA"] * 5


@pytest.mark.parametrize("form", ("sharegpt", "messages", "parts"))
def test_a_record_has_the_same_task_in_every_form(tmp_path, form):
    records = [from_llava(to_llava(content), form) for content in SHAPES.values()]
    done, written = run_on(tmp_path, records)
    assert done.returncode == 0, done.stderr
    assert [made["dataset"] for made in json.loads(written)] == [name.split(",")[0] for name in SHAPES]


def test_what_is_printed_of_the_data_is_short_and_harmless(tmp_path):
    strange = {**record("x" * 3000 + "\x1b[2J", ["What?"]), "id": "\x1b[31m" + "y" * 3000}
    kept = {**SHAPES["GQA"], "dataset": "\x1b[31m" + "z" * 3000}
    done, _ = run_on(tmp_path, [strange, kept], "--existing", "keep", "--default", "other")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) < 200


@pytest.mark.parametrize(("existing", "tasks"), [("keep", ["mine", "GQA", "GQA"]), ("replace", ["GQA"] * 3)])
def test_an_existing_task_is_kept_or_replaced_as_told(tmp_path, existing, tasks):
    done, written = run_on(tmp_path, EXISTING, "--existing", existing)
    assert done.returncode == 0, done.stderr
    assert [made["dataset"] for made in json.loads(written)] == tasks


MISTAKES = {
    "source and target the same": ("[]", ["--target_path", "{folder}/a.json"], "the source itself"),
    "target a link's other name": ("[]", ["--target_path", "{folder}/./a.json"], "the source itself"),
    "a target that is a folder": ("[]", ["--target_path", "."], "name a file"),
    "no such source": ("[]", ["--source_path", "{folder}/none.json"], "none.json"),
    "no such rules": ("[]", ["--rules", "{folder}/none.yaml"], "none.yaml"),
    "a key that the record needs": ("[]", ["--task_key", "image"], "--task_key"),
    "a key that names a prefix": ("[]", ["--task_key", "image:/"], "--task_key"),
    "an empty default": ("[]", ["--default", ""], "--default"),
    "a split that the rules lack": ("[]", ["--split_llava", "--rules", str(RULE_FILES[-1])], "no rule with a `split`"),
    "no records": ("[]", [], "holds no records"),
    "a damaged source": ('[{"id": 1', [], "record 0"),
    "a record that is no object": ("[3]", [], "record 0", "is not an object"),
    "a record without conversations": ('[{"id": "x"}]', [], "record 0 (id 'x')", "conversations"),
    "a turn without text": ('[{"conversations": [{"from": "human"}]}]', [], "record 0", "conversations"),
    "an image that is a number": ('[{"conversations": [], "image": 3}]', [], "record 0", "image"),
    "a video": ('[{"conversations": [], "video": "a.mp4"}]', [], "record 0", "`video`"),
    "an image under another key": ('[{"conversations": [], "image_path": "a.jpg"}]', [], "record 0", "`image_path`"),
    "a list where a task is to be kept": (
        '[{"conversations": [], "dataset": ["a", "b"]}]',
        ["--existing", "keep"],
        "record 0",
        "a list under `dataset`",
    ),
}


@pytest.mark.parametrize("case", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_ends_in_one_line_and_writes_nothing(tmp_path, case):
    text, arguments, *said = case
    done, _ = run_on(tmp_path, text, *(argument.format(folder=tmp_path) for argument in arguments))
    assert_refused(done, *said)
    assert (tmp_path / "a.json").read_text() == text
    assert {path.name for path in tmp_path.iterdir()} <= {"a.json", "b_bad_records.json"}


def test_all_records_that_the_rules_cannot_read_are_listed_and_the_list_goes_when_they_are_repaired(tmp_path):
    records = [SHAPES["GQA"], {**SHAPES["GQA"], "video": "a.mp4"}, 3, SHAPES["GQA"]]
    done, written = run_on(tmp_path, records)
    listing = tmp_path / "b_bad_records.json"
    assert_refused(done, "2 of 4 records cannot be used", "record 1 (id '2375429')", str(listing))
    assert [entry["row"] for entry in json.loads(listing.read_text())] == [1, 2] and written is None
    done, written = run_on(tmp_path, [records[0], records[3]])
    assert done.returncode == 0 and len(json.loads(written)) == 2 and not listing.exists()
