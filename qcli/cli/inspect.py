"""`qcli inspect`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._layers import show_layers
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, bits, duration, size


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint that qcli wrote.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Show what a checkpoint holds and how it was made."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.export.inspect import inspect as look

        session.result(look(folder).to_json(), show_checkpoint)


def show_checkpoint(tables: Tables, found: dict[str, Any]) -> None:
    """Layers, sizes and origin."""
    show_layers(tables, found["layers"])
    recipe, method = found["recipe"], found["recipe"]["method"]
    around = {
        "transforms": "; ".join(map(_options, recipe.get("transforms", []))),
        "low rank": _options(recipe.get("low_rank", {})),
        "refined": _options(recipe.get("refine", {})),
        "activations": _options(found["activations"] or {}),
    }
    tables.pairs(
        {
            "checkpoint": found["folder"],
            **({} if found["packed_as"] is None else {"packed as": found["packed_as"], **found["notes"]}),
            "made from": f"{found['model']} ({found['family']})",
            "with": _options(method),
            **{what: how for what, how in around.items() if how},
            "by": ", ".join(f"{name} {version}" for name, version in found["versions"].items()),
            "bits per weight": bits(found),
            "size": size(found["bytes"]),
            "time": duration(found["seconds"]),
            "fallbacks": f"in {found['fallbacks']} layers" if found["fallbacks"] else "none",
        }
    )


def _options(section: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value).lower()}" for key, value in section.items())
