"""`qcli eval`."""

from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.ui import Session, Tables, bits, size


def evaluate(
    model: flags.Model,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also measure KL and top-1 agreement against this model."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC",
            help="Text: wikitext2, c4, ptb, self (sampled from the baseline), a .txt, .jsonl or .parquet file, or a "
            "folder of `qcli calibrate` that the model has not seen; may be repeated. Default: wikitext2.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="W", min=2, help="Tokens of a window. Default: the model's context, up to 2048."),
    ] = None,
    max_windows: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use only the first N windows.")] = None,
    device: Annotated[str, typer.Option(metavar="DEV", help="auto, cpu, cuda or cuda:N.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(metavar="TYPE", help="auto (float32), float32, bfloat16 or float16, while computing."),
    ] = "auto",
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Measure perplexity, and what was lost against a baseline.

    The loss is the KL divergence of the predictions, and how often the likeliest token is the same. Windows of
    text do not overlap and start without a begin token. Models may be larger than memory.
    """
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.evaluate import evaluate as run

        result = run(
            model,
            baseline=baseline,
            data=data or ["wikitext2"],
            window=window,
            max_windows=max_windows,
            device=device,
            dtype=dtype,
            progress=session.progress,
        )
        session.result(result.to_json(), show_evaluation)


def show_evaluation(tables: Tables, found: dict[str, Any]) -> None:
    """Perplexity by text, the loss against the baseline, the size."""
    before = found["baseline"]["perplexity"] if found["baseline"] else {}
    columns = ("text", "perplexity", "baseline", "ratio", "windows", "of tokens", "scored")
    rows = []
    for data, score in found["perplexity"].items():
        value, reference = score["value"], before.get(data)
        ratio = value / reference if value and reference else None
        rows.append((data, value, reference, ratio, score["windows"], score["window"], score["tokens"]))
    tables.table(columns, rows)
    tables.pairs(
        {
            "KL to baseline": found["kl"],
            "top-1 agreement": found["top1_agreement"],
            "bits per weight": bits(found),
            "size": size(found["bytes"]),
        }
    )
