"""Markdown."""

_ACTIVE = "\\`*_[]<>|#"  # characters that Markdown or the HTML in it may take for more than text


def plain(text: str) -> str:
    """Text, one line of it, that stays text in Markdown: names may come from anywhere."""
    return "".join(f"\\{c}" if c in _ACTIVE else " " if c == "\n" else c for c in text)
