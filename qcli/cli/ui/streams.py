"""The standard streams, as far as somebody may have closed them."""

from __future__ import annotations

import contextlib
import os
import sys

_COLOURS = {"error": "1;31", "warning": "33", "hint": "36"}  # bold red, yellow, cyan
_STDIN, _STDOUT, _STDERR = 0, 1, 2


def open_closed_streams() -> None:
    """Open standard streams that are closed, before a file gets their number and what libraries print.

    Who closed stdin or stderr wants nothing of them; a write to stdout shall fail, as it does if its reader has gone.
    """
    for descriptor in (_STDIN, _STDERR):
        if _is_closed(descriptor):
            _redirect(descriptor)
    if _is_closed(_STDOUT):
        reader, writer = os.pipe()
        os.dup2(writer, _STDOUT)
        for descriptor in {reader, writer} - {_STDOUT}:
            os.close(descriptor)
        sys.stdout = open(_STDOUT, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(_STDERR, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def abandon_stdout() -> None:
    """Discard what is still to be written to stdout, whose reader has gone: at exit it would fail again."""
    with contextlib.suppress(OSError, ValueError):  # in tests it is no file
        _redirect(sys.__stdout__.fileno() if sys.__stdout__ is not None else _STDOUT)


def tell(text: str) -> None:
    """Print a line to stderr; nobody may be reading."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def label(word: str) -> str:
    """`error:`, `hint:` or `warning:` as a line of stderr begins with it: coloured on a terminal.

    `NO_COLOR` is honoured (no-color.org), and terminals that are `dumb` get plain text.
    """
    plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM", "dumb") == "dumb"
    if plain or sys.stderr is None or not sys.stderr.isatty():
        return f"{word}:"
    return f"\x1b[{_COLOURS[word]}m{word}:\x1b[0m"


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def _redirect(descriptor: int) -> None:
    """Let a descriptor lead nowhere."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere != descriptor:
        os.dup2(nowhere, descriptor)
        os.close(nowhere)
