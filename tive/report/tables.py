"""The sections that are tables: sample records, records left out, what the gradient pass cost, where all came from."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup
from msgspec import structs

from tive.report.blocks import Block, Card, Extremes, Facts, Fold, Section, Table, Text, name
from tive.report.numbers import percent, plural, short, whole
from tive.report.samples import Ends, Sample
from tive.selection.files import Selection
from tive.util.text import LABEL_LIMIT, duration, memory, shown

OPEN = 10  # of the tasks
CASES = 100  # of records left out
# What a card says of a record, where the scores file has it; the others are counts.
SCORES = {
    "influence": "influence",
    "score": "score",
    "norm": "norm",
    "weight": "weight",
    "loss": "loss",
    "el2n": "EL2N",
}
COUNTS = {"rank": "rank", "supervised_tokens": "supervised tokens"}


def records(selection: Selection, ends: Sequence[Ends], samples: Mapping[int, Sample], trouble: str) -> Section:
    """The records at the two ends of each task's influence, or of their scores for each subtask of a target.

    Args:
        trouble: why no record was read.
    """
    title, titles = "Most and least influential records", ("Most influential", "Least influential")
    if selection.summary.method == "LESS":
        title, titles = "Best and worst records of each subtask", ("Serve it best", "Serve it least")
    blocks: list[Block] = [Text(f"Made without images and conversations: {trouble}.", "note")] if trouble else []
    for number, end in enumerate(end for end in ends if len(end.most)):
        columns = [
            (which, [_card(selection, row, end.column, samples.get(row)) for row in rows.tolist()])
            for which, rows in zip(titles, (end.most, end.least), strict=True)
            if len(rows)
        ]
        blocks.append(Extremes(name(end.name), end.about, columns, number < OPEN))
    return Section("records", title, blocks or ["None is shown."])


def _card(selection: Selection, row: int, column: str, sample: Sample | None) -> Card:
    """The scores of a record: the one that it is shown for, then the others."""
    scores, counts = SCORES, COUNTS
    if column not in scores:
        scores = {column: f"for {shown(column.removeprefix('score_'), LABEL_LIMIT)}", **scores}
    found = [
        f"{said} {short(float(selection.column(key)[row]))}" for key, said in scores.items() if key in selection.numbers
    ]
    found += [
        f"{said} {whole(float(selection.column(key)[row]))}" for key, said in counts.items() if key in selection.numbers
    ]
    times = int(selection.times_selected[row])
    return Card(times, " · ".join(found), row, name(selection.ids[row]), sample)


def left_out(selection: Selection, further: Sequence[Block] = ()) -> Section:
    """Records without a gradient: how many for each reason and task, and one of them; then `further` blocks."""
    title = "Records left out"
    entries = selection.summary.left_out
    if not entries:
        return Section("left-out", title, ["None: every record has a gradient.", *further])
    cases = [(entry.reason, str(entry.task)) for entry in entries]
    examples = dict(reversed(list(zip(cases, entries, strict=True))))
    counts = Counter(cases)
    found = sorted(counts, key=lambda case: (-counts[case], case))
    lines = []
    for case in found[:CASES]:
        example = Markup("row {}, id {}").format(examples[case].row, name(str(examples[case].id), 40))
        lines.append([name(case[0], 200), name(case[1]), f"{counts[case]:,}", example])
    share = percent(len(entries) / max(1, len(selection.ids)))
    said = f"{plural(len(entries), 'record')} of {len(selection.ids):,} ({share}): in no mean, and never drawn."
    if len(found) > CASES:
        said += f" The table has the {CASES} most frequent of {len(found):,} cases; the scores file has every record."
    table = Table(title, ["reason", "task", "records", "for example"], lines)
    return Section("left-out", title, [said, table, *further])


def cost(selection: Selection) -> Section:
    """What the gradient pass took, from the chunks' manifests."""
    title = "What the gradient pass cost"
    if selection.summary.method == "LESS":
        title = "What the gradient pass of the last checkpoint cost"
    chunks = selection.summary.gradient_pass
    if not chunks:
        unknown = "Not known: the feature files have no manifests (those of the paper's release do not)."
        return Section("cost", title, [unknown])

    def column(key: str) -> list[float]:
        values = [number(chunk.get(key)) for chunk in chunks]
        return [value for value in values if value is not None]

    seconds, rates = column("seconds"), column("records_per_second")
    peaks, paddings = column("peak_memory_bytes"), column("padding_efficiency")
    rate = None
    if len(rates) == len(seconds) and any(seconds):
        rate = float(np.dot(rates, seconds) / sum(seconds))
    facts = [
        ("device time", _duration(sum(seconds) if seconds else None)),
        ("records a second, a device", short(rate)),
        ("device", ", ".join(sorted({str(chunk.get("device", "–")) for chunk in chunks}))[:200]),
        ("chunks", f"{len(chunks):,}"),
        ("peak memory", _memory(max(peaks, default=None))),
        ("lowest padding efficiency", short(min(paddings, default=None))),
    ]
    lines = []
    for position, chunk in enumerate(chunks):
        values = [number(chunk.get(key)) for key in ("seconds", "records_per_second", "padding_efficiency")]
        told = [str(chunk.get(key, "–"))[:100] for key in ("device", "dtype")]
        peak = _memory(number(chunk.get("peak_memory_bytes")))
        lines.append([str(position), *told, _duration(values[0]), short(values[1]), short(values[2]), peak])
    header = ["chunk", "device", "dtype", "time", "records a second", "padding efficiency", "peak memory"]
    folded = Fold("By chunk", [Table("Cost of the gradient pass, by chunk", header, lines)])
    said = "Padding efficiency: the share of the computed positions that belong to a record and are no padding."
    return Section("cost", title, [Facts(facts), Text(said, "quiet"), folded])


def number(value: Any) -> float | None:
    """A finite number of reasonable size as a float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e300:
        return None
    return float(value)


def _duration(seconds: float | None) -> str:
    return "–" if seconds is None else duration(seconds)


def _memory(size: float | None) -> str:
    return "–" if size is None else memory(size)


def origin(selection: Selection) -> Section:
    """Arguments, versions and hashes: what it takes to make the subset again and to check it."""
    summary = selection.summary
    inputs = {key: value for key, value in structs.asdict(summary.inputs).items() if key not in ("chunks", "match")}
    contents = [("Arguments", summary.arguments), ("Inputs", inputs), ("Gradient features", summary.inputs.match)]
    contents += [("Subset", structs.asdict(summary.subset)), ("Versions", summary.versions)]
    contents.append(("Target", {key: value for key, value in summary.details.items() if isinstance(value, str)}))
    if summary.gradient_pass:
        contents.append(("Versions of the gradient pass", summary.gradient_pass[0].get("versions")))
    blocks: list[Block] = [f"Selected {summary.created}."] if summary.created else []
    for title, content in contents:
        if isinstance(content, dict) and content:
            pairs = ((key, value if isinstance(value, str) else json.dumps(value)) for key, value in content.items())
            blocks.append(Facts([(key, value[:2000]) for key, value in pairs], title))
    return Section("origin", "Arguments, versions, hashes", blocks)
