"""`qcli pack`."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._complete import one_of
from qcli.cli._next import after_packing
from qcli.cli._out import checkpoint_name, model_name, out_of
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, size
from qcli.utils.errors import UsageError
from qcli.utils.registry import names

if TYPE_CHECKING:
    from qcli.utils.trust import Trust

FORMATS = names("qcli.export.targets")


def pack(
    run: Annotated[
        Path,
        typer.Argument(
            metavar="RUN",
            help="Folder of `qcli quantize` or `qcli distill`; with --type, a model that is not quantized.",
        ),
    ],
    out: flags.OptionalOut = None,
    force: flags.Force = False,
    format: Annotated[
        str, typer.Option(metavar="F", autocompletion=one_of(FORMATS), help=f"{', '.join(FORMATS)}.")
    ] = "qcli",
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest size of a weight file, such as 500MB or 5GB.")
    ] = "5GB",
    requantize: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="gguf: round layers that no type stores exactly to this type, such as Q8_0. Default: refuse them.",
        ),
    ] = None,
    type: Annotated[
        str | None,
        typer.Option(
            "--type",
            metavar="TYPE",
            help="gguf: quantize a model with llama.cpp's K-quants, such as Q4_K_M. Needs llama-cpp-python.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="--type: folder of `qcli calibrate` on the model, from which importance is taken."
        ),
    ] = None,
    allow_refused: Annotated[
        bool,
        typer.Option("--allow-refused", help="Write also what an engine that the format is meant for does not load."),
    ] = False,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output of `qcli eval RUN --json`, for the model card."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and report what would be written.")] = False,
    trust_remote_code: flags.TrustRemoteCode = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Write a deployable checkpoint and read it back.

    Every weight and the logits of one batch are compared. Layers that the format cannot store exactly, and checkpoints
    that its engines do not load, are refused before any work. The folder also gets a manifest for `qcli verify` and a
    model card."""
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.evaluation.results import read_evaluation
        from qcli.export.pack import pack as pack_checkpoint
        from qcli.export.pack import plan_pack
        from qcli.models.open import open_source
        from qcli.recipe.load import from_flags
        from qcli.recipe.sections import Pack
        from qcli.utils.trust import Trust

        given = {"format": format, "shard_size": shard_size, "requantize": requantize, "allow_refused": allow_refused}
        options, trust = from_flags(Pack, given), Trust(remote_code=trust_remote_code)
        if type is not None or statistics is not None:
            others = {"--requantize": requantize, "--evaluation": evaluation, "--allow-refused": allow_refused or None}
            _require_k_quants(options.format, type, [flag for flag, value in others.items() if value is not None])
            _k_quants(session, run, out, str(type), statistics, trust, dry_run=dry_run, force=force)
            return
        results = None if evaluation is None else read_evaluation(evaluation, run)
        if dry_run:
            plan = plan_pack(
                run,
                format=options.format,
                requantize=options.requantize,
                allow_refused=options.allow_refused,
                trust=trust,
            )
            session.result(plan.to_json(), show_plan)
            return
        name = f"{checkpoint_name(run)}-{options.format}"
        out = out_of(session, out, name, lambda: open_source(str(run), trust))
        result = pack_checkpoint(
            run,
            out,
            format=options.format,
            shard_size=options.shard_bytes,
            requantize=options.requantize,
            allow_refused=options.allow_refused,
            evaluation=results,
            progress=session.progress,
            trust=trust,
            force=force,
        )
        session.result(result.to_json(), show_packed)
        session.suggest(lambda: after_packing(out, result.loading, trust))


def _require_k_quants(format: str, type: str | None, others: list[str]) -> None:
    """Refuse flags that do not go together."""
    if type is None:
        raise UsageError("--statistics: importance is for K-quants alone", hint="add --type, such as --type Q4_K_M")
    if format != "gguf":
        raise UsageError(f"--type: format {format} has no K-quants", hint="add --format gguf")
    if others:
        raise UsageError(f"{others[0]}: not with --type", hint=f"leave out {others[0]}, or --type")


def _k_quants(
    session: Session,
    model: Path,
    out: Path | None,
    type: str,
    statistics: Path | None,
    trust: "Trust",
    *,
    dry_run: bool,
    force: bool,
) -> None:
    from qcli.export.gguf.llama_quantize import require_type

    type = require_type(type)
    from qcli.export.k_quants import pack_k_quants, plan_k_quants
    from qcli.models.open import open_source

    if dry_run:
        plan = plan_k_quants(str(model), type=type, statistics=statistics, trust=trust)
        session.result(plan.to_json(), show_plan)
        return
    result = pack_k_quants(
        str(model),
        out_of(session, out, f"{model_name(str(model))}-{type.lower()}", lambda: open_source(str(model), trust)),
        type=type,
        statistics=statistics,
        progress=session.progress,
        trust=trust,
        force=force,
    )
    session.result(result.to_json(), show_packed)
    session.suggest(lambda: after_packing(result.out, result.loading, trust))


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """What `--dry-run` reports."""
    tables.pairs(
        {
            "checkpoint": plan["run"],
            "format": plan["format"],
            "layers": f"{plan['layers']}" + (f", {plan['rounded']} of them rounded" if plan["rounded"] else ""),
            **plan["notes"],
        }
    )


def show_packed(tables: Tables, packed: dict[str, Any]) -> None:
    """What was written, and the differences to the quantized checkpoint."""
    from qcli.export.result import Proof

    files = f"{packed['files']} file{'s' if packed['files'] > 1 else ''}"
    equal = f"all weights equal except in {packed['rounded']} layers" if packed["rounded"] else "weights equal"
    tables.pairs(
        {
            "packed": packed["out"],
            "format": packed["format"],
            "size": f"{size(packed['bytes'])} in {files}",
            "read back": f"{equal}; logits differ by at most {packed['max_logit_difference']:.3g}, "
            f"KL {packed['kl']:.3g}",
            "run in": Proof(**packed["proof"]).described(),
            **packed["notes"],
            "upload": shlex.join(["hf", "upload", f"YOUR-NAME/{Path(packed['out']).resolve().name}", packed["out"]]),
        }
    )
