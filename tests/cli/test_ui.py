"""The one place that prints: exit codes, escaping, what goes to which stream."""

from __future__ import annotations

import errno
import io
import json
import os
import signal

import pytest

from qcli.cli.ui.session import Session, Tables, Terminated, clean, describe, duration, size
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
    told, _, exit_code = describe(error, resumable=True)
    assert (told, exit_code) == (message, code)


def test_bugs_hint_at_the_traceback_and_vv_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (0, 2):
        with pytest.raises(SystemExit) as caught, Session(verbose=verbose):
            raise ZeroDivisionError("oops")
        assert caught.value.code == 1
        err = capsys.readouterr().err
        assert err.endswith("error: ZeroDivisionError: oops\nhint: this is a bug; run with -vv for the traceback\n")
        assert ("Traceback" in err) == (verbose == 2)


def test_several_problems_are_several_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), Session():
        raise UsageError("one\ntwo \x1b[31m", hint="do this")
    captured = capsys.readouterr()
    assert captured.err == "error: one\nerror: two \\x1b[31m\nhint: do this\n"
    assert captured.out == ""


def test_stdout_holds_nothing_but_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with Session(json=True) as session:
        print("a library talks")
        session.note("a note")
        session.progress("stage", 0, 1)
        session.result({"value": float("nan"), "rows": [(1, float("inf"))]})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"value": None, "rows": [[1, None]]}
    assert captured.err.splitlines() == ["a library talks", "a note", "stage 0/1"]


def test_quiet_keeps_only_result_and_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), Session(quiet=True) as session:
        session.note("a note")
        session.progress("stage", 0, 1)
        session.result({"a": 1}, lambda tables, data: tables.pairs(data))
        raise UsageError("wrong")
    captured = capsys.readouterr()
    assert captured.out == "a  1\n"
    assert captured.err == "error: wrong\n"


def test_progress_lines_are_sparse_unless_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    lines = []
    for verbose in (0, 1):
        with Session(verbose=verbose) as session:
            for done in range(5):
                session.progress("quantize", done, 4, "detail" if done else "")
        lines.append(capsys.readouterr().err.splitlines())
    assert [line.split(",")[0] for line in lines[0]] == ["quantize 0/4", "quantize 4/4"]
    assert [line.split(",")[0] for line in lines[1]] == [f"quantize {done}/4" for done in range(5)]
    assert "left; detail" in lines[1][2]


def test_time_left_counts_from_where_a_run_was_taken_up(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 10.0])
    monkeypatch.setattr("qcli.cli.ui.session.time.monotonic", lambda: next(clock))
    with Session(verbose=1) as session:
        for done in (900, 905, 1000):
            session.progress("train", done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "train 900/1000",
        "train 905/1000, 1 min 35 s left",
        "train 1000/1000, 10.0 s",
    ]


def test_termination_is_an_exit_code_and_the_handler_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, Session(resumable=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "interrupted; resume with the same command\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_names_are_shown_as_they_are() -> None:
    from rich.console import Console

    assert clean("a\x1b]0;x\x07\u202eb\ud800[red]") == "a\\x1b]0;x\\x07\\u202eb\\ud800[red]"
    stream = io.StringIO()
    tables = Tables(Console(file=stream, width=100, markup=False))
    tables.table(("name", "number"), [("[bold]x[/bold]\x1b[2J", 1), ("y", None)])
    tables.pairs({"[red]": ":smile: \r", "left out": None})
    text = stream.getvalue()
    assert "[bold]x[/bold]\\x1b[2J" in text
    assert "[red]  :smile: \\r" in text
    assert "\x1b" not in text


def test_sizes_and_durations() -> None:
    assert [size(n) for n in (999, 1000, 1_240_000, 70 * 10**9)] == [
        "999 B",
        "1.00 kB",
        "1.24 MB",
        "70.00 GB",
    ]
    assert [duration(s) for s in (8.34, 245, 4800)] == ["8.3 s", "4 min 05 s", "1 h 20 min"]
