"""Errors that users may see, each with its exit code. Any other exception is a bug (exit code 1)."""

from __future__ import annotations

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


class UnsupportedError(QcliError):
    """An optional dependency is missing, or qcli does not support the model or target."""

    exit_code = 6
