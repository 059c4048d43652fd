"""`qcli distill`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._complete import one_of, several_of
from qcli.cli._next import after_checkpoint
from qcli.cli._out import checkpoint_name, out_of
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, duration, size
from qcli.evaluation.severity import kl_word
from qcli.utils.placement import Placement

_MEMORY_HINT = "a smaller distill.batch_tokens needs less; --scope block keeps one block in memory"


def distill(
    student: Annotated[Path, typer.Argument(metavar="STUDENT", help="Checkpoint that qcli wrote.")],
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The model it was made from: hub id, folder or .gguf file.")
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="LOSS", autocompletion=one_of(("kl", "onebit", "dad")), help="kl, onebit or dad. Default: kl."
        ),
    ] = None,
    train: Annotated[
        str | None,
        typer.Option(
            metavar="WHAT",
            autocompletion=several_of(("tables", "weights")),
            help="tables (scales, offsets, codebooks) or tables,weights. Default: tables.",
        ),
    ] = None,
    scope: Annotated[
        str | None,
        typer.Option(
            metavar="SCOPE",
            autocompletion=one_of(("model", "block")),
            help="model (all blocks together) or block (one at a time). Default: model.",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps. Default: 1000.")] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="Training text, as for `qcli quantize`. Default: the calibration text."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help="Number of sequences. Default: as for calibration, 128.")
    ] = None,
    seq_len: Annotated[
        int | None, typer.Option(metavar="L", help="Tokens per sequence. Default: as for calibration, 2048.")
    ] = None,
    bos: flags.Bos = None,
    seed: flags.Seed = None,
    device: flags.Device = None,
    dtype: flags.DType = None,
    max_memory: flags.MaxMemory = None,
    deterministic: flags.Deterministic = None,
    out: flags.OptionalOut = None,
    force: flags.Force = False,
    recipe: flags.RecipeFile = None,
    set_: flags.Sets = None,
    resume: flags.Resume = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and report what would be trained.")] = False,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Distill the original model into a quantized one.

    Trains the quantized model to match the predictions of the original. Options without a flag:
    --set distill.NAME=VALUE; `qcli recipe schema` lists them. On several GPUs:
    torchrun --nproc-per-node N -m qcli distill ...
    """
    with Session(
        json=json, quiet=quiet, verbose=verbose, resumable=True, distributed=True, memory_hint=_MEMORY_HINT
    ) as session:
        from qcli.recipe.load import load_recipe
        from qcli.utils.trust import Trust

        given = flags.recipe_fields(
            model=teacher,
            seed=seed,
            bos=bos,
            device=device,
            dtype=dtype,
            max_memory=max_memory,
            deterministic=deterministic,
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
        resolved = load_recipe(recipe, given, set_ or (), model_by="--teacher")
        trust = Trust(remote_code=trust_remote_code)
        if dry_run:
            from qcli.distillation.plan import plan_distillation

            session.result(plan_distillation(student, resolved, trust).to_json(), show_plan)
            return
        from qcli.distillation.distill import distill as run
        from qcli.distillation.plan import open_pair

        name = f"{checkpoint_name(student)}-distilled"
        out = out_of(session, resolved.out, name, lambda: open_pair(student, resolved.source, trust))
        result = run(student, resolved, out, session.progress, trust=trust, force=force)
        session.result(result.to_json(), show_distilled)
        session.suggest(lambda: after_checkpoint(out, resolved.source, trust))


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """What `--dry-run` reports."""
    tables.pairs(
        {
            "teacher": plan["teacher"],
            "layers": plan["layers"],
            "trained": f"{plan['trained']:,} parameters, for {plan['weights']:,} weights",
            "tokens": f"{plan['tokens']:,}",
            "peak memory": Placement(**plan["memory"]).in_words(),
        }
    )


def show_distilled(tables: Tables, result: dict[str, Any]) -> None:
    """Loss before and after, and where the checkpoint is."""
    outcome = result["outcome"]
    tables.pairs(
        {
            "written": result["out"],
            "teacher": result["teacher"],
            f"held-out {result['measure']}": f"{outcome['before']:.4f} -> {outcome['after']:.4f}"
            f" ({kl_word(outcome['after'])})",
            "best step": f"{outcome['best_step']} of {outcome['steps']}"
            if outcome["best_step"]
            else "none: the initial weights are kept",
            "stopped": outcome["stopped"],
            "curve": result["plot"] or "none: needs matplotlib (pip install matplotlib)",
            "bits per weight": f"{result['bits_per_weight']:.3f}",
            "size": size(result["bytes"]),
            "time": duration(result["seconds"]),
            "peak memory": ", ".join(f"{size(used)} {kind}" for kind, used in result["peak_memory"].items()) or None,
        }
    )
