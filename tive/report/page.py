"""The page: one HTML file that needs nothing beside itself."""

from __future__ import annotations

from pathlib import Path

from tive.report.captions import percent, plural
from tive.report.choice import Choice
from tive.report.markup import Markup, name, tag
from tive.selection.files import Selection

# Nothing may be loaded and no script may run, should any text of the data ever be taken for markup.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(selection: Selection, choice: Choice | None, sections: list[tuple[str, str, Markup]]) -> bytes:
    """The whole page.

    Args:
        sections: anchor, title and content of each.
    """
    style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
    file = Path(selection.summary.inputs.data_path).name
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"TIVE selection {selection.stem}"),
        tag("style", Markup(style)),
    )
    selected = sum(task.selected for task in selection.tasks)
    facts = [
        (f"{selected:,}", f"records selected of {len(selection.ids):,}"),
        (percent(selected / max(1, len(selection.ids))), "of the data"),
        (f"{len(selection.tasks):,}", "tasks" if len(selection.tasks) > 1 else "task"),
        (f"{len(selection.summary.left_out):,}", "left out"),
    ]
    if choice is not None:
        facts.append((percent(choice.share_at_q), f"effective size at q = {choice.q:g}"))
    header = tag(
        "header",
        tag("h1", "What TIVE selected"),
        tag("p", tag("b", selection.stem), " from ", name(file), ", ", plural(len(selection.ids), "record")),
        tag("ul", *(tag("li", tag("b", value), " ", what) for value, what in facts), class_="tiles"),
    )
    links = (tag("li", tag("a", title, href=f"#{anchor}")) for anchor, title, _ in sections)
    contents = tag("nav", tag("ul", *links), aria_label="Contents")
    main = tag("main", *(tag("section", tag("h2", title), content, id=anchor) for anchor, title, content in sections))
    return f'<!DOCTYPE html>\n<html lang="en">{head}{tag("body", header, contents, main)}</html>\n'.encode()
