"""`qcli run`: every stage a recipe names."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._next import after_checkpoint, after_packing
from qcli.cli._out import out_of, quantized_name
from qcli.cli.distill import show_distilled
from qcli.cli.eval import show_evaluation, show_gates
from qcli.cli.pack import show_packed
from qcli.cli.quantize import report_plan, show_plan, show_result
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Output folder; finished stages in it are skipped. Default: named after model, method and bits.",
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace results that were made with other settings, each once the new one is complete; start such an "
            "unfinished one over.",
        ),
    ] = False,
    device: flags.Device = None,
    max_memory: flags.MaxMemory = None,
    deterministic: flags.Deterministic = None,
    set_: flags.Sets = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check every stage, and show what would be quantized and made.")
    ] = False,
    trust_remote_code: flags.TrustRemoteCode = False,
    trust_tasks: flags.TrustTasks = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Run all stages of a recipe.

    Quantizes, then distills, evaluates and packs if the recipe has these sections. Results are DIR/quantized,
    DIR/distilled, DIR/eval.json and DIR/packed; finished stages are skipped. Texts that are missing or too short, and
    methods that the packed layout cannot hold or its engines do not load, are reported before anything is quantized.
    If a quality gate fails, nothing is packed and the exit code is 4. On several GPUs, which share all but evaluation:
    torchrun --nproc-per-node N -m qcli run ...
    """
    with (
        Session(json=json, quiet=quiet, verbose=verbose, resumable=True, distributed=True) as session,
        contextlib.ExitStack() as stack,
    ):
        from qcli.recipe.gates import require
        from qcli.recipe.load import load_recipe
        from qcli.utils.cache import Cache, default_folder

        given = flags.recipe_fields(device=device, max_memory=max_memory, deterministic=deterministic, out=out)
        resolved = load_recipe(recipe, given, set_ or ())
        from qcli.quantization.plan import require_fit
        from qcli.utils.trust import Trust

        trust = Trust(remote_code=trust_remote_code, tasks=trust_tasks)
        require_fit(resolved, trust)
        from qcli.models.open import open_source
        from qcli.pipeline.stages import Pipeline
        from qcli.utils.device import local_device
        from qcli.utils.distributed import process_group

        pipeline = Pipeline(
            resolved,
            out_of(
                session, resolved.out, f"{quantized_name(resolved)}-run", lambda: open_source(resolved.source, trust)
            ),
            cache=Cache(default_folder()),
            progress=session.progress,
            skip=lambda result: session.note(f"{result}: done already, skipped"),
            trust=trust,
            processes=stack.enter_context(process_group(local_device(resolved.device))),
            force=force,
        )
        if dry_run:
            pipeline.check()
            report_plan(session, pipeline.plan, show_run, stages=pipeline.stages)
            return
        result = pipeline.run()
        gates = None if resolved.eval is None else resolved.eval.gates
        report = result.to_json()
        if gates is not None and result.evaluation is not None:
            report["gates"] = [verdict.to_json() for verdict in gates.verdicts(result.evaluation)]
        session.result(report, show)
        if result.evaluation is not None:
            require(gates, [result.evaluation])
        if (packed := result.packed) is not None:
            session.suggest(lambda: after_packing(packed.out, packed.loading, trust))
        else:
            baseline = resolved.source if resolved.eval is None else None
            session.suggest(lambda: after_checkpoint(pipeline.model, baseline, trust))


def show_run(tables: Tables, plan: dict[str, Any]) -> None:
    """What `--dry-run` reports: the plan of the quantization, and what would become of every result."""
    show_plan(tables, plan)
    tables.pairs({f"result {name}": what for name, what in plan["stages"].items()})


def show(tables: Tables, results: dict[str, Any]) -> None:
    """The result of each stage."""
    if "quantized" in results:
        show_result(tables, results["quantized"])
    if "distilled" in results:
        show_distilled(tables, results["distilled"])
    if "eval" in results:
        show_evaluation(tables, results["eval"])
    if "gates" in results:
        show_gates(tables, results["gates"])
    if "packed" in results:
        show_packed(tables, results["packed"])
    if results["skipped"]:
        tables.line(f"done before: {', '.join(results['skipped'])}")
