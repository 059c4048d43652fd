"""What a user sees of an exception: one line, a hint and an exit code; only bugs have a traceback."""

from __future__ import annotations

import errno
import sys
from types import FrameType
from typing import NamedTuple

from qcli.utils.errors import QcliError
from qcli.utils.text import printable

BUG, USAGE, STATE, RESOURCES, INTERRUPTED, BROKEN_PIPE, TERMINATED = 1, 2, 3, 5, 130, 141, 143

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_WRONG_PATH = (  # the user named a path that cannot be read or written
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
)
_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")


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
    text = str(error)
    if isinstance(error, QcliError):
        return Description(error.message, error.hint, error.exit_code)
    if isinstance(error, KeyboardInterrupt | Terminated):
        code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
        return Description("interrupted" + ("; resume with the same command" if resumable else ""), None, code)
    if isinstance(error, BrokenPipeError):
        return Description("", None, BROKEN_PIPE)
    if (isinstance(error, OSError) and error.errno in _DISK_FULL) or "No space left on device" in text:
        file = getattr(error, "filename", None)
        return Description(
            f"disk full{f': {printable(str(file))}' if file else ''}",
            "free some space and run the same command",
            RESOURCES,
        )
    out_of_memory = isinstance(error, RuntimeError | OSError) and any(words in text for words in _OUT_OF_MEMORY)
    if out_of_memory or isinstance(error, MemoryError):
        return Description("out of memory", memory_hint, RESOURCES)
    if isinstance(error, OSError) and error.errno in _WRONG_PATH and error.filename is not None:
        return Description(printable(f"{error.filename}: {error.strerror}"), None, USAGE)
    summary = printable(text.strip().splitlines()[0]) if text.strip() else ""
    return Description(f"{type(error).__name__}: {summary}", "this is a bug; run with -vv for the traceback", BUG)


def show_error(message: str, hint: str | None = None) -> None:
    """Print an `error:` line for each line of `message`, then the hint, to stderr."""
    for line in message.split("\n") if message else ():
        print(f"error: {printable(line)}", file=sys.stderr)
    if hint:
        print(f"hint: {printable(hint)}", file=sys.stderr)


def terminate(signum: int, frame: FrameType | None) -> None:
    """A signal handler that raises `Terminated`."""
    raise Terminated
