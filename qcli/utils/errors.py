"""Errors that users may see, each with its exit code. Any other exception is a bug (exit code 1)."""

from __future__ import annotations

import errno
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

from qcli.utils.text import printable


class QcliError(Exception):
    """One or several problems that the user can act on.

    Args:
        problems: what is wrong and where (`recipe.yaml:6:10: ...`, a file, a tensor name); a line each.
        hint: what to do about it; shown below the message.

    Attributes:
        message: the problems, printable, a line each.
    """

    exit_code = 1

    def __init__(self, *problems: str, hint: str | None = None) -> None:
        super().__init__(*problems)
        self.message = "\n".join(map(printable, problems))
        self.hint = None if hint is None else printable(hint)

    def __str__(self) -> str:
        return self.message


class UsageError(QcliError):
    """Invalid flags, recipe, model or data."""

    exit_code = 2


class StateError(QcliError):
    """The output exists, is in use, or belongs to another run."""

    exit_code = 3


class VerificationError(QcliError):
    """A checkpoint is damaged or inconsistent."""

    exit_code = 4


class ResourceError(QcliError):
    """Memory, disk space or devices do not suffice."""

    exit_code = 5


class OutOfMemoryError(ResourceError):
    """Memory of the machine or of a GPU does not suffice."""


class UnsupportedError(QcliError):
    """An optional dependency is missing, or qcli does not support the model or target."""

    exit_code = 6


class QcliWarning(UserWarning):
    """Something the user should know that does not affect the result."""


def warn(message: str) -> None:
    """Issue a `QcliWarning`; the command line prints it as one line."""
    warnings.warn(message, QcliWarning, stacklevel=2)


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_HINTS = dict.fromkeys(_DISK_FULL, "free some space and run the same command again") | {
    errno.EIO: "the disk, or the connection to it, may be failing",
    errno.EMFILE: "allow this process more open files: `ulimit -n`",
    errno.ENFILE: "the machine has too many open files: end other programs",
    errno.EFBIG: "a limit of the file system or of `ulimit -f` is reached",
}
RESOURCE_ERRNOS = frozenset(_HINTS)
"""Shortages and failures of the system."""
PATH_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.EEXIST,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENOTEMPTY,
        errno.ENAMETOOLONG,
        errno.ELOOP,
    }
)
"""Faults of the path itself."""


def os_problem(error: OSError, what: str | Path) -> QcliError:
    """Convert an error of the operating system.

    Args:
        what: the path, perhaps with what failed: `FILE cannot be written`.

    Returns:
        A UsageError if the path is at fault, otherwise a ResourceError.
    """
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in PATH_ERRNOS:
        return UsageError(f"{what}: {reason}")
    return ResourceError(f"{what}: {reason}", hint=_HINTS.get(error.errno or 0))


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "Cannot allocate memory", "not enough memory")
_WRAPPED_ERRNO = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # as Rust and Python print them


def expected(error: BaseException) -> QcliError | None:
    """The QcliError that describes an exception; None if the exception is a bug of qcli.

    Shortages of memory, disk or files are recognized even where a library has wrapped them or failed because of them.
    """
    if isinstance(error, QcliError):
        return error
    for cause in _causes(error):
        if isinstance(cause, QcliError):
            continue
        text = str(cause)
        if isinstance(cause, MemoryError) or (
            isinstance(cause, RuntimeError | OSError) and any(words in text for words in _OUT_OF_MEMORY)
        ):
            return OutOfMemoryError("out of memory")
        number = _errno(cause, text)
        if number in RESOURCE_ERRNOS:
            return os_problem(OSError(number, os.strerror(number)), _place(cause))
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
        return os_problem(error, _place(error))
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, then its cause or context, and so on."""
    cause: BaseException | None = error
    seen: set[int] = set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _errno(error: BaseException, text: str) -> int:
    """The system's error number; 0: none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if match := _WRAPPED_ERRNO.search(text):
        return int(match[1] or match[2])
    return next((number for number in RESOURCE_ERRNOS if os.strerror(number) in text), 0)


def _place(error: BaseException) -> str:
    """The path in the error, if there is one."""
    filename = getattr(error, "filename", None)
    return "a file cannot be read or written" if filename is None else str(filename)
