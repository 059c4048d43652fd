"""`qcli verify`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Checkpoint that qcli wrote.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Check a checkpoint against its manifest.

    Checks the hash of every file, the shape and dtype of every tensor, and every value, and that transformers can build
    the model for them."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.export.verify import verify as verify_checkpoint

        session.result(verify_checkpoint(folder, session.progress).to_json(), show_verified)


def show_verified(tables: Tables, report: dict[str, Any]) -> None:
    """What was checked; a mismatch is an error."""
    tables.pairs(
        {
            "verified": report["folder"],
            "files": f"{report['files']}, {size(report['bytes'])}",
            "layers": f"{report['layers']}, {report['bits_per_weight']:.4g} bits per weight",
            "not in the manifest": ", ".join(report["unlisted"]) or None,
        }
    )
