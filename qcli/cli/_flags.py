"""Flags that several commands have, and how they become recipe fields."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.data.datasets import set_names

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="[MODEL]", help="Hub id, folder or .gguf file; may come from --recipe."),
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="Start from a YAML recipe.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe field, as method.ridge=0.05; may be repeated."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="SRC",
        help=f"Calibration text: {', '.join(set_names())}, self (sampled from the model), a .txt, .jsonl or .parquet "
        "file, or a folder of `qcli calibrate`. Default: wikitext2.",
    ),
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Calibration sequences. Default: 128.")]
SeqLen = Annotated[int | None, typer.Option(metavar="L", help="Tokens of a sequence. Default: 2048.")]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Of every random choice. Default: 0.")]
Device = Annotated[str | None, typer.Option(metavar="DEV", help="auto, cpu, cuda or cuda:N. Default: auto.")]
DType = Annotated[
    str | None,
    typer.Option(metavar="TYPE", help="auto, float32, bfloat16 or float16, while computing. Default: auto."),
]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the result; must not exist.")]
OptionalOut = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the result; must not exist.")]
Resume = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help="Continue an interrupted run: auto, required or never. Default: auto."),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors.")]
Verbose = Annotated[
    int,
    typer.Option("--verbose", "-v", count=True, metavar="", help="Tell more; -vv adds tracebacks.", show_default=False),
]


def recipe_fields(
    *,
    model: str | None = None,
    data: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The shared flags by the path of the recipe field they set."""
    return {
        "model": model,
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "out": None if out is None else str(out),
        "calibration.data": data,
        "calibration.samples": samples,
        "calibration.seq_len": seq_len,
    }
