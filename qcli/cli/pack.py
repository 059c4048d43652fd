"""`qcli pack`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size


def pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `qcli quantize` wrote.")],
    out: flags.Out,
    format: Annotated[str, typer.Option(metavar="F", help="qcli, compressed-tensors, gptq, gguf or dense.")] = "qcli",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest file, as 500MB or 5GB.")] = "5GB",
    requantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE", help="gguf: round layers that fit no type exactly, as Q8_0. Default: refuse them."
        ),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="What `qcli eval RUN --json` printed, for the model card."),
    ] = None,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Write a deployable checkpoint and read it back.

    Every weight is compared, and a batch of logits. What the format cannot hold is refused. A manifest for
    `qcli verify` and a model card lie beside the weights."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.evaluation.results import read_evaluation
        from qcli.export.pack import pack as write
        from qcli.recipe.load import from_flags
        from qcli.recipe.sections import Pack

        wanted = from_flags(Pack, {"format": format, "shard_size": shard_size, "requantize": requantize})
        session.result(
            write(
                run,
                out,
                format=wanted.format,
                shard_size=wanted.shard_bytes,
                requantize=wanted.requantize,
                evaluation=None if evaluation is None else read_evaluation(evaluation, run),
                progress=session.progress,
            ),
            show_packed,
        )


def show_packed(tables: Tables, packed: dict[str, Any]) -> None:
    """What was written, and that it reads back."""
    files = f"{packed['files']} file{'s' if packed['files'] > 1 else ''}"
    equal = f"all weights equal but those of {packed['rounded']} layers" if packed["rounded"] else "weights equal"
    tables.pairs(
        {
            "packed": packed["out"],
            "format": packed["format"],
            "size": f"{size(packed['bytes'])} in {files}",
            "read back": f"{equal}; logits differ by at most {packed['max_logit_difference']:.3g}, "
            f"KL {packed['kl']:.3g}",
            **packed["notes"],
        }
    )
