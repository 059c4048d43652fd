"""Every exception is one line, a hint and an exit code."""

from __future__ import annotations

import errno

import pytest

from qcli.cli.ui.errors import Terminated, describe
from qcli.utils.errors import StateError, UnsupportedError, UsageError


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (StateError("there"), 3, "there"),
        (UnsupportedError("gone"), 6, "gone"),
        (KeyboardInterrupt(), 130, "interrupted; resume with the same command"),
        (Terminated(), 143, "interrupted; resume with the same command"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 5, "disk full: /out/x"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, "disk full"),
        (MemoryError(), 5, "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), 5, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 5, "out of memory"),
        (PermissionError(errno.EACCES, "Permission denied", "/root"), 2, "/root: Permission denied"),
        (ValueError("some\nlines"), 1, "ValueError: some"),
        (KeyError(), 1, "KeyError: "),
    ],
)
def test_errors_have_one_line_and_their_code(error: BaseException, code: int, message: str) -> None:
    description = describe(error, resumable=True)
    assert (description.message, description.exit_code) == (message, code)
