"""The errors a user may see, each with the exit code the shell receives.

Everything else that escapes is a bug (exit code 1) and keeps its traceback.
"""

from __future__ import annotations


class QcliError(Exception):
    """A problem the user can act on: one line, where it is, and a hint.

    Args:
        message: what is wrong and where (`recipe.yaml:6:10: ...`, a file, a tensor name).
        hint: what to do about it; shown after the message.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(QcliError):
    """Wrong flags, recipe, model or data: nothing has been started."""

    exit_code = 2


class StateError(QcliError):
    """The output exists, or what is there belongs to another run."""

    exit_code = 3


class VerificationError(QcliError):
    """A checkpoint is not what it claims to be."""

    exit_code = 4


class ResourceError(QcliError):
    """Out of memory or disk."""

    exit_code = 5


class UnsupportedError(QcliError):
    """A missing optional dependency, or a model or target qcli does not handle."""

    exit_code = 6
