"""A table on the terminal."""

from __future__ import annotations


def print_table(rows: list[tuple[str, ...]]) -> None:
    """Print a table whose first row is its header: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        print("  ".join(cells).rstrip())
