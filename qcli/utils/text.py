"""Text from outside, such as names of files, layers and data types, made fit to be shown."""

from __future__ import annotations


def printable(text: str) -> str:
    """Text in one line, without control characters: these and all others that do not print are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
