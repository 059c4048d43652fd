"""Exit codes, and what a session prints to which stream."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import warnings

import pytest

from qcli.cli.ui.session import Session
from qcli.utils.errors import UsageError, warn


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
        raise UsageError("one", "two \x1b[31m\nerror: three", hint="do\nthis")
    captured = capsys.readouterr()
    assert captured.err == "error: one\nerror: two \\x1b[31m\\nerror: three\nhint: do\\nthis\n"
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
        print("a library talks")
        session.note("a note")
        session.progress("stage", 0, 1)
        session.result({"a": 1}, lambda tables, data: tables.pairs(data))
        raise UsageError("wrong")
    captured = capsys.readouterr()
    assert captured.out == "a  1\n"
    assert captured.err == "error: wrong\n"


def test_termination_is_an_exit_code_and_the_handler_is_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, Session(resumable=True):
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.code == 143
    assert capsys.readouterr().err == "interrupted; resume with the same command\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_quiet_silences_bars_and_logs_of_libraries() -> None:
    code = (
        "import logging, sys; from qcli.cli.ui.session import Session\n"
        "with Session(quiet=True):\n"
        "    import tqdm; list(tqdm.tqdm(range(3))); logging.getLogger('lm_eval').warning('chatter')\n"
        "logging.getLogger('lm_eval').warning('afterwards')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "afterwards\n"


def test_warnings_are_notes_each_time(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, False, True):
        with Session(quiet=quiet):
            for _ in range(2):
                warn("left behind \x1b")
            warnings.warn("a library's", stacklevel=1)
    assert capsys.readouterr().err.splitlines() == ["warning: left behind \\x1b"] * 4


def test_nobody_has_to_read_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(text: str) -> int:
        raise BrokenPipeError

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys.stderr, "write", gone)
        with Session(json=True) as session:
            session.note("a note")
            session.progress("stage", 0, 1)
            session.result({"a": 1})
            raise UsageError("wrong")
    assert caught.value.code == 2
    assert json.loads(capsys.readouterr().out) == {"a": 1}


def test_streamed_text_ends_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    for pieces, printed in ((["a", "b"], "ab\n"), (["a\n"], "a\n"), ([], "\n")):
        with Session() as session, session.stream() as write:
            for piece in pieces:
                write(piece)
        assert capsys.readouterr().out == printed
    for pieces, printed in (([], ""), (["a"], "a\n")):
        with pytest.raises(SystemExit), Session() as session, session.stream() as write:
            for piece in pieces:
                write(piece)
            raise KeyboardInterrupt
        assert capsys.readouterr().out == printed


def test_a_terminal_gets_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a\x1b[31m\tb\n\u200d\x9b"
    for terminal, printed in ((True, "a\\x1b[31m\tb\n\u200d\\x9b\n"), (False, text + "\n")):
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        with Session() as session, session.stream() as write:
            write(text)
        assert capsys.readouterr().out == printed


def test_streamed_characters_that_stdout_cannot_write_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="latin-1"))
    with Session() as session, session.stream() as write:
        write("\xe9 \U0001f600")
    assert content.getvalue() == b"\xe9 \\U0001f600\n"
