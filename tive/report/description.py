"""A first look at a mixture, before any model: its tasks, images, texts, repetitions and broken records."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tive.data.conversations import image_paths, images_of, to_llava
from tive.data.images import BadImage, find_image, format_and_size
from tive.data.media import IMAGE_TAG, Image
from tive.data.problems import form_problem, kind_of
from tive.data.records import Records
from tive.data.tasks import rows_by_task, task_of
from tive.report import plots
from tive.report.page import Block, Card, Cards, Pictures, Section, Table, name
from tive.report.samples import read_sample
from tive.util.text import percent, plural, shown

NO_TASK = "(no task)"
ROWS_A_PLOT = 30
HEADER: tuple[str, ...] = (
    *("task", "records", "no image", "one", "more", "answers a record", "characters an answer: median", "95%"),
    *("repeated texts", "broken"),
)


@dataclass(frozen=True)
class Description:
    """What one pass through N records, of T tasks, counts. A record that cannot be read has no images and no answers.

    Attributes:
        tasks: name -> its rows, int64.
        images, answers: int64 `[N]`, of each record.
        lengths: int64 `[A]`, characters of each answer; those of a record lie together, in the order of the records.
        repeated: bool `[N]`, the record's turns are those of an earlier one; images play no part.
        problems: row -> what keeps the record from being read.
        paths: how many records name an image, by its path; images that lie in rows are not among them.
    """

    records: Records
    tasks: dict[str, np.ndarray]
    images: np.ndarray
    answers: np.ndarray
    lengths: np.ndarray
    repeated: np.ndarray
    problems: dict[int, str]
    paths: Counter[str]

    def lengths_of(self, rows: np.ndarray) -> np.ndarray:
        """The lengths of some records' answers."""
        chosen = np.zeros(len(self.answers), bool)
        chosen[rows] = True
        return self.lengths[np.repeat(chosen, self.answers)]


def describe(records: Records, task_key: str) -> Description:
    """Go through the records once, without the bytes of images in their rows."""
    tasks: list[str] = []
    images, answers, lengths = array("q"), array("q"), array("q")
    repeated, seen = [], set()
    problems: dict[int, str] = {}
    paths: Counter[str] = Counter()
    for row, record in enumerate(records):
        tasks.append((isinstance(record, dict) and task_of(record, task_key)) or NO_TASK)
        problem = form_problem(record)
        turns: list[dict[str, Any]] = []
        named: tuple[Image, ...] = ()
        try:
            if not problem:
                conversation = to_llava(record)
                turns, named = conversation["conversations"], image_paths(conversation)
        except ValueError as error:
            problem = str(error)
        if problem:
            problems[row] = problem
        answered = [len(turn["value"]) for turn in turns if turn["from"] == "gpt"]
        images.append(len(named))
        answers.append(len(answered))
        lengths.extend(answered)
        paths.update(image for image in named if isinstance(image, str))
        text = hash("\0".join([turn["value"].replace(IMAGE_TAG, "").strip() for turn in turns]))
        repeated.append(not problem and text in seen)
        seen.add(text)
    return Description(
        records,
        rows_by_task(tasks),
        np.array(images, np.int64),
        np.array(answers, np.int64),
        np.array(lengths, np.int64),
        np.array(repeated, bool),
        problems,
        paths,
    )


@dataclass(frozen=True)
class Looks:
    """What reading every image of a mixture tells.

    Attributes:
        sizes: int64 `[n, 2]`, width and height of each image that can be read, a file that many records name once.
        repeated: images whose bytes are those of an earlier one, under another name or in another row.
        broken: row -> why an image of it cannot be used.
    """

    sizes: np.ndarray
    repeated: int
    broken: dict[int, str]


def look_at_images(description: Description, image_folder: str) -> Looks:
    """Read the bytes of every image once, and its size; its pixels are not decoded."""
    records, sizes = description.records, []
    broken: dict[int, str] = {}
    seen: set[bytes] = set()
    known: dict[str, str] = {}  # path -> what is wrong with the file
    repeated = 0
    rows = np.flatnonzero(description.images).tolist()
    for row in tqdm(rows, "Reading images", unit=" records", delay=2):
        for image in images_of(records[row]):
            if isinstance(image, str) and image in known:
                reason = known[image]
            else:
                try:
                    content = _content(image, image_folder)
                    sizes.append(format_and_size(io.BytesIO(content))[1])
                    digest = hashlib.blake2b(content, digest_size=16).digest()
                    repeated += digest in seen
                    seen.add(digest)
                    reason = ""
                except (BadImage, OSError) as error:
                    reason = str(error)
                if isinstance(image, str):
                    known[image] = reason
            if reason:
                broken.setdefault(row, reason)
    return Looks(np.array(sizes, np.int64).reshape(-1, 2), repeated, broken)


def _content(image: Image, folder: str) -> bytes:
    return Path(find_image(folder, image)).read_bytes() if isinstance(image, str) else image.content or b""


