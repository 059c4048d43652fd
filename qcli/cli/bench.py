"""`qcli bench`: speed and memory of models and of single layers."""

from functools import partial
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._plot import Plot, require_plot, write_plot
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size
from qcli.utils.errors import UsageError


def bench(
    model: flags.Model,
    baseline: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Measure this model in turns with it, such as the original.")
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,N", help="Sequences at once; one or several numbers.")] = "1",
    context: Annotated[
        str | None, typer.Option(metavar="N,N", help="Tokens before the new ones; one or several. Default: 128.")
    ] = None,
    new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=2, help="Tokens to decode after each context. Default: 32.")
    ] = None,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="Repetitions; medians are reported.")] = 5,
    layers: Annotated[
        bool,
        typer.Option(
            "--layers", help="Measure single packed layers in place of the model, each shape and format once."
        ),
    ] = False,
    plot: Plot = None,
    device: flags.RunDevice = "auto",
    dtype: flags.RunDType = "auto",
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Measure tokens per second, time to the first token, and memory.

    With a baseline both models are in memory and take turns, and the ratios are medians of those of each round. Memory
    is that of a process of its own. Layers are measured beside bf16 of the same shape and the speed of copying memory.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, memory_hint="without --baseline it takes less") as session:
        batches, contexts = _numbers("batch", batch), _numbers("context", context or "128")
        if layers:
            only_models = {"baseline": baseline, "context": context, "new-tokens": new_tokens, "plot": plot}
            for flag, given in only_models.items():
                if given is not None:
                    raise UsageError(f"--{flag} is of whole models, --layers of layers", hint="leave one of them out")
        require_plot(plot)
        from qcli.inference.bench import BenchOptions
        from qcli.utils.trust import Trust

        trust = Trust(remote_code=trust_remote_code)
        options = BenchOptions(batches, contexts, new_tokens or 32, rounds, device, dtype, trust)
        if layers:
            from qcli.inference.bench_layers import bench_layers

            session.result(bench_layers(model, options, session.progress), show_layers)
            return
        from qcli.inference.bench import bench as bench_models

        result = bench_models(model, baseline, options, session.progress)
        if plot is not None:
            from qcli.inference.bench_plot import plot_speeds

            write_plot(plot, session, partial(plot_speeds, result))
        session.result(result, show_models)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(number) for number in text.split(","))
    except ValueError:
        numbers = (0,)
    if min(numbers) < 1:
        raise UsageError(f"--{flag}: {text!r} is not a list of positive numbers", hint=f"for example --{flag} 1,4")
    return tuple(dict.fromkeys(numbers))


def show_models(tables: Tables, result: dict[str, Any]) -> None:
    """Speeds by batch size and context, then memory, then the circumstances."""
    compared = result["baseline"] is not None
    measures = {
        "decode_tokens_per_second": "decode tokens/s",
        "prefill_tokens_per_second": "prefill tokens/s",
        "first_token_seconds": "first token, s",
    }
    columns = ["batch", "context"]
    for label in measures.values():
        columns += [label, *(["baseline", "ratio"] if compared else [])]
    rows = []
    for point in result["points"]:
        arms = ("model", "baseline", "ratio") if compared else ("model",)
        rows.append(
            [point["batch"], point["context"], *(_rate(point[arm][measure]) for measure in measures for arm in arms)]
        )
    tables.table(columns, rows)
    shown = [held for held in (result["model"], result["baseline"]) if held is not None]
    kinds = list(shown[0]["peak"]["run"])
    tables.table(
        ["model", "weights", *(f"peak {kind}" for kind in kinds), "load, s", "backends"],
        [
            [
                held["name"],
                size(held["tensors"]),
                *(size(held["peak"]["run"][kind]) for kind in kinds),
                held["load_seconds"],
                ", ".join(f"{name} ({count})" for name, count in held["backends"].items()) or None,
            ]
            for held in shown
        ],
    )
    _show_setting(tables, result)


def show_layers(tables: Tables, result: dict[str, Any]) -> None:
    """A row for each kind of layer and batch size; below, why faster backends do not serve them."""
    tables.table(
        ("out, in", "format", "layers", "batch", "backend", "us", "GB/s", "of copy", "bf16 us", "ratio"),
        [
            (
                ", ".join(map(str, row["shape"])),
                _format(row["format"]),
                row["layers"],
                row["batch"],
                row["backend"],
                _rate(row["microseconds"]),
                row["gigabytes_per_second"],
                row["share_of_copy"],
                _rate(row["bf16_microseconds"]),
                row["ratio"],
            )
            for row in result["layers"]
        ],
    )
    reasons = [(name, reason) for row in result["layers"] for name, reason in row["why_no_other"].items()]
    for name, reason in dict.fromkeys(reasons):
        tables.line(f"not {name}: {reason}")
    tables.line(f"copying memory: {result['copy_gigabytes_per_second']:.1f} GB/s, reads and writes together")
    _show_setting(tables, result)


def _format(spec: dict[str, Any]) -> str:
    inner = spec.get("base", spec)
    names = [spec["format"]] if inner is spec else [spec["format"], inner["format"]]
    return ", ".join([*names, *(f"{key} {inner[key]}" for key in ("bits", "group_size") if key in inner)])


def _rate(value: float) -> float:
    """A speed without digits that mean nothing."""
    return round(value) if value >= 100 else value


def _show_setting(tables: Tables, result: dict[str, Any]) -> None:
    load = " to ".join("?" if value is None else f"{value:.1f}" for value in result["load_average"])
    tables.line(
        f"{result['device']} ({result['device_name']}), {result['dtype']}, {result['threads']} threads; medians of "
        f"{result['rounds']} rounds, load average {load}"
    )
