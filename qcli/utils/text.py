"""Text from outside, such as names of files, layers and data types, made fit to be shown."""

from __future__ import annotations

import re
from unicodedata import category

_NUMBER = re.compile(r"(?<![A-Za-z_])[0-9]+(?![A-Za-z_])")


def printable(text: str) -> str:
    """Text in one line, without control characters: these and all others that do not print are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def significant(value: float) -> str:
    """A measured number: three digits of what is below 1, four of the rest."""
    return f"{value:.4g}" if abs(value) >= 1 else f"{value:.3g}"


def with_wildcards(text: str) -> str:
    """Text with `*` for every number that stands alone, such as those of blocks and experts."""
    return _NUMBER.sub("*", text)


def without_controls(text: str) -> str:
    """Text in any number of lines, its control characters escaped except newlines and tabs."""
    return "".join(c.encode("unicode_escape").decode() if category(c) == "Cc" and c not in "\n\t" else c for c in text)
