"""`qcli inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.ui import Session, Tables


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that qcli wrote.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Show what a checkpoint holds and how it was made."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.inspection import inspect as look

        session.result(look(folder).to_json(), show_checkpoint)


def show_checkpoint(tables: Tables, found: dict[str, Any]) -> None:
    """Layers, sizes and origin."""
    tables.pairs({key: value for key, value in found.items() if not isinstance(value, dict | list)})
