"""`qcli verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that qcli wrote.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Check a checkpoint against its manifest.

    Every file's hash, every tensor's shape and type, every value."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.export.verify import verify as check

        session.result(check(folder, session.progress).to_json(), show_verified)


def show_verified(tables: Tables, found: dict[str, Any]) -> None:
    """What was checked; that anything is wrong would be an error."""
    tables.pairs(
        {
            "verified": found["folder"],
            "files": f"{found['files']}, {size(found['bytes'])}",
            "layers": f"{found['layers']}, {found['bits_per_weight']:.4g} bits per weight",
            "not in the manifest": ", ".join(found["unlisted"]) or None,
        }
    )
