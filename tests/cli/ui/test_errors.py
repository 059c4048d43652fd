"""Every exception is one line, a hint and an exit code."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from qcli.cli.ui.errors import Terminated, describe, show_error
from qcli.cli.ui.session import Session
from qcli.utils.errors import PATH_ERRNOS, RESOURCE_ERRNOS, StateError, UnsupportedError, UsageError, warn

SOME = "a file cannot be read or written"


def raised(error: Exception, cause: Exception) -> Exception:
    """`error`, raised while `cause` was handled."""
    error.__context__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("wrong"), 2, "wrong"),
        (StateError("there"), 3, "there"),
        (UnsupportedError("gone"), 6, "gone"),
        (KeyboardInterrupt(), 130, "interrupted; resume with the same command"),
        (Terminated(), 143, "interrupted; resume with the same command"),
        (OSError(errno.ENOSPC, "No space left on device", "/out/x"), 5, "/out/x: No space left on device"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), 5, f"{SOME}: No space left on device"),
        (OSError("cannot load it: [Errno 24] Too many open files"), 5, f"{SOME}: Too many open files"),
        (ImportError("x.so: cannot open shared object file: Too many open files"), 5, f"{SOME}: Too many open files"),
        (OSError(errno.EIO, "Input/output error"), 5, f"{SOME}: Input/output error"),
        (raised(ValueError("no"), OSError(errno.EMFILE, "Too many", "x")), 5, "x: Too many open files"),
        (raised(ValueError("no"), OSError(errno.ENOENT, "No such file", "x")), 1, "ValueError: no"),
        (OSError(errno.EROFS, "Read-only file system", "/out"), 2, "/out: Read-only file system"),
        (FileExistsError(errno.EEXIST, "File exists", "/out"), 2, "/out: File exists"),
        (OSError(errno.ESTALE, "Stale file handle", "/out"), 5, "/out: Stale file handle"),
        (BrokenPipeError(errno.EPIPE, "Broken pipe"), 141, ""),
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


def test_space_is_asked_for_only_where_it_is_missing() -> None:
    hints = {number: describe(OSError(number, "", "x")).hint for number in (*RESOURCE_ERRNOS, *PATH_ERRNOS)}
    assert {number for number, hint in hints.items() if hint and "space" in hint} == {errno.ENOSPC, errno.EDQUOT}
    assert hints[errno.EMFILE] == "allow this process more open files: `ulimit -n`"


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.mark.parametrize(
    ("terminal", "environment", "coloured"),
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, True),
        (True, {"TERM": "xterm", "NO_COLOR": "1"}, False),
        (True, {"TERM": "dumb"}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_colour_is_for_terminals_that_want_it(
    monkeypatch: pytest.MonkeyPatch, terminal: bool, environment: dict[str, str], coloured: bool
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    stream = Stream(terminal=terminal)
    monkeypatch.setattr(sys, "stderr", stream)
    show_error("it is\x1b[2J wrong", hint="mend it")
    with Session():
        warn("take care")
    plain = ["error: it is\\x1b[2J wrong", "hint: mend it", "warning: take care"]
    colours = ("\x1b[1;31m", "\x1b[36m", "\x1b[33m")
    expected = [
        f"{c}{w}:\x1b[0m{rest}" for c, (w, _, rest) in zip(colours, (t.partition(":") for t in plain), strict=True)
    ]
    assert stream.getvalue().splitlines() == (expected if coloured else plain)
