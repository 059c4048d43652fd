"""Tables, and numbers with units."""

from __future__ import annotations

import io

from rich.console import Console

from qcli.cli.ui.tables import Tables, duration, size
from qcli.utils.text import printable


def test_control_codes_and_markup_in_names_are_escaped() -> None:
    assert printable("a\x1b]0;x\x07\u202eb\ud800[red]") == "a\\x1b]0;x\\x07\\u202eb\\ud800[red]"
    stream = io.StringIO()
    tables = Tables(Console(file=stream, width=100, markup=False))
    tables.table(("name", "number"), [("[bold]x[/bold]\x1b[2J", 1), ("y", None)])
    tables.pairs({"[red]": ":smile: \r", "left out": None})
    text = stream.getvalue()
    assert "[bold]x[/bold]\\x1b[2J" in text
    assert "[red]  :smile: \\r" in text
    assert "\x1b" not in text


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (999, 1000, 1_240_000, 70 * 10**9)] == [
        "999 B",
        "1.00 kB",
        "1.24 MB",
        "70.00 GB",
    ]
    assert [duration(s) for s in (8.34, 245, 4800)] == ["8.3 s", "4 min 05 s", "1 h 20 min"]
