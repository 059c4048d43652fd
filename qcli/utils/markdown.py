"""Escaping for Markdown."""

_SPECIAL = "\\`*_[]<>|#"  # characters with a meaning in Markdown or in HTML inside it


def plain(text: str) -> str:
    """Escape text from outside, such as names, and join its lines into one."""
    return "".join(f"\\{c}" if c in _SPECIAL else " " if c == "\n" else c for c in text)
