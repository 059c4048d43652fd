"""The `qcli` program: its commands, and how usage errors are reported."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from qcli.cli import (
    bench,
    calibrate,
    distill,
    doctor,
    eval,
    generate,
    inspect,
    pack,
    quantize,
    recipe,
    run,
    study,
    verify,
)
from qcli.cli._command import Command
from qcli.cli.ui.errors import BROKEN_PIPE, TERMINATED, USAGE, Terminated, show_error
from qcli.cli.ui.streams import abandon_stdout, open_closed_streams, tell
from qcli.utils.lean import import_little
from qcli.utils.paths import expanded
from qcli.utils.text import printable

_INSTALL = "--install-completion"
_NAMED = "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"  # where it is set, typer has the shell named
_HELP = "Quantize language models to 1-8 bits per weight, evaluate and pack them."

app = typer.Typer(
    name="qcli",
    help=_HELP,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(requested: bool) -> None:
    if requested:
        from qcli import __version__

        print(f"qcli {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True, help=_HELP)
def qcli(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("calibrate", cls=Command)(calibrate.calibrate)
app.command("quantize", cls=Command)(quantize.quantize)
app.command("distill", cls=Command)(distill.distill)
app.command("eval", cls=Command)(eval.evaluate)
app.command("pack", cls=Command)(pack.pack)
app.command("generate", cls=Command)(generate.generate)
app.command("bench", cls=Command)(bench.bench)
app.command("run", cls=Command)(run.run)
app.command("inspect", cls=Command)(inspect.inspect)
app.command("verify", cls=Command)(verify.verify)
app.add_typer(recipe.app, name="recipe")
app.add_typer(study.app, name="study")
app.command("doctor", cls=Command)(doctor.doctor)


def _expanded(argument: str) -> str:
    """An argument with the `~` that shells leave alone, as in `--out=~/model`, in full."""
    flag, equals, value = argument.rpartition("=") if argument.startswith("--") else ("", "", argument)
    return f"{flag}{equals}{expanded(value)}"


def _start_files() -> set[tuple[str, int]]:
    """The files that shells start with, and when they were written."""
    files = (Path.home() / name for name in (".bashrc", ".zshrc"))
    return {(str(file), file.stat().st_mtime_ns) for file in files if file.is_file()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its code."""
    given = sys.argv[1:] if arguments is None else arguments
    open_closed_streams()
    import_little()
    before = _start_files() if [*given[:1]] == [_INSTALL] else None
    if before is not None and len(given) > 1 and _NAMED not in os.environ:
        show_error(f"{_INSTALL} takes no argument: it is for the shell that runs it")
        sys.exit(USAGE)
    try:
        code = app(args=list(map(_expanded, given)), prog_name="qcli", standalone_mode=False)
        sys.stdout.flush()
    except typer.TyperException as error:
        context = getattr(error, "ctx", None)
        name = context.command_path if context else "qcli"
        show_error(printable(error.format_message()), hint=f"see `{name} --help`")
        sys.exit(error.exit_code)
    except Terminated:  # before a session had begun, or after its end
        tell("interrupted")
        sys.exit(TERMINATED)
    except BrokenPipeError:
        abandon_stdout()
        sys.exit(BROKEN_PIPE)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # typer makes it exit code 1
            abandon_stdout()
            sys.exit(BROKEN_PIPE)
        for file in sorted(_start_files() - before) if before is not None else ():
            tell(f"{file[0]} was edited: new shells load the completion")
        raise
    sys.exit(code if isinstance(code, int) else 0)
