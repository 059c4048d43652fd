"""Escaping for Markdown and HTML."""

import html

from qcli.utils.text import printable

_SPECIAL = "\\`*_[]<>|#"  # characters with a meaning in Markdown or in HTML inside it


def plain(text: str) -> str:
    """Escape text from outside, such as names, for a line of Markdown."""
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in printable(text.replace("\n", " ")))


def code(text: str) -> str:
    """Text from outside as code in a line or a table of Markdown."""
    return "`" + printable(text.replace("\n", " ")).replace("`", "'").replace("|", r"\|") + "`"


def plain_html(text: str) -> str:
    """Escape text from outside for HTML, attributes included."""
    return html.escape(printable(text))
