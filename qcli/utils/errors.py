"""Errors that users may see, each with its exit code. Any other exception is a bug (exit code 1)."""

from __future__ import annotations


class QcliError(Exception):
    """A problem that the user can act on.

    Args:
        message: what is wrong and where (`recipe.yaml:6:10: ...`, a file, a tensor name); one line per problem.
        hint: what to do about it; shown below the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


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


class UnsupportedError(QcliError):
    """An optional dependency is missing, or qcli does not support the model or target."""

    exit_code = 6
