"""Widths of a table's columns, as narrow as the terminal: headers wrap first, then names lose their beginnings.

Numbers are never cut, and nothing is without an ellipsis.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

ELLIPSIS = "…"
_SHORTEST = 8  # of a name that was shortened, or a sentence that is wrapped
_FIGURES = re.compile(r"[-+]?[\d.][\d.,%x/ e+-]*([kMG]?B)?|-|yes|no|")  # `3.25`, `1.24 GB`, `64, 64`


def fit(columns: Sequence[str], rows: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """The width of every column; None if they do not fit even so.

    Args:
        columns: headers, which may be wrapped between words.
        rows: cells as they are shown.
        available: characters for all columns together.
    """
    cells = [[row[i] for row in rows] for i in range(len(columns))]
    full = [max(map(len, (header, *values))) for header, values in zip(columns, cells, strict=True)]
    if sum(full) <= available:
        return full
    widths = [max(map(len, (*header.split(), *values))) for header, values in zip(columns, cells, strict=True)]
    least = [
        size if is_figures(values) else min(size, max(_SHORTEST, *map(len, header.split())))
        for header, values, size in zip(columns, cells, widths, strict=True)
    ]
    while sum(widths) > available:
        widest = max(range(len(widths)), key=lambda i: widths[i] - (0 if widths[i] > least[i] else available))
        if widths[widest] <= least[widest]:
            return None
        widths[widest] -= 1
    for i, wanted in enumerate(full):  # headers in one line where there is room left
        widths[i] += min(wanted - widths[i], available - sum(widths)) if widths[i] < wanted else 0
    return widths if all(map(_stay_different, cells, widths)) else None


def is_figures(cells: Sequence[str]) -> bool:
    """Whether a column has numbers, with their units."""
    return all(_FIGURES.fullmatch(cell) for cell in cells)


def _stay_different(cells: Sequence[str], width: int) -> bool:
    """Whether shortening leaves names apart."""
    return len({shortened(cell, width) for cell in cells}) == len({*cells})


def shortened(text: str, width: int) -> str:
    """A name without its beginning, if it is longer than that; sentences stay, since they can be wrapped."""
    return text if len(text) <= width or " " in text else ELLIPSIS + text[len(text) - width + 1 :]
