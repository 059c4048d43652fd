"""`qcli study`."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from qcli.cli import _flags as flags
from qcli.cli._command import Command, Group
from qcli.cli._complete import one_of
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, duration, size
from qcli.utils.errors import UsageError

LIMIT = 100  # more runs than that need --yes


class RunOrReport(Group):
    """A group whose first argument may also be the file of a study."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`study FILE` is `study run FILE`."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["run", *args])


app = typer.Typer(cls=RunOrReport)


@app.callback(invoke_without_command=True, short_help="Run grids of recipes and report on them.")
def study(context: typer.Context) -> None:
    """Run grids of recipes and report on them.

    \b
    qcli study STUDY.yaml --dry-run    show the runs and their cost
    qcli study STUDY.yaml --out DIR    run whatever is missing; in full: qcli study run STUDY.yaml
    qcli study report DIR              write tables, plots and recommended recipes
    """
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("run", cls=Command)
def run(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="Study file with base, names, grid, include and exclude.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a field of the base recipe, as in model=PATH; may be repeated."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the rows; an existing one is continued.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Number of parallel runs.")] = 1,
    executor: Annotated[
        str,
        typer.Option(
            metavar="WHERE", autocompletion=one_of(("local", "ray")), help="Where runs execute: local or ray."
        ),
    ] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Address of a Ray cluster. Default: start one on this machine.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Retry failed runs.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with code 4 if any run has failed.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help=f"Allow more than {LIMIT} runs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and their cost, and with --out which are missing.")
    ] = False,
    trust_remote_code: flags.TrustRemoteCode = False,
    trust_tasks: flags.TrustTasks = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Run whatever a study is missing.

    Each finished run appends a row to DIR/results.jsonl. The same command continues an interrupted or extended study.
    A failed run is a row too, and the reasons are listed. If all runs fail, the exit code is theirs; with --strict it
    is 4 if any does.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, resumable=True) as session:
        from qcli.study.grid import load_study, require_size
        from qcli.study.plan import plan_study
        from qcli.study.study import run_study
        from qcli.utils.trust import Trust

        if executor not in ("local", "ray"):
            raise UsageError(f"--executor: must be local or ray, not {executor!r}")
        loaded = load_study(study, set_ or (), None if yes or dry_run else LIMIT)
        trust = Trust(remote_code=trust_remote_code, tasks=trust_tasks)
        if dry_run:
            session.result(plan_study(loaded, out, retry=retry, trust=trust).to_json(), show_plan)
            return
        if out is None:
            raise UsageError("--out: required", hint="name the folder of the rows, or check first with --dry-run")
        require_size(loaded, LIMIT, yes)
        result = run_study(
            loaded,
            out,
            workers=workers,
            executor="ray" if executor == "ray" else "local",
            address=address,
            retry=retry,
            progress=session.progress,
            trust=trust,
        )
        session.result(result.to_json(), show_result)
        result.require_success(strict=strict)
        session.suggest(lambda: [shlex.join(["qcli", "study", "report", str(out)])])


@app.command("report", cls=Command)
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a study's rows.")],
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Write the report of a study.

    DIR/report gets tables, plots and recommended recipes, as HTML and Markdown.
    """
    with Session(json=json, quiet=quiet, verbose=verbose) as session:
        from qcli.study.report import write_report

        session.result({"written": [str(file) for file in write_report(folder)]}, show_written)


def show_written(tables: Tables, result: dict[str, Any]) -> None:
    """The files of a report."""
    for file in result["written"]:
        tables.line(file)


def show_plan(tables: Tables, plan: dict[str, Any]) -> None:
    """One row per run, and the cost of all."""
    axes, runs = plan["axes"], plan["runs"]
    columns = [*axes, "bits/weight", "size", "peak memory", "status"]
    rows = [
        [
            *(_shown(run["point"].get(axis)) for axis in axes),
            *(run["bits_per_weight"], size(run["bytes"]), size(run["peak_memory_estimate"])),
            run["status"] or "-",
        ]
        for run in runs
    ]
    tables.table(columns, rows)
    missing = sum(run["status"] is None for run in runs)
    memory = max((run["peak_memory_estimate"] for run in runs), default=0)
    tables.line(f"{len(runs)} runs, {missing} missing; the largest needs {size(memory)} of memory")


def show_result(tables: Tables, result: dict[str, Any]) -> None:
    """Numbers of runs by status."""
    from qcli.study.study import RETRY

    tables.pairs(
        {
            "rows": result["out"] + "/results.jsonl",
            "done": result["done"],
            "kept": result["kept"] or None,
            "failed": f"{result['failed']}; {RETRY}" if result["failed"] else None,
            "failed before": f"{result['failed_before']}; {RETRY}" if result["failed_before"] else None,
            "time": duration(result["seconds"]),
        }
    )
    for reason, count in result["reasons"].items():
        tables.line(f"  {count} failed: {reason}")


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
