"""What all figures share: kinds of files, and text from outside in them. Drawing needs matplotlib."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from qcli.utils.text import printable

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
_NO_DATES = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}


def rendered(figure: Figure, kind: str = ".png") -> bytes:
    """The figure as a file of one of `KINDS`: the same bytes each time."""
    from matplotlib import rc_context

    stream = io.BytesIO()
    with rc_context({"svg.hashsalt": "qcli"}):
        figure.savefig(stream, format=kind.removeprefix("."), metadata=_NO_DATES[kind])
    return stream.getvalue()


def label(text: str) -> str:
    """Escape text from outside, and dollar signs, which start a formula in matplotlib."""
    return printable(text).replace("$", r"\$")


def plain_ticks(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers, at 1, 2 and 5 if there is room."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 1e4 else (1,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
