"""Tables of plain text, as a terminal shows them."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


def text_table(
    rows: Sequence[Sequence[object]], headings: Sequence[str], right: Sequence[bool]
) -> str:
    """Columns of text under headings and a line, two spaces between them.

    Args:
        rows: of as many cells as there are headings; anything that `str` makes text of.
        right: of each column, whether it is aligned to the right; to the left otherwise.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    # A heading has two spaces beside it, so that columns stand apart also where their cells are narrow.
    widths = [
        max([_width(heading) + 2, *(_width(row[place]) for row in cells)])
        for place, heading in enumerate(headings)
    ]
    lines = [headings, ["-" * width for width in widths], *cells]
    return "\n".join(_line(line, widths, right) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> str:
    aligned = []
    for cell, width, to_right in zip(cells, widths, right, strict=True):
        space = " " * (width - _width(cell))
        aligned.append(space + cell if to_right else cell + space)
    return "  ".join(aligned).rstrip()


def _width(text: str) -> int:
    """Columns of a terminal: Chinese and Japanese characters, and emoji, take two, and accents none of their own."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
