"""`qcli calibrate`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables
from qcli.utils.errors import UsageError

SHOWN = 10  # layers in the table


def calibrate(
    model: flags.OptionalModel = None,
    out: flags.OptionalOut = None,
    data: flags.Data = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    hessians: Annotated[bool, typer.Option("--hessians", help="Write the Hessian of every input as well.")] = False,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.DType = None,
    recipe: flags.RecipeFile = None,
    set_: flags.Sets = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Prepare calibration data and find sensitive layers.

    Writes tokens and statistics of every layer's inputs. The folder is calibration data for other commands:
    --data DIR.
    """
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.recipe.load import load_recipe

        resolved = load_recipe(
            recipe,
            flags.recipe_fields(
                model=model,
                data=data,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                device=device,
                dtype=dtype,
                out=out,
            ),
            set_ or (),
        )
        if resolved.out is None:
            raise UsageError("--out: required", hint="name the folder of the result")
        from qcli.quantization.calibrate import calibrate as run

        result = run(resolved, Path(resolved.out), hessians=hessians, progress=session.progress)
        session.result(result.to_json(), show_calibration)


def show_calibration(tables: Tables, found: dict[str, Any]) -> None:
    """What was written, and the layers that suffer most from rounding."""
    layers = found["layers"]
    worst = sorted(layers, key=lambda name: layers[name]["sensitivity"][3], reverse=True)[:SHOWN]
    tables.table(
        ("most sensitive layers", "error at 2 bits", "3 bits", "4 bits", "largest input", "dead inputs"),
        [
            (
                name,
                *(layers[name]["sensitivity"][bits] for bits in (2, 3, 4)),
                layers[name]["absmax"],
                layers[name]["dead_channels"],
            )
            for name in worst
        ],
    )
    tables.pairs(
        {
            "written": found["out"],
            "tokens": f"{found['samples']} x {found['seq_len']} of {found['data']}",
            "dead inputs": sum(layer["dead_channels"] for layer in layers.values()),
        }
    )
