"""`qcli distill`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, duration, size
from qcli.utils.errors import UsageError

_MEMORY_HINT = "a smaller distill.batch_tokens takes less; --scope block has one block in memory"


def distill(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Checkpoint that qcli wrote.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="What it was made from: hub id, folder or .gguf file.")
    ] = None,
    loss: Annotated[str | None, typer.Option(metavar="LOSS", help="kl, onebit or dad. Default: kl.")] = None,
    train: Annotated[
        str | None, typer.Option(metavar="WHAT", help="tables, or tables,weights. Default: tables.")
    ] = None,
    scope: Annotated[
        str | None, typer.Option(metavar="SCOPE", help="model, or block: one at a time. Default: model.")
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps. Default: 1000.")] = None,
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
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and tell what would be trained.")] = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Tune a quantized model as a whole against the original.

    Options that have no flag are set as --set distill.NAME=VALUE; `qcli recipe schema` lists them. Several GPUs:
    torchrun --nproc-per-node N -m qcli distill ...
    """
    with Session(
        json=json, quiet=quiet, verbose=verbose, resumable=True, distributed=True, memory_hint=_MEMORY_HINT
    ) as session:
        from qcli.recipe.load import load_recipe

        given = flags.recipe_fields(
            model=teacher,
            seed=seed,
            device=device,
            dtype=dtype,
            out=out,
        ) | {
            "distill.data": data,
            "distill.samples": samples,
            "distill.seq_len": seq_len,
            "distill.loss": loss,
            "distill.train": None if train is None else train.split(","),
            "distill.scope": scope,
            "distill.steps": steps,
            "resume": resume,
        }
        resolved, _ = load_recipe(recipe, given, set_ or ())
        if dry_run:
            from qcli.distillation.plan import intend

            session.result(intend(student, resolved).to_json(), show_intended)
            return
        if resolved.out is None:
            raise UsageError("--out: required", hint="name the folder of the result, or look first with --dry-run")
        from qcli.distillation.distill import distill as run

        session.result(run(student, resolved, Path(resolved.out), session.progress).to_json(), show_distilled)


def show_intended(tables: Tables, found: dict[str, Any]) -> None:
    """What `--dry-run` found."""
    memory = "one block's at a time" if found["memory"] is None else f"at least {size(found['memory'])}"
    tables.pairs(
        {
            "taught by": found["teacher"],
            "layers": found["layers"],
            "trained": f"{found['trained']:,} numbers, for {found['weights']:,} weights",
            "tokens": f"{found['tokens']:,}",
            "memory": memory + (f", {size(found['free'])} are free" if found["free"] is not None else ""),
        }
    )


def show_distilled(tables: Tables, result: dict[str, Any]) -> None:
    """What was gained, and where it lies."""
    outcome = result["outcome"]
    tables.pairs(
        {
            "written": result["out"],
            "taught by": result["teacher"],
            f"held-out {result['measure']}": f"{outcome['before']:.4f} -> {outcome['after']:.4f}",
            "best step": f"{outcome['best_step']} of {outcome['steps']}"
            if outcome["best_step"]
            else "none: the student is kept as it was",
            "stopped": outcome["stopped"],
            "curve": result["plot"] or "not drawn: pip install matplotlib",
            "bits per weight": f"{result['bits_per_weight']:.3f}",
            "size": size(result["bytes"]),
            "time": duration(result["seconds"]),
            "peak memory": ", ".join(f"{size(used)} {kind}" for kind, used in result["peak_memory"].items()) or None,
        }
    )
