"""A first look at a mixture, before any model: its tasks, images, texts, repetitions and broken records."""

from __future__ import annotations

import hashlib
import io
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from tive.data.conversations import image_paths, images_of, to_llava
from tive.data.images import BadImage, find_image, format_and_size
from tive.data.media import IMAGE_TAG
from tive.data.problems import kind_of
from tive.data.records import Records
from tive.data.tasks import NO_TASK, rows_by_task, task_of
from tive.data.trained import form_problem
from tive.report.page import Block, Cards, Plot, Samples, Section, Table, bars, boxes, by_name, card_of, name
from tive.util.text import percent, plural, shown

REASONS = 30  # the most frequent, of broken records


@dataclass(frozen=True)
class Description:
    """What one pass through N records of T tasks counts; one that cannot be read has no images and no answers."""

    records: Records
    tasks: dict[str, np.ndarray]  # name -> its rows, int64
    images: np.ndarray  # int64 `[N]`, of each record
    answers: np.ndarray  # int64 `[N]`, of each record
    lengths: np.ndarray  # int64 `[A]`, characters of each answer, record by record
    repeated: np.ndarray  # bool `[N]`, the record's turns are those of an earlier one; images play no part
    problems: dict[int, str]  # row -> what keeps the record from being read
    paths: Counter[str]  # how many records name an image, by its path; those that lie in rows are not among them

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
        if problem := form_problem(record):
            problems[row] = problem
        conversation = {"conversations": []} if problem else to_llava(record)
        turns, named = conversation["conversations"], image_paths(conversation)
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
    """What reading every image of a mixture tells."""

    sizes: np.ndarray  # int64 `[n, 2]`, width and height of each that can be read, a file that many records name once
    repeated: int  # images whose bytes are those of an earlier one, under another name or in another row
    broken: dict[int, str]  # row -> why an image of it cannot be used


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
                    if isinstance(image, str):
                        content = Path(find_image(image_folder, image)).read_bytes()
                    else:
                        content = image.content or b""
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


def table_of_tasks(description: Description) -> list[tuple[str, ...]]:
    """The table of the terminal and the page: its header, a line a task, and one for all."""
    broken = np.zeros(len(description.images), bool)
    broken[list(description.problems)] = True
    header = ("task", "records", "no image", "one", "more", "answers a record", "characters an answer: median", "95%")
    lines: list[tuple[str, ...]] = [(*header, "repeated texts", "broken")]
    for task, rows in [*description.tasks.items(), ("all", np.arange(len(description.images)))]:
        images, lengths = description.images[rows], description.lengths_of(rows)
        bad = int(broken[rows].sum())
        counts = (len(rows), (images == 0).sum() - bad, (images == 1).sum(), (images > 1).sum())
        median, most = np.percentile(lengths, (50, 95)) if len(lengths) else (0, 0)
        answers = (f"{len(lengths) / max(1, len(rows) - bad):.1f}", f"{median:,.0f}", f"{most:,.0f}")
        repeated = description.repeated[rows].sum()
        lines.append((task, *(f"{count:,}" for count in counts), *answers, f"{repeated:,}", f"{bad:,}"))
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


def sections_of(description: Description, looks: Looks | None, samples: Samples) -> list[Section]:
    """The page's sections."""
    header, *lines = table_of_tasks(description)
    table = Table("Each task", header, [[name(task), *cells] for task, *cells in lines])
    tasks = sorted(description.tasks.items(), key=lambda item: -len(item[1]))
    figure = bars([task for task, _ in tasks], {"records": [len(rows) for _, rows in tasks]}, "records")
    plot = Plot("tasks", "Records of each task", figure)
    sections = [Section("tasks", "Tasks", [plot, *sentences(description, looks), table])]

    lengths = {task: description.lengths_of(rows) for task, rows in tasks}
    if lengths := {task: values for task, values in lengths.items() if len(values)}:
        columns = {
            f"{share}%": [f"{np.percentile(values, share):,.0f}" for values in lengths.values()]
            for share in (5, 25, 50, 75, 95)
        }
        table = by_name("Characters of an answer", "task", lengths, columns)
        figure = boxes([*lengths], {"answers": [*lengths.values()]}, "characters of an answer", logarithmic=True)
        sections.append(Section("answers", "Lengths of answers", [Plot("answers", table.title, figure, table)]))

    if broken := sorted((description.problems | (looks.broken if looks else {})).items()):
        counts = Counter(kind_of(reason) for _, reason in broken)
        first = {kind_of(reason): row for row, reason in reversed(broken)}
        reasons = [[shown(kind, 200), f"{count:,}", f"{first[kind]:,}"] for kind, count in counts.most_common(REASONS)]
        table = Table("Why records cannot be used", ["reason", "records", "the first"], reasons)
        sections.append(Section("broken", "Broken records", [table]))

    blocks: list[Block] = []
    records, random = description.records, np.random.default_rng(0)
    for task, rows in tqdm(description.tasks.items(), desc="Reading sample records", delay=2):
        columns_of_task = []
        for row in sorted(random.permutation(rows)[: samples.count].tolist()):
            record = records[row]
            card = card_of(samples, row, str(record.get("id", "")) if isinstance(record, dict) else "", "")
            question = next((text for role, text in card.turns if role == "human"), "")
            card = replace(card, scores=shown(" ".join(question.replace(IMAGE_TAG, "").split()), 120))
            images, answers = int(description.images[row]), int(description.answers[row])
            columns_of_task.append((f"{plural(images, 'image')}, {plural(answers, 'answer')}", [card]))
        about = f"{plural(len(rows), 'record')}, {percent(len(rows) / len(records))}"
        blocks.append(Cards(name(task), about, columns_of_task))
    if samples.count:
        sections.append(Section("records", "Records of each task, drawn at random", blocks))
    return sections