def table_of_tasks(description: Description) -> list[tuple[str, ...]]:
    """The table of the terminal and the page: `HEADER`, a line a task, and one for all."""
    broken = np.zeros(len(description.images), bool)
    broken[list(description.problems)] = True
    groups = {**description.tasks, "all": np.arange(len(description.images))}
    lines = [HEADER]
    for task, rows in groups.items():
        images, lengths = description.images[rows], description.lengths_of(rows)
        good = len(rows) - int(broken[rows].sum())
        counts = [int(((images == 0) & ~broken[rows]).sum()), int((images == 1).sum()), int((images > 1).sum())]
        median, most = np.percentile(lengths, (50, 95)) if len(lengths) else (0, 0)
        lines.append(
            (
                *(task, f"{len(rows):,}", *(f"{count:,}" for count in counts)),
                *(f"{len(lengths) / max(1, good):.1f}", f"{median:,.0f}", f"{most:,.0f}"),
                *(f"{description.repeated[rows].sum():,}", f"{broken[rows].sum():,}"),
            )
        )
    return lines


def sentences(description: Description, looks: Looks | None) -> Iterator[str]:
    """What the table does not say, a sentence each."""
    named, paths = sum(description.paths.values()), len(description.paths)
    if named:
        yield f"{plural(paths, 'image file')}, named {plural(named, 'time')}."
    if looks is None:
        yield "Images were not read: equal bytes and broken files are not known."
    else:
        width, height = np.median(looks.sizes, axis=0) if len(looks.sizes) else (0, 0)
        yield (
            f"{plural(len(looks.sizes), 'image')} can be read, in the median {width:,.0f} x {height:,.0f} pixels; "
            f"{looks.repeated:,} of them have the bytes of an earlier one."
        )
        if looks.broken:
            row, reason = min(looks.broken.items())
            count = plural(len(looks.broken), "record")
            yield f"{count} with an image that cannot be used; the first: record {row}, {reason}."
    if description.problems:
        row, reason = min(description.problems.items())
        count = plural(len(description.problems), "record")
        yield f"{count} that cannot be used; the first: record {row} {shown(reason, 160)}."


def sections_of(
    description: Description, looks: Looks | None, image_folder: str, samples: int, pictures: Pictures
) -> list[Section]:
    """The page's sections."""
    header, *lines = table_of_tasks(description)
    table = Table("Each task", header, [[name(task), *cells] for task, *cells in lines])
    largest = sorted(description.tasks.items(), key=lambda item: -len(item[1]))[:ROWS_A_PLOT]
    names = [task for task, _ in largest]
    draw = partial(plots.bars, names, {"records": [len(rows) for _, rows in largest]}, "records")
    more = (
        f"The plot shows the {ROWS_A_PLOT} largest of {len(description.tasks)} tasks."
        if len(names) < len(lines) - 1
        else ""
    )
    blocks: list[Block] = [pictures.plot("tasks", draw, more, table), *sentences(description, looks)]
    sections = [Section("tasks", "Tasks", blocks)]

    lengths = {task: description.lengths_of(rows) for task, rows in largest}
    lengths = {task: values for task, values in lengths.items() if len(values)}
    if lengths:
        shares = (5, 25, 50, 75, 95)
        found = {task: np.percentile(values, shares) for task, values in lengths.items()}
        cells = [[name(task), *(f"{value:,.0f}" for value in values)] for task, values in found.items()]
        table = Table("Characters of an answer", ["task", *(f"{share}%" for share in shares)], cells)
        series = {"median": [values[2] for values in found.values()], "95%": [values[4] for values in found.values()]}
        draw = partial(plots.bars, list(found), series, "characters of an answer")
        caption = "Half of a task's answers are longer than the median, and one in twenty is longer than the blue bar."
        sections.append(Section("answers", "Lengths of answers", [pictures.plot("answers", draw, caption, table)]))

    broken = description.problems | (looks.broken if looks else {})
    if broken:
        first: dict[str, int] = {}
        for row, reason in sorted(broken.items()):
            first.setdefault(kind_of(reason), row)
        counts = Counter(map(kind_of, broken.values()))
        reasons = [
            [shown(kind, 200), f"{count:,}", f"{first[kind]:,}"] for kind, count in counts.most_common(ROWS_A_PLOT)
        ]
        blocks = [Table("Why records cannot be used", ["reason", "records", "the first"], reasons)]
        sections.append(Section("broken", "Broken records", blocks))
    if samples:
        sections.append(_samples(description, image_folder, samples))
    return sections


def _samples(description: Description, image_folder: str, samples: int) -> Section:
    """Records of each task, drawn at random."""
    blocks: list[Block] = []
    records, random = description.records, np.random.default_rng(0)
    for task, rows in tqdm(description.tasks.items(), desc="Reading sample records", delay=2):
        columns = []
        for row in sorted(random.permutation(rows)[:samples].tolist()):
            record, sample = records[row], read_sample(records, image_folder or None, row)
            question = next((text for role, text in sample.turns if role == "human"), "")
            identity = record.get("id", "") if isinstance(record, dict) else ""
            images, answers = (
                plural(int(description.images[row]), "image"),
                plural(int(description.answers[row]), "answer"),
            )
            asked = shown(question.replace(IMAGE_TAG, "").strip(), 120)
            card = Card(row, name(str(identity)), None, asked, sample.image, sample.no_image, sample.turns)
            columns.append((f"{images}, {answers}", [card]))
        share = percent(len(rows) / len(records))
        blocks.append(Cards(name(task), f"{plural(len(rows), 'record')}, {share}", columns, True))
    return Section("records", "Records of each task, drawn at random", blocks)
