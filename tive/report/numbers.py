"""Numbers as the page says them."""

from __future__ import annotations

import math


def short(value: float | None) -> str:
    """A number with three digits that count; a dash where there is none."""
    if value is None or math.isnan(value):
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def whole(value: float) -> str:
    """A count, or a dash where there is none."""
    return "–" if math.isnan(value) else f"{value:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
