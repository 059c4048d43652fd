"""What a user sees of an exception: one line, a hint and an exit code; only bugs have a traceback."""

from __future__ import annotations

from typing import NamedTuple

from qcli.cli.ui.streams import label, tell
from qcli.utils.errors import OutOfMemoryError, expected
from qcli.utils.text import printable

BUG, USAGE, STATE, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 3, 130, 141, 143


class Terminated(BaseException):
    """SIGTERM arrived."""


class Description(NamedTuple):
    """What is shown of an exception: message lines, a hint, the exit code."""

    message: str
    hint: str | None
    exit_code: int


def describe(error: BaseException, *, resumable: bool = False, memory_hint: str | None = None) -> Description:
    """Describe an exception to the user.

    Args:
        resumable: whether the same command continues an interrupted run.
        memory_hint: how this command can do with less memory.
    """
    if isinstance(error, KeyboardInterrupt | Terminated):
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return Description("interrupted" + ("; resume with the same command" if resumable else ""), None, code)
    if isinstance(error, BrokenPipeError):
        return Description("", None, BROKEN_PIPE)
    problem = expected(error)
    if isinstance(problem, OutOfMemoryError):
        return Description(problem.message, memory_hint, problem.exit_code)
    if problem is not None:
        return Description(problem.message, problem.hint, problem.exit_code)
    text = str(error).strip()
    summary = printable(text.splitlines()[0]) if text else ""
    return Description(f"{type(error).__name__}: {summary}", "this is a bug; run with -vv for the traceback", BUG)


def show_error(message: str, hint: str | None = None) -> None:
    """Print an `error:` line for each line of `message`, then the hint, to stderr."""
    for line in message.split("\n") if message else ():
        tell(f"{label('error')} {printable(line)}")
    if hint:
        tell(f"{label('hint')} {printable(hint)}")
