"""`qcli quantize`."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._layers import show_layers
from qcli.errors import UsageError
from qcli.registry import names
from qcli.ui import Session, Tables, bits, duration, size


def quantize(
    model: flags.OptionalModel = None,
    method: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"{', '.join(names('qcli.methods'))}. Default: gptq-like.")
    ] = None,
    bits: Annotated[int | None, typer.Option(metavar="B", help="Bits of a weight's code. Default: 4.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(metavar="G", help="Weights that share a scale; -1: the whole row. Default: 64."),
    ] = None,
    symmetric: Annotated[
        bool | None,
        typer.Option("--symmetric/--asymmetric", help="Without or with zero points. Default: asymmetric."),
    ] = None,
    group_tail: Annotated[
        str | None,
        typer.Option(metavar="HOW", help="Rows that the group size does not divide: error or ragged. Default: error."),
    ] = None,
    data: flags.Data = None,
    samples: flags.Samples = None,
    seq_len: flags.SeqLen = None,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.DType = None,
    out: flags.OptionalOut = None,
    recipe: flags.RecipeFile = None,
    set_: flags.Sets = None,
    resume: flags.Resume = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done, from the model's headers.")
    ] = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Quantize a model block by block; the result loads at once.

    Flags win over --set, --set wins over --recipe. Options that only one method has are set as
    --set method.NAME=VALUE; `qcli recipe schema` lists them.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, resumable=True) as session:
        from qcli.recipe_loading import load_recipe

        given = flags.recipe_fields(
            model=model,
            data=data,
            samples=samples,
            seq_len=seq_len,
            seed=seed,
            device=device,
            dtype=dtype,
            out=out,
        ) | {
            "method.name": method,
            "method.bits": bits,
            "method.group_size": group_size,
            "method.group_tail": group_tail,
            "method.symmetric": symmetric,
            "resume": resume,
        }
        resolved, _ = load_recipe(recipe, given, set_ or ())
        if not dry_run and resolved.out is None:
            raise UsageError("--out: required", hint="name the folder of the result, or look first with --dry-run")
        if dry_run:
            from qcli.plan import plan

            session.result(plan(resolved).to_json(), show_plan)
        else:
            from qcli.quantize import quantize as run

            session.result(run(resolved, session.progress).to_json(), show_result)


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """What `--dry-run` found."""
    show_layers(tables, plan["layers"])
    tables.pairs(
        {
            "bits per weight": bits(plan),
            "size": f"{size(plan['bytes'])} ({plan['bytes']} bytes; now {size(plan['source_bytes'])})",
            "peak memory": f"about {size(plan['peak_memory_estimate'])}",
            "calibration": "yes" if plan["calibrated"] else "not needed",
            "not transformed": _unscaled(plan["unscaled"]),
            "outside blocks": f"{len(plan['outside'])} tensors stay as they are",
        }
    )


def show_result(tables: Tables, result: dict[str, Any]) -> None:
    """What was written, and how well it fits."""
    show_layers(tables, [{**layer, **layer["spec"], **layer["facts"]} for layer in result["layers"]])
    peak = ", ".join(f"{size(used)} {kind}" for kind, used in result["peak_memory"].items())
    tables.pairs(
        {
            "written": result["out"],
            "bits per weight": bits(result),
            "size": f"{size(result['bytes'])} (was {size(result['source_bytes'])})",
            "time": duration(result["seconds"]),
            "peak memory": peak,
            "resumed": f"{result['resumed_blocks']} blocks" if result["resumed_blocks"] else None,
            "stayed dense": f"{len(result['dense'])} layers, by override" if result["dense"] else None,
            "not transformed": _unscaled(result["unscaled"]),
            "fallbacks": len(result["fallbacks"]) or "none",
        }
        | trained(result["training"])
    )
    for name, steps in result["fallbacks"].items():
        tables.line(f"  {name}: {'; '.join(steps)}")


def _unscaled(paths: Sequence[str]) -> str | None:
    """Layers that transforms cannot reach."""
    return f"{', '.join(paths)}: nothing before them can take the inverse of a scale" if paths else None


def trained(training: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A line for each kind of training: held-out losses, averaged over blocks."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for what, outcome in training.items():
        kinds.setdefault(what.split()[2], []).append(outcome)
    lines = {}
    for kind, outcomes in kinds.items():
        before, after = (sum(outcome[key] for outcome in outcomes) / len(outcomes) for key in ("before", "after"))
        kept = sum(outcome["best_step"] == 0 for outcome in outcomes)
        lines[kind] = f"held-out loss {before:.3g} -> {after:.3g}" + (
            f"; {kept} of {len(outcomes)} kept as they were" if kept else ""
        )
    return lines
