"""`--plot FILE`, as several commands have it."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from qcli.cli.ui.session import Session
from qcli.utils.errors import StateError, UnsupportedError, UsageError

Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: a .png, .svg or .pdf; must not exist.")
]


def require_plot(file: Path | None) -> None:
    """Refuse, before any work, a figure that cannot be drawn or written.

    Raises:
        UsageError: its name says no kind of figure, or its folder does not exist.
        StateError: it exists.
        UnsupportedError: matplotlib is not installed.
    """
    if file is None:
        return
    from qcli.utils.environment import can_plot
    from qcli.utils.figures import KINDS

    if file.suffix not in KINDS:
        raise UsageError(f"--plot: {file} is none of {', '.join(KINDS)}", hint="for example --plot figure.png")
    if not file.parent.is_dir():
        raise UsageError(f"--plot: {file.parent} is not a folder")
    if file.exists():
        raise StateError(f"--plot: {file} exists", hint="move it away, or choose another name")
    if not can_plot():
        raise UnsupportedError("--plot: matplotlib is not installed", hint="pip install matplotlib")


def write_plot(file: Path, session: Session, draw: Callable[[str], bytes]) -> None:
    """Write the figure that `draw` returns for a kind of file."""
    from qcli.utils.files import write_bytes

    write_bytes(file, draw(file.suffix))
    session.note(f"drawn: {file}")
