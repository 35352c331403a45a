"""The sections that are tables: sample records, records left out, what the gradient pass cost, where all came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from msgspec import structs

from tive.report.captions import percent, plural, short
from tive.report.markup import Markup, join, name, table, tag
from tive.report.samples import Sample
from tive.selection.files import Selection

OPEN_TASKS = 10
CASES = 100


def records(
    selection: Selection, extremes: list[tuple[np.ndarray, np.ndarray]], samples: dict[int, Sample], trouble: str
) -> Markup:
    """The most and least influential records of each task, a folding block a task; `trouble` says why none was read."""
    parts = [tag("p", f"Made without images and conversations: {trouble}.", class_="note")] if trouble else []
    for index, (most, least) in enumerate(extremes):
        if not len(most):
            continue
        task = selection.tasks[index]
        size = tag("span", plural(task.records, "record"), class_="quiet")
        columns = []
        for title, rows in (("Most influential", most), ("Least influential", least)):
            if len(rows):
                cards = tag("ul", *(_card(selection, row, samples.get(row)) for row in map(int, rows)), class_="cards")
                columns.append(tag("div", tag("h4", title), cards))
        heading = tag("summary", tag("h3", name(task.name)), " ", size)
        block = tag("div", *columns, class_="extremes")
        parts.append(tag("details", heading, block, class_="task", open=index < OPEN_TASKS))
    return join(parts) if parts else tag("p", "None is shown.")


def _card(selection: Selection, row: int, sample: Sample | None) -> Markup:
    times = int(selection.times_selected[row])
    state = tag("span", "drawn" + (f" {times} times" if times > 1 else ""), class_="drawn") if times else "not drawn"
    facts = [(what, short(selection.column(what)[row])) for what in ("influence", "norm", "weight")]
    values = " · ".join(f"{what} {value}" for what, value in facts)
    text = [tag("p", state, " · ", values), tag("p", f"row {row}, id ", name(selection.ids[row]), class_="quiet")]
    picture = tag("span", sample.no_image if sample else "not read", class_="missing")
    if sample is not None and sample.image:
        picture = tag("img", src=sample.image, alt=f"Image of row {row}")
    parts = [tag("div", picture, class_="picture"), tag("div", *text)]
    if sample is not None and sample.turns:
        turns = [tag("p", tag("b", role), tag("span", said, dir="auto"), class_="turn") for role, said in sample.turns]
        parts.append(tag("details", tag("summary", "Conversation"), *turns))
    return tag("li", *parts)


def left_out(selection: Selection) -> Markup:
    """Records without a gradient: how many for each reason and task, and one of them."""
    entries = selection.summary.left_out
    if not entries:
        return tag("p", "None: every record has a gradient.")
    cases = [(entry.reason, str(entry.task)) for entry in entries]
    examples = dict(reversed(list(zip(cases, entries, strict=True))))
    counts = Counter(cases)
    found = sorted(counts, key=lambda case: (-counts[case], case))
    lines = []
    for case in found[:CASES]:
        example = join([f"row {examples[case].row}, id ", name(str(examples[case].id), 40)])
        lines.append([name(case[0], 200), name(case[1]), f"{counts[case]:,}", example])
    share = percent(len(entries) / max(1, len(selection.ids)))
    said = f"{plural(len(entries), 'record')} of {len(selection.ids):,} ({share}): in no mean, and never drawn."
    if len(found) > CASES:
        said += f" The table has the {CASES} most frequent of {len(found):,} cases; the scores file has every record."
    return join([tag("p", said), table(["reason", "task", "records", "for example"], lines, "Records left out")])


def cost(selection: Selection) -> Markup:
    """What the gradient pass took, from the chunks' manifests."""
    chunks = selection.summary.gradient_pass
    if not chunks:
        return tag("p", "Not known: the feature files have no manifests (those of the paper's release do not).")

    def column(key: str) -> list[float]:
        values = [number(chunk.get(key)) for chunk in chunks]
        return [value for value in values if value is not None]

    seconds, rates = column("seconds"), column("records_per_second")
    peaks, paddings = column("peak_memory_bytes"), column("padding_efficiency")
    rate = None
    if len(rates) == len(seconds) and sum(seconds):
        rate = float(np.dot(rates, seconds) / sum(seconds))
    facts = [
        ("device time", duration(sum(seconds)) if seconds else "–"),
        ("records a second, a device", short(rate)),
        ("device", ", ".join(sorted({str(chunk.get("device", "–")) for chunk in chunks}))[:200]),
        ("chunks", f"{len(chunks):,}"),
        ("peak memory", memory(max(peaks)) if peaks else "–"),
        ("lowest padding efficiency", short(min(paddings)) if paddings else "–"),
    ]
    lines = []
    for position, chunk in enumerate(chunks):
        values = [number(chunk.get(key)) for key in ("seconds", "records_per_second", "padding_efficiency")]
        told = [str(chunk.get(key, "–"))[:100] for key in ("device", "dtype")]
        peak = memory(number(chunk.get("peak_memory_bytes")))
        lines.append([str(position), *told, duration(values[0]), short(values[1]), short(values[2]), peak])
    header = ["chunk", "device", "dtype", "time", "records a second", "padding efficiency", "peak memory"]
    folded = tag("details", tag("summary", "By chunk"), table(header, lines, "Cost of the gradient pass, by chunk"))
    said = "Padding efficiency: the share of the computed positions that belong to a record and are no padding."
    return join([_facts(facts), tag("p", said, class_="quiet"), folded])


def number(value: Any) -> float | None:
    """A finite number of reasonable size as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
        return None
    return float(value)


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def memory(size: float | None) -> str:
    if size is None:
        return "–"
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def origin(selection: Selection) -> Markup:
    """Arguments, versions and hashes: what it takes to make the subset again and to check it."""
    summary = selection.summary
    inputs = {key: value for key, value in structs.asdict(summary.inputs).items() if key not in ("chunks", "match")}
    blocks = [("Arguments", summary.arguments), ("Inputs", inputs), ("Gradient features", summary.inputs.match)]
    blocks += [("Subset", structs.asdict(summary.subset)), ("Versions", summary.versions)]
    if summary.gradient_pass:
        blocks.append(("Versions of the gradient pass", summary.gradient_pass[0].get("versions")))
    parts = [tag("p", f"Selected {summary.created}.")] if summary.created else []
    for title, content in blocks:
        if isinstance(content, dict) and content:
            pairs = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in content.items())
            parts += [tag("h3", title), _facts(pairs)]
    return join(parts)


def _facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    lines = (tag("div", tag("dt", key), tag("dd", tag("bdi", value[:2000]))) for key, value in pairs)
    return tag("dl", *lines, class_="facts")
