"""`qcli calibrate`."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._next import after_calibration
from qcli.cli._out import model_name, out_of
from qcli.cli._plot import require_plot, write_plot
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables

SHOWN = 10  # layers in the table


def calibrate(
    model: flags.OptionalModel = None,
    out: flags.OptionalOut = None,
    force: flags.Force = False,
    revision: flags.Revision = None,
    data: flags.Data = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    bos: flags.Bos = None,
    hessians: Annotated[
        bool, typer.Option("--hessians", help="Also write the Hessian of every layer's inputs.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw the sensitivity of layers: a .png, .svg or .pdf; must not exist."),
    ] = None,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.DType = None,
    max_memory: flags.MaxMemory = None,
    deterministic: flags.Deterministic = None,
    recipe: flags.RecipeFile = None,
    set_: flags.Sets = None,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Prepare calibration data and find sensitive layers.

    Writes the tokens and the input statistics of every layer, and lists the layers that are most sensitive to rounding.
    Other commands take the folder as calibration data: --data DIR.
    """
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.recipe.load import load_recipe

        resolved = load_recipe(
            recipe,
            flags.recipe_fields(
                model=model,
                revision=revision,
                data=data,
                samples=samples,
                seq_len=seq_len,
                seed=seed,
                bos=bos,
                device=device,
                dtype=dtype,
                max_memory=max_memory,
                deterministic=deterministic,
                out=out,
            ),
            set_ or (),
        )
        require_plot(plot)
        from qcli.models.open import open_source
        from qcli.quantization.calibrate import calibrate as run
        from qcli.utils.trust import Trust

        trust, name = Trust(remote_code=trust_remote_code), f"{model_name(resolved.model)}-calibration"
        out = out_of(session, resolved.out, name, lambda: open_source(resolved.source, trust))
        result = run(resolved, out, session.progress, hessians=hessians, trust=trust, force=force)
        if plot is not None:
            from qcli.quantization.sensitivity_plot import plot_sensitivity

            record = result.to_json()
            write_plot(plot, session, partial(plot_sensitivity, record["layers"], record["model"]))
        session.result(result.to_json(), show_calibration)
        session.suggest(lambda: after_calibration(out, resolved.model, resolved.revision, trust))


def show_calibration(tables: Tables, result: dict[str, Any]) -> None:
    """The layers with the largest rounding errors, and what was written."""
    layers = result["layers"]
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
            "written": result["out"],
            "tokens": f"{result['samples']} x {result['seq_len']} of {result['data']}"
            + (", each behind a begin token" if result["bos"] else ""),
            "dead inputs": sum(layer["dead_channels"] for layer in layers.values()),
        }
    )
