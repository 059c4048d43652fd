"""Results drawn for people: tables and pairs on a terminal or as Markdown, and numbers with their units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TextIO

from qcli.cli.ui.columns import fit, shortened
from qcli.utils.markdown import plain
from qcli.utils.text import printable, significant

if TYPE_CHECKING:
    from rich.console import Console

_PIPE_WIDTH = 10_000  # where there is no terminal, nothing is cut


class Tables:
    """Draws results on a console. Names from files appear as they are, never as markup or control codes.

    Args:
        console: where to draw.
        markdown: draw Markdown for documents.
    """

    def __init__(self, console: Console, *, markdown: bool = False) -> None:
        self.console, self.markdown = console, markdown

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
        """Draw rows under a header; columns of numbers are right-aligned.

        Where a terminal is too narrow, names lose their beginnings; where that is not enough, a row becomes pairs.
        """
        if self.markdown:
            self._markdown_table(columns, rows, title)
            return
        headers = [printable(column) for column in columns]
        cells = [[printable(_cell(value)) for value in row] for row in rows]
        for margin in (1, 0):  # on both sides of the space between two columns
            widths = fit(headers, cells, self.console.width - (1 + margin) * len(columns) - 1 + margin)
            if widths is not None:
                break
        if widths is None:
            self._records(headers, cells, title)
            return
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(
            box=box.SIMPLE_HEAD,
            title=None if title is None else Text(printable(title)),
            title_justify="left",
            pad_edge=False,
            padding=(0, margin, 0, 0),
        )
        for i, (header, width) in enumerate(zip(headers, widths, strict=True)):
            numeric = bool(rows) and all(isinstance(row[i], int | float | None) for row in rows)
            table.add_column(Text(header), width=width, justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*(Text(shortened(cell, width)) for cell, width in zip(row, widths, strict=True)))
        self.console.print(table)

    def pairs(self, pairs: Mapping[str, Any], *, least: int = 0) -> None:
        """Draw a name, `least` characters wide at least, and its value on each line; None is left out.

        Where a terminal is too narrow, values continue below where they begin; no word of them is broken.
        """
        from textwrap import wrap

        shown = {name: _cell(value) for name, value in pairs.items() if value is not None}
        width = max([least, *map(len, shown)])
        for name, value in shown.items():
            if self.markdown:
                self._print(f"- {plain(name)}: {plain(value)}")
                continue
            room = max(self.console.width - width - 2, 1)
            lines = wrap(printable(value), room, break_long_words=False, break_on_hyphens=False)
            for start, line in zip_longest([printable(name)], lines or [""], fillvalue=""):
                self._print(f"{start:<{width}}  {line}")

    def line(self, text: str) -> None:
        """Draw one line of text; in a document, a paragraph."""
        self._print(plain(text) if self.markdown else text)
        if self.markdown:
            self._print("")

    def _markdown_table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None) -> None:
        def row(cells: Sequence[Any]) -> str:
            return f"| {' | '.join(plain(_cell(value)) for value in cells)} |"

        lines = [row(columns), f"|{'|'.join('---' for _ in columns)}|", *map(row, rows), ""]
        for line in [plain(title), "", *lines] if title else lines:
            self._print(line)

    def _records(self, headers: Sequence[str], rows: Sequence[Sequence[str]], title: str | None) -> None:
        if title:
            self.line(title)
        for row in rows:
            self.pairs(dict(zip(headers, row, strict=True)))
            self._print("")

    def _print(self, text: str) -> None:
        self.console.print(printable(text), soft_wrap=True, markup=False, highlight=False, emoji=False)


def console(stream: TextIO) -> Console:
    """A rich console on `stream`, as wide as its terminal."""
    from rich.console import Console

    class UnixConsole(Console):
        """Raises BrokenPipeError if the reader has gone, where rich ends the process with exit code 1."""

        def on_broken_pipe(self) -> None:
            raise

    return UnixConsole(file=stream, width=None if stream.isatty() else _PIPE_WIDTH)


def bits(result: Mapping[str, Any]) -> str:
    """Bits per weight of the quantized layers and of the whole model."""
    return f"{result['bits_per_weight']:.4g} (whole model {result['model_bits_per_weight']:.4g})"


def size(count: int) -> str:
    """Bytes with a unit: `1.24 GB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """Seconds in suitable units: `8.3 s`, `4 min 05 s`, `1 h 20 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return significant(value)
    return str(value)
