"""HTML that is safe by construction: what is not `Markup` is text, and is escaped."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import Any

# Characters that HTML forbids in any spelling; white space stays.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
_VOID = ("img", "meta", "br")


class Markup(str):
    """HTML, as against text."""

    __slots__ = ()


def escape(content: Any) -> Markup:
    """Text as HTML; markup stays as it is."""
    if isinstance(content, Markup):
        return content
    return Markup(html.escape(_FORBIDDEN.sub("\ufffd", str(content))))


def tag(element: str, /, *content: Any, **attributes: Any) -> Markup:
    """An element. `class_` stands for `class`, `aria_label` for `aria-label`; None or False leaves an attribute out."""
    shown = ""
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            shown += f" {key}"
        elif value is not None and value is not False:
            shown += f' {key}="{escape(str(value))}"'
    if element in _VOID:
        return Markup(f"<{element}{shown}>")
    return Markup(f"<{element}{shown}>{join(content)}</{element}>")


def join(content: Iterable[Any], separator: str = "") -> Markup:
    return Markup(escape(separator).join(escape(part) for part in content))


def name(text: str, length: int = 80) -> Markup:
    """A name from the data inside a sentence: cut when long, and its writing direction kept to itself."""
    return tag("bdi", text if len(text) <= length else f"{text[: length - 1]}…")


def table(header: Iterable[Any], rows: Iterable[Iterable[Any]], caption: str) -> Markup:
    """A table that scrolls in its own box where it is wider than the page; the first cell names its row."""
    head = tag("tr", *(tag("th", cell, scope="col") for cell in header))
    lines = []
    for first, *others in rows:
        lines.append(
            tag(
                "tr",
                tag("th", first, scope="row"),
                *(tag("td", cell, class_="text" if isinstance(cell, Markup) else None) for cell in others),
            )
        )
    whole = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *lines))
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=caption)
