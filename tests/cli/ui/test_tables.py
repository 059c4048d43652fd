"""Tables, and numbers with units."""

from __future__ import annotations

import io
from collections.abc import Sequence

import pytest
from rich.console import Console

from qcli.cli.ui.tables import Tables, duration, size
from qcli.evaluation.severity import with_word
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


COLUMNS = ("model", "bits/weight", "size", "perplexity wikitext2", "KL", "worst window", "top-1")
ROWS = [
    ("/home/someone/models/SmolLM2-135M-Instruct-gptq-like-w4", 4.25, "98.41 MB", 17.123456, 0.0123, 0.345, 0.8765),
    ("/home/someone/models/SmolLM2-135M-Instruct-rtn-w3", 3.25, "100.52 MB", 1234567.89, None, 1.5, 0.5),
]
NUMBERS = ("4.25", "98.41 MB", "17.12", "0.0123", "0.345", "0.876", "3.25", "100.52 MB", "1.235e+06", "1.5", "0.5")


def drawn(width: int, columns: Sequence[str] = COLUMNS, rows: Sequence[Sequence[object]] = ROWS) -> list[str]:
    stream = io.StringIO()
    Tables(Console(file=stream, width=width)).table(columns, rows)
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [72, 80, 100])
def test_names_are_shortened_and_numbers_stay(width: int) -> None:
    text = drawn(width)
    assert all(len(line) <= width for line in text)
    rows = [line for line in text if line.strip().startswith("…")]
    assert [line.split()[0][-3:] for line in rows] == ["-w4", "-w3"]
    assert all(number in " ".join(rows) for number in NUMBERS)
    words = " ".join(text).split()
    assert all(word in words for column in COLUMNS for word in column.split())


def test_a_table_that_fits_is_not_changed() -> None:
    text = drawn(140)
    assert ROWS[0][0] in text[3] and "perplexity wikitext2" in text[1]


def test_rows_become_pairs_where_columns_do_not_fit() -> None:
    text = drawn(60, (*COLUMNS, "arc_easy", "piqa"), [(*row, 0.4, 0.6) for row in ROWS])
    pairs = [line.split("  ", 1) for line in text if line]
    assert [name for name, _ in pairs] == [*COLUMNS, "arc_easy", "piqa"] * 2
    assert pairs[3][1].strip() == "17.12"
    assert ROWS[1][0] == pairs[9][1].strip()


def test_names_that_would_look_alike_are_not_shortened() -> None:
    alike = [(f"/models/{name}/SmolLM2-135M-w4", *row[1:]) for name, row in zip(("one", "two"), ROWS, strict=True)]
    assert "".join(drawn(120, COLUMNS, alike)).count("…") == 0
    text = "\n".join(drawn(72, COLUMNS, alike))
    assert "…" not in text
    assert all(row[0] in text for row in alike)


def test_sentences_are_wrapped_not_cut() -> None:
    reason = "there is no C++ compiler, and so no kernel is built for this machine"
    text = drawn(48, ("backend", "available"), [("cpu", f"no: {reason}")])
    assert "…" not in "".join(text)
    assert " ".join(" ".join(text[3:]).split()) == f"cpu no: {reason}"


def test_values_of_pairs_continue_below_where_they_begin() -> None:
    stream = io.StringIO()
    pairs = {"of which": "codes 1.24 MB, scales 0.31 MB, rest 2.5 MB", "file": f"/{'x' * 40}", "KL": 1.14159}
    Tables(Console(file=stream, width=30)).pairs(pairs)
    assert stream.getvalue().splitlines() == [
        "of which  codes 1.24 MB,",
        "          scales 0.31 MB, rest",
        "          2.5 MB",
        f"file      /{'x' * 40}",
        f"KL        {with_word(1.14159).split()[0]}",
    ]
