"""`qcli inspect`."""

from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._contents import contents_in_words
from qcli.cli._layers import show_layers
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, bits, duration, size
from qcli.models.facts import facts_in_words


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="Checkpoint that qcli wrote, or any other folder, .gguf file or hub id."),
    ],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Show what a model is stored as.

    A checkpoint of qcli also has origin, errors and backends on this machine.
    """
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.export.inspect import Inspection, inspect_any

        report = inspect_any(model)
        session.result(report.to_json(), show_checkpoint if isinstance(report, Inspection) else show_model)


def show_checkpoint(tables: Tables, report: dict[str, Any]) -> None:
    """Layers, sizes and provenance."""
    show_layers(tables, [*report["layers"], *report["vocabulary"]])
    recipe, method = report["recipe"], report["recipe"]["method"]
    sections = {
        "transforms": "; ".join(map(_options, recipe.get("transforms", []))),
        "head": _options(recipe.get("lm_head", {})),
        "embeddings": _options(recipe.get("embeddings", {})),
        "low rank": _options(recipe.get("low_rank", {})),
        "refined": _options(recipe.get("refine", {})),
        "activations": _options(report["activations"] or {}),
    }
    runs_on = report["runs_on"]
    for backend in report["missed_backends"]:
        tables.line(f"not {backend['name']}, in {backend['layers']} layers: {backend['reason']}")
    tables.pairs(
        {
            "checkpoint": report["folder"],
            **({} if report["packed_as"] is None else {"packed as": report["packed_as"], **report["notes"]}),
            "made from": f"{report['model']} ({report['family']})",
            "with": _options(method),
            **{name: options for name, options in sections.items() if options},
            "by": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
            "bits per weight": bits(report),
            **facts_in_words(report["facts"]),
            "size": size(report["bytes"]),
            **contents_in_words(report["contents"]),
            "backends on": None if runs_on is None else f"{runs_on['device']}, in {runs_on['dtype']}",
            "time": duration(report["seconds"]),
            "fallbacks": f"in {report['fallbacks']} layers" if report["fallbacks"] else "none",
        }
    )


def show_model(tables: Tables, report: dict[str, Any]) -> None:
    """Layers and sizes of a model that qcli has not written."""
    show_layers(tables, report["layers"])
    tables.pairs(
        {
            "model": f"{report['model']} ({report['family']})",
            "commit": report["revision"],
            "quantized": report["quantized_as"],
            "bits per weight": bits(report),
            "size": size(report["bytes"]),
            **contents_in_words(report["contents"]),
            "context": None if report["context_length"] is None else f"{report['context_length']} tokens",
        }
    )


def _options(section: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value).lower()}" for key, value in section.items())
