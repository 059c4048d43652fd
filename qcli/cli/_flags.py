"""Flags that several commands share, and the recipe fields they set."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli._complete import one_of
from qcli.data.default_text import DEFAULT
from qcli.data.names import FILES, set_names

_DEVICES = one_of(("auto", "cpu", "cuda"))
_DTYPES = one_of(("auto", "float32", "bfloat16", "float16"))

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file.")]
OptionalModel = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Hub id, folder or .gguf file. Default: the recipe's."),
]
Revision = Annotated[
    str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub model. Default: the main branch.")
]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", metavar="FILE", help="YAML recipe to start from.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any recipe field, as in method.ridge=0.05; may be repeated."),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="TEXT",
        autocompletion=one_of((*set_names(), "self")),
        help=f"Calibration text: {', '.join(set_names())}, self (sampled from the model), a {FILES} file, "
        f"or a folder written by `qcli calibrate`. Default: {DEFAULT}.",
    ),
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Number of sequences. Default: 128.")]
SeqLen = Annotated[int | None, typer.Option(metavar="L", help="Tokens per sequence. Default: 2048.")]


def _bos(text: str) -> Any:
    """The value of `--bos`; anything else is refused where it is used."""
    return {"true": True, "false": False}.get(text, text)


Bos = Annotated[
    Any,
    typer.Option(
        "--bos",
        metavar="WHEN",
        parser=_bos,
        help="Begin every window of text with the begin token: auto (as the tokenizer does), true or false. "
        "Default: auto.",
    ),
]
Seed = Annotated[int | None, typer.Option(metavar="S", help="Random seed. Default: 0.")]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEV", autocompletion=_DEVICES, help="Compute device: auto, cpu, cuda or cuda:N. Default: auto."
    ),
]
DType = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE", autocompletion=_DTYPES, help="Compute dtype: auto, float32, bfloat16 or float16. Default: auto."
    ),
]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic",
        help="On a GPU, the same bytes at every run, or whatever is fastest. Default: deterministic.",
    ),
]
MaxMemory = Annotated[
    str | None,
    typer.Option(
        metavar="SIZE",
        help="Memory of the device to use, as in 24GB or 7.5GiB: activations that do not fit wait in host memory. "
        "Default: what is free.",
    ),
]
OptionalOut = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="DIR",
        help="Output folder; must not exist, or be empty. Default: named after model, method and bits.",
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Replace a result in DIR that qcli wrote, once the new one is complete; start "
        "an interrupted run with other settings over.",
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="WHEN",
        autocompletion=one_of(("auto", "required", "never")),
        help="An interrupted run: auto (resume it if there is one), required (fail without one) or never (start "
        "over). Default: auto.",
    ),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run the model's own Python files where transformers needs them."),
]
TrustTasks = Annotated[
    bool, typer.Option("--trust-tasks", help="Run code and unrestricted templates in task files of your own.")
]
RunDevice = Annotated[
    str, typer.Option(metavar="DEV", autocompletion=_DEVICES, help="Compute device: auto, cpu, cuda or cuda:N.")
]
RunDType = Annotated[
    str,
    typer.Option(
        metavar="TYPE",
        autocompletion=_DTYPES,
        help="Compute dtype: auto (the model's, where the device is fast in it), float32, bfloat16 or float16.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as a JSON object.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print only the result and errors.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, metavar="", help="Show more detail; -vv adds tracebacks.", show_default=False
    ),
]


def recipe_fields(
    *,
    model: str | None = None,
    revision: str | None = None,
    data: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    seed: int | None = None,
    bos: Any = None,
    device: str | None = None,
    dtype: str | None = None,
    deterministic: bool | None = None,
    max_memory: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """The values of shared flags by the dotted path of the recipe field they set; None where a flag was not given."""
    return {
        "model": model,
        "revision": revision,
        "seed": seed,
        "bos": bos,
        "device": device,
        "dtype": dtype,
        "deterministic": deterministic,
        "max_memory": max_memory,
        "out": None if out is None else str(out),
        "calibration.data": data,
        "calibration.samples": samples,
        "calibration.seq_len": seq_len,
    }
