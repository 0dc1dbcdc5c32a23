"""Cells and columns of tables."""

from __future__ import annotations

from collections.abc import Collection, Sequence


def aligned(rows: Sequence[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Rows of cells as lines of text, each column as wide as its widest cell, two spaces between.

    right: numbers, from 0, of the columns that are aligned on the right.

    Raises: ValueError for rows of different lengths.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def percent(score: float | None) -> str:
    """A share as percent with one decimal; a dash for none."""
    return "-" if score is None else f"{100 * score:.1f}"
