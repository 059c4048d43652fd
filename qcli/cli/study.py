"""`qcli study`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from qcli.cli import _flags as flags
from qcli.cli.ui.session import Session
from qcli.cli.ui.tables import Tables, duration, size
from qcli.utils.errors import UsageError

MOST = 100  # runs that need no --yes


class RunOrReport(TyperGroup):
    """A group whose first argument may also be the file of a study."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """`study FILE` is `study run FILE`."""
        known = args[0] in self.commands or args[0].startswith("-")
        return super().resolve_command(ctx, args if known else ["run", *args])


app = typer.Typer(
    cls=RunOrReport,
    no_args_is_help=True,
    help="Run grids of recipes and report on them.",
)


@app.command("run")
def run(
    study: Annotated[
        Path, typer.Argument(metavar="STUDY.yaml", help="Study file with base, names, grid, include and exclude.")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Set a field of the base recipe, as in model=PATH; repeatable."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the rows; an existing one is continued.")
    ] = None,
    workers: Annotated[int, typer.Option(metavar="N", min=1, help="Number of parallel runs.")] = 1,
    executor: Annotated[str, typer.Option(metavar="WHERE", help="Where runs execute: local or ray.")] = "local",
    address: Annotated[
        str | None, typer.Option(metavar="ADDR", help="Address of a Ray cluster. Default: start one on this machine.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Retry failed runs.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help=f"Allow more than {MOST} runs.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the runs and their cost, and with --out which are missing.")
    ] = False,
    json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = 0,
) -> None:
    """Run whatever a study is missing.

    Each finished run appends a row to DIR/results.jsonl. The same command continues an interrupted or extended study.
    A failed run is a row too; only if all runs fail is the exit code theirs.
    """
    with Session(json=json, quiet=quiet, verbose=verbose, resumable=True) as session:
        from qcli.study.grid import load_study
        from qcli.study.study import require_one_done, require_size, run_study

        if executor not in ("local", "ray"):
            raise UsageError(f"--executor: must be local or ray, not {executor!r}")
        found = load_study(study, set_ or (), None if yes or dry_run else MOST)
        if dry_run:
            session.result(_costs(found, out, retry), show_costs)
            return
        if out is None:
            raise UsageError("--out: required", hint="name the folder of the rows, or check first with --dry-run")
        require_size(found, MOST, yes)
        result = run_study(
            found,
            out,
            workers=workers,
            executor="ray" if executor == "ray" else "local",
            address=address,
            retry=retry,
            progress=session.progress,
        )
        session.result(result.to_json(), show_studied)
        require_one_done(result)


@app.command("report")
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


def show_written(tables: Tables, found: dict[str, Any]) -> None:
    """The files."""
    for file in found["written"]:
        tables.line(file)


def _costs(study: Any, out: Path | None, retry: bool) -> dict[str, Any]:
    from qcli.quantization.plan import make_plan
    from qcli.study.content import by_content, require_texts
    from qcli.study.rows import read_rows
    from qcli.study.study import require_tasks

    rows = []
    require_texts(study.runs)
    there = read_rows(out) if out is not None and out.exists() and any(out.iterdir()) else []
    known = {row["address"]: row["status"] for row in there if row["status"] == "done" or not retry}
    if any(run.recipe.eval and run.recipe.eval.tasks for run in study.runs):  # their check loads torch
        require_tasks(study.runs)
    for each in by_content(study.runs) if known else study.runs:
        todo = make_plan(each.recipe)
        rows.append(
            {
                "point": each.point,
                "bits_per_weight": todo.bits_per_weight,
                "bytes": todo.bytes,
                "peak_memory_estimate": todo.peak_memory,
                "status": known.get(each.address),
            }
        )
    return {"study": study.source, "axes": study.axes, "runs": rows}


def show_costs(tables: Tables, found: dict[str, Any]) -> None:
    """A row for each run."""
    axes = found["axes"]
    columns = [*axes, "bits/weight", "size", "peak memory", "there"]
    rows = [
        [
            *(_shown(each["point"].get(axis)) for axis in axes),
            *(each["bits_per_weight"], size(each["bytes"]), size(each["peak_memory_estimate"])),
            each["status"] or "-",
        ]
        for each in found["runs"]
    ]
    tables.table(columns, rows)
    missing = sum(each["status"] is None for each in found["runs"])
    most = max((each["peak_memory_estimate"] for each in found["runs"]), default=0)
    tables.line(f"{len(rows)} runs, {missing} to make, {size(most)} of memory at most for one at a time")


def show_studied(tables: Tables, found: dict[str, Any]) -> None:
    """How many rows there are."""
    from qcli.study.study import RETRY

    tables.pairs(
        {
            "rows": found["out"] + "/results.jsonl",
            "done": found["done"],
            "there before": found["kept"] or None,
            "failed": f"{found['failed']}; {RETRY}" if found["failed"] else None,
            "failed before": f"{found['failed_before']}; {RETRY}" if found["failed_before"] else None,
            "time": duration(found["seconds"]),
        }
    )


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)
